"""The table of layer times: what is measured, what lies between, and what is kept on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edgeopt.compression.cost import LayerShape
from edgeopt.compression.pruning.groups import Prunable, PruningGroup, Slice
from edgeopt.errors import ConversionError
from edgeopt.progress import Silent
from edgeopt.tuning import latency_table
from edgeopt.tuning.latency_table import MAX_SHAPES, grids_of, measure_table, resized, single
from edgeopt.tuning.layer_bank import Bench
from edgeopt.types import Scheme

BENCH = Bench("onnx", Scheme("w8a8", "static"), "onnxruntime", 1)


def convolution(inputs: int, outputs: int, groups: int = 1, calls: int = 1) -> LayerShape:
    macs = inputs // groups * outputs * 9 * 64 * calls
    return LayerShape(
        "convolution", inputs, outputs, (3, 3), (1, 1), (1, 1), (1, 1), groups, (8, 8), False, macs, calls
    )


def chain(widths: Sequence[int]) -> tuple[dict[str, LayerShape], Prunable]:
    """Convolutions in a row whose inner widths can change."""
    shapes = {f"{i}": convolution(a, b) for i, (a, b) in enumerate(pairwise(widths))}
    groups = []
    for i, width in enumerate(widths[1:-1]):
        indices = np.arange(width)[:, None]
        groups.append(
            PruningGroup(
                f"{i}", "channels", width, 1, (Slice(f"{i}", "out", indices), Slice(f"{i + 1}", "in", indices))
            )
        )
    return shapes, Prunable(tuple(groups), ())


def truth(shape: LayerShape) -> float:
    """Bilinear in the widths, as a matrix kernel with its overheads is."""
    return 0.01 + 1e-4 * shape.in_channels + 2e-4 * shape.out_channels + 1e-5 * shape.in_channels * shape.out_channels


class Clock:
    """Stands in for the runtime."""

    def __init__(self) -> None:
        self.measured: list[LayerShape] = []
        self.refused: set[LayerShape] = set()

    def __call__(self, shapes: Sequence[LayerShape], bench: Bench) -> list[float]:
        assert bench == BENCH
        if self.refused & set(shapes):
            raise ConversionError("no such layer")
        self.measured += shapes
        return [truth(shape) for shape in shapes]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(latency_table, "time_layers", made)
    return made


def table(shapes: dict[str, LayerShape], prunable: Prunable, folder: Path) -> latency_table.LatencyTable:
    return measure_table(shapes, prunable, BENCH, 8, 0.9, folder, Silent())


def test_times_between_measured_widths_are_bilinear(tmp_path: Path, clock: Clock) -> None:
    shapes, prunable = chain([3, 64, 128, 10])
    found = table(shapes, prunable, tmp_path)
    assert len(clock.measured) <= MAX_SHAPES
    for inputs, outputs in ((64, 128), (40, 72), (8, 16), (24, 128)):
        shape = resized(shapes["1"], inputs, outputs)
        assert found.ms("1", shape) == pytest.approx(truth(shape))


def test_the_saving_of_a_plan(tmp_path: Path, clock: Clock) -> None:
    del clock
    shapes, prunable = chain([3, 64, 128, 10])
    found = table(shapes, prunable, tmp_path)
    saving = found.saving(shapes, prunable, {"0": tuple(range(16)), "1": tuple(range(64))})
    after = [resized(shapes["0"], 3, 48), resized(shapes["1"], 48, 64), resized(shapes["2"], 64, 10)]
    assert saving == pytest.approx(sum(map(truth, shapes.values())) - sum(map(truth, after)))
    assert found.saving(shapes, prunable, {}) == 0


def test_a_removed_block_takes_all_its_layers(tmp_path: Path, clock: Clock) -> None:
    del clock
    shapes = {"stem": convolution(3, 16), "body.0": convolution(16, 16), "body.1": convolution(16, 16, 16)}
    prunable = Prunable((PruningGroup("body", "blocks", 1, 1, ()),), ())
    found = table(shapes, prunable, tmp_path)
    assert found.saving(shapes, prunable, {"body": (0,)}) == pytest.approx(
        truth(shapes["body.0"]) + truth(shapes["body.1"])
    )


def test_a_layer_that_is_used_several_times_costs_as_often(tmp_path: Path, clock: Clock) -> None:
    shapes, prunable = chain([8, 32, 8])
    shapes["0"] = convolution(8, 32, calls=3)
    found = table(shapes, prunable, tmp_path)
    assert found.ms("0", shapes["0"]) == pytest.approx(3 * truth(shapes["0"]))
    assert {shape.calls for shape in clock.measured} == {1}


def test_depthwise_layers_have_one_width() -> None:
    shape = convolution(64, 64, groups=64)
    indices = np.arange(64)[:, None]
    prunable = Prunable((PruningGroup("a", "channels", 64, 1, (Slice("a", "out", indices),)),), ())
    grid = grids_of({"a": shape}, prunable, 16, 0.9)["a"]
    assert [(s.in_channels, s.out_channels, s.groups) for s in grid.shapes()] == [
        (width, width, width) for width in grid.outputs
    ]
    assert grid.outputs[0] == 16
    assert grid.outputs[-1] == 64


def test_resizing_counts_the_arithmetic() -> None:
    assert resized(convolution(64, 64), 32, 16) == convolution(32, 16)
    assert resized(convolution(64, 64, groups=64), 64, 16) == convolution(16, 16, groups=16)
    assert resized(convolution(64, 64, groups=4), 30, 13) == convolution(32, 16, groups=4)


def test_many_layers_get_fewer_widths_and_the_heaviest_come_first() -> None:
    shapes, prunable = chain(list(range(64, 64 + 16 * 12, 16)))
    wanted = {single(s) for grid in grids_of(shapes, prunable, 8, 0.9).values() for s in grid.shapes()}
    assert MAX_SHAPES / 3 < len(wanted) <= MAX_SHAPES
    shapes, prunable = chain(list(range(64, 64 + 8 * 80, 8)))
    grids = grids_of(shapes, prunable, 8, 0.9)
    assert len({single(s) for grid in grids.values() for s in grid.shapes()}) <= MAX_SHAPES
    left_out = [shape.macs for path, shape in shapes.items() if path not in grids]
    assert left_out
    assert min(shapes[path].macs for path in grids) >= max(left_out)


def test_layers_that_were_not_measured_go_by_their_arithmetic(tmp_path: Path, clock: Clock) -> None:
    shapes, prunable = chain([16] * 10)
    shapes["3"] = convolution(2048, 2048)
    clock.refused = {single(shapes["3"])}
    found = table(shapes, prunable, tmp_path)
    assert found.ms("3", shapes["3"]) > 0
    assert found.ms("3", shapes["3"]) == pytest.approx(4 * found.ms("3", resized(shapes["3"], 1024, 1024)))
    # The layers that would have shared its file are timed all the same.
    refused = clock.refused
    assert {single(s) for grid in grids_of(shapes, prunable, 8, 0.9).values() for s in grid.shapes()} - refused <= set(
        clock.measured
    )


def test_a_format_that_takes_no_layer_is_an_error(tmp_path: Path, clock: Clock) -> None:
    shapes, prunable = chain([8, 16, 8])
    clock.refused = {single(s) for grid in grids_of(shapes, prunable, 8, 0.9).values() for s in grid.shapes()}
    with pytest.raises(ConversionError, match="no such layer"):
        table(shapes, prunable, tmp_path)


def test_what_was_measured_is_not_measured_again(tmp_path: Path, clock: Clock) -> None:
    shapes, prunable = chain([3, 64, 10])
    first = table(shapes, prunable, tmp_path)
    count = len(clock.measured)
    again = table(shapes, prunable, tmp_path)
    assert len(clock.measured) == count
    assert again.ms("0", shapes["0"]) == first.ms("0", shapes["0"])
    more, wider = chain([3, 64, 96, 10])
    table(more, wider, tmp_path)
    new = clock.measured[count:]
    assert new
    assert not set(new) & set(clock.measured[:count])


@pytest.mark.parametrize("damage", ["truncate", "edit", "other machine", "not a number"])
def test_a_table_that_does_not_verify_is_measured_anew(tmp_path: Path, clock: Clock, damage: str) -> None:
    shapes, prunable = chain([3, 64, 10])
    table(shapes, prunable, tmp_path)
    count = len(clock.measured)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    match damage:
        case "truncate":
            path.write_text(path.read_text()[:-40])
        case "edit":
            content["entries"][0]["ms"] *= 2
            path.write_text(json.dumps(content))
        case "other machine":
            content["environment"]["cpu"] = "abacus"
            path.write_text(json.dumps(content))
        case _:
            content["entries"][0]["ms"] = "soon"
            path.write_text(json.dumps(content))
    found = table(shapes, prunable, tmp_path)
    assert len(clock.measured) == 2 * count
    assert found.ms("0", shapes["0"]) == pytest.approx(truth(shapes["0"]))


def test_other_threads_have_a_table_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_table, "time_layers", lambda shapes, bench: [1.0 / bench.threads] * len(shapes))
    shapes, prunable = chain([3, 64, 10])
    for threads in (1, 2):
        bench = Bench(BENCH.format, BENCH.scheme, BENCH.runtime, threads)
        found = measure_table(shapes, prunable, bench, 8, 0.9, tmp_path, Silent())
        assert found.ms("0", shapes["0"]) == pytest.approx(1 / threads)
    assert len(list(tmp_path.iterdir())) == 2
