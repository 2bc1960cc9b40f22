"""Start the ranks of a training run on this machine, pass signals on to them, and report how they ended.

For several nodes use the deepspeed launcher: `deepspeed --hostfile H llmkd/train.py ...`. On one machine this takes its place, because
that launcher exits with code 1 after SIGTERM even when every rank has saved and exited with 0.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmkd import starting
from llmkd.errors import NO_MEMORY
from llmkd.processes import memory_kills
from llmkd.starting import Process
from llmkd.text import counted

log = logging.getLogger("llmkd")
MOMENT_SECONDS = 5
"""After one rank of a launch has failed, the others have so long to end by themselves."""
GRACE_SECONDS = 30
"""After SIGTERM, before SIGKILL."""


@dataclass(frozen=True)
class Ending:
    """How a launch ended: the first non-zero exit code (0 if there is none), and whether a signal stopped it."""

    code: int
    stopped: bool


def launch(ranks: int, arguments: Sequence[str]) -> Ending:
    """Run `llmkd/train.py` with these arguments on `ranks` local processes and wait for them."""
    (ending,) = launch_each([Launch(ranks, arguments)])
    assert ending is not None
    return ending


@dataclass(frozen=True)
class Launch:
    """`llmkd/train.py` with these arguments on so many local processes."""

    ranks: int
    arguments: Sequence[str]
    log: Path | None = None
    """The file that its output is added to; None: it goes where this process' own goes."""
    said: str = ""
    """What is logged when it starts."""


def launch_each(launches: Sequence[Launch], at_once: int = 1, devices: Sequence[str] = ()) -> list[Ending | None]:
    """How each of these ended, so many of them at a time; None of those that were not started, since a signal came.

    `devices`: the GPUs, of which each launch has as many as ranks to itself; none where all share what there is.
    """
    if not launches:
        return []
    starting.get_ready()
    server = starting.running()
    if server is None or server.is_importing:
        log.info(
            "starting %s, after the imports of torch, transformers and deepspeed", counted(launches[0].ranks, "rank")
        )
    endings: list[Ending | None] = [None] * len(launches)
    waiting, free = deque(enumerate(launches)), deque(range(at_once))
    running: dict[int, _Running] = {}  # by the number of the launch
    every: list[Process] = []
    with _passing_signals(every) as signals:
        while running or (waiting and not signals):
            while waiting and free and not signals:
                (number, one), place = waiting.popleft(), free.popleft()
                kills = memory_kills()
                own = devices[place * one.ranks : (place + 1) * one.ranks]
                processes = _started(one, own, at_once, every)
                running[number] = _Running(one, place, processes, kills)
                for process in processes:
                    if signals and process.poll() is None:  # it came while they were started
                        process.send_signal(signal.SIGTERM)
            for number, launched in list(running.items()):
                if (code := launched.ended()) is not None:
                    endings[number] = Ending(code, bool(signals))
                    free.append(running.pop(number).place)
            time.sleep(0.05)
    return endings


def _started(one: Launch, devices: Sequence[str], at_once: int, every: list[Process]) -> list[Process]:
    """The processes of a launch, added to `every` as they start. Their share of the cores is that of so many `at_once` also where fewer are
    left, so that a launch which is started again computes by as many threads as before."""
    if one.said:
        log.info("%s", one.said)
    shared = {
        "WORLD_SIZE": str(one.ranks),
        "LOCAL_WORLD_SIZE": str(one.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        starting.RUNS: str(at_once),
        **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}),
    }
    processes = []
    with ExitStack() as opened:
        files = 0, 1, 2
        if one.log is not None:
            one.log.parent.mkdir(parents=True, exist_ok=True)
            output = opened.enter_context(one.log.open("a")).fileno()
            files = 0, output, output
        for rank in range(one.ranks):
            variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                starting.start("llmkd.train", one.arguments, variables, name=f"llmkd rank {rank}", files=files)
            )
            every.append(processes[-1])
    return processes


class _Running:
    """A launch whose processes were started. When one fails, the others have a moment to report why before they are stopped."""

    def __init__(self, one: Launch, place: int, processes: Sequence[Process], kills: int) -> None:
        """`place`: which GPUs it has; `kills`: the kernel's, for want of memory, before it was started."""
        self.place, self.processes = place, processes
        self._title = "" if one.log is None else f"{one.log.stem}: "  # else it is clear whose rank is meant
        self._kills = kills
        self._failed_at = 0.0
        self._stops = deque([(MOMENT_SECONDS, signal.SIGTERM), (MOMENT_SECONDS + GRACE_SECONDS, signal.SIGKILL)])
        self._code = 0

    def ended(self) -> int | None:
        """The first non-zero exit code, or 0, as soon as every process has ended; None until then."""
        codes = [process.poll() for process in self.processes]
        if not self._code and any(codes):
            code = next(code for code in codes if code)
            self._code = code if code > 0 else 128 - code
            self._failed_at = time.monotonic()
            self._say_killed(codes)
        if None not in codes:
            return self._code
        if self._code and self._stops and time.monotonic() >= self._failed_at + self._stops[0][0]:
            _, stop = self._stops.popleft()
            for process in self.processes:
                if process.poll() is None:
                    process.send_signal(stop)
        return None

    def _say_killed(self, codes: Sequence[int | None]) -> None:
        """A rank that is killed can't say so itself."""
        for rank in (rank for rank, code in enumerate(codes) if code == -signal.SIGKILL):
            why = f", by the kernel: {NO_MEMORY}" if memory_kills() > self._kills else ""
            print(f"Error: {self._title}rank {rank} was killed (SIGKILL){why}.", file=sys.stderr, flush=True)


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
