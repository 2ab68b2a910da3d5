"""The Edge TPU predictor against the real compiler and published measurements: python benchmarks/edge_tpu.py

Needs ../shared/data (or EDGEOPT_DATA): coral/ with compiled files beside their sources, latency/ with published
figures. Prints Markdown tables: agreement per operator, bytes of parameters, and the latency model, fitted again
without each network that it is then judged on. `edgeopt/accelerators/edge_tpu/figures.py` holds the result. The law
itself is `edgeopt.accelerators.edge_tpu.latency.total`.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from edge_tpu_networks import (
    EFFICIENTNET,
    EFFICIENTNET_EDGETPU,
    MNASNET,
    MOBILENET_V2,
    Net,
    densenet121,
    efficientdet,
    inception_v1,
    line_seg,
    link_resnet34,
    mobile,
    mobilenet_v1,
    resnet,
    squeezenet,
    unet_mobilenet_v2,
    vgg,
)
from edge_tpu_zoo import zoo
from scipy.optimize import least_squares

from edgeopt.accelerators.edge_tpu import graph, latency, parameters, predict
from edgeopt.accelerators.edge_tpu.compiled import parameter_bytes as compiled_parameter_bytes
from edgeopt.accelerators.edge_tpu.figures import MEBI, RATES, Rates
from edgeopt.accelerators.edge_tpu.workload import work_of

DATA = Path(os.environ.get("EDGEOPT_DATA", Path(__file__).parents[1] / "../shared/data"))
CACHE_BYTES = 8 * MEBI
#: Time of the same work at the maximum clock (500 instead of 250 MHz).
CLOCK = 0.5
#: Rates that are fitted, and where the search for them begins. `download` is not: the study has measured it.
FITTED = {"upload": 9.0, "streaming": 2.0, "dense": 1.4, "depthwise": 88.0, "operator": 0.017}
LINK = ("upload", "streaming")


@dataclass(frozen=True)
class Case:
    """A network with what was measured on it: MiB on chip and streamed (None: not published), and milliseconds."""

    name: str
    net: Net
    onchip: float | None
    offchip: float | None
    ms: float

    def predicted(self) -> Case:
        """The same with our own bytes of parameters."""
        kept = parameters.place(list(enumerate(self.net.works)), self.net.activations, CACHE_BYTES)
        return replace(self, onchip=kept.onchip_bytes / MEBI, offchip=kept.offchip_bytes / MEBI)

    @property
    def family(self) -> str:
        """Networks of one origin: cuts of the same network, or the same kind of network."""
        known = next((f for f in ("base128", "w96", "link_r34", "efficientdet") if self.name.startswith(f)), None)
        return known or "classification"

    def ms_by(self, rates: Rates) -> float:
        """What the latency model says, with the bytes of parameters that are given here."""
        load = latency.Load(
            chip_ms=sum(latency.chip_ms(work, rates) for work in self.net.works),
            streaming_ms=(self.offchip or 0.0) * rates.streaming,
            host_ms=0.0,
            sent_bytes=self.net.bytes_in,
            received_bytes=self.net.bytes_out,
        )
        return latency.total(load, rates).ms


# The same study's deeper cuts (results/line_seg/*.json) and EfficientDet ladders (results/detection/*.json), which the
# transcribed table leaves out: parameters, MiB on chip, MiB streamed, ms.
DEEPER = {
    "link_r34": ((11317308, 6.57, 6.7, 19.869), (8533841, 6.71, 3.59, 12.931), (5689756, 6.31, 0, 4.893),
                 (2812724, 3.75, 0, 3.704)),
    "w96": ((690690, 0.8081, 0, 2.097), (431690, 0.5232, 0, 1.865), (259010, 0.4111, 0, 1.645),
            (86340, 0.1467, 0, 1.383)),
}  # fmt: skip
WIDTHS = {"base128": ((16, 32, 64, 96), 128), "w96": ((96, 192, 384, 576), 192)}


def pruned(variant: str, parameters_left: float) -> Net:
    """A pruned rung: its channels are not published, so all are scaled alike to the published parameter count."""
    if variant == "link_r34":
        return link_resnet34(192, math.sqrt(parameters_left / 28507649))
    widths, side = WIDTHS[variant]
    factor = math.sqrt(parameters_left / sum(w.weights for w in line_seg(widths, side).works))
    return line_seg(tuple(max(1, round(width * factor)) for width in widths), side)


def study() -> tuple[list[Case], list[Case]]:
    """26 of the 30 models of the published law, and what else the same bench measured without CPU operators."""
    told = json.loads((DATA / "latency/edgetpu_int8_pruning_pipeline.json").read_text())
    law = [
        Case(f"{variant} -{cut}%", pruned(variant, left), onchip, offchip, ms)
        for variant, cut, left, _, onchip, offchip, ms, _ in told["line_seg"]
    ]
    networks = {
        "mobilenet_v2": mobile(224, 32, MOBILENET_V2, 1280).classify(),
        "resnet50": resnet(224, (3, 4, 6, 3)),
        "squeezenet1_1": squeezenet(224, "1.1"),
        "efficientnet_lite0": mobile(224, 32, EFFICIENTNET, 1280, scale_ends=False).classify(),
        "mnasnet1_0": mobile(224, 32, MNASNET, 1280, separable=16).classify(),
    }
    rest = [
        Case(row["model"], networks[row["model"]], row["onchip_mib"], row["offchip_mib"], row["ms"])
        for row in told["litert_stage0"]
        if row["model"] in networks
    ]
    rest += [
        Case(f"{variant}, {left} parameters", pruned(variant, left), onchip, offchip, ms)
        for variant, rows in DEEPER.items()
        for left, onchip, offchip, ms in rows
    ]
    rest += [
        Case("efficientdet_lite1", efficientdet(384, 1.0, 1.1, 88, 4, 3), 6.29, 0.0, 52.404),
        Case("efficientdet_lite2", efficientdet(448, 1.1, 1.2, 112, 5, 3), 7.14, 0.685, 78.538),
    ]
    return law, rest


def coral(column: str) -> list[Case]:
    networks = {
        "Unet Mv2": unet_mobilenet_v2(128),
        "DenseNet": densenet121(224),
        "Inception v1": inception_v1(224),
        "MobileNet v1": mobilenet_v1(224),
        "MobileNet v2": mobile(224, 32, MOBILENET_V2, 1280).classify(),
        "ResNet-50 V1": resnet(299, (3, 4, 6, 3)),
        "ResNet-152 V2": resnet(299, (3, 8, 36, 3)),
        "SqueezeNet": squeezenet(224, "1.0"),
        "VGG16": vgg(224, (2, 2, 3, 3, 3)),
        "VGG19": vgg(224, (2, 2, 4, 4, 4)),
        "EfficientNet-EdgeTpu-S": mobile(224, 32, EFFICIENTNET_EDGETPU, 1280).classify(),
        "EfficientNet-EdgeTpu-M": mobile(240, 32, EFFICIENTNET_EDGETPU, 1280, 1.0, 1.1).classify(),
    }
    with (DATA / "latency/coral_benchmarks.csv").open() as file:
        rows = {row["model"]: float(row[column]) for row in csv.DictReader(file)}
    return [Case(name, net, None, None, rows[name]).predicted() for name, net in networks.items()]


def fit(cases: Sequence[Case], start: Rates, names: Sequence[str]) -> Rates:
    """The named rates by least squares of the relative error, all others as given; none comes out negative."""

    def rates(factors: np.ndarray) -> Rates:
        return replace(start, **{n: getattr(start, n) * abs(f) for n, f in zip(names, factors, strict=True)})

    def errors(factors: np.ndarray) -> np.ndarray:
        return relative_errors(cases, rates(factors))

    return rates(least_squares(errors, np.ones(len(names))).x)


def relative_errors(cases: Sequence[Case], rates: Rates) -> np.ndarray:
    return np.array([case.ms_by(rates) / case.ms - 1 for case in cases])


def left_out(cases: Sequence[Case], start: Rates, names: Sequence[str]) -> np.ndarray:
    """Relative error of every network with our own bytes of parameters, the model fitted to all others."""
    return np.concatenate(
        [relative_errors([case.predicted()], fit([c for c in cases if c is not case], start, names)) for case in cases]
    )


def law_left_out(transfers: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """The same for a law that is linear in its terms."""
    errors = []
    for i in range(len(ms)):
        others = np.arange(len(ms)) != i
        weights = np.linalg.lstsq(transfers[others] / ms[others, None], np.ones(len(ms) - 1), rcond=None)[0]
        errors.append(transfers[i] @ weights / ms[i] - 1)
    return np.array(errors)


def line(label: str, errors: np.ndarray) -> str:
    size = np.abs(errors)
    low, high = np.quantile(errors, (0.25, 0.75))
    return (
        f"| {label} | {len(errors)} | {np.median(size):.1%} | {np.quantile(size, 0.9):.1%} | {size.max():.1%} "
        f"| {low:+.1%} .. {high:+.1%} |"
    )


def agreement() -> None:
    print("| file | operators | agree | on the CPU, compiler | on the CPU, predicted |\n|---|---|---|---|---|")
    total = right = 0
    for compiled in sorted((DATA / "coral").glob("*_edgetpu.tflite")):
        source = compiled.with_name(compiled.name.replace("_edgetpu", ""))
        predicted, before, after = predict(source), graph.read(source), graph.read(compiled)
        kept = {after.tensors[op.outputs[0]].name for op in after.operators if op.type != graph.COMPILED}
        truth = ["cpu" if before.tensors[op.outputs[0]].name in kept else "accelerator" for op in before.operators]
        agree = sum(op.on == where for op, where in zip(predicted.ops, truth, strict=True))
        total, right = total + len(truth), right + agree
        print(f"| {source.stem} | {len(truth)} | {agree} | {truth.count('cpu')} | {len(predicted.on_cpu)} |")
    print(f"| **all** | {total} | {right} ({right / total:.1%}) | | |\n")


def parameter_sizes(cases: Sequence[Case]) -> None:
    print("| network | parameters on and off chip, compiler (MiB) | predicted | error |\n|---|---|---|---|")
    errors = []
    for compiled in sorted((DATA / "coral").glob("*_edgetpu.tflite")):
        source = graph.read(compiled.with_name(compiled.name.replace("_edgetpu", "")))
        ours = sum(parameters.parameter_bytes(work_of(source, op)) for op in source.operators)
        errors.append(size_row(compiled.stem, compiled_parameter_bytes(compiled), ours))
    known = ("base128 -0%", "w96 -0%", "link_r34 -0%", "mobilenet_v2", "resnet50", "squeezenet1_1",
             "efficientnet_lite0", "mnasnet1_0", "efficientdet_lite1", "efficientdet_lite2")  # fmt: skip
    for case in cases:
        if case.name in known and case.onchip is not None and case.offchip is not None:
            ours = sum(parameters.parameter_bytes(work) for work in case.net.works)
            errors.append(size_row(case.name, (case.onchip + case.offchip) * MEBI, ours))
    print(f"\nMedian error {np.median(np.abs(errors)):.1%}, largest {np.max(np.abs(errors)):.1%}.\n")
    streamed = [(case, case.predicted()) for case in cases if case.offchip]
    apart = [abs((ours.offchip or 0) - (case.offchip or 0)) for case, ours in streamed]
    print(
        f"Streamed parameters of the {len(streamed)} networks that stream: median difference "
        f"{np.median(apart):.2f} MiB, largest {max(apart):.2f} MiB.\n"
    )


def size_row(name: str, theirs: float, ours: float) -> float:
    print(f"| {name} | {theirs / MEBI:.3f} | {ours / MEBI:.3f} | {ours / theirs - 1:+.1%} |")
    return ours / theirs - 1


def latencies(law: Sequence[Case], rest: Sequence[Case]) -> None:
    print("| model, and what it is judged on | networks | median error | 90 % | largest | middle half |")
    print("|---|---|---|---|---|---|")
    everything = [*law, *rest]
    ms, count = np.array([case.ms for case in everything]), len(law)
    transfers = np.array([[1.0, case.offchip or 0.0, case.onchip or 0.0] for case in everything])
    published = transfers @ np.array([0.8523, 2.2561, 0.9148])
    print(line("published law, 26 of its own 30 models (in sample)", published[:count] / ms[:count] - 1))
    print(line("published law, the other networks", published[count:] / ms[count:] - 1))
    print(line("the law's form fitted to all, each left out", law_left_out(transfers, ms)))
    start = replace(RATES["usb3"], **FITTED)
    print(line("**ours, all, each left out, predicted bytes**", left_out(everything, start, tuple(FITTED))))
    own = [case.predicted() for case in everything]
    print(
        line(
            "ours, fitted to those 26, the other networks",
            relative_errors(own[count:], fit(law, start, tuple(FITTED))),
        )
    )
    apart = [
        relative_errors(
            [case for case in own if case.family == family],
            fit([case for case in everything if case.family != family], start, tuple(FITTED)),
        )
        for family in sorted({case.family for case in everything})
    ]
    print(line("**ours, each family left out**", np.concatenate(apart)))
    rates = fit(everything, start, tuple(FITTED))
    fast = replace(rates, **{name: getattr(rates, name) * CLOCK for name in ("dense", "depthwise", "operator")})
    shown = [Case(name, net, None, None, ms).predicted() for name, (net, ms) in zoo().items()]
    table, board = coral("usb_edgetpu_ms"), coral("devboard_edgetpu_ms")
    of_zoo, of_table = relative_errors(shown, fast), relative_errors(table, fast)
    print(line("Coral's model zoo, USB at maximum clock, nothing fitted", of_zoo))
    print(line("Coral's table, USB at maximum clock, nothing fitted", of_table))
    print(line("both", np.concatenate([of_zoo, of_table])))
    of_board = left_out(board, fast, LINK)
    print(line("Coral's table, Dev Board, two rates of the link, each left out", of_board))
    print("\n| Coral's table | USB, ms | Dev Board, ms |\n|---|---|---|")
    for case, other, error, miss in zip(table, board, of_table, of_board, strict=True):
        print(f"| {case.name} | {case.ms:g} ({error:+.0%}) | {other.ms:g} ({miss:+.0%}) |")
    print("\n| Coral's model zoo | USB, ms |\n|---|---|")
    for case, error in zip(shown, of_zoo, strict=True):
        print(f"| {case.name} | {case.ms:g} ({error:+.0%}) |")
    print(f"\nUSB, default clock: {told(rates, FITTED)}. Dev Board: {told(fit(board, fast, LINK), LINK)}.")


def told(rates: Rates, names: Iterable[str]) -> str:
    return ", ".join(f"{name} {getattr(rates, name):.4g}" for name in names)


def main() -> None:
    law, rest = study()
    agreement()
    parameter_sizes([*law, *rest])
    latencies(law, rest)


if __name__ == "__main__":
    main()
