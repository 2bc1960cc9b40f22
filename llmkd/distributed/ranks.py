"""Ranks and collectives. Beside this room nobody imports deepspeed or torch.distributed."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmkd.distributed.joining import LostRank, join
from llmkd.errors import InputError, storage_problem

os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on every rank that it found none

import deepspeed  # noqa: E402
import torch.distributed as dist  # noqa: E402

Result = TypeVar("Result")
BEAT_SECONDS = 5
"""Between two collectives of ranks that wait for long work of one."""
PRINTED = "llmkd/printed"
"""The store's key by which rank 0 tells the others that it has printed their common mistake."""


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
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, timeout=timeout, verbose=False
        )
    control = dist.new_group(backend="gloo", timeout=timeout) if cuda else dist.group.WORLD
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, control, _local_size(), timeout)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def print_mistake(sentence: str, patience_seconds: float = 3) -> None:
    """Print the mistake that ends this rank, once: rank 0 prints it, another rank only where rank 0 did not make it too.

    A launcher ends all ranks when the first one exits. So each other rank waits until rank 0 has printed, and rank 0 exits only when the
    others have noticed that.
    """
    patience = timedelta(seconds=patience_seconds)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if size == 1:
        if os.environ.get("RANK", "0") == "0":
            print(sentence, file=sys.stderr, flush=True)
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        if rank == 0:
            store.set(PRINTED, "yes")
            print(sentence, file=sys.stderr, flush=True)
            store.wait([f"{PRINTED}/{other}" for other in range(1, size)], patience)
        else:
            store.wait([PRINTED], patience)
            store.set(f"{PRINTED}/{rank}", "noticed")
    except dist.DistError:  # the other side did not come here in time: the mistake is not a common one
        if rank != 0:
            print(sentence, file=sys.stderr, flush=True)


def _let_segments_grow() -> None:
    """Have PyTorch enlarge what it has of a GPU's memory in place of asking for more pieces, unless the user says how: micro-batches of
    many lengths would leave gaps between the pieces. It is read when CUDA starts."""
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _share_cores() -> None:
    """Give each rank its share of the machine's cores; without this every rank starts a thread per core (beside a GPU for DeepSpeed's
    optimizer in host memory) and all crawl."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _local_size()))


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
    """Run `work` on rank 0 while the others wait, and give every rank its result (or its InputError)."""
    attempt = _attempted(work) if world.is_main else _Attempt()
    failed = attempt.failure is not None
    answer: list[Any] = [attempt.result, f"rank 0 {attempt.sentence}" if failed else attempt.sentence]
    dist.broadcast_object_list(answer, src=0, group=world.control)
    if attempt.failure is not None:
        raise attempt.failure
    result, sentence = answer
    if sentence is not None:
        raise InputError(sentence)
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
    while True:  # a collective every few seconds, so that no wait for one takes as long as its timeout
        done = running is None or bool(wait([running], BEAT_SECONDS).done)
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
        problem = storage_problem(error)
        failed = f"failed: {type(error).__name__}: {error}"
        return _Attempt(sentence=problem or failed, failure=None if problem else error)


def lost_rank(error: BaseException) -> bool:
    """Whether an error means that other ranks no longer answer."""
    message = str(
        error
    ).lower()  # gloo raises plain RuntimeErrors, and after a timeout speaks of a "pair closure" without its name
    return isinstance(error, LostRank | dist.DistError) or "gloo" in message or "pair closure" in message


def silent_ranks(patience_seconds: float = 3) -> list[int] | None:
    """The ranks that do not answer a roll call after a failed wait: most likely the ones that caused the failure.

    This rank's connections are closed first: ranks that wait for this one then fail at once, and answer too. None where the ranks never
    met.
    """
    if not dist.is_initialized():
        return None
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()

    def call() -> list[int]:
        deadline = time.monotonic() + patience_seconds
        silent = []
        try:
            store.set(f"llmkd/answers/{rank}", "yes")
            dist.destroy_process_group()
            for other in set(range(size)) - {rank}:
                left = max(deadline - time.monotonic(), 0.05)
                try:
                    store.wait([f"llmkd/answers/{other}"], timedelta(seconds=left))
                except dist.DistStoreError:  # not in time
                    silent.append(other)
        except dist.DistNetworkError:  # rank 0, which holds the store, is gone, and nobody else can be asked
            return [0]
        return silent

    # a rank 0 that hangs takes questions and never answers, whatever timeout the store was given
    return _within(2 * patience_seconds, call, otherwise=[0])


def _within(seconds: float, work: Callable[[], Result], otherwise: Result) -> Result:
    """The result of `work`, or `otherwise` where it takes longer; it then goes on in a thread that ends with the process."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise


def quiet() -> None:
    """Limit DeepSpeed's own log to warnings, and hide torch's warnings about the older names that DeepSpeed calls."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
