"""Processes that write shards: forked with all that they need, and given a shard at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

from datasets import disable_progress_bars

from llmkd.processes import die_with_parent

Shard = TypeVar("Shard")


def written(
    write: Callable[[int], Shard], numbers: Sequence[int], processes: int, asked: Callable[[], bool]
) -> Iterator[Shard]:
    """What `write` returns for each number, in the order in which they are done.

    Once it was `asked` to stop, those under way are finished and no more are begun. Raises what `write` raises for the first number, and
    BrokenProcessPool where a process was killed.
    """
    left = iter(numbers)
    context = multiprocessing.get_context("fork")  # neither the rows nor what encodes them need be sent
    with ProcessPoolExecutor(processes, context, _begin, (write, os.getpid())) as pool:
        # A pool begins more than it has processes for, and what it has begun is done: it is given no more than it can do at once.
        under_way = [pool.submit(_next, number) for number in islice(left, processes)]
        while under_way:
            wait(under_way, return_when=FIRST_COMPLETED)
            done = [shard for shard in under_way if shard.done()]
            if any(shard.exception() for shard in done):
                wait(under_way)
                done = under_way  # so that the error of the first shard is raised, whichever ends first
            for shard in done:
                yield shard.result()
            under_way = [shard for shard in under_way if shard not in done]
            if not asked():
                under_way += [pool.submit(_next, number) for number in islice(left, len(done))]


_write: Callable[[int], Any]
"""In a worker: what it was started for."""


def _begin(write: Callable[[int], Any], parent: int) -> None:
    global _write
    die_with_parent()
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's own would only take note
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    disable_progress_bars()  # of one shard; the whole has its own
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    _write = write


def _next(number: int) -> Any:
    return _write(number)
