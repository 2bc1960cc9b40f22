"""What the head costs a GPU beside its products, counted without one: launches, and bytes that move between memory and the chip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.tables import table
from llmkd.losses import chunked_head
from llmkd.losses.chunked_head import head_losses
from llmkd.losses.divergences import DIVERGENCES
from llmkd.losses.head_inputs import TeacherHead, Terms
from llmkd.losses.head_kernels import takes_in
from tests.triton_interpreter import in_interpreter

POSITIONS, CHUNK, VOCABULARY, WIDTH = 4096, 1024, 151_936, 8
NARROW = (512, 1024)
"""Vocabularies of the interpreter. A kernel's bytes grow by the same with each column, so that two of them give those of any."""
NO_LAUNCH = {"empty", "new_empty", "empty_like", "detach", "detach_"}
PRODUCTS = {"mm", "addmm"}
PICKS = {"gather": 0, "scatter_add_": 0, "scatter_": 0}
"""Operations that touch a few elements of one argument: as many as their result has, or their index."""


def counted() -> str:
    """The table."""
    names = [name for name in DIVERGENCES if takes_in("triton", DIVERGENCES[name])]
    kernel = in_interpreter([arguments(name, 4, columns, 4) for name in names for columns in NARROW])
    rows = []
    for number, name in enumerate(names):
        launches, moved = of_operations(name)
        around = (
            of_operations(name, without_losses=True)[0] + 1 + (name == "top_k")
        )  # the rows' sum; torch's own search for the top k
        narrow, wide = kernel[2 * number : 2 * number + 2]
        a_column = (wide.bytes - narrow.bytes) / 4 / (NARROW[1] - NARROW[0])
        a_token = narrow.bytes / 4 + a_column * (VOCABULARY - NARROW[0])
        rows.append(
            [
                name,
                f"{launches:,.0f}",
                f"{moved / 1e6:.1f}",
                f"{narrow.launches} + {around:.0f}",
                f"{a_token / 1e6:.2f}",
            ]
        )
    header = [
        "divergence",
        "plain: launches a chunk",
        "MB a token",
        "Triton: its kernel + operations a chunk",
        "MB a token",
    ]
    return table(header, rows)


def arguments(name: str, positions: int, vocabulary: int, chunk: int, device: str = "cpu") -> dict[str, Any]:
    """Of `head_losses`, in bfloat16."""

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    return {
        "states": some(positions, WIDTH).requires_grad_(),
        "weight": some(vocabulary, WIDTH).requires_grad_(),
        "bias": None,
        "teacher": TeacherHead(some(positions, WIDTH), some(vocabulary, WIDTH), None),
        "targets": torch.zeros(positions, dtype=torch.long, device=device),
        "compared": torch.ones(positions, dtype=torch.bool, device=device),
        "terms": Terms(1.0, 1.0, DIVERGENCES[name], 1.0),
        "chunk": chunk,
    }


def of_operations(name: str, *, without_losses: bool = False) -> tuple[float, float]:
    """(launches a chunk, bytes a token) of the head an operation at a time, with a GPU's sizes, on tensors without contents.

    without_losses: of what surrounds them, products excepted, with a kernel too.
    """
    with pytest.MonkeyPatch.context() as patch, Moved() as moved:
        patch.setitem(chunked_head.ELEMENTS_AT_ONCE, "meta", chunked_head.ELEMENTS_AT_ONCE["cuda"])
        if without_losses:
            patch.setattr(chunked_head, "_losses", lambda *_: torch.empty(2, device="meta").unbind())
        head_losses(**arguments(name, POSITIONS, VOCABULARY, CHUNK, device="meta"))
    return moved.launches / (POSITIONS / CHUNK), moved.bytes / POSITIONS


class Moved(TorchDispatchMode):
    """Counts the operations inside, but products and views, and the bytes of what each reads and writes, each tensor once."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        result = function(*given, **(named or {}))
        name = function._schema.name.removeprefix("aten::")
        if not function.is_view and name not in NO_LAUNCH | PRODUCTS:
            self.launches += 1
            self.bytes += sum(self._moved(function, name, given, named or {}, result))
        return result

    def _moved(self, function: Any, name: str, given: Any, named: dict[str, Any], result: Any) -> list[int]:
        """Bytes read, then bytes written."""
        values = [*zip(function._schema.arguments, given, strict=False)]
        values += [
            (argument, named[argument.name]) for argument in function._schema.arguments if argument.name in named
        ]
        few = max((value.numel() for argument, value in values if argument.name == "index"), default=0)
        moved = []
        for argument, value in values:
            writes, picked = argument.is_write, name in PICKS and argument.name in ("self", "input")
            for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
                size = few * tensor.element_size() if picked else size_of(tensor)
                is_out = argument.kwarg_only and writes
                moved.append(size * (2 if writes and not is_out and name != "copy_" else 1))
        if not any(argument.is_write for argument in function._schema.arguments):
            moved += [size_of(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return moved


def size_of(tensor: Tensor) -> int:
    """Its bytes; a dimension along which it repeats itself counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return int(torch.Size(sizes).numel()) * tensor.element_size()
