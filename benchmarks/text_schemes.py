"""A small causal transformer trained on real captions: dynamic, static, SmoothQuant and 4-bit schemes, all formats.

    python benchmarks/text_schemes.py WORK_DIR

WORK_DIR as for caption_lm.py, which trains the network. Prints a Markdown table; accuracy is that of the next token.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from caption_lm import LENGTH, PADDING, load, token_ids, tokenizer_of
from measure import Figures, measure, model_file
from vendor_routes import build

from edgeopt.config import config_of
from edgeopt.errors import EdgeoptError
from edgeopt.pipeline import export
from edgeopt.sources import ModelSpec
from edgeopt.types import Array, Bundle, Sample, TensorSpec

CALIBRATION, TESTS = 128, 500
METRIC = f"{Path(__file__).resolve()}:next_token"
#: target, recipe; the first of each format is the one that vendors' files are held against.
FILES = (
    ("android-int8-dynamic", "none"), ("android-int8", "none"), ("android-int8", "smooth"), ("android-w8", "none"),
    ("android-8da4w", "none"), ("android-8da4w", "round-adaptively"),
    ("android-onnx-int8-dynamic", "none"), ("android-onnx-int8", "none"), ("android-onnx-int8", "smooth"),
    ("android-onnx-w4", "none"), ("android-onnx-8da4w", "none"), ("android-onnx-8da4w", "round-adaptively"),
    ("android-executorch-int8-dynamic", "none"), ("android-executorch-int8", "none"),
    ("android-executorch-int8", "smooth"), ("android-executorch-8da4w", "none"),
    ("android-executorch-8da4w", "round-adaptively"),
)  # fmt: skip
VENDOR = {
    "android-int8-dynamic": ("litert dynamic", ".tflite"),
    "android-onnx-int8-dynamic": ("onnx dynamic", ".onnx"),
    "android-executorch-int8-dynamic": ("executorch dynamic", ".pte"),
}
HEADER = """\
| file | next token (fp32 {fp32:.2f} %) | agrees with fp32 | SQNR | time, float / this | MiB (fp32 {mib:.2f}) |
|---|---|---|---|---|---|"""


def next_token(outputs: dict[str, Array], label: Array) -> float:
    """Share of the words of one caption that are predicted."""
    counts = label != PADDING
    return float((outputs["logits"][0].argmax(-1) == label)[counts].mean())


class Captions:
    """Token ids by index, with the tokens that follow them."""

    def __init__(self, tokens: Array) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[dict[str, Array], Array]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._tokens[index]
        return {"tokens": row[np.newaxis, :-1]}, row[1:]


def main(work: Path) -> None:
    tokenizer = tokenizer_of(work)
    calibration = Captions(token_ids("train", tokenizer)[:CALIBRATION].numpy())
    tests = Captions(token_ids("test_2016_flickr", tokenizer)[:TESTS].numpy())
    samples = [Sample(*tests[i], str(i)) for i in range(len(tests))]
    network = load(work)
    spec = ModelSpec(
        module=network, inputs=(TensorSpec("tokens", (1, LENGTH), "int64"),), outputs=("logits",), name="caption-lm"
    )
    is_first = True
    for target, recipe in FILES:
        given = {"target": [target], "recipe": [recipe], "metric": METRIC, "output_dir": work / recipe}
        config = replace(config_of(given), model=spec, calibration=calibration, evaluation=tests)
        try:
            (bundle,) = export(config)
        except EdgeoptError as error:
            print(f"| {target}{_with(recipe)} | {error.line()} |", flush=True)
            continue
        ours = measure(model_file(bundle), bundle, samples, METRIC)
        if is_first:
            print(HEADER.format(fp32=100 * ours.float_metric, mib=_float_mib(bundle)))
            is_first = False
        if target in VENDOR:
            route, suffix = VENDOR[target]
            path = work / (route.replace(" ", "_") + suffix)
            feeds = [dict(calibration[i][0]) for i in range(CALIBRATION)]
            build(route, network, token_ids("train", tokenizer)[:1, :-1], feeds, path)
            print(_row(f"vendor: {route}", measure(path, bundle, samples, METRIC)), flush=True)
        print(_row(f"{target}{_with(recipe)}", ours), flush=True)


def _with(recipe: str) -> str:
    return "" if recipe == "none" else f", {recipe}"


def _float_mib(bundle: Bundle) -> float:
    return next(m.value for m in bundle.report.measurements if (m.name, m.subject) == ("size_bytes", "float")) / 2**20


def _row(name: str, figures: Figures) -> str:
    return (
        f"| {name} | {100 * figures.metric:.2f} % | {100 * figures.agreement:.2f} % | {figures.sqnr_db:.1f} dB "
        f"| {figures.speedup:.2f}x | {figures.mib:.2f} |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
