"""Where a step's time goes: exclusive seconds of its phases, and the operations that take longest."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import llmkd.student.matching
from benchmarks.contestants import Contestant
from benchmarks.measure import seconds_of, synchronise
from benchmarks.shapes import Work
from llmkd.distributed.ranks import World
from llmkd.models.parts import backbone

PHASES = ("teacher", "student forward", "matching", "backward", "optimizer", "head and the rest")
COMMUNICATION = ("gloo:", "nccl:", "c10d::", "nccldevkernel", "ncclkernel")


class Clock:
    """Time goes to the innermost phase that is open."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = [PHASES[-1]]
        self._since = time.perf_counter()

    def _charge(self) -> None:
        synchronise()
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def enter(self, phase: str) -> None:
        self._charge()
        self._open.append(phase)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def restart(self) -> None:
        self._charge()
        self.seconds.clear()


def phases_of(contestant: Contestant, work: Work, *, steps: int = 2) -> dict[str, float]:
    """Mean seconds of each phase. On a GPU every border waits for it, so the sum is more than a step takes."""
    clock = Clock()
    with contestant.turn() as step, _watched(clock, contestant):
        clock.restart()
        for _ in range(steps):
            step(work)
        clock.enter("end")
    return {phase: clock.seconds[phase] / steps for phase in PHASES}


def operations_of(
    world: World, contestant: Contestant, work: Work, *, rows: int = 12, trace: Path | None = None
) -> tuple[str, float]:
    """(torch.profiler's table of the longest operations in one step, the share of communication); `trace` gets the whole of it."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with contestant.turn() as step, profile(activities=activities) as recorded:
        seconds_of(world, step, work)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(trace))
    averages = recorded.key_averages()
    spent = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    whole = sum(getattr(event, spent) for event in averages) or 1
    sent = sum(getattr(event, spent) for event in averages if event.key.lower().startswith(COMMUNICATION))
    return averages.table(sort_by=spent, row_limit=rows, max_name_column_width=45), sent / whole


@contextmanager
def _watched(clock: Clock, contestant: Contestant) -> Iterator[None]:
    """Inside, the clock follows the phases of a step: by hooks on the models, and by wrapped methods of the engine."""
    with ExitStack() as stack:
        for model, phase in ((contestant.student, "student forward"), (contestant.teacher, "teacher")):
            body = backbone(model)
            enter, leave = _entering(clock, phase)
            stack.callback(body.register_forward_pre_hook(enter).remove)
            stack.callback(body.register_forward_hook(leave).remove)
        for owner, method, phase in (
            (contestant.engine, "backward", "backward"),
            (contestant.engine, "step", "optimizer"),
            (llmkd.student.matching, "distance_sum", "matching"),
        ):
            _wrap(stack, owner, method, clock, phase)
        yield


def _entering(clock: Clock, phase: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """A module's hooks before and after it."""

    def enter(module: nn.Module, args: object) -> None:
        clock.enter(phase)

    def leave(module: nn.Module, args: object, output: object) -> None:
        clock.leave()

    return enter, leave


def _wrap(stack: ExitStack, owner: Any, name: str, clock: Clock, phase: str) -> None:
    inner: Callable[..., Any] = getattr(owner, name)
    own = name in vars(owner)

    def timed(*args: Any, **kwargs: Any) -> Any:
        clock.enter(phase)
        try:
            return inner(*args, **kwargs)
        finally:
            clock.leave()

    setattr(owner, name, timed)
    stack.callback(lambda: setattr(owner, name, inner) if own else delattr(owner, name))
