"""How long a network's layers take at any width, from a few widths that were measured in the target's runtime.

The idea of a table of layers is that of NetAdapt (Yang et al. 2018); HALP (Shen et al. 2022) prunes by one.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.cost import LayerShape, is_inside, planned_shapes
from edgeopt.errors import ConversionError, UsageError
from edgeopt.json_data import dumps, from_plain, loads, to_plain
from edgeopt.layer_names import strip_wrapper
from edgeopt.tuning.layer_bank import Bench, chunks, time_layers
from edgeopt.types import Array, Format

if TYPE_CHECKING:
    from edgeopt.compression.pruning.groups import Plan, Prunable
    from edgeopt.progress import Progress

#: Shapes that are measured for one network, and widths per side of a layer: as many as keep to that.
MAX_SHAPES, LEVELS = 150, (4, 3, 2)
#: Files that a format may refuse before layers are no longer looked for one by one.
MAX_REFUSALS = 16
#: Changes when layers are measured in another way, so that older tables are not taken.
_METHOD = 1
#: What makes and runs the files of a format.
_PACKAGES: Mapping[Format, tuple[str, ...]] = {
    "litert": ("ai-edge-litert", "ai-edge-quantizer", "litert-torch"),
    "onnx": ("onnx", "onnxruntime"),
    "executorch": ("executorch", "torch", "torchao"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """One layer at several widths.

    Attributes:
        shape: at full width.
        inputs, outputs: widths, ascending, the full one last. A depthwise layer has one input width only: its inputs
            are its outputs.
    """

    shape: LayerShape
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def shapes(self) -> list[LayerShape]:
        """All combinations, inputs slowest."""
        return [resized(self.shape, one, other) for one in self.inputs for other in self.outputs]


class LatencyTable:
    """Milliseconds of the layers that pruning can touch.

    Args:
        grids: by layer.
        measured: milliseconds of one call by shape (see `single`).
    """

    def __init__(self, grids: Mapping[str, Grid], measured: Mapping[LayerShape, float]) -> None:
        self._grids = grids
        self._times: dict[str, Array] = {}
        for path, grid in grids.items():
            times = [measured.get(single(shape), math.nan) for shape in grid.shapes()]
            if not any(map(math.isnan, times)):
                self._times[path] = np.array(times).reshape(len(grid.inputs), len(grid.outputs))
        #: For layers that were not measured.
        self._ms_per_mac = _typical([(ms, shape.macs) for shape, ms in measured.items()])

    def ms(self, path: str, shape: LayerShape) -> float:
        """Of all calls of a layer in one inference, at this shape; between measured widths it is bilinear."""
        times = self._times.get(path)
        if times is None:
            return self._ms_per_mac * shape.macs
        grid = self._grids[path]
        per_input = [_line(shape.out_channels, grid.outputs, row) for row in times]
        return max(_line(shape.in_channels, grid.inputs, np.array(per_input)), 0.0) * shape.calls

    def saving(self, shapes: Mapping[str, LayerShape], prunable: Prunable, plan: Plan) -> float:
        """Milliseconds that the plan takes off a network whose layers have these shapes."""
        after = planned_shapes(shapes, prunable, plan)
        return sum(
            self.ms(path, shape) - (self.ms(path, after[path]) if path in after else 0.0)
            for path, shape in shapes.items()
            if after.get(path) != shape
        )


def measure_table(
    shapes: Mapping[str, LayerShape],
    prunable: Prunable,
    bench: Bench,
    multiple: int,
    max_ratio: float,
    folder: Path,
    progress: Progress,
) -> LatencyTable:
    """The table of a network's layers; what an earlier run left in the folder is not measured again.

    Args:
        shapes: of the layers, by path.
        prunable: says which of their widths can change.
        multiple, max_ratio: see `steps.Prune`: widths between are not asked for.
        folder: keeps one file for each runtime, machine and scheme; a file that does not verify is replaced.

    Raises ConversionError when the format takes none of the layers, MissingError when the runtime is not installed.
    """
    grids = grids_of(shapes, prunable, multiple, max_ratio)
    wanted = list(dict.fromkeys(single(shape) for grid in grids.values() for shape in grid.shapes()))
    store = _Store(folder, bench)
    failure: ConversionError | None = None
    refusals = 0
    lots = chunks([shape for shape in wanted if shape not in store.times], bench.format)
    for lot in progress.track(lots, f"Timing layers in {bench.runtime}", len(lots)):
        parts = [lot]
        while parts:
            part = parts.pop()
            try:
                times = time_layers(part, bench)
            except ConversionError as error:
                # A layer that this format takes in the network only (fused, say) is estimated by its arithmetic; it is
                # looked for by halves, so that the others of its file are still timed.
                failure = error
                refusals += 1
                middle = len(part) // 2 if refusals < MAX_REFUSALS else 0
                parts += [part[:middle], part[middle:]] if middle else []
                continue
            store.add(dict(zip(part, times, strict=True)))
    known = {shape: store.times[shape] for shape in wanted if shape in store.times}
    if failure is not None and not known:
        raise failure
    return LatencyTable(grids, known)


def grids_of(shapes: Mapping[str, LayerShape], prunable: Prunable, multiple: int, max_ratio: float) -> dict[str, Grid]:
    """Which widths of which layers to measure: as many per layer as `MAX_SHAPES` allows, of the heaviest layers where
    even two per side are too many."""
    sides: dict[str, set[str]] = {}
    for group in prunable.groups:
        for part in group.slices:
            sides.setdefault(strip_wrapper(part.layer), set()).add(part.side)
        if group.kind == "blocks":
            for path in shapes:
                if is_inside(path, strip_wrapper(group.name)):
                    sides.setdefault(path, set())
    touched = sorted((path for path in shapes if path in sides), key=lambda path: -shapes[path].macs)
    for levels in LEVELS:
        grids = {path: _grid(shapes[path], sides[path], levels, multiple, max_ratio) for path in touched}
        if _count(grids) <= MAX_SHAPES:
            return grids
    while _count(grids) > MAX_SHAPES:
        grids.popitem()
    return grids


def _count(grids: Mapping[str, Grid]) -> int:
    return len({single(shape) for grid in grids.values() for shape in grid.shapes()})


def _grid(shape: LayerShape, sides: set[str], levels: int, multiple: int, max_ratio: float) -> Grid:
    def widths(full: int, side: str) -> tuple[int, ...]:
        if side not in sides:
            return (full,)
        lowest = max(math.ceil(full * (1 - max_ratio)), 1)
        steps = np.linspace(lowest, full, levels)
        return tuple(sorted({min(math.ceil(step / multiple) * multiple, full) for step in steps}))

    if is_depthwise(shape):
        return Grid(shape, (shape.in_channels,), widths(shape.out_channels, "out"))
    return Grid(shape, widths(shape.in_channels, "in"), widths(shape.out_channels, "out"))


def is_depthwise(shape: LayerShape) -> bool:
    return shape.type == "convolution" and shape.groups == shape.in_channels > 1


def resized(shape: LayerShape, inputs: int, outputs: int) -> LayerShape:
    """The same layer at other widths; those of a grouped convolution are rounded up to whole groups."""
    groups = shape.groups
    if is_depthwise(shape):
        per_group = max(shape.out_channels // groups, 1)
        groups = inputs = max(outputs // per_group, 1)
        outputs = groups * per_group
    elif groups > 1:
        inputs, outputs = (math.ceil(width / groups) * groups for width in (inputs, outputs))
    weights = outputs * (inputs // groups)
    before = shape.out_channels * (shape.in_channels // shape.groups)
    macs = shape.macs // before * weights
    return replace(shape, in_channels=inputs, out_channels=outputs, groups=groups, macs=macs)


def single(shape: LayerShape) -> LayerShape:
    """One call of the layer: what is measured, once for all layers alike."""
    return replace(shape, macs=shape.macs // shape.calls, calls=1)


def _line(width: int, widths: tuple[int, ...], times: Array) -> float:
    if len(widths) == 1:
        return float(times[0])
    # Beyond the measured widths the last stretch goes on.
    place = int(np.clip(np.searchsorted(widths, width), 1, len(widths) - 1))
    low, high = widths[place - 1], widths[place]
    share = (width - low) / (high - low)
    return float(times[place - 1] + share * (times[place] - times[place - 1]))


def _typical(pairs: list[tuple[float, int]]) -> float:
    """Milliseconds per multiply-accumulate."""
    rates = [ms / macs for ms, macs in pairs if macs]
    return float(np.median(rates)) if rates else 0.0


class _Store:
    """The measured shapes of one runtime on this machine, on disk."""

    def __init__(self, folder: Path, bench: Bench) -> None:
        self._environment = _environment(bench)
        name = hashlib.sha256(json.dumps(self._environment, sort_keys=True).encode()).hexdigest()[:16]
        self._path = folder / f"layers-{name}.json"
        self.times: dict[LayerShape, float] = {}
        with suppress(UsageError, OSError, UnicodeDecodeError):
            self.times = _read(self._path, self._environment)

    def add(self, times: Mapping[LayerShape, float]) -> None:
        """Keep these; on disk when this returns, where the folder can be written."""
        self.times.update(times)
        entries = [{"shape": to_plain(shape), "ms": ms} for shape, ms in self.times.items()]
        content = {"environment": self._environment, "entries": entries}
        text = dumps({**content, "sha256": _digest(content)})
        with suppress(OSError):  # The table serves this run all the same.
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._path)


def _read(path: Path, environment: Mapping[str, object]) -> dict[LayerShape, float]:
    """Raises UsageError where the file is not a whole table of this environment."""
    where = str(path)
    content = loads(path.read_text(encoding="utf-8"), where)
    if not isinstance(content, dict) or not isinstance(entries := content.get("entries"), list):
        raise UsageError("is no table of layers", where=where)
    body = {"environment": content.get("environment"), "entries": entries}
    if content.get("sha256") != _digest(body) or body["environment"] != environment:
        raise UsageError("is not as it was written", where=where)
    times: dict[LayerShape, float] = {}
    for entry in entries:
        ms = entry.get("ms") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(ms, int | float) or not 0 <= ms < math.inf:
            raise UsageError("is no time", where=where)
        times[from_plain(LayerShape, entry.get("shape"), where)] = float(ms)
    return times


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(dumps(content).encode()).hexdigest()


def _environment(bench: Bench) -> dict[str, object]:
    """All that a layer's time depends on beside its shape, as JSON has it."""
    return {
        "method": _METHOD,
        "format": bench.format,
        "scheme": to_plain(bench.scheme),
        "runtime": bench.runtime,
        "threads": bench.threads,
        "cpu": _cpu(),
        "packages": {name: _version(name) for name in _PACKAGES[bench.format]},
    }


def _cpu() -> str:
    """What this machine calls its processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Hardware", "CPU part")):
                return f"{platform.machine()} {line.partition(':')[2].strip()}"
    return f"{platform.machine()} {platform.processor()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
