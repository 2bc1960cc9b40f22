"""The RNNLG benchmark's dialogue acts and their sentences as rows to train and test on.

    python scripts/rnnlg_rows.py FOLDER [--out runs/rnnlg]

FOLDER holds `rnnlg_{train,validation,test}.jsonl` (or .jsonl.gz), one object per line: an `act` such as `inform(name=...;price=...)`
and its `text`, from the data of the benchmark (Wen et al.; github.com/shawnwun/RNNLG), all domains of a split in one file. A row's
prompt is the act, its completion the text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "validation", "test")


def rows(file: Path) -> Iterator[dict[str, str]]:
    """Prompt and completion of every line."""
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        for line in lines:
            row = json.loads(line)
            yield {"prompt": f"{row['act']} =>", "completion": f" {row['text']}"}


def main() -> None:
    """Write OUT/train.jsonl, validation.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/rnnlg"))
    given = parser.parse_args()
    for split in SPLITS:
        found = [file for end in ("jsonl", "jsonl.gz") if (file := given.folder / f"rnnlg_{split}.{end}").is_file()]
        if not found:
            print(
                f"Error: {given.folder} holds no rnnlg_{split}.jsonl or .jsonl.gz; give the folder that does",
                file=sys.stderr,
            )
            sys.exit(2)
        given.out.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows(found[0]))
        (given.out / f"{split}.jsonl").write_text(text)
        print(f"{given.out / f'{split}.jsonl'}: {text.count(chr(10)):,} rows")


if __name__ == "__main__":
    main()
