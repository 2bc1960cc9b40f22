"""The RNNLG benchmark's dialogue acts and their sentences as rows to train and test on.

    python scripts/rnnlg_rows.py FOLDER [--out runs/rnnlg]

FOLDER holds `rnnlg_{train,validation,test}.jsonl` (or .jsonl.gz), one object per line: an `act` such as `inform(name=...;price=...)`
and its `text`, from the data of the benchmark (Wen et al.; github.com/shawnwun/RNNLG), all domains of a split in one file. A row's
prompt is the act, its completion the text. Of validation and test each act is one row, with all texts of it as `references`, and acts that
training has are left out. The rows are put in an order drawn once, so that a first part of them is of all domains.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from pathlib import Path

SPLITS = ("train", "validation", "test")


def texts_of_acts(file: Path) -> dict[str, list[str]]:
    """Every text of each act of a split."""
    found: dict[str, list[str]] = {}
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        for row in map(json.loads, lines):
            found.setdefault(row["act"], []).append(row["text"])
    return found


def rows(acts: dict[str, list[str]], trained: set[str] | None) -> list[dict[str, str | list[str]]]:
    """A row per text, or, where the acts that are `trained` are given, a row with references per act that is not among them."""
    made: list[dict[str, str | list[str]]] = []
    for act, texts in acts.items():
        if trained is None:
            made += [{"prompt": f"{act} =>", "completion": f" {text}"} for text in texts]
        elif act not in trained:
            made.append({"prompt": f"{act} =>", "completion": f" {texts[0]}", "references": [f" {t}" for t in texts]})
    random.Random(0).shuffle(made)
    return made


def main() -> None:
    """Write OUT/train.jsonl, validation.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/rnnlg"))
    given = parser.parse_args()
    acts: dict[str, dict[str, list[str]]] = {}
    for split in SPLITS:
        found = [file for end in ("jsonl", "jsonl.gz") if (file := given.folder / f"rnnlg_{split}.{end}").is_file()]
        if not found:
            print(
                f"Error: {given.folder} holds no rnnlg_{split}.jsonl or .jsonl.gz; give the folder that does",
                file=sys.stderr,
            )
            sys.exit(2)
        acts[split] = texts_of_acts(found[0])
    given.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        made = rows(acts[split], None if split == "train" else set(acts["train"]))
        (given.out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        print(f"{given.out / f'{split}.jsonl'}: {len(made):,} rows")


if __name__ == "__main__":
    main()
