"""Fit the CPU latency model, score it on what it did not see, and write edgeopt/prediction/parameters.toml.

    python benchmarks/prediction.py             # the error tables of docs/prediction.md
    python benchmarks/prediction.py --write     # and the parameters
    python benchmarks/prediction.py --networks  # multiply-accumulates and weights of the networks

Needs scipy. Takes a few minutes; the same figures give the same parameters.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from fit_latency import Fitted, Layout, Observation, error, fit, observations
from published_networks import NETWORKS, works

from edgeopt.prediction.calibration_fit import factors, share
from edgeopt.prediction.model import milliseconds

PARAMETERS = Path(__file__).parent.parent / "edgeopt" / "prediction" / "parameters.toml"
COVERAGE = 0.9
#: Figures of a user's own that a calibration is tried with, and how often with another choice of them.
CALIBRATIONS, DRAWS = (1, 3), 12
Scores = list[tuple[Observation, float]]


def without(data: Sequence[Observation], layout: Layout, key: Callable[[Observation], str]) -> dict[str, Fitted]:
    """For each group of figures the fit to all others."""
    return {group: fit([o for o in data if key(o) != group], layout) for group in sorted({key(o) for o in data})}


def held_out(data: Sequence[Observation], fits: dict[str, Fitted], key: Callable[[Observation], str]) -> Scores:
    """Each figure as the fit predicts it that has not seen its group."""
    return [(o, fits[key(o)].predict(o)) for o in data]


def calibrated(data: Sequence[Observation], fits: dict[str, Fitted], count: int) -> Scores:
    """Each device left out of the fit, then calibrated with `count` of its own figures and scored on other networks."""
    scores: Scores = []
    draw = np.random.default_rng(0)
    for name, fitted in fits.items():
        own = [o for o in data if o.device.name == name]
        for _ in range(DRAWS):
            chosen = [own[i] for i in draw.permutation(len(own))[:count]]
            # A user's figures are of today's kernels: those of older ones are taken to them.
            shares = [share(o.asked, fitted.parameters, o.ms / fitted.old.get(o.old, 1.0)) for o in chosen]
            parameters = replace(fitted.parameters, device={name: factors(shares)})
            for o in own:
                if o.model not in {c.model for c in chosen}:
                    ms = float(milliseconds(o.asked, parameters).sum()) * fitted.old.get(o.old, 1.0)
                    scores.append((o, ms))
    return scores


def single_rate(data: Sequence[Observation], by_family: bool) -> Scores:
    """Baseline: multiply-accumulates per second of each device, precision and thread count, from the other networks."""
    scores: Scores = []
    for o in data:
        rates = [
            math.log(other.macs / other.ms)
            for other in data
            if (other.device.name, other.precision, other.threads) == (o.device.name, o.precision, o.threads)
            and (other.family != o.family if by_family else other.model != o.model)
        ]
        if rates:
            scores.append((o, o.macs / math.exp(float(np.median(rates)))))
    return scores


def peak_ratio(data: Sequence[Observation]) -> Scores:
    """Baseline: the same network's time on another device, scaled by clock and lanes (fp32 peak); the median of all."""
    scores: Scores = []
    for o in data:
        found = [
            math.log(other.ms * float(o.asked.compute.sum() / other.asked.compute.sum()))
            for other in data
            if other.device.name != o.device.name and other.model == o.model and other.precision == o.precision
        ]
        if found:
            scores.append((o, math.exp(float(np.median(found)))))
    return scores


def only(scores: Scores, others: Scores) -> Scores:
    """The scores of the figures that `others` has, too."""
    wanted = {id(o) for o, _ in others}
    return [(o, ms) for o, ms in scores if id(o) in wanted]


def held(scores: Scores, size: float) -> str:
    """Share of the figures within `size`, of all and of the device with the fewest."""
    inside: dict[str, list[bool]] = defaultdict(list)
    for o, predicted in scores:
        inside[o.device.name].append(abs(error(predicted, o.ms)) <= size)
    share = {name: sum(found) / len(found) for name, found in inside.items()}
    worst = min(share, key=lambda name: share[name])
    total = sum(map(sum, inside.values())) / len(scores)
    return f"{total:.0%} of the figures, least on {worst}: {share[worst]:.0%}"


def row(title: str, scores: Scores) -> str:
    errors = np.array([abs(predicted / o.ms - 1) for o, predicted in scores]) * 100
    if not len(errors):
        return f"| {title} | 0 | | | |"
    worst = scores[int(np.argmax(errors))][0]
    where = f"{worst.device.name} {worst.model} {worst.precision} x{worst.threads}"
    middle, most = np.percentile(errors, [50, 90])
    return f"| {title} | {len(errors)} | {middle:.0f} | {most:.0f} | {errors.max():.0f} ({where}) |"


def width(scores: Scores) -> float:
    """Half-width in logarithms that `COVERAGE` of the held-out figures stay within, each device counting the same."""
    counts: dict[str, int] = defaultdict(int)
    for o, _ in scores:
        counts[o.device.name] += 1
    pairs = sorted((abs(error(predicted, o.ms)), 1 / counts[o.device.name]) for o, predicted in scores)
    reached, total = 0.0, sum(weight for _, weight in pairs)
    for size, weight in pairs:
        reached += weight
        if reached >= COVERAGE * total:
            return size
    raise AssertionError("weights don't add up")


def write(fitted: Fitted, data: Sequence[Observation], widths: dict[str, float]) -> None:
    parameters = fitted.parameters
    lines = [
        "# Written by benchmarks/prediction.py --write from the published latencies in edgeopt/device_profiles and",
        "# benchmarks/prediction_devices. Don't edit: change the figures and run it again.",
        f"figures = {len(data)}",
        f"devices = {len({o.device.name for o in data})}",
        f"networks = {len({id(NETWORKS[o.model]) for o in data})}",
        f"serial = {parameters.serial:.4f}",
        f"sharing = {parameters.sharing:.4f}",
        f"dispatch-us = {parameters.dispatch_us:.3f}",
        "",
        "# How much longer figures of before XNNPACK are than those of today's kernels.",
        "[old-kernels]",
        *(f"{name} = {value:.4f}" for name, value in sorted(fitted.old.items())),
        "",
        "# Half-widths of the interval in logarithms, each from figures that the fit did not see.",
        "[interval]",
        f"coverage = {COVERAGE}",
        *(f"{name} = {value:.4f}" for name, value in widths.items()),
        "",
        "[efficiency]",
        *(f"{name} = {value:.4f}" for name, value in parameters.efficiency.items()),
        "",
        "[core]",
        *(f"{name} = {value:.4f}" for name, value in parameters.core.items()),
        "",
        "[memory]",
        *(f"{name} = {value:.4f}" for name, value in parameters.memory.items()),
    ]
    for name, (compute, memory) in sorted(parameters.device.items()):
        own = [o for o in data if o.device.name == name]
        lines += [
            "",
            f"[device.{name}]",
            f"compute = {compute:.4f}",
            f"memory = {memory:.4f}",
            f"figures = {len(own)}",
            f"old-figures = {sum(bool(o.old) for o in own)}",
        ]
    PARAMETERS.write_text("\n".join(lines) + "\n")


def _device(observation: Observation) -> str:
    return observation.device.name


def _model(observation: Observation) -> str:
    return observation.model


def _family(observation: Observation) -> str:
    return observation.family


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--networks", action="store_true")
    options = parser.parse_args()
    if options.networks:
        for name in NETWORKS:
            ops = works(name, "fp32")
            macs = sum(op.macs for op in ops if op.kind in ("conv", "depthwise", "matmul"))
            print(f"{name:28} {macs / 1e6:9.0f} M {sum(op.weight_bytes for op in ops) / 4e6:8.2f} M weights")
        return
    data = observations()
    layout = Layout(data)
    everything = fit(data, layout)
    without_device = without(data, layout, _device)
    by_device = held_out(data, without_device, _device)
    by_model = held_out(data, without(data, layout, _model), _model)
    by_family = held_out(data, without(data, layout, _family), _family)
    with_own = {count: calibrated(data, without_device, count) for count in CALIBRATIONS}
    rates, ratios = single_rate(data, by_family=True), peak_ratio(data)
    splits = {
        "seen by the fit": [(o, everything.predict(o)) for o in data],
        "network left out": by_model,
        "family of networks left out": by_family,
        "device left out": by_device,
        **{f"device left out, then calibrated with {n} figure{'s' * (n > 1)}": s for n, s in with_own.items()},
        "baseline: one rate per device, network left out": single_rate(data, by_family=False),
        "baseline: one rate per device, family left out": rates,
        "the model on those figures, family left out": only(by_family, rates),
        "baseline: another device's figure by peak rate": ratios,
        "the model on those figures, device left out": only(by_device, ratios),
    }
    print(f"{len(data)} figures, {len(layout.devices)} devices, {len({o.family for o in data})} families of networks\n")
    for precision in ("fp32", "w8a8"):
        print(
            f"| {precision}: absolute error in % | figures | median | 90th percentile | worst |\n|---|---|---|---|---|"
        )
        for title, scores in splits.items():
            print(row(title, [(o, ms) for o, ms in scores if o.precision == precision]))
        print()
    print("| device left out | figures | median | 90th percentile | worst |\n|---|---|---|---|---|")
    for name in layout.devices:
        for precision in ("fp32", "w8a8"):
            own = [(o, ms) for o, ms in by_device if o.device.name == name and o.precision == precision]
            if own:
                print(row(f"{name} {precision}", own))
    print("\n| family left out | figures | median | 90th percentile | worst |\n|---|---|---|---|---|")
    for name in sorted({o.family for o in data}):
        print(row(name, [(o, ms) for o, ms in by_family if o.family == name]))
    widths = {
        "published": width(by_family),
        "unseen": width(by_device),
        **{f"calibrated-{n}": width(scores) for n, scores in with_own.items()},
    }
    held_scores = (by_family, by_device, *with_own.values())
    print()
    for (name, size), scores in zip(widths.items(), held_scores, strict=True):
        print(f"interval {name}: x{math.exp(size):.2f} holds {held(scores, size)}")
    if options.write:
        write(everything, data, widths)


if __name__ == "__main__":
    main()
