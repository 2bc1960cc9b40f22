"""`python -m tests.triton_compiled`: the Triton kernel compiled for an H100, which takes no GPU.

Prints of each version how many loads of 16 bytes its program has, how many smaller ones, and the bytes of registers that a thread spills.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from llmkd.losses import triton_rows

VERSIONS: dict[str, dict[str, Any]] = {
    "forward_kl": {"PARTS": ("forward_kl",), "LOGITS": True, "ONE_SOFTMAX": True, "K": 0},
    "jsd, warm": {"PARTS": ("jsd",), "LOGITS": True, "ONE_SOFTMAX": False, "K": 0},
    "tvd and top_k": {"PARTS": ("tvd",), "LOGITS": True, "ONE_SOFTMAX": True, "K": 64},
    "stored": {"PARTS": (), "LOGITS": False, "ONE_SOFTMAX": True, "K": 64},
}
POINTERS = {
    **{"student": "*bf16", "teacher": "*bf16", "targets": "*i64", "compared": "*u8", "losses": "*fp32"},
    "likeliest": ("*i64", "*fp32", "*fp32"),
}
NUMBERS = {"columns": "i32", "shared": "i32", "k": "i32", "scales": ("fp32",) * 3, "temperature": "fp32"}


def compiled(version: dict[str, Any]) -> dict[str, int]:
    """Of one version: its loads of 16 bytes, its other loads, its spilt bytes."""
    mix = {"mix": (("fp32",) * len(version["PARTS"]),) * 2}
    constants = version | {"BLOCK": triton_rows.BLOCK}
    signature = POINTERS | NUMBERS | mix | dict.fromkeys(constants, "constexpr")
    whole = [
        name for name in (*POINTERS, "columns", "shared") if name != "stored"
    ]  # multiples of 16, as torch's tensors begin
    aligned = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in whole}
    source = ASTSource(fn=triton_rows._rows, signature=signature, constexprs=constants, attrs=aligned)  # pyright: ignore
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_rows.WARPS})
    loads = re.findall(r"ld\.global[.\w]*", kernel.asm["ptx"])
    wide = sum("v4.b32" in load for load in loads)
    return {"wide": wide, "other": len(loads) - wide, "spilt": _spilt(kernel.asm["ptx"])}


def _spilt(ptx: str) -> int:
    assembler = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [assembler, "-v", "--gpu-name=sm_90a", f"{folder}/kernel.ptx", "-o", f"{folder}/kernel"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (spilt,) = re.findall(r"(\d+) bytes spill stores", said)
    return int(spilt)


if __name__ == "__main__":
    print(json.dumps({name: compiled(version) for name, version in VERSIONS.items()}))
