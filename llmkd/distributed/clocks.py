"""The time of a run's steps and of their parts, taken without waiting for the device."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

Part = Literal["data", "teacher", "wire", "forward", "head", "backward", "optimizer"]
"""Of a step: waiting for its rows and for the other ranks' counts of them; the teacher's pass; waiting for states from other ranks of a
pipeline; the student's forward pass; its head, both models' logits and their gradients; the backward pass; the optimizer's step. What
ZeRO sends and gathers is in the part that it is for."""
WARM_UP = 3
"""Steps at the start of a run that its cost leaves out: they compile, allocate and import."""
Step = TypeVar("Step")


Away = Literal["away"]
AWAY: Final = "away"
"""Not the step's time: other runs of this process have their turn."""


class Mark(NamedTuple):
    """A place in the work, whose time is read later."""

    event: Any
    """What the device comes by on a GPU; else the time."""
    cpu_seconds: float
    """Of this process, on a CPU."""


class Span(NamedTuple):
    """The work between two marks."""

    begun: Mark
    ended: Mark


class _Change(NamedTuple):
    """From one part to the next, or within a part to what is booked."""

    mark: Mark
    begins: Part | Away | None
    """None: a step ends here, or none is under way."""
    booked: Span | None = None
    share: float = 0.0
    """Of what is booked here."""


class StepClock:
    """Takes the time of every step and divides it among its parts; what stands between two steps (validation, logs, saving) has none.

    On a GPU the device works on after the program has gone on. There the time is that between two marks in its queue of work: what it
    waits for in a part is that part's.

    Work that is done for several runs of this process is booked by each: see `book`.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._marks: deque[_Change] = deque()  # not read yet; the first begins what is read next
        self._part: Part | Away | None = None
        self._parts: dict[Part, float] = {}
        self._seconds, self._cpu_seconds = array("d"), array("d")  # of each step
        self._this, self._this_cpu = 0.0, 0.0  # of the step that is being read
        self._read_steps, self._read_parts = 0, dict[Part, float]()  # at the last call of `read`
        self._away_seconds = 0.0  # that have passed inside `away`
        self._booked_seconds = 0.0  # in steps and between them

    def timed(self, steps: Iterable[Step], apart: Callable[[], float] = lambda: 0.0) -> Iterator[Step]:
        """The same; a step begins when it is asked for, so that waiting for its rows is a part of it, or after work that is no
        step's own, whose seconds so far `apart` gives."""
        iterator = iter(steps)
        while True:
            before = apart()
            self._begin()
            if (step := next(iterator, None)) is None:
                self._forget()
                return
            if apart() > before:
                self._forget()
                self._begin()
            yield step

    def part(self, part: Part | Away) -> None:
        """From here on the step's time is this part's; outside of a step this does nothing."""
        if self._part is not None and part != self._part:
            self._change(part)

    @contextlib.contextmanager
    def inside(self, part: Part | Away) -> Iterator[None]:
        """Inside, the step's time is this part's; then again that of the part before."""
        before = self._part
        self.part(part)
        try:
            yield
        finally:
            if before is not None:
                self.part(before)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Inside, other runs of this process have their turn."""
        began = time.perf_counter()
        with self.inside(AWAY):
            yield
        self._away_seconds += time.perf_counter() - began

    def mark(self) -> Mark:
        """A mark at this place of the work."""
        if not self._gpu:
            return Mark(time.perf_counter(), time.process_time())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Mark(event, 0.0)

    def book(self, work: Span, share: float) -> None:
        """Add this share of the time of the teacher's work to the run's: to the step that is under way, if one is, and to `now`.

        The run that did the work has all of it in its own time: it books -1 of it, and then its share like the others.
        """
        self._change(self._part, work, share)

    def now(self) -> float:
        """The time by the run's own clock: it stands still inside `away`, and what is booked is added to it (a GPU has done that when this
        returns)."""
        if self._marks and self._marks[-1].booked is not None:
            self._change(self._part)
        self._collect(wait=True)
        return time.perf_counter() - self._away_seconds + self._booked_seconds

    def around(self, module: nn.Module, part: Part) -> None:
        """Let the forward passes of a module be this part of a step; to be called before an engine has the module."""
        before: list[Part | Away | None] = []

        def enter(*_: object) -> None:
            before.append(self._part)
            self.part(part)

        def leave(*_: object) -> None:
            if (outer := before.pop()) is not None:
                self.part(outer)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def end(self) -> None:
        """The step that was last given has done its work, or on a GPU been told to."""
        self._change(None)

    def read(self) -> tuple[float, dict[Part, float]]:
        """(seconds of the steps since the last call, the same by part); on a GPU they are waited for."""
        self._collect(wait=True)
        seconds = sum(self._seconds[self._read_steps :])
        parts: dict[Part, float] = {p: total - self._read_parts.get(p, 0.0) for p, total in self._parts.items()}
        self._read_steps, self._read_parts = len(self._seconds), dict(self._parts)
        return seconds, parts

    def parts(self) -> dict[Part, float]:
        """The seconds of all steps so far by part; on a GPU they are waited for."""
        self._collect(wait=True)
        return dict(self._parts)

    def cost(self) -> dict[str, object] | None:
        """Median and quartiles of this start's steps, on a CPU of this process' CPU seconds too; None where all are of the first ones."""
        self._collect(wait=True)
        steps = len(self._seconds) - WARM_UP
        if steps <= 0:
            return None
        low, median, high = np.quantile(self._seconds[WARM_UP:], (0.25, 0.5, 0.75)).tolist()
        cost: dict[str, object] = {"steps": steps, "median_seconds": median, "quartiles": [low, high]}
        if not self._gpu:
            low, median, high = np.quantile(self._cpu_seconds[WARM_UP:], (0.25, 0.5, 0.75)).tolist()
            cost |= {"cpu_seconds": median, "cpu_quartiles": [low, high]}
        return cost

    def _begin(self) -> None:
        self._change("data")

    def _forget(self) -> None:
        """The step that has begun was none, or begins anew."""
        self._marks.pop()
        self._part = None

    def _change(self, begins: Part | Away | None, booked: Span | None = None, share: float = 0.0) -> None:
        self._collect(wait=False)
        self._marks.append(_Change(self.mark(), begins, booked, share))
        self._part = begins

    def _collect(self, *, wait: bool) -> None:
        """Read the marks that the device has come by, so that no more are kept than it has before it. `wait`: all of them."""
        while len(self._marks) > 1:
            change, following = self._marks[0], self._marks[1]
            if self._gpu and wait:
                following.mark.event.synchronize()
            elif self._gpu and not following.mark.event.query():
                return
            self._marks.popleft()
            part = change.begins
            if change.booked is not None:  # which the device has done before it came by this mark
                seconds, cpu_seconds = self._between(change.booked)
                self._booked_seconds += change.share * seconds
                if part is not None:
                    self._add("teacher", change.share * seconds, change.share * cpu_seconds)
            if part is None or part == AWAY:  # between two steps, or not here
                continue
            self._add(part, *self._between(Span(change.mark, following.mark)))
            if following.begins is None:
                self._seconds.append(self._this)
                self._cpu_seconds.append(self._this_cpu)
                self._this = self._this_cpu = 0.0

    def _between(self, span: Span) -> tuple[float, float]:
        """(seconds, CPU seconds) of a span that the device has come by."""
        (begun, cpu_begun), (ended, cpu_ended) = span
        return (begun.elapsed_time(ended) / 1000 if self._gpu else ended - begun), cpu_ended - cpu_begun

    def _add(self, part: Part, seconds: float, cpu_seconds: float) -> None:
        """To a part of the step that is being read."""
        self._parts[part] = self._parts.get(part, 0.0) + seconds
        self._this, self._this_cpu = self._this + seconds, self._this_cpu + cpu_seconds
