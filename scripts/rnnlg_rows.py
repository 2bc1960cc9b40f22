"""The RNNLG benchmark's dialogue acts and their sentences as rows to train and test on.

    python scripts/rnnlg_rows.py FOLDER [--out runs/rnnlg]

FOLDER holds `rnnlg_{train,validation,test}.jsonl` (or .jsonl.gz): one object per line, with an `act` such as `inform(name=...;price=...)`
and its `text`, from the benchmark's data (Wen et al.; github.com/shawnwun/RNNLG), all domains of a split in one file. A row's prompt is
the act, its completion the text. In validation and test an act is one row, with all its texts as `references`, and acts that occur in the
training data are left out. The rows are shuffled by a fixed seed, so that the first rows come from all domains.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

from wheels import run

from llmkd.errors import InputError

SPLITS = ("train", "validation", "test")


def texts_of_acts(file: Path) -> dict[str, list[str]]:
    """Every text of each act of a split."""
    texts: dict[str, list[str]] = {}
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        for row in map(json.loads, lines):
            texts.setdefault(row["act"], []).append(row["text"])
    return texts


def rows_of(acts: dict[str, list[str]], trained: set[str] | None) -> list[dict[str, str | list[str]]]:
    """A row per text; or, where the `trained` acts are given, a row with references per act that is not one of them."""
    rows: list[dict[str, str | list[str]]] = []
    for act, texts in acts.items():
        if trained is None:
            rows += [{"prompt": f"{act} =>", "completion": f" {text}"} for text in texts]
        elif act not in trained:
            rows.append({"prompt": f"{act} =>", "completion": f" {texts[0]}", "references": [f" {t}" for t in texts]})
    random.Random(0).shuffle(rows)
    return rows


def main() -> None:
    """Write OUT/train.jsonl, validation.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/rnnlg"))
    arguments = parser.parse_args()
    acts: dict[str, dict[str, list[str]]] = {}
    for split in SPLITS:
        names = [f"rnnlg_{split}.jsonl", f"rnnlg_{split}.jsonl.gz"]
        files = [file for name in names if (file := arguments.folder / name).is_file()]
        if not files:
            raise InputError(f"{arguments.folder} holds no {names[0]} or .jsonl.gz; give the folder that does")
        acts[split] = texts_of_acts(files[0])
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = rows_of(acts[split], None if split == "train" else set(acts["train"]))
        (arguments.out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{arguments.out / f'{split}.jsonl'}: {len(rows):,} rows")


if __name__ == "__main__":
    run(main)
