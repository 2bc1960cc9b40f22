"""How ranks end: by a mistake that all of them made, because one of them is lost, or at their work's end.

A rank finds out in one of two ways that another is lost. Its own wait fails, on gloo: when the connection ends, or after
`train.timeout_seconds`. Or its `Watch` does, a thread that meets those of the other ranks every second: on NCCL a rank waits inside its
GPU, where no wait fails, and only NCCL's watchdog would end it, without a word. Either way nothing of the process group is taken down,
which with work left on a GPU would wait for the lost rank, too: the process says who is silent, and ends.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llmkd.distributed.joining import LostRank, named, several_hosts, this_rank
from llmkd.errors import NO_MEMORY
from llmkd.processes import memory_kills

Result = TypeVar("Result")
PULSE_SECONDS = 1.0
"""Between two meetings of the ranks' watches. A launcher that sees a rank end gives the others five seconds to say why they do."""
ROLL_CALL_SECONDS = 3.0
LISTENS_SECONDS = 1.0
"""By which rank 0, which holds the store that all ask, lives longer than the others' questions."""
PRINTED = "llmkd/printed"
"""The store's key by which rank 0 tells the others that it has printed their common mistake."""
ANSWERS, LIVES = "llmkd/answers", "llmkd/lives"
"""Start of the store's keys by which each rank says that its wait has failed, and that its watch has."""

_ending = threading.Event()
"""Set where this rank ends by a mistake of its own, and what happens to the others is no news."""
_own: Watch | None = None
_kills_before = memory_kills()
"""The kernel's, on this machine, before this process worked."""


class Watch:
    """A thread of this rank that meets those of the others for as long as they all live, whatever the ranks themselves do meanwhile.

    Where a process has ended, or has stood still for `timeout`, the watches of the others name it and end their processes (all ranks make
    one).
    """

    def __init__(self, timeout: timedelta) -> None:
        # Held by the thread alone: where it lets go of its group, the connections end, and the other watches learn of it at once.
        groups = [dist.new_group(backend="gloo", timeout=timeout)]
        self._leaves, self._failed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(groups,), name="llmkd watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """End the thread, as soon as every rank wants to (all ranks take part)."""
        self._leaves.set()
        self._thread.join()

    def has_failed(self) -> bool:
        """Whether the thread is about to end this process, or will be within two meetings."""
        return self._failed.wait(2 * PULSE_SECONDS)

    def _watch(self, groups: list[Any]) -> None:
        reason = self._met_until(groups[0])
        if reason is None or _ending.is_set() or (_is_told() and _ending.wait(ROLL_CALL_SECONDS)):
            return  # nobody is lost: the others have ended by a mistake that this rank makes, too, or comes to within the time they give it
        self._failed.set()
        dist.destroy_process_group(groups.pop())
        _end_lost(f"lost touch with the other ranks ({reason})", silent_ranks(by_watch=True))

    def _met_until(self, group: Any) -> str | None:
        """Meet the others until all leave, or until a meeting fails: why it did."""
        leaving = 0
        try:
            while leaving < dist.get_world_size(group):
                self._leaves.wait(PULSE_SECONDS)
                count = torch.tensor([int(self._leaves.is_set())])
                dist.all_reduce(count, group=group)
                leaving = int(count.item())
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return None


def start_watch(timeout: timedelta) -> None:
    """Start this rank's watch, unless it is the only one (all ranks take part)."""
    global _own, _kills_before
    _kills_before = memory_kills()
    if dist.get_world_size() > 1:
        _own = Watch(timeout)


def end_watch() -> None:
    """End this rank's watch if it has one, at the end of all work (all ranks take part)."""
    global _own
    if _own is not None:
        _own.leave()
        _own = None


def end_lost(error: BaseException) -> None:
    """End this rank, whose wait for another has failed with this error, with a sentence that names the silent ones."""
    # the watch knows better: a rank that has ended can't answer, one that is busy elsewhere may not have noticed yet
    if _own is not None and _own.has_failed():
        _own.leave()  # which does not return: the thread ends this process
    _ending.set()
    _end_lost(str(error).splitlines()[0], silent_ranks())


def _end_lost(reason: str, silent: list[int] | None) -> None:
    who = ""
    if silent is not None:
        none = "none, so one was too slow or has said why it ended: see train.timeout_seconds"
        who = f"; silent ranks: {named(silent) or none}"
    if memory_kills() > _kills_before:
        who += f"; meanwhile the kernel here has killed a process: {NO_MEMORY}"
    sentence = f"Error: {this_rank()}: {reason}{who}. The same command resumes from the last checkpoint."
    print(sentence, file=sys.stderr, flush=True)
    if os.environ.get("RANK") == "0":
        time.sleep(LISTENS_SECONDS)
    leave(1)


def leave(code: int) -> None:
    """Exit at once: the process group's threads may still run, and the interpreter's own exit would abort on them."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def print_mistake(sentence: str, patience_seconds: float = ROLL_CALL_SECONDS) -> None:
    """Print the mistake that ends this rank, once: rank 0 prints it, another rank only where rank 0 did not make it too.

    A launcher ends all ranks when the first one exits. So each other rank waits until rank 0 has printed, and rank 0 exits only when the
    others have noticed that. Ranks that have not met can't know of each other: there the first of each node prints it.
    """
    _ending.set()
    patience = timedelta(seconds=patience_seconds)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if size == 1:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"Error: {sentence}", file=sys.stderr, flush=True)
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        if rank == 0:
            store.set(PRINTED, "yes")
            print(f"Error: {sentence}", file=sys.stderr, flush=True)
            store.wait([f"{PRINTED}/{other}" for other in range(1, size)], patience)
        else:
            store.wait([PRINTED], patience)
            store.set(f"{PRINTED}/{rank}", "noticed")
    except dist.DistError:  # the other side did not come here in time: the mistake is not a common one
        if rank != 0:
            who = f"{this_rank()}: " if several_hosts() else ""
            print(f"Error: {who}{sentence}", file=sys.stderr, flush=True)


def _is_told() -> bool:
    """Whether rank 0 has printed a mistake of its own, which ends it and those who made it, too."""
    store = dist.distributed_c10d._get_default_store()

    def told() -> bool:
        try:
            return store.check([PRINTED])
        except dist.DistError:  # rank 0, which holds the store, is gone
            return False

    return _within(ROLL_CALL_SECONDS, told, otherwise=False)


def lost_rank(error: BaseException) -> bool:
    """Whether an error means that other ranks no longer answer."""
    message = str(
        error
    ).lower()  # gloo raises plain RuntimeErrors, and after a timeout speaks of a "pair closure" without its name
    return isinstance(error, LostRank | dist.DistError) or "gloo" in message or "pair closure" in message


def silent_ranks(patience_seconds: float = ROLL_CALL_SECONDS, *, by_watch: bool = False) -> list[int] | None:
    """The ranks that do not answer a roll call after a failed wait: most likely the ones that caused the failure.

    `by_watch`: after the watch has failed, which a rank answers as long as its process lives. None where the ranks never met.
    """
    if not dist.is_initialized():
        return None
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    mine = LIVES if by_watch else ANSWERS

    def call() -> list[int]:
        others = [other for other in range(size) if other != rank]
        silent: list[int] = []
        try:
            store.set(f"{mine}/{rank}", "yes")
            try:
                store.wait([f"{mine}/{other}" for other in others], timedelta(seconds=patience_seconds))
            except dist.DistStoreError:  # not in time
                # a rank that has called the roll itself, and has ended since, is not the cause
                answers = {mine, ANSWERS}
                silent = [other for other in others if not any(store.check([f"{kind}/{other}"]) for kind in answers)]
        except dist.DistNetworkError:  # rank 0, which holds the store, is gone, and nobody else can be asked
            return [0]
        return silent

    # a rank 0 that hangs takes questions and never answers, whatever timeout the store was given
    return _within(2 * patience_seconds, call, otherwise=[0])


def _within(seconds: float, work: Callable[[], Result], otherwise: Result) -> Result:
    """The result of `work`, which raises nothing, or `otherwise` where it takes longer; it then goes on in a thread that ends with the
    process."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise
