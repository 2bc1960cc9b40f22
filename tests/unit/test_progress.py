"""A terminal gets a bar, a file gets a line now and then, and short work none."""

from __future__ import annotations

import io
import logging
import math
import sys

import pytest

from llmkd import progress as module
from llmkd.progress import progress


class _Screen(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


class _Time:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def terminal(monkeypatch: pytest.MonkeyPatch) -> _Screen:
    """In place of stderr; no fixture, since pytest puts its own back before the test."""
    screen = _Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Time:
    clock = _Time()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_terminal_gets_a_bar_that_is_wiped(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    screen = terminal(monkeypatch)
    with caplog.at_level(logging.INFO), progress("training", total=40, unit="steps", done=10, seconds=0) as advance:
        assert "training:  25%" in screen.getvalue() and "10/40 steps" in screen.getvalue()
        advance(0.0, "loss 3.1")
        advance(20, "loss 2.5")
    assert screen.getvalue().rpartition("\r")[0].split("\r")[-1].strip() == ""  # nothing stays
    assert not caplog.records


def test_a_bar_shows_the_last_note_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a rank, too, where TQDM_DISABLE silences libraries."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    screen = terminal(monkeypatch)
    with progress("training", total=4, unit="steps") as advance:
        for number in range(4):
            module.time.sleep(0.15)  # tqdm draws ten times a second
            advance(1, f"loss {4 - number}")
    assert "2/4 steps" in screen.getvalue() and "loss 3]" in screen.getvalue()


def test_a_line_of_the_log_stays_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    handler = logging.StreamHandler(screen)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with progress("scoring", total=2, unit="models"):
            logging.getLogger("llmkd").warning("a model is done")
    finally:
        root.removeHandler(handler)
    (line,) = [text for text in screen.getvalue().replace("\r", "\n").split("\n") if "a model" in text]
    assert line == "a model is done"  # on a line of its own


def test_a_file_gets_a_line_now_and_then(clock: _Time, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llmkd"), progress("tokenizing", total=1000, unit="rows") as advance:
        for _ in range(10):
            clock.now += 10
            advance(100)
    assert caplog.messages == [
        "tokenizing: 300 of 1000 rows, 10 rows/s, 70 s left",
        "tokenizing: 600 of 1000 rows, 10 rows/s, 40 s left",
        "tokenizing: 900 of 1000 rows, 10 rows/s, 10 s left",
    ]


def test_what_was_done_before_counts_for_the_place_but_not_for_the_rate(
    clock: _Time, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "llmkd"), progress("cache", total=100, unit="rows", done=50) as advance:
        clock.now += 40
        advance(0)  # no rate yet
        advance(10)
    assert caplog.messages == ["cache: 60 of 100 rows, 4 s each, 160 s left"]


@pytest.mark.parametrize(("after", "seconds"), [(5, 30.0), (500, math.inf)])
def test_short_work_and_work_with_lines_of_its_own_get_none(
    clock: _Time, caplog: pytest.LogCaptureFixture, after: float, seconds: float
) -> None:
    with (
        caplog.at_level(logging.INFO, "llmkd"),
        progress("training", total=10, unit="steps", seconds=seconds) as advance,
    ):
        for _ in range(4):
            clock.now += after
            advance(1)
    assert not caplog.messages


def test_where_another_process_shows_it_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with progress("training", total=4, unit="steps", shown=False) as advance:
        advance(4)
    assert screen.getvalue() == ""
