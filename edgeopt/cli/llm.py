"""`edgeopt llm`: a language model for the runtimes' own generators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from edgeopt.cli.console import JsonFlag, facts, print_json, size, stdout, table, work
from edgeopt.cli.flags import ConfigFlag, Given, keys, with_flags
from edgeopt.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from edgeopt.llm_layouts import Layout

_FLAGS = (
    "model", "weights", "name", "task", "max_source_length", "max_target_length", "target", "evaluation", "seed",
    "threads", "output_dir",
)  # fmt: skip


@with_flags(keys(*_FLAGS))
def llm(context: typer.Context, given: Given, config: ConfigFlag = None, json: JsonFlag = False) -> None:
    """Write a decoder-only language model as its runtime's own generator loads it, and prove the network in it.

    Example: edgeopt llm hf:DIR --target android-onnx-w4 --evaluation texts.jsonl

    The target's format decides the generator: ONNX is for onnxruntime-genai, ExecuTorch for its text runner, LiteRT for
    LiteRT-LM. Its scheme decides the precision; one that calibrates activations is refused. 'edgeopt export' makes a
    bundle of the same model, with a loop of its own and a whole report.
    """
    from edgeopt.config import load_config

    settings = load_config(config, given)
    if settings.model is None:
        raise UsageError("no model to write", where="edgeopt llm", fix="give one: edgeopt llm hf:DIR --target TARGET")
    with work(context) as progress:
        progress.step("Starting")
        from edgeopt.llm_layouts import write_layouts

        layouts = write_layouts(settings, progress)
    if json:
        print_json({"layouts": [_document(layout) for layout in layouts]})
        return
    console = stdout()
    for layout in layouts:
        _show(layout, console)


def _document(layout: Layout) -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(layout), "path": str(layout.path), "provenance": "measured-host"}


def _show(layout: Layout, console: Console) -> None:
    from edgeopt.report.units import quantity

    console.print(f"{layout.target} for {layout.generator}", style="bold", soft_wrap=True)
    rows = table("File", "Size", "In float32", right=("Size", "In float32"), fold=("File",))
    for file in layout.files:
        rows.add_row(file.name, size(file.size_bytes), size(file.float_bytes))
    console.print(rows)
    proof = layout.proof
    texts = "1 text" if proof.texts == 1 else f"{proof.texts} texts"
    found = {
        "Same next token": quantity(proof.agreement, "fraction"),
        "SQNR of logits": quantity(proof.sqnr_db, "dB"),
        "Measured": f"on {proof.tokens} tokens of {texts} ({proof.origin}), in {proof.ran_in}, against PyTorch; "
        f"{layout.generator} itself was not run",
        "Tokenizer": "" if layout.has_tokenizer else "none: the app must bring its own",
    }
    console.print(facts(found))
    console.print(f"Folder: {layout.path}\n", soft_wrap=True)
