"""What the program and the device did in a few steps, kernel by kernel, as torch's profiler records it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity

from llmkd.distributed.clocks import WARM_UP

log = logging.getLogger("llmkd")
Step = TypeVar("Step")


class Trace:
    """Records `count` steps of a run, after its first WARM_UP, in `file` (.json.gz), which chrome://tracing and Perfetto show."""

    def __init__(self, count: int, file: Path) -> None:
        self._count, self._file = count, file
        self.seconds = 0.0
        """What starting the profiler and writing the file have taken; no step's own time."""

    def of(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same steps. One is recorded from when it is asked for to when the next one is; where they end before, fewer are."""
        iterator = iter(steps)
        if not self._count:
            yield from iterator
            return
        profiler, taken = None, 0
        try:
            while taken < WARM_UP + self._count:
                if taken == WARM_UP:
                    profiler = self._started()
                if (step := next(iterator, None)) is None:
                    break
                taken += 1
                yield step
        finally:
            if profiler is not None:
                self._write(profiler, taken - WARM_UP)
        yield from iterator

    def _started(self) -> torch.profiler.profile:
        began = time.perf_counter()
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()
        self.seconds += time.perf_counter() - began
        return profiler

    def _write(self, profiler: torch.profiler.profile, steps: int) -> None:
        began = time.perf_counter()
        profiler.stop()
        if steps:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._file))
            log.info("profiled %d steps: %s", steps, self._file)
        else:
            log.warning("train.profile_steps: no step is left after the first %d, so nothing was profiled", WARM_UP)
        self.seconds += time.perf_counter() - began
