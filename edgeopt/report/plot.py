"""Small charts for files, drawn with matplotlib and without a display; the same bytes for the same values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
#: Names along an axis overlap when there are more; every n-th is shown then.
_MOST_NAMES = 70
_INCHES_PER_NAME = 0.16


def check_plot_path(path: Path) -> None:
    """Raise UsageError now for what would fail after hours of work: another suffix, or no such directory."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            "is no kind of picture that can be drawn", where=str(path), fix=f"take {' or '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise UsageError("there is no such directory", where=str(path.parent))


def save_bars(path: Path, names: Sequence[str], values: Sequence[float], *, title: str, axis: str) -> None:
    """A horizontal bar per name, the first one on top.

    Args:
        path: .svg or .png.
        values: one per name, in the order to be shown.
        axis: what the values are, with the unit.
    """
    figure, axes = _figure(width=8.0, height=1.2 + _INCHES_PER_NAME * max(len(names), 4))
    positions = range(len(names))
    axes.barh(positions, values, color="#3b6ea5")
    axes.set_yticks(positions, names, fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(axis)
    _save(figure, axes, title, path)


def save_lines(
    path: Path,
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    axis: str,
    marked: Collection[int] = (),
) -> None:
    """Lines over the names, in their order: figures along the depth of a network.

    Args:
        path: .svg or .png.
        series: what a line shows -> one value per name; NaN leaves a gap.
        axis: what the values are, with the unit.
        marked: indices that get a vertical line.
    """
    figure, axes = _figure(width=max(8.0, 1.5 + _INCHES_PER_NAME * min(len(names), _MOST_NAMES)), height=5.0)
    for label, values in series.items():
        axes.plot(range(len(names)), values, marker="o", markersize=3, linewidth=1, label=label)
    for index in marked:
        axes.axvline(index, color="#b03030", linewidth=1, linestyle="--")
    shown = range(0, len(names), -(-len(names) // _MOST_NAMES) or 1)
    axes.set_xticks(shown, [names[i] for i in shown], fontsize=7, rotation=90, parse_math=False)
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.set_ylabel(axis)
    if len(series) > 1:
        axes.legend(fontsize=8)
    _save(figure, axes, title, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    # Not through pyplot, which keeps figures alive and looks for a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, axes: Axes, title: str, path: Path) -> None:
    import matplotlib as mpl

    axes.set_title(title, fontsize=10, parse_math=False)
    with mpl.rc_context({"svg.hashsalt": "edgeopt", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise UsageError(f"can't be written: {error.strerror}", where=str(path)) from error
