"""The Edge TPU predictor against the real compiler and published measurements: python benchmarks/edge_tpu.py

Needs ../shared/data (or EDGEOPT_DATA): coral/ with compiled files beside their sources, latency/ with published
figures. Prints Markdown tables: agreement per operator, bytes of parameters, and the latency model, fitted again
without each network that it is then judged on. `edgeopt/accelerators/edge_tpu/figures.py` holds the result.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
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
from scipy.optimize import nnls

from edgeopt.accelerators.edge_tpu import graph, parameters, predict
from edgeopt.accelerators.edge_tpu.compiled import parameter_bytes as compiled_parameter_bytes
from edgeopt.accelerators.edge_tpu.figures import MEBI
from edgeopt.accelerators.edge_tpu.workload import work_of

DATA = Path(os.environ.get("EDGEOPT_DATA", Path(__file__).parents[1] / "../shared/data"))
CACHE_BYTES = 8 * MEBI
#: Time of the same work at the maximum clock (500 instead of 250 MHz).
CLOCK = 0.5


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

    @property
    def features(self) -> list[float]:
        works = self.net.works
        return [
            (self.net.bytes_in + self.net.bytes_out) / MEBI,
            self.offchip or 0.0,
            sum(w.padded_macs for w in works if w.kind == "dense") / 1e9,
            sum(w.macs for w in works if w.kind == "depthwise") / 1e9,
            float(len(works)),
        ]


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


def fit(features: np.ndarray, ms: np.ndarray, given: np.ndarray | float = 0.0) -> np.ndarray:
    """Non-negative least squares of the relative error; `given`: milliseconds that need no fitting."""
    return nnls(features / ms[:, None], 1 - given / ms)[0]


def left_out(
    features: np.ndarray, ms: np.ndarray, judged: np.ndarray | None = None, given: np.ndarray | None = None
) -> np.ndarray:
    """Relative error of every network, with the model fitted to all others; `judged`: features to predict it from."""
    judged = features if judged is None else judged
    given = np.zeros(len(ms)) if given is None else given
    everything = np.arange(len(ms))
    errors = []
    for i in everything:
        others = everything != i
        rates = fit(features[others], ms[others], given[others])
        errors.append((judged[i] @ rates + given[i]) / ms[i] - 1)
    return np.array(errors)


def errors_of(features: np.ndarray, ms: np.ndarray, judged: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Relative errors of the networks that are set apart, with the model fitted to the others."""
    return judged[apart] @ fit(features[~apart], ms[~apart]) / ms[apart] - 1


def matrix(cases: Sequence[Case]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([case.features for case in cases]), np.array([case.ms for case in cases])


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
    features, ms = matrix(everything)
    own = np.array([case.predicted().features for case in everything])
    count = len(law)
    transfers = np.array([[1.0, case.offchip or 0.0, case.onchip or 0.0] for case in everything])
    published = transfers @ np.array([0.8523, 2.2561, 0.9148])
    print(line("published law, 26 of its own 30 models (in sample)", published[:count] / ms[:count] - 1))
    print(line("published law, the other networks", published[count:] / ms[count:] - 1))
    print(line("the law's form fitted to all, each left out", left_out(transfers, ms)))
    print(line("ours, the same 26, each left out", left_out(features[:count], ms[:count])))
    print(line("ours, all, each left out, published bytes", left_out(features, ms)))
    print(line("**ours, all, each left out, predicted bytes**", left_out(features, ms, own)))
    print(
        line("ours, fitted to those 26, the other networks", errors_of(features, ms, own, np.arange(len(ms)) >= count))
    )
    families = np.array([case.family for case in everything])
    apart = np.concatenate([errors_of(features, ms, own, families == family) for family in sorted(set(families))])
    print(line("**ours, each family left out**", apart))
    rates = fit(features, ms)
    fitted, misses = [], []
    for label, column in (("USB at maximum clock", "usb_edgetpu_ms"), ("Dev Board", "devboard_edgetpu_ms")):
        table, measured = matrix(coral(column))
        # The chip runs at twice the clock here; how fast the link is, is fitted.
        chip = table[:, 2:] @ rates[2:] * CLOCK
        link = np.stack([table[:, 0] * rates[0], table[:, 1]], axis=1)
        errors = left_out(link, measured, given=chip)
        print(line(f"Coral's table, {label}, two rates of the link, each left out", errors))
        factors = fit(link, measured, given=chip)
        fitted.append(f"{label}: transfer x {factors[0]:.3g}, streaming {factors[1]:.3g}")
        misses.append([f"{ms:g} ({error:+.0%})" for ms, error in zip(measured, errors, strict=True)])
    names = ("transfer per MiB", "streaming per MiB", "dense per 1e9 MACs", "depthwise per 1e9 MACs", "per operator")
    print("\n| Coral's table | USB, ms | Dev Board, ms |\n|---|---|---|")
    for case, *both in zip(coral("usb_edgetpu_ms"), *misses, strict=True):
        print(f"| {case.name} | {both[0]} | {both[1]} |")
    told = ", ".join(f"{name} {rate:.4g}" for name, rate in zip(names, rates, strict=True))
    print(f"\nRates in ms (USB, default clock): {told}. {'; '.join(fitted)}.")


def main() -> None:
    law, rest = study()
    agreement()
    parameter_sizes([*law, *rest])
    latencies(law, rest)


if __name__ == "__main__":
    main()
