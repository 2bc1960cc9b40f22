"""One teacher for students in turn: what it runs, what each is given, and who goes when."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from llmkd.data.batches import Batch, collate
from llmkd.distributed import clocks
from llmkd.distributed.clocks import StepClock
from llmkd.errors import Diverged
from llmkd.teachers.base import Demand, Signal
from llmkd.teachers.shared import SharedTeacher, Student, in_turn, same, union

CPU = torch.device("cpu")


def batch(first: int) -> Batch:
    rows = [{"input_ids": [first, 7, 8], "trained": [0, 1, 1]}]
    return collate(rows, pad_id=0, packed=False)


class Whole:
    """A teacher that notes what it is asked for; a block's state is a tensor of its number."""

    blocks = None

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.expected: list[list[int]] = []
        self.ran: list[int] = []

    def expect(self, batches: Sequence[Batch]) -> None:
        self.expected.append([int(b.input_ids[0, 0]) for b in batches])

    def signals(self, batch: Batch, uses: Sequence[int] | None = None) -> Signal:
        self.ran.append(int(batch.input_ids[0, 0]))
        uses = self.demand.blocks if uses is None else uses
        states = {block: torch.tensor(float(block)) for block in set(uses)}
        final = torch.tensor(99.0) if self.demand.logits else None
        return Signal(states, uses, final, None)


@pytest.fixture
def shared() -> tuple[SharedTeacher, list[Whole]]:
    made: list[Whole] = []

    def make(demand: Demand) -> Any:
        made.append(Whole(demand))
        return made[0]

    return SharedTeacher(make), made


def test_a_micro_batch_is_run_once_for_all(shared: tuple[SharedTeacher, list[Whole]]) -> None:
    teacher, made = shared
    first = teacher.seat(Demand((1, 3, 3), logits=True), StepClock(CPU))
    second = teacher.seat(Demand((5,), logits=False), StepClock(CPU))
    assert not made  # loaded when all are known
    teacher.load()
    for step in range(3):
        for seat in (first, second):
            seat.expect([batch(10 * step), batch(10 * step + 1)])
        for number in range(2):
            ours = first.signals(batch(10 * step + number))
            assert [float(ours.take(block)) for block in (1, 3, 3)] == [1, 3, 3] and ours.held == 0
            assert ours.final is not None and float(ours.final) == 99
            theirs = second.signals(batch(10 * step + number))
            assert float(theirs.take(5)) == 5 and theirs.held == 0 and theirs.final is None
            with pytest.raises(KeyError):
                theirs.take(1)
    (whole,) = made
    assert whole.demand == Demand((1, 3, 5), logits=True)
    assert whole.expected == [[0, 1], [10, 11], [20, 21]]
    assert whole.ran == [0, 1, 10, 11, 20, 21] and teacher.passes == 6


def test_one_that_comes_later_joins_what_was_announced(shared: tuple[SharedTeacher, list[Whole]]) -> None:
    """A student that was ahead when all were killed waits until the others are where it is."""
    teacher, made = shared
    behind, ahead = (
        teacher.seat(Demand((1,), logits=True), StepClock(CPU)),
        teacher.seat(Demand((2,), logits=True), StepClock(CPU), turns_done=1),
    )
    teacher.load()
    behind.expect([batch(1)])
    behind.expect([batch(2)])
    behind.signals(batch(1))
    behind.expect([batch(3)])
    ahead.expect([batch(2)])
    ahead.expect([batch(3)])
    for seat in (ahead, behind):
        seat.signals(batch(2))
    for seat in (behind, ahead):
        seat.signals(batch(3))
    assert made[0].expected == [[1], [2], [3]] and made[0].ran == [1, 2, 3]


def test_the_same_rows_again_are_another_pass(shared: tuple[SharedTeacher, list[Whole]]) -> None:
    """Also for one that joins in between: which pass is the last one follows from the turn, and so is found alike by all ranks."""
    teacher, made = shared
    seats = [teacher.seat(Demand((1,), logits=True), StepClock(CPU)) for _ in range(2)]
    late = teacher.seat(Demand((1,), logits=True), StepClock(CPU), turns_done=2)
    teacher.load()
    for turn in range(3):
        present = [late, *seats] if turn == 2 else seats
        for seat in present:
            seat.expect([batch(4)])
        for seat in present:
            seat.signals(batch(4))
    assert made[0].expected == [[4], [4], [4]] and made[0].ran == [4, 4, 4]


def test_what_was_not_announced_is_run_for_one_alone(shared: tuple[SharedTeacher, list[Whole]]) -> None:
    teacher, made = shared
    seat = teacher.seat(Demand((1,), logits=True), StepClock(CPU))
    teacher.seat(Demand((2,), logits=True), StepClock(CPU))
    teacher.load()
    assert float(seat.signals(batch(6), [2]).take(2)) == 2
    assert made[0].ran == [6] and teacher.passes == 0


def test_other_rows_are_refused(shared: tuple[SharedTeacher, list[Whole]]) -> None:
    teacher, _ = shared
    one, other = (teacher.seat(Demand((1,), logits=True), StepClock(CPU)) for _ in range(2))
    teacher.load()
    one.expect([batch(1)])
    with pytest.raises(AssertionError, match="students in turn train on the same micro-batches"):
        other.expect([batch(2)])


def test_batches_are_compared_by_all_they_hold() -> None:
    assert same(batch(1), batch(1)) and not same(batch(1), batch(2))
    longer = collate([{"input_ids": [1, 7, 8, 9], "trained": [0, 1, 1, 1]}], pad_id=0, packed=False)
    assert not same(batch(1), longer)
    untrained = collate([{"input_ids": [1, 7, 8], "trained": [0, 0, 1]}], pad_id=0, packed=False)
    assert not same(batch(1), untrained)


def test_demands_together_ask_for_all() -> None:
    asked = union([Demand((3, 1), logits=False, stones=(2,)), Demand((1, -1), logits=True)])
    assert asked == Demand((-1, 1, 3), logits=True, stones=(2,))


def test_those_behind_go_first_and_the_first_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []

    def training(name: str, first: int, last: int) -> Generator[int, None, bool]:
        for step in range(first, last):
            order.append((name, step))
            yield step  # after a micro-batch
            yield step + 1
        return True

    students = [Student(name, first, training(name, first, 4)) for name, first in (("a", 0), ("b", 2), ("c", 0))]
    in_turn(students)
    assert all(student.exported and student.failed is None for student in students)
    assert order == [
        *[("a", 0), ("c", 0), ("c", 1), ("a", 1)],
        *[("c", 2), ("a", 2), ("b", 2)],  # step 2: the third of three is the first
        *[("a", 3), ("b", 3), ("c", 3)],
    ]


def test_one_that_diverges_ends_alone() -> None:
    def training(*, ends: bool) -> Generator[int, None, bool]:
        yield 0
        if ends:
            raise Diverged("the loss is nan")
        yield 1
        return True

    students = [Student("bad", 0, training(ends=True)), Student("good", 0, training(ends=False))]
    in_turn(students)
    assert [student.failed for student in students] == ["the loss is nan", None]
    assert [student.exported for student in students] == [False, True]


def test_each_has_random_numbers_of_its_own() -> None:
    drawn: dict[str, list[float]] = {}

    def training(name: str) -> Generator[int, None, bool]:
        for step in range(3):
            drawn.setdefault(name, []).append(float(torch.rand(())))
            yield step
        return True

    def students(*names: str) -> list[Student]:
        made = []
        for seed, name in enumerate(names):
            torch.manual_seed(seed)
            made.append(Student(name, 0, training(name)))
        return made

    in_turn(students("a", "b"))
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        assert drawn[name] == [float(torch.rand(())) for _ in range(3)]


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
