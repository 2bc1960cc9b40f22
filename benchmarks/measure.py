"""Seconds and bytes of a step: timed in turns, so that noise hits all alike; bytes counted exactly in passes of their own."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants import Contestant, SharedEngine, hooks_put_back
from benchmarks.shapes import Work
from llmkd.distributed.ranks import World, barrier, highest, sum_tensor
from tests.tensor_bytes import TensorBytes

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """MiB of one step on the rank that holds most."""

    passes: float
    """Tensors made in the forward and backward passes, at most alive at a time."""
    peak: float
    """The same of the whole step, with the optimizer's part."""
    resting: float
    """Tensors that are there before and after it: both models, gradients' buffers, optimizer."""
    process: float
    """What the process (on a GPU: the allocator) grew by at most."""


def seconds_of(world: World, step: Callable[[Work], Tensor], work: Work) -> tuple[float, Tensor]:
    """(seconds on the slowest rank, loss) of one step that all ranks begin together."""
    barrier(world)
    synchronise()
    began = time.perf_counter()
    loss = step(work)
    synchronise()
    return highest(world, time.perf_counter() - began), loss


def rounds(
    world: World, contestants: Sequence[Contestant], works: Sequence[Work], *, repeat: int, lead: int
) -> dict[str, list[float]]:
    """Seconds per step and round. In a round everybody has one turn on the same micro-batch; each round begins with another.

    `lead`: steps before the timed one, in which ZeRO-3 learns the order of parameters anew.
    """
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(repeat):
        work = works[number % len(works)]
        first = number % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            with contestant.turn() as step:
                for _ in range(lead):
                    step(work)
                gc.collect()
                seconds[contestant.name].append(seconds_of(world, step, work)[0])
    return seconds


def mean_loss(world: World, loss: Tensor) -> float:
    """The mean over the ranks."""
    return float(sum_tensor(world, loss.detach().double().clone())) / world.size


def memory(world: World, contestant: Contestant, work: Work) -> Memory:
    """The bytes of one step."""
    engine, passes = contestant.engine, []
    optimizer_step = engine.step

    def noting(*args: Any, **kwargs: Any) -> Any:
        passes.append(counted.peak)
        return optimizer_step(*args, **kwargs)

    with contestant.turn() as step:
        gc.collect()
        engine.step = noting
        with Allocated() if torch.cuda.is_available() else TensorBytes() as counted:
            grown = _growth(lambda: step(work))
        del engine.step  # the method of its class shows again
    values = (passes[0], counted.peak, resting_bytes([contestant.teacher, engine]), grown)
    return Memory(*(highest(world, value / MIB) for value in values))


class Allocated:
    """`TensorBytes` of a GPU's allocator: counting each operation would keep torch.compile from compiling."""

    def __enter__(self) -> Allocated:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing was changed."""

    @property
    def peak(self) -> int:
        """The most bytes beyond those at the start."""
        return torch.cuda.max_memory_allocated() - self._before

    @property
    def live(self) -> int:
        """Bytes beyond those at the start."""
        return torch.cuda.memory_allocated() - self._before


def bytes_up_to_backward(world: World, contestant: SharedEngine, work: Work) -> tuple[float, float]:
    """(peak of forward and backward passes, what waits between the two) in bytes, the optimizer's part left out."""
    with hooks_put_back(contestant.teacher):
        contestant.passing.start()
        gc.collect()
        with TensorBytes() as counted:
            loss = contestant.loss(work)
            waiting = counted.live
            contestant.engine.backward(loss, scale_wrt_gas=False)
            peak = counted.peak
        contestant.engine.step()
    return highest(world, peak), highest(world, waiting)


def resting_bytes(owners: Iterable[Any]) -> int:
    """Bytes of the tensors that these engines and modules hold, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    for owner in owners:
        _collect(owner, storages, seen, depth=6)
    return sum(storages.values())


def _collect(value: Any, storages: dict[int, int], seen: set[int], depth: int) -> None:
    if depth < 0 or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        for extra in (value.grad, getattr(value, "ds_tensor", None)):
            _collect(extra, storages, seen, depth)
    elif isinstance(value, nn.Module):
        inner = getattr(value, "optimizer", None)
        for tensor in (*value.parameters(), *value.buffers()):
            _collect(tensor, storages, seen, depth)
        _collect(inner, storages, seen, depth)
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            _collect(item, storages, seen, depth - 1)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _collect(item, storages, seen, depth - 1)
    elif type(value).__module__.startswith(("deepspeed.runtime", "torch.optim", "accelerate")):
        _collect(vars(value), storages, seen, depth - 1)


def _growth(work: Callable[[], object]) -> int:
    """How many bytes the process, or the GPU's allocator, grew by at most."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set counts from here
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
