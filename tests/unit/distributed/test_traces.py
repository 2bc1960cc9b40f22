"""The trace of a few steps: which it has, and that its making is no step's time."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmkd.distributed.clocks import WARM_UP, StepClock
from llmkd.distributed.traces import Trace


def test_two_steps_are_traced_and_starting_and_writing_are_no_steps_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of which takes a second here, by the clock alone."""
    profile, clock_of_machine, late = torch.profiler.profile, time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock_of_machine() + late[0])

    def slowly(work: Callable[..., None]) -> Callable[..., None]:
        def slow(*given: object) -> None:
            late[0] += 1
            work(*given)

        return slow

    monkeypatch.setattr(profile, "start", slowly(profile.start))
    monkeypatch.setattr(profile, "export_chrome_trace", slowly(profile.export_chrome_trace))
    file = tmp_path / "traces" / "rank-0.json.gz"
    trace, clock, seen = Trace(2, file), StepClock(torch.device("cpu")), []
    for number in clock.timed(trace.of(range(WARM_UP + 4)), lambda: trace.seconds):
        torch.ones(2, 2).mm(torch.full((2, 2), float(number)))
        seen.append(number)
        clock.end()
    assert seen == [*range(WARM_UP + 4)]
    with gzip.open(file, "rt") as text:
        names = [event.get("name") for event in json.load(text)["traceEvents"]]
    assert names.count("aten::mm") == 2
    assert trace.seconds >= 2 and clock.read()[0] < 1


@pytest.mark.parametrize(("steps", "count"), [(WARM_UP, 2), (WARM_UP + 2, 0)])
def test_where_no_step_is_left_or_asked_for_there_is_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, count: int
) -> None:
    file = tmp_path / "trace.json.gz"
    assert [*Trace(count, file).of(range(steps))] == [*range(steps)] and not file.exists()
    assert ("no step is left after the first 3" in caplog.text) == (count > 0)
