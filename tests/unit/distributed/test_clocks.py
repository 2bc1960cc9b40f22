"""The clock of what the device does, on a CPU and, with pretended marks, on a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from llmkd.distributed.clocks import DeviceClock


def test_on_a_cpu_time_is_that_of_what_is_inside() -> None:
    clock = DeviceClock(torch.device("cpu"))
    began = time.perf_counter()
    for _ in range(2):
        with clock.timed():
            time.sleep(0.05)
        inside = time.perf_counter() - began
        time.sleep(0.2)
    assert 0.1 <= clock.seconds <= inside - 0.2


class Mark:
    """A mark in a device's queue, which it comes by when `done` says so; it works for 3 ms from one to the next."""

    made: int = 0
    done: int = 0
    waited: int = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Mark.made += 1
        self.number = Mark.made

    def query(self) -> bool:
        return self.number <= Mark.done

    def synchronize(self) -> None:
        Mark.waited += 1
        Mark.done = max(Mark.done, self.number)

    def elapsed_time(self, other: Mark) -> float:
        assert self.query() and other.query()
        return 3.0 * (other.number - self.number)


def test_on_a_gpu_nothing_waits_until_the_time_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    clock = DeviceClock(torch.device("cuda"))
    for number in range(4):
        Mark.done = 2 * number  # the device is one part behind
        with clock.timed():
            pass
        assert len(clock._marks) == 1 and Mark.waited == 0
    assert clock.seconds == pytest.approx(4 * 0.003) and Mark.waited == 1
    assert clock.seconds == pytest.approx(4 * 0.003)
