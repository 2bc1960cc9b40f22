"""Ranks and collectives. Beside this room nobody imports deepspeed or torch.distributed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmkd.distributed.ending import end_watch
from llmkd.distributed.joining import join, patience
from llmkd.errors import FoundByAll, InputError, problem
from llmkd.starting import RUNS

os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on every rank that it found none

import deepspeed  # noqa: E402
import torch.distributed as dist  # noqa: E402

Result = TypeVar("Result")
BEAT_SECONDS = 5
"""Between two collectives of ranks that wait for long work of one, at most."""


@dataclass(frozen=True)
class World:
    """This process among its peers. `control` is the group for small CPU tensors and objects: with it nothing waits for the device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: Any
    local_size: int
    """Ranks on this machine."""
    timeout: timedelta
    """How long a rank waits for another."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(timeout_seconds: int = 1800) -> World:
    """Join the process group that the launcher (deepspeed, torchrun, llmkd train) described, or make one of a single process."""
    # Only for its shared-memory operator, which inference uses, would DeepSpeed look here. The look-up compiles probes, and building the
    # operator takes a C++ compiler and a minute.
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 (a name its type stubs do not know)
    timeout = timedelta(seconds=timeout_seconds)
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        _let_segments_grow()
        torch.cuda.set_device(device)
    _share_cores()
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            join(backend, timeout, device if cuda else None)
        else:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if not deepspeed.comm.is_initialized():
        backend = dist.get_backend()
        # DeepSpeed makes its groups without a timeout, which on NCCL is ten minutes then, whatever the recipe says
        dist.distributed_c10d.default_pg_nccl_timeout = patience("nccl", timeout)
        limit = patience(backend, timeout)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=limit, verbose=False)
    control = dist.new_group(backend="gloo", timeout=timeout) if cuda else dist.group.WORLD
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, control, _local_size(), timeout)


def stop() -> None:
    """Leave the process group, at the end of all work (all ranks take part where they have a watch)."""
    end_watch()
    if dist.is_initialized():
        dist.destroy_process_group()


def _let_segments_grow() -> None:
    """Have PyTorch enlarge what it has of a GPU's memory in place of asking for more pieces, unless the user says how: micro-batches of
    many lengths would leave gaps between the pieces. It is read when CUDA starts."""
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _share_cores() -> None:
    """Give each rank its share of the machine's cores; without this every rank starts a thread per core (beside a GPU for DeepSpeed's
    optimizer in host memory) and all crawl."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = _local_size() * int(os.environ.get(RUNS, 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def _local_size() -> int:
    """Ranks on this machine, as torchrun (and `llmkd train`) or the deepspeed launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    dist.barrier(group=world.control)


def wait_for_device(world: World) -> None:
    """Wait until the device has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def sum_counts(world: World, counts: list[int]) -> list[int]:
    """Add small integers over the ranks, on the CPU: the device is not waited for."""
    tensor = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(tensor, group=world.control)
    return tensor.tolist()


def gather(world: World, value: Result) -> list[Result]:
    """Every rank's small value of numbers and texts, by rank (all ranks take part)."""
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.control)
    return values


def sum_tensor(world: World, tensor: Tensor) -> Tensor:
    """Add a device tensor over the ranks."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def all_rows(world: World, rows: Tensor) -> tuple[Tensor, int]:
    """(every rank's rows [N, H] under one another, where this rank's [n, H] begin); no gradient passes. All ranks take part."""
    if world.size == 1:
        return rows.detach(), 0
    counts = sum_counts(world, [len(rows) if rank == world.rank else 0 for rank in range(world.size)])
    mine = rows.new_zeros(max(counts), rows.shape[1])  # a collective moves equal shares
    mine[: len(rows)] = rows.detach()
    shares = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(shares, mine)
    whole = torch.cat([share[:count] for share, count in zip(shares, counts, strict=True)])
    return whole, sum(counts[: world.rank])


def highest(world: World, value: float) -> float:
    """The largest of the ranks' values."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=world.control)
    return tensor.item()


def on_main(world: World, work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 while the others wait, however long it takes, and give every rank its result (or its InputError, FoundByAll)."""
    if world.size == 1:
        attempt = _attempted(work)
    else:
        with ThreadPoolExecutor(1) as pool:
            attempt = _waited_for(world, pool.submit(_attempted, work) if world.is_main else None) or _Attempt()
    failed = attempt.failure is not None
    answer: list[Any] = [attempt.result, f"rank 0 {attempt.sentence}" if failed else attempt.sentence, failed]
    dist.broadcast_object_list(answer, src=0, group=world.control)
    if attempt.failure is not None:
        raise attempt.failure
    result, sentence, failed = answer
    if sentence is not None:
        raise InputError(sentence) if failed else FoundByAll(sentence)
    return result


def on_each_node(world: World, work: Callable[[], Result]) -> tuple[list[Result], Result]:
    """Run `work` on one rank of each node, in a thread, while the others wait, however long it takes.

    All get (the nodes' results, that of their own node), or the first InputError (all ranks take part).
    """
    with ThreadPoolExecutor(1) as pool:
        attempt = _waited_for(world, pool.submit(_attempted, work) if world.local_rank == 0 else None)
    if attempt is not None and attempt.failure is not None:
        gather(world, (None, f"rank {world.rank} {attempt.sentence}"))
        raise attempt.failure
    answers = gather(world, None if attempt is None else (attempt.result, attempt.sentence))
    for _, sentence in filter(None, answers):
        if sentence is not None:
            raise InputError(sentence)
    own = next(
        answer for answer in reversed(answers[: world.rank + 1]) if answer is not None
    )  # ranks of a node follow each other
    return [result for result, _ in filter(None, answers)], own[0]


def on_every_rank(world: World, thread: Executor, work: Callable[[], Result]) -> list[Result]:
    """Run `work` on every rank, in a thread of the caller's, however much longer it takes on one than on the others.

    All get all ranks' results, or the first InputError (all ranks take part).
    """

    def on_device() -> Result:
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # a thread begins on the first one
        return work()

    attempt = _waited_for(world, thread.submit(_attempted, on_device))
    assert attempt is not None
    failed = attempt.failure is not None
    answers = gather(world, (attempt.result, f"rank {world.rank} {attempt.sentence}" if failed else attempt.sentence))
    if attempt.failure is not None:
        raise attempt.failure
    for _, sentence in answers:
        if sentence is not None:
            raise InputError(sentence)
    return [result for result, _ in answers]


def _waited_for(world: World, running: Future[_Attempt] | None) -> _Attempt | None:
    """What runs in a thread of this rank, if anything does, when that of all ranks has ended (all ranks take part)."""
    beat = min(BEAT_SECONDS, world.timeout.total_seconds() / 3)
    while True:  # a collective every few seconds, so that no wait for one takes as long as its timeout
        done = running is None or bool(wait([running], beat).done)
        if sum_counts(world, [int(not done)]) == [0]:
            return None if running is None else running.result()


@dataclass(frozen=True)
class _Attempt:
    """How a piece of work that one rank does for others ended."""

    result: Any = None
    sentence: str | None = None
    """What the other ranks are told."""
    failure: BaseException | None = None
    """What is no user's mistake, to be raised where it happened."""


def _attempted(work: Callable[[], Any]) -> _Attempt:
    try:
        return _Attempt(work())
    except InputError as error:
        return _Attempt(sentence=str(error))
    except BaseException as error:  # the other ranks must not wait for ever
        lacks = problem(error)
        failed = f"failed: {type(error).__name__}: {error}"
        return _Attempt(sentence=lacks or failed, failure=None if lacks else error)


def quiet() -> None:
    """Limit DeepSpeed's own log to warnings, and hide torch's warnings about the older names that DeepSpeed calls."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
