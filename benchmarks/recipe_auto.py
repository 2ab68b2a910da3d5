"""EfficientNet-Lite0 int8: plain, `--recipe auto`, and each vendor's default, on the same pictures, timed in turns.

    python benchmarks/recipe_auto.py [WORK_DIR [TARGET ...]]

Calibrated and tuned on even classes, scored on all odd ones; needs ../shared/data. Prints a Markdown table and what the
recipe tried.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from imagenet_halves import split
from vendor_routes import build

from edgeopt.bundle import open_bundle
from edgeopt.comparison import in_terms_of
from edgeopt.config import RunConfig, config_of
from edgeopt.formats import summarize
from edgeopt.pipeline import export
from edgeopt.plan import load, open_data, plan_jobs, with_example
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.runtimes.pytorch import open_source
from edgeopt.types import Array, Bundle, Sample, Signature
from edgeopt.validation.benchmark import TimedFile, benchmark_pair
from edgeopt.validation.evaluate import evaluate
from edgeopt.validation.golden import Replay
from edgeopt.validation.metrics import load_metric

VENDOR = {
    "android-int8": ("litert", ".tflite"),
    "android-onnx-int8": ("onnx", ".onnx"),
    "android-executorch-int8": ("executorch", ".pte"),
}
HEADER = """\
| file | top-1 (fp32 {fp32:.2f} %) | agrees with fp32 | logit SQNR | time against plain int8 | MiB |
|---|---|---|---|---|---|"""


def main(work: Path, targets: list[str]) -> None:
    even, odd = split(work / "pictures")
    given = {"example": "efficientnet-lite0", "calibration": str(even), "evaluation": str(odd)}

    def config(target: str, recipe: str) -> RunConfig:
        more = {"target": [target], "recipe": [recipe], "output_dir": work / recipe, "max_accuracy_drop": "off"}
        return with_example(config_of({**given, **more}))

    first = config(targets[0], "none")
    model = load(first)
    data = open_data(first, model, plan_jobs(first))
    assert data.calibration is not None
    assert model.module is not None
    calibration = [dict(sample.inputs) for sample in data.calibration]
    samples = list(data.evaluation)
    with open_source(model, 1) as source:
        expected = [source.run(sample.inputs) for sample in samples]
    rows: list[str] = []
    for target in targets:
        (plain,) = export(config(target, "none"))
        start = time.monotonic()
        (auto,) = export(config(target, "auto"))
        seconds = time.monotonic() - start
        print(f"\n{target}: auto took {seconds:.0f} s")
        print("\n".join(f"- {f.where}: {f.message}" for f in auto.report.findings), flush=True)
        route, suffix = VENDOR[target]
        vendor = work / (route + suffix)
        if not vendor.exists():
            build(route, model.module, torch.zeros(1, 3, 224, 224), calibration, vendor)
        for name, path in (("plain", _file(plain)), ("**--recipe auto**", _file(auto)), (f"vendor: {route}", vendor)):
            rows.append(_row(f"{target}, {name}", path, plain, samples, expected))
        print(rows[-3], rows[-2], rows[-1], sep="\n", flush=True)
        figures = {(m.name, m.subject): m.value for m in plain.report.measurements}
        print(HEADER.format(fp32=100 * figures["top1", "float"]), *rows, sep="\n", flush=True)


def _file(bundle: Bundle) -> Path:
    return open_bundle(bundle.path).model_path


def _row(name: str, path: Path, plain: Bundle, samples: list[Sample], expected: list[dict[str, Array]]) -> str:
    base = open_bundle(plain.path)
    summary = summarize(path)
    runtime = HOST_RUNTIMES[summary.format]
    terms: Signature = in_terms_of(base.signature, summary.signature, str(path))
    with load_runtime(runtime).open(path, terms, 1) as session:
        quality = evaluate(Replay(terms, expected), session, samples, load_metric("top1"))
    inputs = samples[0].inputs
    measured = benchmark_pair(
        TimedFile("this", path, terms, runtime, inputs),
        TimedFile("plain", base.model_path, base.signature, runtime, inputs),
        threads=1,
    )
    speed = next(m for m in measured if m.name == "speedup")
    assert quality.candidate_metric is not None
    assert quality.agreement is not None
    return (
        f"| {name} | {100 * quality.candidate_metric:.2f} % | {100 * quality.agreement:.1f} % | {quality.sqnr_db:.1f} "
        f"dB | {1 / speed.value:.2f}x | {path.stat().st_size / 2**20:.2f} |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/edgeopt-benchmark"), sys.argv[2:] or list(VENDOR))
