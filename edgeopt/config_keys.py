"""The keys of edgeopt.toml, each declared once; those of its `[[step]]` tables are in `step_keys`.

The loader in `config`, the flags of the commands and the file that `edgeopt init` writes all come from `KEYS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.config_values import (
    Parser,
    a_fraction,
    a_name_or_path,
    a_number,
    a_path,
    a_percentile,
    a_positive,
    a_recipe,
    a_slug,
    a_source,
    a_switch,
    a_table,
    a_text,
    a_weights_file,
    an_integer,
    names_or_paths,
    one_of,
    some_texts,
)

ESTIMATORS = ("min-max", "percentile", "entropy", "mse")
#: More threads than any machine that edgeopt runs on has cores; starting them takes minutes.
MOST_THREADS = 64
#: Longer caches than this don't fit into a phone.
MOST_TOKENS = 131_072
MOST_BEAMS = 32
IO_TYPES = ("float", "int8")
#: key -> field of `Gates` that it sets.
GATE_OF_KEY = {
    "max_accuracy_drop": "max_accuracy_drop",
    "min_accuracy_kept": "min_accuracy_kept",
    "min_agreement": "min_agreement",
    "min_sqnr_db": "min_sqnr_db",
    "min_speedup": "min_speedup",
    "max_latency_ms": "max_latency_ms",
    "max_size_mb": "max_size_bytes",
    "max_peak_memory_mb": "max_peak_memory_bytes",
    "max_cpu_operators": "max_cpu_operators",
    "min_accelerated": "min_accelerated",
    "max_instructions": "max_instructions",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of edgeopt.toml, which is one flag too.

    Attributes:
        name: field of `RunConfig`; in the file and on the command line with '-' for '_'.
        group: heading in the help and in the file.
        help: what it does, with its default, in one or two sentences.
        sample: a value as TOML.
        metavar: what the help calls the value; empty for a switch.
    """

    name: str
    group: str
    parse: Parser
    metavar: str
    sample: str
    help: str

    @property
    def spelling(self) -> str:
        return self.name.replace("_", "-")

    @property
    def is_gate(self) -> bool:
        return self.name in GATE_OF_KEY


MODEL, DATA, TARGET, QUANTIZATION, GATES, OUTPUT = "Model", "Data", "Target", "Quantization", "Gates", "Run and output"
GROUP_NOTES = {
    GATES: 'Limits on the exported file. Fractions may be percentages ("0.5%"); "off" drops the target\'s own limit. '
    "A missed gate makes the exit code 1; the bundle is written all the same."
}

KEYS: tuple[Key, ...] = (
    Key("model", MODEL, a_source, "MODEL", '"net.py:build"',
        "file.py:factory, package.module:factory, a .pt2 or .onnx file, or hf:DIR-or-id."),
    Key("example", MODEL, a_text, "NAME", '"digits"',
        "A built-in example instead of a model: digits or efficientnet-lite0."),
    Key("weights", MODEL, a_path, "FILE", '"net.safetensors"',
        "Weights for the factory's model: .safetensors, or .pt/.pth holding tensors only."),
    Key("name", MODEL, a_slug, "NAME", '"my-net"',
        "Names the bundle. Default: from the model."),
    Key("task", MODEL, a_text, "TASK", '"text-classification"',
        "Task of a Hugging Face model. Default: from its config."),
    Key("input", MODEL, some_texts, "NAME=DTYPE[DIMS]", '["image=float32[1,3,224,224]"]',
        "One per input, where the factory gives no example inputs: image=float32[1,3,224,224]. Repeatable."),
    Key("max_source_length", MODEL, an_integer(2, MOST_TOKENS), "N", "64",
        "Of a network that writes: tokens that it reads at most. Default: what it was made for, up to 128."),
    Key("max_target_length", MODEL, an_integer(2, MOST_TOKENS), "N", "64",
        "Tokens that it writes at most, a decoder-only network's prompt included. Default: likewise."),
    Key("num_beams", MODEL, an_integer(1, MOST_BEAMS), "N", "4",
        "Sequences that are followed side by side when writing; 1 is greedy. Default: 1."),
    Key("labels", MODEL, a_path, "FILE", '"labels.txt"',
        "Class names, one a line; they travel in the bundle."),
    Key("licence", MODEL, a_text, "SPDX", '"Apache-2.0"',
        "Licence of the model as an SPDX expression, for the bundle's lists. Default: undeclared."),
    Key("target", TARGET, names_or_paths, "NAME", '["android-int8", "android-onnx-int8"]',
        "What to build: a name from 'edgeopt targets' or a .toml file. Repeatable. Default: android-int8."),
    Key("device", TARGET, a_name_or_path, "NAME", '"raspberry-pi-5"',
        "Where it will run: a name from 'edgeopt devices' or a .toml file. Default: the target's."),
    Key("calibration", DATA, a_source, "DATA", '"pictures/train"',
        "Real inputs to quantize with: an image, WAV or array folder, .npz, .npy, .jsonl, train.{en,de}.gz, or "
        "file.py:factory."),
    Key("num_calibration_samples", DATA, an_integer(1), "N", "128",
        "How many of them are used. Default: 128."),
    Key("evaluation", DATA, a_source, "DATA", '"pictures/val"',
        "Inputs to prove the result on; labelled ones give accuracy. Default: what calibration left over."),
    Key("num_evaluation_samples", DATA, an_integer(1), "N", "1000",
        "How many of them are used. Default: all; 200 of what calibration left over."),
    Key("train", DATA, a_source, "DATA", '"pictures/train"',
        "Real inputs to train on, where a step trains; labels are used if there are any."),
    Key("validation", DATA, a_source, "DATA", '"pictures/val"',
        "Inputs that judge what training makes; the best epoch is kept. Default: the last one is."),
    Key("verify_on", DATA, some_texts, "phone:NAME", '["phone:cortex-a76"]',
        "Run the file on an emulated Arm core too, and count instructions: a core, or a device from 'edgeopt devices'. "
        "Needs 'edgeopt emulator setup'. Repeatable."),
    Key("num_verification_samples", DATA, an_integer(1), "N", "32",
        "How many of the evaluation inputs run there; an emulated inference takes seconds. Default: 32."),
    Key("metric", DATA, a_name_or_path, "NAME", '"top1"',
        "top1, top5 or file.py:function; of texts bleu, chrf, rouge1, rouge2, rougeL, wer, exact-match or perplexity. "
        "Default: top1 where there are labels; for texts by the task."),
    Key("seed", DATA, an_integer(0), "N", "0",
        "Chooses the samples; the same seed chooses the same ones. Default: 0."),
    Key("estimator", QUANTIZATION, one_of(ESTIMATORS), "NAME", '"percentile"',
        "How ranges come from samples: min-max, percentile, entropy or mse. Default: the target's."),
    Key("percentile", QUANTIZATION, a_percentile, "P", "99.99",
        "Share of values kept in the range; implies the percentile estimator."),
    Key("keep_float", QUANTIZATION, some_texts, "PATTERN", '["classifier", "features.0.*"]',
        "Layers that stay float: path or shell pattern, 'features.0.*'. Repeatable."),
    Key("int16_activations", QUANTIZATION, some_texts, "PATTERN", '["features.0.*"]',
        "Layers with 16-bit activations in an int8 file, where the format has them. Repeatable."),
    Key("recipe", QUANTIZATION, a_recipe, "PASS", '["auto"]',
        "Passes that toughen the model before quantization, in a list or one by one; auto tries them, keeps what helps "
        "and searches which layers stay float; none. Default: the target's."),
    Key("apply_rewrites", QUANTIZATION, a_switch, "", "false",
        "Replace operators that the target's accelerator lacks by equivalent ones, each proven on the float model; "
        "'edgeopt coverage' shows which. Default: no."),
    Key("io", QUANTIZATION, one_of(IO_TYPES), "TYPE", '"float"',
        "Type of the file's inputs and outputs: float or int8. Default: the target's."),
    Key("max_accuracy_drop", GATES, a_fraction, "X", '"0.5%"',
        "Loss of the metric against the float model. Needs labels."),
    Key("min_accuracy_kept", GATES, a_fraction, "X", '"97%"',
        "Share of the float model's metric that is kept. Needs labels."),
    Key("min_agreement", GATES, a_fraction, "X", '"97.5%"',
        "Share of samples where both models answer the same."),
    Key("min_sqnr_db", GATES, a_number, "DB", "18.5",
        "Signal to quantization noise of the outputs, in dB."),
    Key("min_speedup", GATES, a_positive, "X", "1.0",
        "Latency of the float model divided by that of the quantized one."),
    Key("max_latency_ms", GATES, a_positive, "MS", "5.0",
        "Median time of one inference on this machine; of an accelerator the estimate."),
    Key("max_size_mb", GATES, a_positive, "MB", "6.0",
        "Size of the model file; 1 MB is 1 048 576 bytes."),
    Key("max_peak_memory_mb", GATES, a_positive, "MB", "50.0",
        "Peak memory that inference adds."),
    Key("max_cpu_operators", GATES, an_integer(0), "N", "0",
        "Operators that the accelerator leaves to the CPU, where the target has one."),
    Key("min_accelerated", GATES, a_fraction, "X", '"90%"',
        "Share of the operators that run on the accelerator."),
    Key("max_instructions", GATES, an_integer(1), "N", "66_000_000",
        "Instructions of one inference on each emulated phone of --verify-on."),
    Key("threads", OUTPUT, an_integer(1, MOST_THREADS), "N", "1",
        "Threads when timing. Default: 1."),
    Key("output_dir", OUTPUT, a_path, "DIR", '"dist"',
        "Bundles go to DIR/<model>-<target>/. Default: dist."),
    Key("save_weights", OUTPUT, a_weights_file, "FILE", '"small.safetensors"',
        "Write the model that the steps made there, as .safetensors; --weights reads it again for a Python model."),
    Key("cache_dir", OUTPUT, a_path, "DIR", '".edgeopt"',
        "Finished steps are kept there and not done twice. Default: .steps in the output directory."),
    Key("float_twin", OUTPUT, a_switch, "", "true",
        "Keep the float file in the bundle, so that 'edgeopt validate' can compare. Default: yes."),
    Key("preprocessing", DATA, a_table, "FILE", "",
        "A .toml file that says how raw data becomes model input. Default: what the model brings."),
)  # fmt: skip


# --- the file that `edgeopt init` writes ------------------------------------------------------------------------------

_HEADER = """\
# edgeopt.toml: what 'edgeopt export' does in this folder. Every key is a flag of the same name, and flags win.
# Paths start from this file's folder. Remove the '#' before a key to set it; see docs/configuration.md.
"""
_PREPROCESSING = """\

# How raw data becomes model input, in calibration, in evaluation and in the app. kind is image, text, audio or array.
# [preprocessing]
# kind = "image"
# height = 224
# width = 224
# rescale = 255.0
# mean = [0.485, 0.456, 0.406]
# std = [0.229, 0.224, 0.225]
"""
_STEPS = """\

# What is done to the model before its export, in this order; see docs/recipes.md. do is prune, sparsify, factorize,
# distil or qat; the other keys are the flags of the command of that name.
# [[step]]
# do = "prune"
# prune-to = "latency=0.6x"
#
# [[step]]
# do = "qat"
# epochs = 3
"""


def template() -> str:
    """A commented edgeopt.toml with every key."""
    parts = [_HEADER]
    for group in (MODEL, TARGET, DATA, QUANTIZATION, GATES, OUTPUT):
        parts.append(f"\n# --- {group} {'-' * (74 - len(group))}\n")
        if group in GROUP_NOTES:
            parts.append(f"# {GROUP_NOTES[group]}\n")
        keys = (key for key in KEYS if key.group == group and key.sample)
        parts.extend(f"\n# {key.help}\n# {key.spelling} = {key.sample}\n" for key in keys)
    return "".join([*parts, _PREPROCESSING, _STEPS])
