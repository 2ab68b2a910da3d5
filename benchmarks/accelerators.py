"""Networks over all accelerator targets: what runs there, how close the emulated numbers are to float, estimates.

    python benchmarks/accelerators.py WORK_DIR [--case NAME ...] [--target NAME ...] [--pictures FOLDER --samples N]

`--case efficientnet-lite0` needs `--pictures`: a folder with even/ and odd/ as benchmarks/imagenet_halves.py makes it.
Prints one Markdown table per network.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from accelerator_models import CASES

import edgeopt
from edgeopt.errors import EdgeoptError
from edgeopt.report.units import quantity
from edgeopt.targets import list_targets
from edgeopt.types import Bundle

LITE0 = "efficientnet-lite0"
HEADING = (
    "| target | status | on the accelerator | told by | agreement | SQNR | latency (estimated) | SRAM | size |",
    "|---|---|---|---|---|---|---|---|---|",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--case", nargs="*", default=list(CASES))
    parser.add_argument("--target", nargs="*", default=[t.name for t in list_targets() if t.accelerator is not None])
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    args = parser.parse_args()
    for name in args.case:
        print(f"\n**{name}**\n", *HEADING, sep="\n", flush=True)
        for target in args.target:
            start = time.monotonic()
            row = one(name, target, args.work, args.pictures, args.samples)
            print(row, flush=True)
            print(f"{target}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def one(name: str, target: str, work: Path, pictures: Path | None, samples: int) -> str:
    try:
        if name == LITE0:
            assert pictures is not None
            bundle = edgeopt.export(
                "edgeopt.examples.efficientnet_lite0:model",
                target=target,
                calibration=str(pictures / "even"),
                evaluation=str(pictures / "odd"),
                num_evaluation_samples=samples,
                output_dir=work,
            )
        else:
            spec, data = CASES[name]()
            bundle = edgeopt.export(
                spec,
                target=target,
                calibration=data[:64],
                evaluation=data[64:],
                output_dir=work,
                max_accuracy_drop="off",
            )
    except EdgeoptError as error:
        return f"| {target} | refused: {error.line()} | | | | | | | |"
    return row_of(bundle)


def row_of(bundle: Bundle) -> str:
    report = bundle.report
    figures = {m.name.partition("[")[0]: m for m in report.measurements if m.subject == "quantized"}
    placement = report.placement
    missed = ", ".join(check.name for check in report.checks if not check.passed)
    mapped, told = "", ""
    if placement is not None:
        total, left = len(placement.ops), len(placement.on_cpu)
        mapped = f"{total - left} of {total}"
        told = f"{placement.told_by}{' (predicted)' if placement.predicted else ''}"

    def shown(key: str) -> str:
        return quantity(figures[key].value, figures[key].unit) if key in figures else "-"

    return (
        f"| {bundle.target} | {report.status}{f' ({missed})' if missed else ''} | {mapped} | {told} "
        f"| {shown('agreement')} | {shown('sqnr_db')} | {shown('latency_ms')} | {shown('sram_bytes')} "
        f"| {shown('size_bytes')} |"
    )


if __name__ == "__main__":
    main()
