"""`llmkd ARGUMENTS` as a terminal starts it, but that neither it nor the server of its ranks has to import anything first.

The command is a fork of a server of the tests, and the server that forks its ranks a fork of the command before it has done anything. Who
is whose parent, and what ends with whom, is as it always is. `tests/cli/` has commands that do import what they need.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from llmkd import cli, forkserver, starting
from llmkd.processes import PARENT
from tests.distributed.warm import forked


class Command:
    """A command that has been started, as the leader of a session: whatever it starts, whoever of them is left, is of that session."""

    def __init__(self, *arguments: str) -> None:
        self._place = TemporaryDirectory(prefix="llmkd-command-")
        number, self._output = Path(self._place.name, "number"), Path(self._place.name, "output")
        self._process = forked("tests.distributed.command", [str(number), *arguments], self._output)
        while not number.is_file():
            assert self.poll() is None, self.output()
            time.sleep(0.01)
        self.pid = int(number.read_text())

    def output(self) -> str:
        """What it and its ranks have said so far."""
        return self._output.read_text()

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that ended it; None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float) -> int:
        """The same, once it has ended."""
        return self._process.wait(timeout)

    def running(self, name: str = "") -> list[int]:
        """The processes of its session, itself among them, with this in their name."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                about, _, numbers = (process / "stat").read_text().rpartition(")")
            except OSError:  # it has ended
                continue
            state, _, _, session, *_ = numbers.split()
            if int(session) == self.pid and state not in "ZX" and name in about.partition("(")[2]:
                found.append(int(process.name))
        return found

    def finish(self, timeout: float = 300) -> tuple[int, str]:
        """Wait for its end: (exit code, what was said)."""
        return self._process.wait(timeout), self.output()

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)


class _OwnServer(starting.Server):
    """The server of a command, forked already."""

    def __init__(self, number: int, orders: socket.socket, environment: Mapping[str, str]) -> None:
        self._environment, self._set_by_imports, self._orders = dict(environment), None, orders
        self.process = _Fork(number)  # type: ignore[assignment]


class _Fork:
    """What a server needs of `subprocess.Popen`, of a child that was forked."""

    args = ("llmkd.forkserver",)

    def __init__(self, number: int) -> None:
        self._number, self._code = number, None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            number, status = os.waitpid(self._number, options)
            self._code = os.waitstatus_to_exitcode(status) if number else None
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._number, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def main() -> None:
    """Of the process of a command, and of its server's, and of whatever that forks."""
    number_file, *arguments = sys.argv[1:]
    os.setsid()
    command = os.getpid()
    orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = os.fork()
    if server == 0:
        orders.close()
        os.environ[PARENT] = str(command)
        sys.argv[1:] = [str(theirs.detach())]
        return forkserver.main()
    theirs.close()

    def own_server(environment: Mapping[str, str], imports: Sequence[str]) -> starting.Server:
        starting.Server = once  # for another environment it is started as ever
        return _OwnServer(server, orders, environment)

    once, starting.Server = starting.Server, own_server  # type: ignore[assignment,misc]
    Path(f"{number_file}.new").write_text(str(command))
    Path(f"{number_file}.new").rename(number_file)
    cli.main(arguments)
    return None
