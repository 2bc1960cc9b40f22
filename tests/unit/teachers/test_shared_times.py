"""The time of a shared teacher's passes, as the students' clocks have it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import pytest

from llmkd.data.batches import Batch
from llmkd.distributed import clocks
from llmkd.distributed.clocks import StepClock
from llmkd.teachers.base import Demand, Signal
from llmkd.teachers.shared import SharedTeacher, Student, in_turn
from tests.unit.teachers.test_shared import CPU, Whole, batch


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.wall = 100.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.wall / 2


class Slow(Whole):
    """A teacher whose pass takes 12 seconds by this clock."""

    def __init__(self, demand: Demand, now: Hand) -> None:
        super().__init__(demand)
        self.now = now

    def signals(self, batch: Batch, uses: Sequence[int] | None = None) -> Signal:
        self.now.wall += 12
        return super().signals(batch, uses)


class Timed(NamedTuple):
    """What a student's clock says."""

    teachers: list[float]
    """The teacher's part of each step."""
    steps: list[float]
    seconds: float
    """Of its whole training."""
    validation: float
    cost: dict[str, Any] | None


class Lesson:
    """Students of one slow teacher, of two micro-batches a step each; a student's own micro-batch takes a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = Hand()
        monkeypatch.setattr(clocks, "time", self.now)
        self.teacher = SharedTeacher(lambda demand: Slow(demand, self.now))
        self.timed: dict[str, Timed] = {}

    def student(self, name: str, *, first: int = 0, last: int, taught: bool = True, validated: bool = False) -> Student:
        """One that does the steps `first` to `last`, and is validated after each of them or never."""
        clock, turns = StepClock(CPU), first * (1 + validated)
        seat = self.teacher.seat(Demand((len(self.timed),), logits=True), clock, turns) if taught else None
        return Student(name, first, self._training(name, clock, seat, first, last, validated))

    def _training(
        self, name: str, clock: StepClock, seat: Any, first: int, last: int, validated: bool
    ) -> Generator[int, None, bool]:
        began, validation, teachers, steps = clock.now(), 0.0, list[float](), list[float]()
        for step in clock.timed(range(first, last)):
            micro_batches = [batch(10 * step), batch(10 * step + 1)]
            if seat is not None:
                seat.expect(micro_batches)
            for micro_batch in micro_batches:
                clock.part("teacher")
                if seat is not None:
                    seat.signals(micro_batch)
                clock.part("forward")
                self.now.wall += 1
                with clock.away():
                    yield step
            clock.end()
            seconds, parts = clock.read()
            teachers.append(parts.get("teacher", 0.0))
            steps.append(seconds)
            if validated:
                before = clock.now()
                if seat is not None:
                    seat.expect([batch(7)])
                    seat.signals(batch(7))
                self.now.wall += 3
                with clock.away():
                    yield step
                validation += clock.now() - before
            with clock.away():
                yield step + 1
        self.timed[name] = Timed(teachers, steps, clock.now() - began, validation, clock.cost())
        return True

    def train(self, *students: Student) -> float:
        """Train them all; how long that takes."""
        self.teacher.load()
        began = self.now.wall
        in_turn(students)
        assert all(student.exported for student in students)
        return self.now.wall - began


def test_a_pass_is_paid_in_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever uses it, in the step that does; also where one without a seat goes first. Validations are shared alike."""
    lesson = Lesson(monkeypatch)
    names = ("none", "forward", "reverse")
    students = [
        lesson.student("ce_only", last=6, taught=False, validated=True),
        *(lesson.student(name, last=6, validated=True) for name in names),
    ]
    seconds = lesson.train(*students)
    for name in names:
        assert lesson.timed[name] == Timed(
            teachers=[8.0] * 6,  # two passes of 12 seconds among three
            steps=[10.0] * 6,
            seconds=6 * 10.0 + 6 * 7.0,
            validation=6 * (3 + 4.0),
            cost={
                "steps": 3,
                "median_seconds": 10.0,
                "quartiles": [10.0, 10.0],
                "cpu_seconds": 5.0,
                "cpu_quartiles": [5.0, 5.0],
            },
        )
    assert lesson.timed["ce_only"][:4] == ([0.0] * 6, [2.0] * 6, 6 * 2 + 6 * 3, 6 * 3)
    assert sum(timed.seconds for timed in lesson.timed.values()) == seconds


def test_who_catches_up_alone_pays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lesson = Lesson(monkeypatch)
    seconds = lesson.train(
        lesson.student("behind", last=7),
        lesson.student("ahead", first=2, last=7),
        lesson.student("far", first=4, last=7),
    )
    two, three = 2 * 12 / 2, 2 * 12 / 3
    assert lesson.timed["behind"].teachers == [24.0, 24.0, two, two, three, three, three]
    assert lesson.timed["ahead"].teachers == [two, two, three, three, three]
    assert lesson.timed["far"].teachers == [three, three, three]
    assert sum(timed.seconds for timed in lesson.timed.values()) == seconds


def test_one_that_has_ended_pays_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share of the first pass without it is nobody's, for at that pass it is still waited for."""
    lesson = Lesson(monkeypatch)
    lesson.train(lesson.student("short", last=2), lesson.student("long", last=4), lesson.student("too", last=4))
    whole = 2 * 12
    assert lesson.timed["short"].teachers == [whole / 3, whole / 3]
    for name in ("long", "too"):
        assert lesson.timed[name].teachers == [whole / 3, whole / 3, 12 / 3 + 12 / 2, whole / 2]


def test_a_student_with_the_teacher_to_itself_pays_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside students of cross-entropy alone."""
    lesson = Lesson(monkeypatch)
    lesson.train(lesson.student("ce_only", last=5, taught=False), lesson.student("kl", last=5))
    assert lesson.timed["kl"].steps == [26.0] * 5 and lesson.timed["kl"].seconds == 5 * 26
    assert lesson.timed["ce_only"].steps == [2.0] * 5
