"""How the ranks meet, and which of them are missing where they do not."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from llmkd.errors import InputError

JOIN_SECONDS = 300
"""How long the ranks wait for one another at the start, where `JOIN_VARIABLE` is not set; never longer than `train.timeout_seconds`."""
JOIN_VARIABLE = "LLMKD_JOIN_SECONDS"
JOINED = "llmkd/joined"
"""Start of the store's keys by which each rank says that it is there."""


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
    try:
        store = dist.TCPStore(
            address,
            port,
            size,
            is_master=rank == 0 and not in_launcher,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=not in_launcher,
        )
        store.set(f"{JOINED}/{rank}", "yes")
        absent = _absent(store, size, seconds if rank == 0 else seconds + 10)  # rank 0 tells it first
        if not absent:
            store.set_timeout(timeout)
            about = {"rank": rank, "world_size": size, "timeout": patience(backend, timeout), "device_id": device}
            dist.init_process_group(backend, store=store, **about)
            return
        reason = f"missing: {absent}"
        cause: Exception | None = None
    except dist.DistError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise LostRank(
                f"another process of this machine uses port {port}: give the launcher another (--master_port N)"
            ) from error
        reason, cause = f"rank {rank}: {str(error).splitlines()[0]}", error
    raise LostRank(
        f"the {size} ranks did not meet at {address}:{port} within {seconds} s ({reason}): start a rank for each, see that every node "
        f"reaches that address, and where nodes start that far apart set {JOIN_VARIABLE} to more seconds"
    ) from cause


def _absent(store: dist.Store, size: int, seconds: int) -> str:
    """The ranks that have not joined after so long, `3, 8-15`; nothing where all have."""
    keys = [f"{JOINED}/{rank}" for rank in range(size)]
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError:  # not in time
        return _ranges([rank for rank, key in enumerate(keys) if not store.check([key])])
    return ""


def _ranges(ranks: Sequence[int]) -> str:
    """`3, 8-15` for ranks in ascending order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
