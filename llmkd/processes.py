"""Processes among others: one that ends with the process that started it, one that people stop, and a folder that only one works in."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llmkd.errors import ANOTHER_FOLDER, InputError

log = logging.getLogger("llmkd")

PARENT = "LLMKD_PARENT"
"""The environment variable in which a process of ours leaves its number to those it starts."""
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""What torchrun and the deepspeed launcher set for the ranks that they start."""
LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What a file system without locks says where one is asked for."""
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def stopping(sentence: str, terminated: int = 128 + signal.SIGTERM) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end this process with a sentence for people, by the exit codes 130 and `terminated`."""
    codes = {signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: terminated}

    def stop(number: int, frame: object) -> None:
        os.write(2, f"{sentence}\n".encode())  # a handler may not print: it may have come into another print
        raise SystemExit(codes[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in codes}
    heeded = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # nohup ignores one
    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


class Stopping:
    """Remembers SIGTERM and SIGINT until the step is over; the loop asks every rank, so one rank's signal stops all."""

    def __init__(self) -> None:
        self.asked = False
        self.name = "another rank's signal"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if not self.asked:
            self.asked, self.name = True, signal.Signals(number).name
            log.info("%s: stopping after this step", self.name)


def parent_variable() -> dict[str, str]:
    """What `end_with_parent` needs in the environment of a process that this one starts."""
    return {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however that ends (Linux).

    Only where one of ours or a launcher started it: a shell may end before what it left running.
    """
    parent = os.environ.pop(PARENT, None)  # what this process starts must not take it for its own
    if sys.platform != "linux" or (parent is None and not any(name in os.environ for name in LAUNCHERS)):
        return
    die_with_parent()
    if parent is not None and os.getppid() != int(parent):  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux; man 2 prctl, PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_for_group(group: int, seconds: float) -> list[int]:
    """Wait until all processes of a group have ended; the numbers of those that live on after so many seconds (Linux; else none)."""
    began = time.monotonic()
    while (left := _members(group)) and time.monotonic() < began + seconds:
        time.sleep(0.05)
    return left


def _members(group: int) -> list[int]:
    """The numbers of a group's processes, but for those that have ended and that nobody has asked about."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, its_group = (
                file.read_text().rpartition(")")[2].split()[:3]
            )  # man 5 proc; the name may have spaces
            if int(its_group) == group and state not in "ZX":
                found.append(int(file.parent.name))
    return found


def memory_kills() -> int:
    """How many processes this machine's kernel has killed for want of memory since it started (Linux; elsewhere 0)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class StoppedWaiting(Exception):
    """A signal came while another process's folder was waited for."""


@contextlib.contextmanager
def only_one_in(folder: Path, patience_seconds: float = 2, asked: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Inside, no other process is in this folder. Raises InputError that names who is, and StoppedWaiting where it was `asked` to stop.

    The kernel gives the lock back when its holder ends, however it ends, so that a stale one holds nobody up. The wait is for a holder
    that was killed a moment ago. Folders that were made for this and stayed empty are removed again.
    """
    file = folder / LOCK
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    began, waiting = time.monotonic(), False
    while (descriptor := _lock(file)) is None:
        if time.monotonic() > began + patience_seconds:
            raise InputError(
                f"{folder}: {_holder(file)} works in this folder; wait for it, stop it, or {ANOTHER_FOLDER}"
            )
        if asked():
            raise StoppedWaiting
        if not waiting and time.monotonic() > began + 2:
            waiting = True
            log.info("%s: waiting for %s, which works in this folder", folder, _holder(file))
        time.sleep(0.1)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is unlocked: whoever waits for it looks whether it is still there
        os.close(descriptor)
        with contextlib.suppress(OSError):  # one of them is not empty
            for path in missing:
                path.rmdir()


def _lock(file: Path) -> int | None:
    """The descriptor of the locked file; None while another process has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        log.warning("%s: this file system has no locks, so nothing keeps a second run out of the folder", file.parent)
    if not file.exists() or os.fstat(descriptor).st_ino != file.stat().st_ino:
        os.close(descriptor)  # its holder has removed it since we opened it
        return None
    about = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(about).encode())
    return descriptor


@dataclass(frozen=True)
class Holder:
    """Who works in a folder that `only_one_in` guards, by what its lock says of itself."""

    name: str
    is_certain: bool
    """Whether the lock is held; else its process is of another machine, whose locks may not be seen here."""


def holder(folder: Path) -> Holder | None:
    """Who works in a folder, or may; None where nobody does. A lock that its holder left when it was killed is nobody's.

    Asked by a lock that several may have at a time and that is given back at once, so that no other process that asks is taken for a
    holder, and one that begins waits for an instant at most.
    """
    file = folder / LOCK
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return Holder(_holder(file), is_certain=True)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    else:
        if not file.exists() or _about(file).get("host") == socket.gethostname():
            return None
    finally:
        os.close(descriptor)
    return Holder(_holder(file), is_certain=False)


def _holder(file: Path) -> str:
    about = _about(file)
    try:
        return f"process {about['process']} on {about['host']} (since {about['since']})"
    except KeyError:
        return "another process"


def _about(file: Path) -> dict[str, object]:
    """What a lock says of its holder; nothing where it can't be read, as its holder is about to write it or has removed it."""
    try:
        about = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
