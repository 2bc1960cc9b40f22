"""Start the ranks of a training run on this machine, pass signals on to them, and report how they ended.

For several nodes use the deepspeed launcher: `deepspeed --hostfile H llmkd/train.py ...`. On one machine this takes its place, because
that launcher exits with code 1 after SIGTERM even when every rank has saved and exited with 0.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llmkd import starting
from llmkd.starting import Process
from llmkd.text import counted

log = logging.getLogger("llmkd")
GRACE_SECONDS = 30


@dataclass(frozen=True)
class Ending:
    """How a launch ended: the first non-zero exit code (0 if there is none), and whether a signal stopped it."""

    code: int
    stopped: bool


def launch(ranks: int, arguments: Sequence[str]) -> Ending:
    """Run `llmkd/train.py` with these arguments on `ranks` local processes and wait for them."""
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    starting.get_ready()
    server = starting.running()
    if server is None or server.is_importing:
        log.info("starting %s, after the imports of torch, transformers and deepspeed", counted(ranks, "rank"))
    processes: list[Process] = []
    with _passing_signals(processes) as signals:
        for rank in range(ranks):
            variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(starting.start("llmkd.train", arguments, variables, name=f"llmkd rank {rank}"))
        code = _wait(processes)
    return Ending(code, bool(signals))


def _wait(processes: list[Process]) -> int:
    """Wait for all; when one fails, give the others a moment to report why, then end them. The first non-zero code."""
    while True:
        codes = [p.poll() for p in processes]
        failed = [c for c in codes if c]
        if failed:
            break
        if all(c == 0 for c in codes):
            return 0
        time.sleep(0.05)
    deadline = time.monotonic() + 5
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for stop in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                process.send_signal(stop)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
    code = failed[0]
    return code if code > 0 else 128 - code


@contextmanager
def _passing_signals(processes: list[Process]) -> Iterator[list[int]]:
    """Inside, SIGTERM and SIGINT go to the ranks, which finish their step and save. Yields the list of signals seen."""
    seen: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        seen.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
