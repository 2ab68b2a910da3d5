"""Progress on terminals, silence elsewhere."""

from __future__ import annotations

import io

import pytest

from edgeopt.cli.progress import Terminal, shown_on
from edgeopt.progress import Silent


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_drawn_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with shown_on(stream) as progress:
        progress.step("Exporting")
        assert list(progress.track([1, 2], "Counting", 2)) == [1, 2]
    assert isinstance(progress, Silent)
    assert stream.getvalue() == ""


def test_only_the_first_process_of_a_launcher_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with shown_on(FakeTerminal()) as progress:
        assert isinstance(progress, Silent)


def test_steps_and_loops_are_drawn_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = FakeTerminal()
    with shown_on(stream) as progress:
        assert isinstance(progress, Terminal)
        progress.step("Exporting [x]")
        items = progress.track(iter("abc"), "Calibrating", 3)
        assert next(items) == "a"
        assert list(items) == ["b", "c"]
        progress.step("Profiling")
    drawn = stream.getvalue()
    assert "Profiling" in drawn
    assert drawn.endswith("\x1b[2K")  # the last thing is an erased line


def test_a_loop_that_is_given_up_is_removed() -> None:
    with shown_on(FakeTerminal()) as progress:
        items = progress.track([1, 2, 3], "Evaluating", 3)
        next(items)
        items.close()  # type: ignore[attr-defined]
        progress.step("next")
