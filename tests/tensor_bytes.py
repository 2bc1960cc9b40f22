"""Exact bytes of the tensors that code creates, independent of the allocator and the operating system."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Inside the context, follows every storage that an operation creates until it is released.

    `live` and `peak`: bytes of those storages that are alive now, and that were alive at the same time at most. Storages that existed
    before do not count, nor do an operation's internal temporaries that never become a tensor. `shapes`: of every tensor created.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.shapes: set[torch.Size] = set()
        self._sizes: dict[int, int] = {}  # storage -> its bytes, 0 for one that existed before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, created=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.shapes.add(tensor.shape)
            self._follow(tensor, created=True)
        return result

    def _follow(self, tensor: Tensor, *, created: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if created else 0
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
