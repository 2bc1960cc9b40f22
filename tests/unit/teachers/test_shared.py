"""One teacher for students in turn: what it runs, what each is given, and who goes when."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch

from llmkd.data.batches import Batch, collate
from llmkd.distributed.clocks import StepClock
from llmkd.errors import FoundByAll
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
            raise FoundByAll("the loss is nan")
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
