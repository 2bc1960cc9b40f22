"""The head's losses by the Triton kernel without a GPU: in Triton's interpreter, which takes over a whole process."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
BLOCK = 128
"""Columns at a time: of a few hundred, so that rows have several blocks and the last one is not full."""


class Found(NamedTuple):
    """Of one case."""

    outputs: list[Tensor]
    """The loss, its two sums, and its gradients with respect to the states, the weight and the bias, where there is one."""
    bytes: int
    """Loaded and stored by the kernel."""
    launches: int
    """Of the kernel."""


def in_interpreter(cases: Sequence[dict[str, Any]]) -> list[Found]:
    """What `head_losses(**case, kernel="triton")` finds for each case, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cases").write_bytes(pickle.dumps(list(cases)))
        child = [sys.executable, "-m", "tests.triton_interpreter", f"{folder}/cases", f"{folder}/found"]
        in_child_with_triton(child, TRITON_INTERPRET="1")
        return [Found(*found) for found in pickle.loads(Path(folder, "found").read_bytes())]


def in_child_with_triton(command: Sequence[str], **variables: str) -> str:
    """What a command prints that can import Triton: the one that is installed, or the one that scripts/test.sh put into the environment."""
    path = [str(ROOT)]
    if importlib.util.find_spec("triton") is None:
        path.append(str(Path(sys.prefix) / "triton"))
        assert Path(path[-1]).is_dir(), f"Triton is not here: bash scripts/test.sh installs it into {path[-1]}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)} | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main(cases: str, found: str) -> None:
    """The child: read the cases, write what is found."""
    # Triton is there in the child alone
    from llmkd.losses import triton_rows
    from llmkd.losses.chunked_head import head_losses

    torch.set_num_threads(1)
    triton_rows.BLOCK = BLOCK
    launches = _patch_once()
    moved = _count_bytes()
    results = []
    for case in pickle.loads(Path(cases).read_bytes()):
        moved.clear()
        launches.clear()
        outputs = head_losses(**case, kernel="triton")
        leaves = [leaf for leaf in (case["states"], case["weight"], case["bias"]) if leaf is not None]
        gradients = torch.autograd.grad(outputs[0], leaves)
        results.append(([value.detach() for value in (*outputs, *gradients)], sum(moved), len(launches)))
    Path(found).write_bytes(pickle.dumps(results))


def _patch_once() -> list[str]:
    """A list to which each launch adds its kernel.

    Triton turns its language into numpy's at each call of each function, and back after each launch: most of the time. Here it stays.
    """
    from triton.runtime import interpreter  # as above  # pyright: ignore[reportMissingImports]

    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched, launches = set(), []

    class Kept:
        def restore(self) -> None:
            """Nothing."""

    def once(function: Any) -> Kept:
        if function not in patched:
            patched.add(function)
            patch(function)
        return Kept()

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, counted  # pyright: ignore
    return launches


def _count_bytes() -> list[int]:
    """A list to which each load and each store adds its bytes: of the elements that its mask lets through."""
    # as above
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder as builder  # pyright: ignore[reportMissingImports]

    moved: list[int] = []
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(pointers: Any, mask: Any) -> None:
        moved.append(int(np.count_nonzero(mask.data)) * pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    return moved


if __name__ == "__main__":
    main(*sys.argv[1:])
