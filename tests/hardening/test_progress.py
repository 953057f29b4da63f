from __future__ import annotations

import io

import pytest
from rich.console import Console

from hardening.progress import Bars


def test_on_a_terminal_there_are_bars() -> None:
    screen = io.StringIO()
    with (
        Bars(Console(file=screen, force_terminal=True, width=100, highlight=False)) as bars,
        bars.task("tune victim", 4) as task,
    ):
        task.advance(3, "epoch 1")
        bars._progress.refresh()
        bars.say("a line [in brackets] above")
    shown = screen.getvalue()
    assert "tune victim" in shown
    assert "3/4" in shown
    assert "epoch 1" in shown
    assert "a line [in brackets] above" in shown


def test_in_a_log_file_there_are_lines_and_no_bars() -> None:
    log = io.StringIO()
    with Bars(Console(file=log, width=20)) as bars, bars.task("tune victim", 4) as task:
        task.advance()
        bars.say("one line, however long it may be")
    # rich ends its (disabled) display with an empty line.
    assert log.getvalue().strip() == "one line, however long it may be"


def test_a_bar_goes_when_its_work_is_done_or_fails() -> None:
    bars = Bars(Console(file=io.StringIO()))
    with pytest.raises(KeyboardInterrupt), bars.task("tune", 4):
        raise KeyboardInterrupt
    with bars.task("another", 1):
        assert [task.description for task in bars._progress.tasks] == ["another"]
    assert bars._progress.tasks == []
