"""EfficientNet-Lite0 int8: edgeopt against each vendor's own default route, same pictures, paired timing.

    python benchmarks/efficientnet_lite0.py [WORK_DIR]

Calibrated on 128 pictures of even classes, scored on all odd ones; needs ../shared/data. Prints a Markdown table.
Vendor files that an earlier run left in WORK_DIR are taken as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from imagenet_halves import split
from vendor_routes import build

from edgeopt.bundle import open_bundle
from edgeopt.comparison import in_terms_of
from edgeopt.config import config_of
from edgeopt.formats import summarize
from edgeopt.pipeline import export
from edgeopt.plan import load, open_data, plan_jobs, with_example
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.runtimes.pytorch import open_source
from edgeopt.types import Array, Bundle, Sample
from edgeopt.validation.benchmark import TimedFile, benchmark_pair
from edgeopt.validation.evaluate import Evaluation, evaluate
from edgeopt.validation.golden import Replay
from edgeopt.validation.metrics import load_metric

#: Our target -> the vendor routes to hold it against, with the suffix of what they write.
RIVALS = {
    "android-int8": (("litert", ".tflite"), ("litert channel-last", ".tflite")),
    "android-onnx-int8": (("onnx", ".onnx"), ("onnx per-channel U8S8", ".onnx")),
    "android-executorch-int8": (("executorch", ".pte"),),
}
HEADER = """\
| route | top-1 (fp32 {fp32:.2f} %) | agrees with fp32 | logit SQNR | ms, 1 thread | time against ours |
|---|---|---|---|---|---|"""


def main(work: Path) -> None:
    even, odd = split(work / "pictures")
    config = with_example(
        config_of(
            {
                "example": "efficientnet-lite0",
                "calibration": str(even),
                "evaluation": str(odd),
                "target": list(RIVALS),
                "output_dir": work / "dist",
            }
        )
    )
    bundles = {bundle.target: bundle for bundle in export(config)}
    model = load(config)
    data = open_data(config, model, plan_jobs(config))
    assert data.calibration is not None
    calibration = [dict(sample.inputs) for sample in data.calibration]
    example = torch.zeros(1, 3, 224, 224)
    samples = list(data.evaluation)
    with open_source(model, 2) as source:
        expected = [source.run(sample.inputs) for sample in samples]
    rows: list[str] = []
    for target, rivals in RIVALS.items():
        for route, suffix in rivals:
            path = work / (route.replace(" ", "_") + suffix)
            assert model.module is not None
            if not path.exists():
                build(route, model.module, example, calibration, path)
            rows += _rows(bundles[target], route, path, samples, expected)
    figures = {(m.name, m.subject): m.value for m in bundles["android-int8"].report.measurements}
    print(HEADER.format(fp32=100 * figures["top1", "float"]))
    print("\n".join(dict.fromkeys(rows)))


def _rows(
    bundle: Bundle, route: str, rival: Path, samples: list[Sample], expected: list[dict[str, Array]]
) -> list[str]:
    """One row for our file and one for the rival's, timed in turns in one process."""
    ours = bundle.path / f"model{rival.suffix}"
    summary = summarize(rival)
    runtime = HOST_RUNTIMES[summary.format]
    own_signature = open_bundle(bundle.path).signature
    signature = in_terms_of(own_signature, summary.signature, str(rival))
    inputs = samples[0].inputs
    measured = benchmark_pair(
        TimedFile("ours", ours, own_signature, runtime, inputs),
        TimedFile("rival", rival, signature, runtime, inputs),
        threads=1,
    )
    figures = {(m.name, m.subject): m for m in measured}
    rows = []
    for subject, name, path, terms in (
        ("ours", f"**edgeopt {bundle.target}**", ours, own_signature),
        ("rival", f"vendor: {route}", rival, signature),
    ):
        with load_runtime(runtime).open(path, terms, 2) as session:
            quality = evaluate(Replay(terms, expected), session, samples, load_metric("top1"))
        latency = figures["latency_ms", subject]
        assert latency.spread is not None
        ratio = figures["speedup", "ours"].value if subject == "rival" else 1.0
        rows.append(
            _row(name, quality, f"{latency.value:.2f} [{latency.spread[0]:.2f}-{latency.spread[1]:.2f}]", ratio)
        )
    return rows


def _row(name: str, quality: Evaluation, latency: str, ratio: float) -> str:
    assert quality.candidate_metric is not None
    assert quality.agreement is not None
    return (
        f"| {name} | {100 * quality.candidate_metric:.2f} % | {100 * quality.agreement:.1f} % "
        f"| {quality.sqnr_db:.1f} dB | {latency} | {ratio:.2f}x |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/edgeopt-benchmark"))
