"""Which backend runs a model folder: the recipe's choice, or with `auto` vLLM where it is installed and the work repays its start."""

from __future__ import annotations

import json
import math
from pathlib import Path

from llmkd.inference.vllm_setup import CPU_HEAD_SIZES, on_cpu, vllm_version

WORTH_VLLM = 3e11
"""Parameters x new tokens from which vLLM repays its start. On one CPU thread 26M parameters x 12,800 tokens (3.3e11) took 21 s by
Hugging Face and 10 + 7 s by vLLM; 7M parameters 5 s against 8 + 4 s. Not measured on a GPU."""


def choose_backend(setting: str, folder: Path, uses: float, enough: float, task: str = "") -> tuple[str, str]:
    """(hf or vllm, why). `auto` takes vLLM from `enough` = the model's parameters x `uses` on; `task` says what the uses are."""
    if setting != "auto":
        return setting, "as the recipe says"
    if vllm_version() is None:
        return "hf", "vLLM is not installed"
    try:
        size, head = parameters(folder), head_size(folder)
    except (OSError, ValueError, KeyError):  # loading it will report what is wrong
        return "hf", "the model's size can't be read"
    if on_cpu() and head not in CPU_HEAD_SIZES:
        return "hf", f"vLLM's CPU build has no attention heads of size {head}"
    work = f"{size / 1e6:.3g}M parameters{task}"
    if size * uses < enough:
        return "hf", f"{work}, too little to repay vLLM's start (from {enough:.0e} on)"
    return "vllm", f"{work}, enough to repay vLLM's start (from {enough:.0e} on)"


def parameters(folder: Path) -> int:
    """How many numbers a folder's safetensors hold; read from their headers. Raises OSError where there are none."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    if not count:
        raise FileNotFoundError(folder)
    return count


def head_size(folder: Path) -> int:
    """The width of one attention head."""
    config = json.loads((folder / "config.json").read_text())
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def is_encoder_decoder(folder: Path) -> bool:
    """Whether a model folder's model is an encoder-decoder; False where that can't be read (loading it will report why)."""
    try:
        return bool(json.loads((folder / "config.json").read_text()).get("is_encoder_decoder"))
    except (OSError, ValueError):
        return False
