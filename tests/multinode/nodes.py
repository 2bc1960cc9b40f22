"""Two nodes on one machine: namespaces for the network, the host's name, the mounts and the processes, joined by a virtual cable.

with two_nodes(folder) as (first, second):
    process = first.start(["torchrun", ...], log)

A node sees the files of this machine, as nodes with a shared file system do, until `first.hide(folder)` lays an empty one of its own over
a folder. Nothing of it outlives the test: namespaces end with their last process, and the kernel kills a node's when its first ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from llmkd.files import ROOT
from llmkd.starting import environment

TOOLS = ("ip", "ss", "unshare", "nsenter", "setpriv", "mount", "hostname")
KINDS = ("net", "uts", "mount", "pid")
PORT = 29511
"""Of the ranks' meeting; every pair of nodes has a network of its own, in which it is free."""


def why_not() -> str | None:
    """Why no namespaces can be made here; None where they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"namespaces need Linux with {', '.join(missing or TOOLS)} (Debian: iproute2, util-linux)"
    make = "mount -t tmpfs none /mnt && ip link set lo up && ip link add left type veth peer name right"
    spaces = [f"--{kind}" for kind in KINDS]
    tried = subprocess.run(["unshare", *spaces, "--fork", "sh", "-c", make], capture_output=True)
    return f"no namespaces without root: {tried.stderr.decode().strip()}" if tried.returncode else None


class Node:
    """A machine, as far as its processes can tell."""

    def __init__(self, name: str, address: str, hosts: Path) -> None:
        self.name, self.address, self.hosts = name, address, hosts
        begin = (
            f"hostname {name} && mount --bind {hosts} /etc/hosts && ip link set lo up && echo up && exec sleep infinity"
        )
        spaces = "unshare --net --uts --mount --pid --fork --kill-child --mount-proc".split()
        command = ["setpriv", "--pdeathsig", "KILL", *spaces, "sh", "-c", begin]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None and self._holder.stdout.readline() == b"up\n"
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text()
        self.first = int(children.split()[0])
        """The number of its first process, whose namespaces are the node's."""
        self._network = os.readlink(f"/proc/{self.first}/ns/net")

    def start(
        self, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on the node, which says what it says into the file `log`."""
        inside = ["nsenter", f"--target={self.first}", *(f"--{kind}" for kind in KINDS), f"--wd={ROOT}"]
        with log.open("wb") as said:
            return subprocess.Popen(
                [*inside, *command],
                env={**environment(), "PYTHONUNBUFFERED": "1", **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def do(self, *command: str) -> str:
        """What a short command says on the node; it must succeed."""
        inside = ["nsenter", f"--target={self.first}", *(f"--{kind}" for kind in KINDS), *command]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def hide(self, folder: Path) -> None:
        """Lay an empty file system of the node's own over a folder."""
        self.do("mount", "-t", "tmpfs", "none", str(folder))

    def link(self, state: str) -> None:
        """Take the node's cable `down` or `up` again."""
        self.do("ip", "link", "set", "eth0", state)

    def processes(self, name: str = "") -> list[int]:
        """The processes on the node but for those that hold it, with this in their command line; in order of their start."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                own = int(process.name) in (self.first, self._holder.pid)
                others = not own and os.readlink(process / "ns/net") == self._network
                if others and command and name in command:  # without a command line: ended, and not asked about yet
                    found.append(int(process.name))
        return sorted(found)

    def kill(self, name: str = "") -> None:
        """Kill all that runs on the node and has this in its command line."""
        while left := self.processes(name):
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def end(self) -> None:
        """Take the node away."""
        self.kill()
        self._holder.kill()
        self._holder.wait()


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes `node0` and `node1`, which reach each other by these names; skips the test where none can be made."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")
    with contextlib.ExitStack() as held:
        nodes = []
        for number in (0, 1):
            nodes.append(Node(f"node{number}", f"10.77.0.{number + 1}", hosts))
            held.callback(nodes[-1].end)
        first, second = nodes
        cable = f"link add eth0 netns {first.first} type veth peer name eth0 netns {second.first}"
        subprocess.run(["ip", *cable.split()], check=True)
        for node in nodes:
            node.do("ip", "addr", "add", f"{node.address}/24", "dev", "eth0")
            node.link("up")
        yield first, second
