"""CommonsenseQA and HellaSwag: what scripts/fetch_choice_data.py writes, and eval/'s tasks that score it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval.tasks
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.hellaswag.utils import preprocess

from llmkd.errors import InputError
from llmkd.files import ROOT

SCRIPT = ROOT / "scripts" / "fetch_choice_data.py"

QUESTION = {
    "id": "q1",
    "query": "Question: Where is  a ficus grown?\nAnswer:",
    "choices": ["pot", "sea", "ice", "sun", "car"],
    "gold": 0,
}
SCENE = {
    "ind": 4,
    "query": "Baking: A chef shows a stack of  pans: big ones. The pans",
    "choices": [" Cut the  cake.", "are filled.", ", then", "Sing. "],
    "gold": 1,
}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as if it were run: it imports the file beside it
        patch.setenv(
            "HF_DATASETS_DISABLE_PROGRESS_BARS", "1"
        )  # it does, and would leave it to the files after this one
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def made(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the script makes of a folder of one row each."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "given"
    folder.mkdir()
    for short, row in (("csqa", QUESTION), ("hellaswag", SCENE)):
        for split in ("train", "validation"):
            (folder / f"{short}_{split}.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    script.fetch(tmp_path / "out", "auto", folder, tmp_path / "wheels")
    return tmp_path / "out"


def task(name: str, folder: Path) -> Any:
    manager = TaskManager(include_path=ROOT / "eval", include_defaults=False, metadata={"choice_data": str(folder)})  # type: ignore[arg-type]
    return manager.load([name])["tasks"][name]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "packaged"),
    [("commonsense_qa", "commonsense_qa/default.yaml"), ("hellaswag", "hellaswag/hellaswag.yaml")],
)
def test_the_definition_is_lm_evals_own(made: Path, name: str, packaged: str) -> None:
    ours = task(f"{name}_local", made).config
    theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / packaged)
    changed = {key for key, value in theirs.items() if getattr(ours, key, value) != value}
    assert changed <= {"task", "dataset_path", "training_split", "metadata", "tag"}
    assert "doc_to_text" in theirs and "metric_list" in theirs


def test_lm_eval_reads_back_the_rows_as_they_were(made: Path) -> None:
    question, scene = (task(f"{name}_local", made) for name in ("commonsense_qa", "hellaswag"))
    (doc,) = question.eval_docs
    text = "Question: Where is  a ficus grown?\nA. pot\nB. sea\nC. ice\nD. sun\nE. car\nAnswer:"
    assert (question.doc_to_text(doc), question.doc_to_target(doc)) == (text, "A")
    (doc,) = scene.eval_docs
    found = (scene.doc_to_text(doc), scene.doc_to_choice(doc), scene.doc_to_target(doc))
    assert found == (SCENE["query"], SCENE["choices"], SCENE["gold"])


@pytest.mark.parametrize("name", ["commonsense_qa", "hellaswag"])
def test_training_text_is_what_lm_eval_scores_highest_for(made: Path, name: str) -> None:
    scored = task(f"{name}_local", made)
    (doc,) = scored.eval_docs
    requests = scored.construct_requests(doc, scored.doc_to_text(doc), metadata=(name, 0, 1))
    right = next(i for i, letter in enumerate("ABCD") if scored.doc_to_target(doc) in (i, letter))
    (row,) = lines(made / "train" / f"{name}.jsonl")
    assert (row["prompt"], row["completion"]) == requests[right].args


def test_a_second_call_changes_nothing(made: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    script.fetch(made, "hub", None, made)
    assert "already there" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*")} == before


def test_a_folder_without_all_files_is_refused_and_nothing_written(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="csqa_train.jsonl.gz"):
        script.fetch(tmp_path / "out", "auto", tmp_path, tmp_path)
    assert not (tmp_path / "out").exists()


def test_without_its_file_a_task_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"fetch_choice_data\.py"):
        task("hellaswag_local", tmp_path)


def test_the_hub_is_asked_for_every_split(script: ModuleType) -> None:
    asked = []

    def load(name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return [{"id": name}]

    tables = script.from_hub(load)
    assert set(asked) == {
        (name, split) for name in ("tau/commonsense_qa", "Rowan/hellaswag") for split in ("train", "validation")
    }
    assert tables["hellaswag", "train"] == [{"id": "Rowan/hellaswag"}]


def test_without_the_hub_the_script_names_another_source(script: ModuleType) -> None:
    def load(name: str, *, split: str) -> list[dict[str, Any]]:
        raise ConnectionError(f"no route to {name}\nsecond line")

    with pytest.raises(InputError, match=r"no route to tau/commonsense_qa\).*leave out --source"):
        script.from_hub(load)


def test_a_mistake_is_one_sentence_and_exit_code_2() -> None:
    command = [sys.executable, str(SCRIPT), "--source", "folder"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: --source folder") and len(done.stderr.splitlines()) == 1


@given(st.text(alphabet="ab. :,", max_size=30))
def test_unprocessing_undoes_lm_evals_clean_up(script: ModuleType, text: str) -> None:
    assert preprocess(script.unprocessed(text)) == text
