"""Start processes of ours, on Linux without a GPU from a server that has done their imports already.

process = start("llmkd.train", ["--recipe", "quickstart"], {"RANK": "0"}, name="llmkd rank 0")
exit_code = process.wait()

What a rank imports takes longer than its first steps. `llmkd.forkserver`, a process of its own, imports it once and forks whatever is
asked for; it and all that it forks end when the process that asks does, however that ends.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Protocol

from llmkd.files import PACKAGE, ROOT
from llmkd.forkserver import Order
from llmkd.processes import parent_variable

IMPORTS = (
    "llmkd.train",
    "llmkd.evaluation.generation",
    "torch.utils.tensorboard",  # by the journal when it starts
    # it sets a variable, which a study's look at its tasks would have in this process alone
    "lm_eval",
)
# How the variables begin that a launcher sets for its ranks: with them a process of ours would wait for the other ranks.
LAUNCHER_VARIABLES = tuple(
    "RANK WORLD_SIZE MASTER_ LOCAL_ GROUP_ ROLE_ CROSS_ TORCHELASTIC_ ACCELERATE_ LLMKD_RUNS".split()
)
RUNS = "LLMKD_RUNS"
"""The variable by which a rank knows how many runs of as many ranks share this machine."""
READ_LATE = (*LAUNCHER_VARIABLES, "TOKENIZERS_PARALLELISM")
"""How the variables begin that nothing reads while it is imported: a fork may have others than the server."""


class Process(Protocol):
    """A process that was started here."""

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that ended it; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """The same, once it has ended. Raises subprocess.TimeoutExpired after so many seconds."""
        ...

    def send_signal(self, sig: int) -> None:
        """Send it a signal; nothing where it has ended."""
        ...


def start(
    module: str,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    *,
    name: str,
    files: tuple[int, int, int] = (0, 1, 2),
    group: bool = False,
) -> Process:
    """`main()` of a module in a process of its own, which sees the arguments as sys.argv[1:] and these variables beside this process's.

    From the server where it can be, else by a fresh interpreter. `files`: the descriptors that become its stdin, stdout and stderr.
    `group`: it leads a process group, and signals go to all of that. `name`: as `top` shows it, if it is forked (15 bytes).
    """
    if all(key.startswith(READ_LATE) for key in variables) and can_fork():
        order = Order(module, list(arguments), dict(variables), os.getcwd(), name, group)
        return server().start(order, files)
    return _Started(module, arguments, {**environment(), **variables}, files, group)


def can_fork() -> bool:
    """Whether processes may come from the server: on Linux, where no GPU is seen.

    A library that has looked for GPUs while it was imported may have left its driver in a state that a fork can't use.
    """
    import torch  # heavy, and a process that asks has other need of it

    return sys.platform == "linux" and torch.cuda.device_count() == 0


def get_ready() -> None:
    """Let the server begin its imports, so that they are done by when a process is asked for; without this it begins then."""
    if can_fork():
        server()


def environment() -> dict[str, str]:
    """This process's environment without a launcher's variables, with this checkout importable and other libraries' progress bars off.

    Unless the user says otherwise, threads that wait for one another sleep (torch's default, to spin, takes the cores that others work on),
    and torch's C++ side reports errors alone (its warning of a wait that fails is a stack).
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
    checkout = [str(PACKAGE.parent)] if ROOT == PACKAGE.parent else []
    paths = checkout + [path for path in [kept.get("PYTHONPATH")] if path]
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return {**quiet, **kept, "PYTHONPATH": os.pathsep.join(paths), "TQDM_DISABLE": "1"}


class Server:
    """The process that forks, for as long as the environment stays as it is: what it has imported may have read any variable."""

    def __init__(self, environment: Mapping[str, str], imports: Sequence[str]) -> None:
        self._environment = dict(environment)
        self._set_by_imports: dict[str, str] | None = None
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The kernel ties it to the thread that starts it. Started by another one, it ends as soon as it finds its socket closed.
        tied = parent_variable() if threading.current_thread() is threading.main_thread() else {}
        command = [sys.executable, "-u", "-P", "-m", "llmkd.forkserver", str(theirs.fileno()), *imports]
        with theirs:
            self.process = subprocess.Popen(
                command, env={**environment, **tied}, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )

    def start(self, order: Order, files: Sequence[int]) -> _Forked:
        """Have a process forked that carries out the order."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, suppress(BrokenPipeError, ConnectionResetError):  # it has ended: the process's end says so
            socket.send_fds(self._orders, [json.dumps(asdict(order)).encode()], [*files, theirs.fileno()])
        return _Forked(self, ours)

    def fits(self, now: Mapping[str, str]) -> bool:
        """Whether it can go on in this environment: it runs, and whatever has changed its own imports have set to the same."""
        if self.ended:
            return False
        changed = {key for key, _ in self._environment.items() ^ now.items()}
        if changed and self._set_by_imports is None:
            told = self._orders.recv(2**20)  # when its imports are done
            self._set_by_imports = json.loads(told or "{}")
        return all((self._set_by_imports or {}).get(key) == now.get(key) for key in changed)

    @property
    def is_importing(self) -> bool:
        """Whether its imports are not done yet: an order waits for them."""
        return self._set_by_imports is None and not self.ended and not _is_readable(self._orders, 0)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        """Take no more orders: it ends when all that it has started has ended."""
        self._orders.close()

    def kill(self) -> None:
        """End it and all that it has started, and wait for it, so that its CPU time is counted with this process's."""
        self.process.kill()
        self.process.wait()


def server() -> Server:
    """The server of this process and of its environment as it is now."""
    global _server
    with _lock:
        now = environment()
        if _server is None or not _server.fits(now):
            if _server is not None:
                _server.close()
            _server = Server(now, IMPORTS)
            atexit.register(_server.kill)
        return _server


def running() -> Server | None:
    """The server of this process, where there is one already."""
    return None if _server is None or _server.ended else _server


_server: Server | None = None
_lock = threading.Lock()


def _is_readable(channel: socket.socket, timeout: float | None) -> bool:
    """Whether there is something to read within so many seconds; None: however long it takes."""
    with selectors.PollSelector() as selector:  # select() itself refuses descriptors from 1024 on
        selector.register(channel, selectors.EVENT_READ)
        return bool(selector.select(timeout))


class _Forked:
    """A process that the server has forked, or will when its imports are done. The server kills it when this is gone."""

    def __init__(self, server: Server, channel: socket.socket) -> None:
        self._server, self._channel = server, channel

    def poll(self) -> int | None:
        if not _is_readable(self._channel, 0):
            return None
        try:  # looked at, not taken: another thread or a signal's handler may ask too
            told = self._channel.recv(16, socket.MSG_PEEK)
        except ConnectionResetError:  # comes once, where a signal was not read any more; what was told comes after it
            told = self._channel.recv(16, socket.MSG_PEEK)
        # without a word, the server has ended, and whatever it had started with it
        return int(told) if told else self._server.process.wait() or 1

    def wait(self, timeout: float | None = None) -> int:
        if not _is_readable(self._channel, timeout):
            raise subprocess.TimeoutExpired(self._server.process.args, timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, sig: int) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self._channel.send(str(int(sig)).encode())
        self._server.process.send_signal(signal.SIGTERM)  # ends one that still imports; later it ignores this

    def __del__(self) -> None:
        self._channel.close()


class _Started(subprocess.Popen[bytes]):
    """A process with an interpreter of its own."""

    def __init__(
        self, module: str, arguments: Sequence[str], env: Mapping[str, str], files: Sequence[int], group: bool
    ) -> None:
        command = [sys.executable, "-u", "-P", "-m", module, *arguments]
        stdin, stdout, stderr = files
        leads = 0 if group else None
        environment = {**env, **parent_variable()}
        super().__init__(command, env=environment, stdin=stdin, stdout=stdout, stderr=stderr, process_group=leads)
        self._group = group

    def send_signal(self, sig: int) -> None:
        if not self._group:
            super().send_signal(sig)
        elif self.poll() is None or sig == signal.SIGKILL:  # what it has started may live longer than it
            os.killpg(self.pid, sig)
