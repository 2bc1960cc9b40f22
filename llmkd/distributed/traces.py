"""What the program and the device did in a few steps, kernel by kernel, as torch's profiler records it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity

from llmkd.distributed.clocks import WARM_UP

log = logging.getLogger("llmkd")
Step = TypeVar("Step")


def traced(steps: Iterable[Step], count: int, file: Path) -> Iterator[Step]:
    """The same; so many steps after the first WARM_UP are recorded in `file` (.json.gz), which chrome://tracing and Perfetto show.

    A step is recorded from when it is asked for to when the next one is; where the steps end before, those that there were.
    """
    iterator = iter(steps)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    profiler = torch.profiler.profile(activities=activities)
    taken, recording = 0, False
    try:
        while True:
            if taken == WARM_UP:
                profiler.start()
                recording = True
            if (step := next(iterator, None)) is None:
                return
            taken += 1
            yield step
            if taken == WARM_UP + count:
                break
    finally:
        if recording:
            profiler.stop()
            file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(file))
            log.info("profiled %d steps: %s", taken - WARM_UP, file)
    yield from iterator
