"""Students that are trained in turn, a micro-batch each, off one teacher, which runs each micro-batch once for all of them.

Every student has its own seat at the teacher and its own training, a generator that stops after each micro-batch. All students see the
same micro-batches, and those that have trained fewest steps go first; so when one comes to a micro-batch, either the teacher has just
run it for another student, or nobody has been there before. Whoever runs it, its time is booked to all in equal parts.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.distributed.clocks import Span, StepClock
from llmkd.errors import FoundByAll
from llmkd.losses.head_inputs import TopK
from llmkd.teachers.base import Demand, Head, Signal, Teacher, Upper

log = logging.getLogger("llmkd")

TURNS_AHEAD = 2
"""How many turns may be announced beyond the one that is run, with one to spare."""
Training = Generator[int, None, bool]
"""The training of a student: gives after each micro-batch how many steps are done, at the end whether the student is exported."""


@dataclass
class _Pass:
    """What the teacher gave for the micro-batch that it ran last; held until the next one."""

    place: tuple[int, int]
    """The number of its turn, and its own number in that."""
    states: dict[int, Tensor]
    final: Tensor | None
    head: Head | None
    top_k: TopK | None
    upper: Upper | None
    work: Span
    """Running it."""
    students: int
    """That were expected to take it when it was run."""
    taken: int = 0
    """How many have."""


class SharedTeacher:
    """One teacher for several students. `make` loads it, when all of them are known, with all that they need of it.

    What is announced at once, a step's micro-batches or a validation's, is a turn. Turns are numbered alike for all students, so that all
    ranks find the same pass to be the last one, whatever rows they have.
    """

    def __init__(self, make: Callable[[Demand], Teacher]) -> None:
        self._make = make
        self._demands: list[Demand] = []
        self._first: list[tuple[int, int]] = []  # of each student, the place where it begins
        self._loaded: Teacher | None = None
        self._turns: dict[int, tuple[Batch, ...]] = {}  # announced to the teacher
        self._last: _Pass | None = None
        self.passes = 0
        """How many micro-batches the teacher has run for students in turn."""

    def seat(self, demand: Demand, clock: StepClock, turns_done: int = 0) -> Seat:
        """A teacher for one more student, before any of them is trained. `clock`: of its steps; `turns_done`: of a run that goes on."""
        assert self._loaded is None, "the teacher is loaded for the students that it knows of"
        self._demands.append(demand)
        self._first.append((turns_done + 1, 0))
        return Seat(self, demand, clock, turns_done)

    def load(self) -> None:
        """Load the teacher for those that have a seat, before any of them is trained, whose time this is not (all ranks take part)."""
        self._loaded = self._make(union(self._demands))

    @property
    def teacher(self) -> Teacher:
        """The one teacher."""
        assert self._loaded is not None, "it is loaded before students are trained"
        return self._loaded

    def announce(self, number: int, batches: Sequence[Batch]) -> None:
        """Announce the micro-batches of a turn to the teacher, unless a student has before."""
        if number not in self._turns:
            self.teacher.expect(batches)
            self._turns[number] = tuple(batches)
            for over in [turn for turn in self._turns if turn < number - TURNS_AHEAD]:
                del self._turns[over]
        assert _all_same(self._turns[number], batches), "students in turn train on the same micro-batches"

    def signal(
        self, place: tuple[int, int], demand: Demand, batch: Batch, uses: Sequence[int] | None, clock: StepClock
    ) -> Signal:
        """The signal of a micro-batch for one student, and its share of the time, for its clock; `place`: see `_Pass`."""
        if self._last is None or self._last.place != place:
            students = self._students_at(place)
            self._last = None  # so that no two are held while the teacher runs
            self._last = self._run(place, batch, students, clock)
            clock.book(self._last.work, -1.0)
        last, uses = self._last, demand.blocks if uses is None else uses
        last.taken += 1
        clock.book(last.work, 1 / last.students)
        states = {block: last.states[block] for block in set(uses)}
        if not demand.logits:
            return Signal(states, uses, None, None)
        return Signal(states, uses, last.final, last.head, last.top_k, last.upper if demand.stones else None)

    def _students_at(self, place: tuple[int, int]) -> int:
        """How many are expected to take the pass at this place: those that took the last one, and those that begin here.

        One that has ended since is still counted; its share of this one pass is then nobody's.
        """
        return (0 if self._last is None else self._last.taken) + self._first.count(place)

    def _run(self, place: tuple[int, int], batch: Batch, students: int, clock: StepClock) -> _Pass:
        self.passes += 1
        begun = clock.mark()
        signal = self.teacher.signals(batch)
        states = {block: signal.take(block) for block in union(self._demands).blocks}
        work = Span(begun, clock.mark())
        return _Pass(place, states, signal.take_final(), signal.head, signal.top_k, signal.upper, work, students)


class Seat:
    """The shared teacher as one student sees it: a teacher like any other."""

    def __init__(self, shared: SharedTeacher, demand: Demand, clock: StepClock, turns_done: int) -> None:
        self._shared, self._demand, self._clock = shared, demand, clock
        self._announced = turns_done
        self._coming: deque[tuple[int, int]] = deque()

    @property
    def blocks(self) -> nn.ModuleList | None:
        """All the teacher's blocks, where a rank can run them itself."""
        return self._shared.teacher.blocks

    def expect(self, batches: Sequence[Batch]) -> None:
        """Announce the micro-batches of the next calls of `signals`."""
        self._announced += 1
        self._shared.announce(self._announced, batches)
        self._coming.extend((self._announced, number) for number in range(len(batches)))

    def signals(self, batch: Batch, uses: Sequence[int] | None = None) -> Signal:
        """The signal for a micro-batch; one that was not announced is run for this student alone."""
        if not self._coming:
            return self._shared.teacher.signals(batch, uses)
        return self._shared.signal(self._coming.popleft(), self._demand, batch, uses, self._clock)


def union(demands: Sequence[Demand]) -> Demand:
    """All that any of these asks for, each block once."""
    assert len({demand.normed_last for demand in demands}) == 1, "one pass gives the last block's state in one form"
    return Demand(
        tuple(sorted({block for demand in demands for block in demand.blocks})),
        logits=any(demand.logits for demand in demands),
        normed_last=demands[0].normed_last,
        stones=tuple(sorted({block for demand in demands for block in demand.stones})),
    )


def same(one: Batch, other: Batch) -> bool:
    """Whether two micro-batches in host memory hold the same rows at the same places."""
    if one is other:
        return True
    pairs = [(getattr(one, part.name), getattr(other, part.name)) for part in fields(Batch)]
    return all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
        if isinstance(a, Tensor) or isinstance(b, Tensor)
        else a == b
        for a, b in pairs
    )


def _all_same(ones: Sequence[Batch], others: Sequence[Batch]) -> bool:
    return len(ones) == len(others) and all(map(same, ones, others))


# ---------------------------------------------------------------------------------------------------------------------
# Who goes when


class Random:
    """The state of torch's random numbers, of this machine's CPU and of this process' GPU."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        """Go on with the random numbers from here."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)


class Student:
    """One of the students that are trained in turn, with random numbers of its own; made when its training is ready to begin."""

    def __init__(self, name: str, done: int, training: Training) -> None:
        self.name, self.done = name, done
        self.exported = False
        self.failed: str | None = None
        self._training, self._random = training, Random()

    def turn(self) -> bool:
        """Train on one micro-batch (all ranks take part); whether the training goes on."""
        self._random.restore()
        try:
            self.done = next(self._training)
        except StopIteration as end:
            self.exported = end.value
            return False
        except FoundByAll as error:
            self.failed = str(error)
            return False
        self._random = Random()
        return True


def in_turn(students: Sequence[Student]) -> None:
    """Train all to their ends, those first that have done the fewest steps (all ranks take part).

    At each step another student is the first, for it is the one that waits until the other ranks have come as far. A student whose training
    can't go on, as all ranks find, ends alone.
    """
    going = list(students)
    while going:
        least = min(student.done for student in going)
        present = [student for student in going if student.done == least]
        first = least % len(present)
        for student in present[first:] + present[:first]:
            if not student.turn():
                going.remove(student)
                if student.failed is not None and going:
                    log.info("%s: ended: %s; the others go on", student.name, student.failed)
