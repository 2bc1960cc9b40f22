"""How the ranks meet, on which hosts they are, and which of them are missing where they do not."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from llmkd.errors import InputError

JOIN_SECONDS = 300
"""How long the ranks wait for one another at the start, where `JOIN_VARIABLE` is not set; never longer than `train.timeout_seconds`."""
JOIN_VARIABLE = "LLMKD_JOIN_SECONDS"
JOINED, MET = "llmkd/joined", "llmkd/met"
"""Start of the store's keys by which each rank says on which host it is; the key by which rank 0 tells all who is there."""
_hosts: tuple[str, ...] = ()
"""The host of each rank, once they have met."""

WATCHDOG_SECONDS = 120
"""By which NCCL's own watchdog waits longer than a rank does: it ends a process without a word."""


class LostRank(RuntimeError):
    """A rank waited for another that is gone, or that did not answer in time."""


def patience(backend: str, timeout: timedelta) -> timedelta:
    """How long an operation of a group may take, where ranks wait for each other for `timeout`."""
    return timeout + timedelta(seconds=WATCHDOG_SECONDS) if backend == "nccl" else timeout


def gloo_interface(nccl: str, present: Sequence[str]) -> str | None:
    """The network interface that gloo is to use where NCCL_SOCKET_IFNAME names NCCL's; None where that only names those not to use.

    NCCL takes beginnings of names, `eth,ib`, or after `=` whole ones; gloo takes whole ones. `present`: this machine's.
    """
    if nccl.startswith("^"):
        return None
    names = [name.partition(":")[0] for name in nccl.removeprefix("=").split(",")]
    whole = [name for name in names if name in present]
    begun = [one for name in names for one in present if one.startswith(name)]
    return next(iter(whole if nccl.startswith("=") else begun), None)


def _share_interface() -> None:
    """Let gloo use the interface that NCCL was told to use: the deepspeed launcher passes NCCL's variables to other nodes, not gloo's."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and (nccl := os.environ.get("NCCL_SOCKET_IFNAME")):
        if found := gloo_interface(nccl, [name for _, name in socket.if_nameindex()]):
            os.environ["GLOO_SOCKET_IFNAME"] = found


def join(backend: str, timeout: timedelta, device: torch.device | None) -> None:
    """Meet the other ranks. Raises LostRank that names the missing ones, the address and the cure. `device`: this rank's GPU."""
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"RANK is set and {' and '.join(missing)} not: start with llmkd train, deepspeed or torchrun, or unset RANK"
        )
    _share_interface()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    seconds = min(int(os.environ.get(JOIN_VARIABLE) or JOIN_SECONDS), int(timeout.total_seconds()))
    in_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the store itself
    holds = rank == 0 and not in_launcher
    try:
        own = "" if holds else _reach(address, port, seconds)
        store = dist.TCPStore(
            "localhost" if holds else address,  # which may lead to this machine only from elsewhere
            port,
            size,
            is_master=holds,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=not in_launcher,
        )
        # torchrun's store outlives the ranks that it starts again: what those before have said is not for these
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        there = _meet(store, rank, size, seconds, own)
        if not there.missing:
            _remember(there.hosts)
            _avoid_loopback([address, *there.addresses])
            store.set_timeout(timeout)
            about = {"rank": rank, "world_size": size, "timeout": patience(backend, timeout), "device_id": device}
            _connect(backend, store, about)
            return
        joined = [number for number in range(size) if number not in there.missing]
        reason, others = f"missing: {_ranges(there.missing)}", f" (there: {_on_hosts(joined, there.hosts)})"
        cause: Exception | None = None
    except (OSError, dist.DistError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise LostRank(
                f"another process of this machine uses port {port}: give the launcher another (--master_port N)"
            ) from error
        said = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0].rstrip(".")
        reason, others, cause = f"no answer there: {said}", "", error
    raise LostRank(
        f"the {size} ranks did not meet at {address}:{port} within {seconds} s ({reason}): start a rank for each, see that every node "
        f"reaches that address, and where nodes start that far apart set {JOIN_VARIABLE} to more seconds{others}"
    ) from cause


def _connect(backend: str, store: dist.Store, about: dict[str, Any]) -> None:
    """Make the process group of ranks that have met."""
    try:
        dist.init_process_group(backend, store=store, **about)
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise LostRank(
            "the ranks have met and can't reach each other: gloo uses the interface of GLOO_SOCKET_IFNAME, or else that of the host's own "
            "name; set GLOO_SOCKET_IFNAME on every node to the interface that leads to the others (`ip addr` lists a node's)"
        ) from error


def _avoid_loopback(others: Sequence[str]) -> None:
    """Give gloo the interface that leads to another host, where it would take the loopback: Debian has a host's name lead there."""
    try:
        broken = socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        broken = True
    if broken and several_hosts() and "GLOO_SOCKET_IFNAME" not in os.environ:
        own = {_own_address_towards(other) for other in others}
        if found := [name for _, name in socket.if_nameindex() if _address_of(name) in own and name != "lo"]:
            os.environ["GLOO_SOCKET_IFNAME"] = found[0]


def _own_address_towards(other: str) -> str:
    """The address from which this host sends to another one; empty where it does not. Nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if other:
            probe.connect((other, 9))
            return probe.getsockname()[0]
    return ""


def _address_of(interface: str) -> str:
    """An interface's address (man 7 netdevice, SIOCGIFADDR), or `none`."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        return socket.inet_ntoa(fcntl.ioctl(asked, 0x8915, struct.pack("256s", interface.encode()[:15]))[20:24])
    return "none"


def _reach(address: str, port: int, seconds: int) -> str:
    """Wait until something listens there, for so long at most, and give back this host's own address on the way there.

    torch's own attempts would fill the log with stacks. Raises OSError.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())) as there:
                return there.getsockname()[0]
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


class _There(NamedTuple):
    """Who has joined, as rank 0 found it."""

    missing: list[int]
    hosts: list[str]
    """By rank; of a missing one an empty text."""
    addresses: list[str]
    """By rank; empty of the one that all have reached, and of a missing one."""


def _meet(store: dist.Store, rank: int, size: int, seconds: int, own: str) -> _There:
    """Wait until every rank is there, or for so long; all that are there get the same answer. `own`: this host's address."""
    store.set(f"{JOINED}/{rank}", json.dumps([socket.gethostname(), own]))
    if rank == 0:
        store.set(MET, json.dumps(_call(store, size, seconds)))
    store.wait([MET], timedelta(seconds=seconds + 10))
    return _There(*json.loads(store.get(MET)))


def _call(store: dist.Store, size: int, seconds: int) -> _There:
    """Rank 0's part of it."""
    keys = [f"{JOINED}/{rank}" for rank in range(size)]
    missing: list[int] = []
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError:  # not in time
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    joined = [["", ""] if rank in missing else json.loads(store.get(key)) for rank, key in enumerate(keys)]
    return _There(missing, [host for host, _ in joined], [address for _, address in joined])


def _remember(hosts: Sequence[str]) -> None:
    global _hosts
    _hosts = tuple(hosts)


def several_hosts() -> bool:
    """Whether the ranks have met and are on more than one host."""
    return len(set(_hosts)) > 1


def this_rank() -> str:
    """This rank, for messages: `rank 3`, and unless all are known to be on one host, `rank 3 on node1`."""
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}" if len(set(_hosts)) == 1 else f"rank {rank} on {socket.gethostname()}"


def named(ranks: Sequence[int]) -> str:
    """Ranks in ascending order, for messages: `1, 3`, or where there are several hosts `1 on node0, 8-15 on node1`."""
    return _on_hosts(ranks, _hosts) if several_hosts() else ", ".join(map(str, ranks))


def _on_hosts(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    return ", ".join(f"{_ranges(list(of))} on {host}" for host, of in groupby(ranks, lambda rank: hosts[rank]))


def _ranges(ranks: Sequence[int]) -> str:
    """`3, 8-15` for ranks in ascending order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
