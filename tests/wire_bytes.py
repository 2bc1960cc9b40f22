"""Bytes that this rank sends and receives, counted where every call of torch.distributed passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class WireBytes(TorchDispatchMode):
    """Inside the context, counts the bytes `received` and `sent` from rank to rank, and `gathered`: from gathers.

    Broadcasts of integers are not counted; any other collective is an error, so that none is missed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received = self.sent = self.gathered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.") and not any(passive in name for passive in ("barrier", "monitored")):
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        first = bytes_of(args[0])
        if "recv" in name:
            self.received += first
        elif "send" in name:
            self.sent += first
        elif "allgather" in name:  # (outputs, inputs, ...)
            self.gathered += first - bytes_of(args[1])
        elif "broadcast" in name:  # DeepSpeed compares the ranks' parameter orders while it records them
            assert all(not t.is_floating_point() for t in tree_leaves(args[0])), "weights are gathered, not broadcast"
        else:
            raise AssertionError(f"{name} is not counted")


def bytes_of(values: Any) -> int:
    """Of all tensors in a value."""
    return sum(value.nbytes for value in tree_leaves(values) if isinstance(value, Tensor))
