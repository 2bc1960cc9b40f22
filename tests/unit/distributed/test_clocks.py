"""The clock of a run's steps and their parts: on a CPU by hand, and on a GPU with pretended marks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from llmkd.distributed import clocks
from llmkd.distributed.clocks import WARM_UP, Span, StepClock

CPU = torch.device("cpu")


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.wall = self.cpu = 100.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.cpu


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Hand:
    time = Hand()
    monkeypatch.setattr(clocks, "time", time)
    return time


def _run(clock: StepClock, now: Hand, steps: list[tuple[float, float, float]]) -> None:
    """Steps of (seconds of waiting for rows, seconds of work, seconds of what comes after it); half of the work is on the CPU."""

    def rows() -> Iterator[tuple[float, float]]:
        for waiting, work, after in steps:
            now.wall += waiting
            yield work, after

    for work, after in clock.timed(rows()):
        now.wall += work
        now.cpu += work / 2
        clock.end()
        now.wall += after
        now.cpu += after


def test_a_steps_time_is_its_own(now: Hand) -> None:
    """Waiting for rows is a part of it; validation, logs and saving are not."""
    clock = StepClock(CPU)
    now.wall += 50  # what is prepared before the first step
    _run(clock, now, [(0.25, 1.0, 30.0), (0.0, 2.0, 0.0)])
    assert clock.read() == (3.25, {"data": 3.25})
    _run(clock, now, [(0.0, 4.0, 9.0)])
    assert clock.read() == (4.0, {"data": 4.0})  # since the last call
    assert clock.parts() == {"data": 7.25}


def test_a_runs_cost_is_the_median_step_after_the_first_ones(now: Hand) -> None:
    clock = StepClock(CPU)
    _run(clock, now, [(0.0, 60.0, 0.0)] * WARM_UP)
    assert clock.cost() is None
    _run(clock, now, [(0.0, work, 5.0) for work in (1.0, 2.0, 3.0, 4.0, 500.0)])
    assert clock.cost() == {
        "steps": 5,
        "median_seconds": 3.0,
        "quartiles": [2.0, 4.0],
        "cpu_seconds": 1.5,
        "cpu_quartiles": [1.0, 2.0],
    }


def test_what_is_no_steps_own_is_not_timed(now: Hand) -> None:
    """Texts that are written before a step are not; waiting for rows is, in front of the other steps."""
    apart = 0.0

    def rows() -> Iterator[int]:
        nonlocal apart
        for number in range(4):
            now.wall += 0.25
            if number % 2:
                now.wall += 100
                apart += 100
            yield number

    clock = StepClock(CPU)
    for _ in clock.timed(rows(), lambda: apart):
        now.wall += 1
        clock.end()
    assert clock.read() == (2 * 1.25 + 2 * 1, {"data": 2 * 1.25 + 2 * 1})


def test_the_parts_of_a_step_are_all_of_it(now: Hand) -> None:
    """A part within a part has its own time, and the outer one the rest; outside of a step nothing is timed."""

    class Head(nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            now.wall += 8
            if states.sum() < 0:
                raise ValueError("states")
            return states

    clock, head = StepClock(CPU), Head()
    clock.around(head, "head")
    for _ in clock.timed(range(2)):
        now.wall += 1
        for _ in range(2):  # micro-batches
            clock.part("teacher")
            now.wall += 2
            with clock.inside("wire"):
                now.wall += 4
            now.wall += 2
            clock.part("forward")
            head(torch.ones(1))
            with pytest.raises(ValueError):
                head(-torch.ones(1))
            now.wall += 16
            clock.part("backward")
            now.wall += 32
            clock.part("optimizer")
            now.wall += 64
        clock.end()
        head(torch.ones(1))  # a validation
        clock.part("teacher")
        with clock.inside("wire"):
            now.wall += 1000
    of_two = {"data": 2, "teacher": 16, "wire": 16, "forward": 64, "head": 64, "backward": 128, "optimizer": 256}
    assert clock.read() == (sum(of_two.values()), of_two)
    assert clock.read() == (0.0, dict.fromkeys(of_two, 0.0))


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
        Mark.waited += not self.query()
        Mark.done = max(Mark.done, self.number)

    def elapsed_time(self, other: Mark) -> float:
        assert self.query() and other.query()
        return 3.0 * (other.number - self.number)


def test_on_a_gpu_nothing_waits_until_the_time_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more marks are kept than the device has before it."""
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    clock = StepClock(torch.device("cuda"))
    for step in clock.timed(range(WARM_UP + 2)):
        clock.part("teacher")
        clock.part("optimizer")
        clock.end()
        assert len(clock._marks) <= 8 and Mark.waited == 0
        Mark.done = 4 * step + 2  # the device is two parts behind
    seconds, parts = clock.read()
    assert seconds == pytest.approx((WARM_UP + 2) * 0.009)
    assert parts == pytest.approx(dict.fromkeys(("data", "teacher", "optimizer"), (WARM_UP + 2) * 0.003))
    assert 0 < Mark.waited <= 3
    cost = clock.cost()
    assert cost == {"steps": 2, "median_seconds": pytest.approx(0.009), "quartiles": pytest.approx([0.009, 0.009])}


def test_work_for_several_is_booked_where_it_is_used(now: Hand) -> None:
    """In the step that is under way, or between steps; who did it keeps its share of it."""
    one, other = StepClock(CPU), StepClock(CPU)
    steps, others = one.timed(range(2)), other.timed(range(2))
    began = one.now(), other.now()
    next(steps)
    one.part("teacher")
    begun = one.mark()
    now.wall += 6
    now.cpu += 3
    work = Span(begun, one.mark())
    one.book(work, -1.0)
    one.book(work, 1 / 3)
    one.part("forward")
    now.wall += 1
    with one.away():
        next(others)
        other.part("teacher")
        other.book(work, 2 / 3)
        other.part("forward")
        now.wall += 5
        other.end()
    one.end()
    assert one.read() == (3.0, {"data": 0.0, "teacher": 2.0, "forward": 1.0})
    assert other.read() == (9.0, {"data": 0.0, "teacher": 4.0, "forward": 5.0})
    assert one.now() - began[0] == 3.0
    other.book(work, 0.5)  # in a validation
    assert other.read() == (0.0, {"data": 0.0, "teacher": 0.0, "forward": 0.0})
    assert other.now() - began[1] == 1.0 + 6.0 + 5.0 + 4.0 + 3.0  # `one`'s turn was no time away
    next(steps)
    one.end()
    assert one.read()[0] == 0.0


def test_on_a_gpu_booked_work_is_read_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """And counts in the step in which it was booked, however far the device is behind."""
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(clocks, "time", Hand())  # stands still
    for name in ("made", "done", "waited"):
        monkeypatch.setattr(Mark, name, 0)
    gpu = torch.device("cuda")

    def measured(share: float) -> tuple[list[float], float, float]:
        """(ms of each of three steps, of their teacher's part, and by the run's own clock) where the second step books this share."""
        clock, other = StepClock(gpu), StepClock(gpu)
        began = clock.now()
        begun = other.mark()
        other.mark()
        work = Span(begun, other.mark())  # 6 ms
        Mark.waited = 0
        for step in clock.timed(range(3)):
            clock.part("teacher")
            if step == 1:
                clock.book(work, share)
            clock.end()
        clock.book(work, share)  # in a validation
        assert Mark.waited == 0
        teacher = clock.parts()["teacher"]
        return [1000 * seconds for seconds in clock._seconds], 1000 * teacher, 1000 * (clock.now() - began)

    (first, second, third), teacher, own = measured(0.0)
    assert own == 0
    for share in (-1.0, 0.25):
        steps, of_teacher, by_own = measured(share)
        assert steps == pytest.approx([first, second + share * 6, third])
        assert of_teacher == pytest.approx(teacher + share * 6)
        assert by_own == pytest.approx(2 * share * 6)
