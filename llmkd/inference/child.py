"""A child process that carries out orders one after another: it reads them as JSON, prints lines, and its other output goes to a file.

child = Child("llmkd.evaluation.generation", shared, out / "generation.log")     # the parent
exit_code = child.do(order, log.info, moved)                                     # None: the order is done
shared, orders, say = listen()                                                   # the child
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from llmkd import processes, starting
from llmkd.errors import InputError

REFUSAL = "input error: "  # begins the child's last line when it can't follow its orders
DONE = "\x1edone: "  # begins the last line about an order; the control character is in no model's name

PROGRESS = "\x1eprogress: "  # begins a line that says how much of the order is done
GROUP = "\x1egroup: "  # begins the first line, with the number of the process group

ENDING = 60.0
"""Seconds that a killed group of processes is waited for: one that holds memory of a GPU may take some."""

log = logging.getLogger("llmkd")

Say = Callable[[str], None]


class Child:
    """A module's `main()` in a process, started with what all orders share; what it prints besides its lines is appended to `log_file`."""

    def __init__(self, module: str, shared: object, log_file: Path, variables: Mapping[str, str] | None = None) -> None:
        variables = {"TOKENIZERS_PARALLELISM": "false", **(variables or {})}
        (read, orders), (lines, write) = os.pipe(), os.pipe()
        with log_file.open("a") as errors:  # a group of its own: Ctrl-C is for the parent, which ends all of the group
            print(
                f"--- {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}, {module} on {socket.gethostname()}",
                file=errors,
                flush=True,
            )
            files = (read, write, errors.fileno())
            name = module.rpartition(".")[2]
            self._process = starting.start(module, [], variables, name=name, files=files, group=True)
        for descriptor in (read, write):
            os.close(descriptor)
        self._orders, self._lines = os.fdopen(orders, "w"), os.fdopen(lines)
        # Sent with the first order: a child reads only after its imports, which may take long.
        self._unsent = [shared]
        self._group: int | None = None

    def do(self, order: object, say: Say, moved: Callable[[float], None]) -> int | None:
        """Send an order and wait until it is done; `say` gets each line that the child prints meanwhile, `moved` the share that is done.

        Returns None, or the exit code of a child that died first. Raises InputError where the child refuses the order.
        """
        for value in (*self._unsent, order):
            self._send(value)
        self._unsent = []
        for line in map(str.rstrip, self._lines):
            if line.startswith(GROUP):
                self._group = int(line.removeprefix(GROUP))
                continue
            if line.startswith(REFUSAL):
                raise InputError(line.removeprefix(REFUSAL))
            if line.startswith(PROGRESS):
                moved(float(line.removeprefix(PROGRESS)))
                continue
            say(line.removeprefix(DONE))
            if line.startswith(DONE):
                return None
        return self._process.wait()

    def close(self) -> None:
        """Let it end, and wait until it has."""
        with suppress(BrokenPipeError):
            self._orders.close()
        self._process.wait()
        self._lines.close()

    def kill(self) -> None:
        """End it at once, and whatever it has started, and wait until all of it has ended, so that what comes next has its memory."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if self._group is None:  # it has done nothing yet, and started nothing
            return
        if left := processes.wait_for_group(self._group, ENDING):
            log.warning(
                "processes %s have not ended %.0f s after they were killed; what they hold of a GPU's memory is missing to what comes next",
                ", ".join(map(str, left)), ENDING,
            )  # fmt: skip

    def _send(self, value: object) -> None:
        with suppress(BrokenPipeError):  # it has died: `do` returns its exit code
            self._orders.write(json.dumps(value) + "\n")
            self._orders.flush()


def quietly(line: str) -> None:
    """Say nothing."""


def say_share(say: Say, done: int, total: int) -> None:
    """In the child: so much of the order is done."""
    say(f"{PROGRESS}{done / total:.4f}")


def listen() -> tuple[Any, Iterator[Any], Say]:
    """In the child: what all orders share, the orders as they come, and the function that sends a line to the parent.

    From now on stdin is empty for everybody else, and what is written to stdout, by libraries in C too, goes where stderr goes.
    """
    processes.end_with_parent()
    received, sent = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    values = map(json.loads, received)
    print(f"{GROUP}{os.getpgrp()}", file=sent, flush=True)
    return next(values), values, lambda line: print(line, file=sent, flush=True)
