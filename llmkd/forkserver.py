"""The server that forks processes with their imports already done; `llmkd.starting` asks it.

A fresh interpreter, so that nothing of who asks (threads, a process group, random numbers) is in a fork; it has run nothing yet itself. Not
`multiprocessing`'s forkserver: in each fork that one runs the caller's main file again, so that a user's script without a guard would start
its study anew.

An order is one message on the socket that both share, with four descriptors: the fork's stdin, stdout and stderr, and its channel. There
the server reads the numbers of signals for the fork, and writes its exit code.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from llmkd.processes import PARENT, end_with_parent

_PR_SET_NAME = 15


@dataclass(frozen=True)
class Order:
    """A process to fork: the arguments of `starting.start`, and the folder of the process that asks."""

    module: str
    arguments: list[str]
    variables: dict[str, str]
    cwd: str
    name: str
    group: bool


@dataclass(frozen=True)
class _Child:
    """A process that the server has forked."""

    number: int
    ending: int
    """The descriptor that becomes readable when it ends (man 2 pidfd_open)."""
    channel: socket.socket
    """Signals for it come from here, and its exit code goes there."""
    group: bool


def main() -> None:
    """The server: `python -m llmkd.forkserver DESCRIPTOR MODULES`. In a fork, what the fork is for."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks, and for what is forked
    end_with_parent()
    orders, before = socket.socket(fileno=int(sys.argv[1])), dict(os.environ)
    orders.set_inheritable(False)
    # What is imported is no garbage. To look for some in it takes a quarter of the imports' time, and later most of that of making an
    # engine, before which DeepSpeed has garbage collected.
    gc.disable()
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    with suppress(BrokenPipeError):  # nobody asks any more
        orders.send(json.dumps(dict(os.environ.items() - before.items())).encode())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (order := _serve(orders)) is not None:
        for number, handler in signals.items():
            signal.signal(number, handler)
        sys.exit(_carry_out(order))


def _serve(orders: socket.socket) -> Order | None:
    """Fork for each order until nobody asks any more and all processes have ended; in a fork, its order."""
    server = os.getpid()
    # not epoll, which the forks would share
    with selectors.PollSelector() as selector:
        selector.register(orders, selectors.EVENT_READ, partial(_fork, selector, orders, server))
        while selector.get_map():
            for key, _ in selector.select():
                # not for what another one of this round has let go of
                if selector.get_map().get(key.fd) is key and (order := key.data()) is not None:
                    return order
    return None


def _fork(selector: selectors.BaseSelector, orders: socket.socket, server: int) -> Order | None:
    """Fork for the next order; in the fork, the order."""
    message, descriptors = b"", []
    with suppress(ConnectionResetError):  # who asked has ended
        message, descriptors, _, _ = socket.recv_fds(orders, 2**20, 4)
    if not message:
        selector.unregister(orders)
        return None
    order, (*files, channel) = Order(**json.loads(message)), descriptors
    number = os.fork()
    if number == 0:
        _leave_server(selector, order, files, server)
        os.close(channel)
        return order
    for descriptor in files:
        os.close(descriptor)
    if order.group:
        with suppress(OSError):  # it does this too; whoever comes second need not
            os.setpgid(number, number)
    child = _Child(number, os.pidfd_open(number), socket.socket(fileno=channel), order.group)
    selector.register(child.ending, selectors.EVENT_READ, partial(_bury, selector, child))
    selector.register(child.channel, selectors.EVENT_READ, partial(_pass_on, selector, child))
    return None


def _pass_on(selector: selectors.BaseSelector, child: _Child) -> None:
    """Send a fork, or its group, the signal that is asked for; SIGKILL where nobody waits for it any more."""
    asked = child.channel.recv(16)
    if not asked:
        selector.unregister(child.channel)
    # it is not waited for before it is out of the selector, so that the number is still its own
    (os.killpg if child.group else os.kill)(child.number, int(asked) if asked else signal.SIGKILL)


def _bury(selector: selectors.BaseSelector, child: _Child) -> None:
    """Tell how a fork has ended."""
    _, status = os.waitpid(child.number, 0)
    selector.unregister(child.ending)
    os.close(child.ending)
    if child.channel.fileno() in selector.get_map():
        selector.unregister(child.channel)
    with child.channel, suppress(BrokenPipeError, ConnectionResetError):
        child.channel.send(str(os.waitstatus_to_exitcode(status)).encode())


def _leave_server(selector: selectors.BaseSelector, order: Order, files: list[int], server: int) -> None:
    """In a fork: let go of all that is the server's, and become a process as if it had been started by itself."""
    for key in selector.get_map().values():
        if isinstance(key.fileobj, socket.socket):
            key.fileobj.close()
        else:
            os.close(key.fd)
    for target, descriptor in enumerate(files):
        os.dup2(descriptor, target)
        os.close(descriptor)
    if order.group:
        os.setpgid(0, 0)
    os.chdir(order.cwd)
    os.environ.update({**order.variables, PARENT: str(server)})
    end_with_parent()


def _carry_out(order: Order) -> int | None:
    """In a fork: what it is for; what `main` returns is its exit code."""
    for name in ("numpy.random", "torch"):  # what they drew from the system when they were imported, forks would share
        if name in sys.modules:
            sys.modules[name].seed()
    ctypes.CDLL(None).prctl(_PR_SET_NAME, order.name.encode())
    module = importlib.import_module(order.module)
    sys.argv = [str(module.__file__), *order.arguments]
    return module.main()


if __name__ == "__main__":
    main()
