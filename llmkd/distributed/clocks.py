"""How long the device worked on a part of the program, without waiting for it there."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class DeviceClock:
    """Adds up the time of what is done inside `timed`.

    On a GPU the device works on after the program has gone on: there the time is that between two marks in its queue of work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Inside is what counts."""
        if not self._on_gpu:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        yield
        after.record()
        self._marks.append((before, after))
        while (
            self._marks and self._marks[0][1].query()
        ):  # the device has come by: no more marks are kept than it has before it
            self._read()

    @property
    def seconds(self) -> float:
        """All so far; waits for the device."""
        while self._marks:
            self._marks[0][1].synchronize()
            self._read()
        return self._seconds

    def _read(self) -> None:
        before, after = self._marks.popleft()
        self._seconds += before.elapsed_time(after) / 1000
