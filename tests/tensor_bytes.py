"""Exact bytes of the tensors that code makes, whatever the allocator and the operating system do with them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Inside the context, follows every storage that an operation makes until it is let go.

    `live` and `peak`: bytes of the storages made inside that are (were at most) alive at a time. What existed before counts for
    nothing, and neither do an operation's own temporaries that never become a tensor. `shapes`: of every tensor made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.shapes: set[torch.Size] = set()
        self._known: dict[int, int] = {}  # storage -> its bytes, 0 for what was there before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, made_here=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.shapes.add(tensor.shape)
            self._follow(tensor, made_here=True)
        return result

    def _follow(self, tensor: Tensor, *, made_here: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if made_here else 0
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._let_go, key).atexit = False

    def _let_go(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
