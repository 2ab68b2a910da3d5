"""Charts in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.errors import UsageError
from edgeopt.report.plot import check_plot_path, save_bars, save_lines


def test_bars_show_every_name_literally(tmp_path: Path) -> None:
    path = tmp_path / "bars.svg"
    save_bars(path, ["a$b", "x_{1}$"], [3.0, -1.0], title="50 % of $x", axis="damage, dB")
    text = path.read_text("utf-8")
    for shown in ("a$b", "x_{1}$", "50 % of $x", "damage, dB"):
        assert shown in text


def test_lines_of_deep_networks_leave_out_names(tmp_path: Path) -> None:
    path = tmp_path / "lines.svg"
    names = [f"layer.{i}" for i in range(300)]
    series = {"one": [float(i) for i in range(300)], "two": [float("nan")] * 300}
    save_lines(path, names, series, title="t", axis="dB", marked=(7,))
    text = path.read_text("utf-8")
    assert ">layer.0<" in text
    assert ">layer.1<" not in text
    assert ">one<" in text


def test_the_same_values_give_the_same_bytes(tmp_path: Path) -> None:
    for suffix in ("svg", "png"):
        first, second = tmp_path / f"1.{suffix}", tmp_path / f"2.{suffix}"
        for path in (first, second):
            save_bars(path, ["a"], [1.0], title="t", axis="x")
        assert first.read_bytes() == second.read_bytes()


def test_nothing_to_show_is_still_a_picture(tmp_path: Path) -> None:
    save_bars(tmp_path / "b.svg", [], [], title="t", axis="x")
    save_lines(tmp_path / "l.svg", [], {"one": []}, title="t", axis="x")


@pytest.mark.parametrize("name", ["p.jpg", "p", "missing/p.svg"])
def test_paths_are_checked_early(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        check_plot_path(tmp_path / name)
    check_plot_path(tmp_path / "p.SVG")
