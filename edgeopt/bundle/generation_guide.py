"""What an app developer reads about a network that writes: its loop in words, the bundle's README and its licences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from edgeopt.bundle.apps.base import render
from edgeopt.bundle.generation_consistency import source_mask
from edgeopt.bundle.generation_contents import WrittenExample
from edgeopt.bundle.generation_manifest import PARTS, GenerationManifest
from edgeopt.bundle.generation_scripts import most_prompt_tokens, needs, reads_text
from edgeopt.bundle.guide import RUNTIME_TITLE
from edgeopt.bundle.manifest import Manifest
from edgeopt.types import Measurement, PartName, Report, TextPreprocessing

#: Examples in the README; examples.jsonl has all.
_MOST_EXAMPLES = 5
_WHAT: dict[PartName, str] = {
    "encoder": "reads the source, once",
    "prefill": "reads the prompt, once",
    "decoder": "reads one token and scores the next, once for every token",
}


def tensor_rules(manifest: GenerationManifest) -> dict[str, str]:
    """Name of a tensor, or of a family of them -> what it is. i counts layers from 0."""
    generation, rows = manifest.generation, manifest.beams
    rules = {
        "token": f"decoder input, ({rows}, 1): the token that each row reads",
        "position": "decoder input, (1): the place of that token in the sequence, which is the cache's row, from 0",
        "past_key_i, past_value_i": (
            f"decoder inputs, ({rows}, heads, {generation.max_target}, width): the cache, kept by the app; rows that "
            "were not written yet are 0"
        ),
        "present_key_i, present_value_i": (
            f"decoder outputs, ({rows}, heads, 1, width): the new row of past_key_i and past_value_i"
        ),
        "logits": f"decoder output, ({rows}, {generation.vocabulary}): scores of the token that follows",
    }
    if generation.kind == "encoder-decoder":
        rules["memory_key_i, memory_value_i"] = (
            f"encoder outputs, (1, heads, source, width), and decoder inputs, ({rows}, heads, source, width): what the "
            "decoder's attention reads of the source"
        )
        rules["source_mask"] = "decoder input where the encoder takes a mask: the same mask, 1 on tokens, 0 on padding"
    else:
        rules["input_ids, length"] = (
            f"prefill inputs, (1, {generation.max_source}) and (1): the prompt, filled up at its end, and its length"
        )
        rules["present_key_i, present_value_i"] += (
            f"; prefill outputs, (1, heads, {generation.max_source}, width): the prompt's rows"
        )
    return rules


def loop_steps(manifest: GenerationManifest, parts: Mapping[PartName, Manifest]) -> tuple[str, ...]:
    """How to write a sequence greedily with the parts, a step each, in words."""
    kind = manifest.generation.kind
    return (
        *_reading(manifest, parts),
        *(_with_encoder(manifest, parts) if kind == "encoder-decoder" else _with_prefill(manifest)),
        *_writing(manifest),
    )


def _reading(manifest: GenerationManifest, parts: Mapping[PartName, Manifest]) -> Iterator[str]:
    generation, preprocessing = manifest.generation, manifest.preprocessing
    if not (reads_text(manifest, parts) and isinstance(preprocessing, TextPreprocessing)):
        return
    prefix = f"Put {preprocessing.prefix!r} before the text. " if preprocessing.prefix else ""
    yield (
        f"{prefix}Turn the text into token ids with tokenizer.json, special tokens included, and cut them at "
        f"{most_prompt_tokens(manifest)}. Fill up with the id {generation.pad_id} to {generation.max_source}."
    )


def _with_encoder(manifest: GenerationManifest, parts: Mapping[PartName, Manifest]) -> Iterator[str]:
    generation, rows = manifest.generation, manifest.beams
    mask = source_mask(parts["encoder"])
    masked = (
        f" {mask} is 1 on tokens and 0 behind them; the decoder gets it as source_mask." if mask is not None else ""
    )
    repeated = f", repeated {rows} times along the first axis" if rows > 1 else ""
    yield (
        f"Run the encoder once.{masked} Its outputs memory_key_i and memory_value_i are the decoder's inputs of the "
        f"same names{repeated}, for the whole sequence."
    )
    yield "Make every past_key_i and past_value_i an array of zeros of its input's shape."
    yield (
        f"For position = 0, 1, 2, ...: run the decoder with that position and the token there. The first tokens are "
        f"{list(generation.start_ids)}, each later one is the one chosen last."
        + (f" All {rows} rows read the same token." if rows > 1 else "")
    )
    yield _ROW
    if len(generation.start_ids) > 1:
        yield f"Before position {len(generation.start_ids) - 1}, pass over the logits: those tokens are given."


def _with_prefill(manifest: GenerationManifest) -> Iterator[str]:
    rows = manifest.beams
    repeated = " for each row of the batch" if rows > 1 else ""
    yield "Run the prefill once with the ids and their number n as length. Its logits score the first new token."
    yield (
        "Make every past_key_i and past_value_i an array of zeros of the decoder's input's shape, and copy the rows 0 "
        f"to n - 1 of the prefill's present_key_i and present_value_i there{repeated}."
    )
    yield "For position = n, n + 1, ...: run the decoder with that position and the token that was chosen last."
    yield _ROW


_ROW = (
    "After each run, copy present_key_i into row `position` of past_key_i, past_key_i[:, :, position, :] = "
    "present_key_i[:, :, 0, :], and the same with the values."
)


def _writing(manifest: GenerationManifest) -> Iterator[str]:
    generation = manifest.generation
    never = f", never one of {list(generation.suppressed_ids)}" if generation.suppressed_ids else ""
    first = (
        f", at the first place none of {list(generation.begin_suppressed_ids)} either"
        if generation.begin_suppressed_ids
        else ""
    )
    yield f"The next token is the one with the highest score in the first row of logits{never}{first}."
    ends = f"after a token of {list(generation.end_ids)}, or " if generation.end_ids else ""
    yield f"Stop {ends}when position has been {generation.max_target - 1}, the cache's last row."
    if manifest.tokenizer is not None:
        yield "Turn the ids into text with tokenizer.json, special tokens left out."
    if manifest.beams > 1:
        yield (
            f"For beam search with up to {manifest.beams} hypotheses, each row reads its own token; when a row goes on "
            "with another's hypothesis, give it that row's cache, past = past[parents]. generate.py does it."
        )


def render_guide(
    manifest: GenerationManifest,
    parts: Mapping[PartName, Manifest],
    report: Report,
    examples: tuple[WrittenExample, ...],
    *,
    sizes: Mapping[PartName, int],
    has_scripts: bool,
) -> str:
    """README.md as Markdown.

    Of the report it has the metric's scores only: those repeat, while latencies don't, and the file's hash is in
    generation.json. `sizes`: bytes of each part's model. `has_scripts`: there is a generate.py.
    """
    first = PARTS[manifest.generation.kind][0]
    return render(
        "generation",
        "README.md.j2",
        m=manifest,
        runtime=RUNTIME_TITLE[manifest.format],
        parts=[
            (part, parts[part].model, parts[part].precision, _WHAT[part]) for part in PARTS[manifest.generation.kind]
        ],
        first=first,
        sizes=sizes,
        scores=_scores(manifest, report),
        has_arrays=not reads_text(manifest, parts),
        text=reads_text(manifest, parts),
        has_scripts=has_scripts,
        needs=needs(manifest).replace(",", ""),
        examples=[_cells(example) for example in examples[:_MOST_EXAMPLES]],
    )


def _scores(manifest: GenerationManifest, report: Report) -> str | None:
    """What the metric says of the shipped files and, where it was asked, of the float network."""
    found = {m.subject: m for m in report.measurements if m.name == manifest.metric}
    if "quantized" not in found:
        return _figure(found["float"]) if "float" in found else None
    beside = f" (float network: {_figure(found['float'])})" if "float" in found else ""
    return f"{_figure(found['quantized'])}{beside}"


def _figure(measured: Measurement) -> str:
    return f"{100 * measured.value:.2f} %" if measured.unit == "fraction" else f"{measured.value:.4g}"


def _cells(example: WrittenExample) -> tuple[str, str, str, str]:
    return (_cell(example.source), _cell(example.reference or "-"), _cell(example.float_text), _cell(example.text))


def _cell(text: str) -> str:
    """One cell of a Markdown table: a text may hold anything, a line break or a tag too."""
    flat = " ".join(text.split()).replace("\\", "\\\\")
    for mark in "|<>`*_[]":
        flat = flat.replace(mark, f"\\{mark}")
    return flat or "-"
