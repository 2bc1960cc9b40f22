"""`llmkd angles` on training folders and studies: real tiny students, before and after, by the command and by its function."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkd.cli import main
from llmkd.errors import InputError
from llmkd.evaluation.angles import measure
from llmkd.evaluation.angles.results import angles_text
from llmkd.inference import child
from llmkd.recipe.recipe import dump_recipe, load_recipe
from llmkd.recipe.study_entries import StudyFile, study_entries
from llmkd.train import train
from llmkd.training import jobs

ROWS = 6


def trained(world: Any, tiny: Path, folder: Path, **changes: Any) -> Path:
    """A training folder of the tiny recipe, held-out rows named in it."""
    held = {"evaluation.generation": {"source": str(tiny / "rows.jsonl"), "split": "train"}}
    short = {"train.steps": 1, "train.warmup_steps": 0, "train.micro_batch_size": 8}
    recipe = load_recipe(tiny / "recipe.yaml").changed({**held, **short, **changes})
    assert train(world, jobs.distil_job(world, recipe, folder))
    return folder


@pytest.fixture(scope="module")
def run(world: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copied student after one large step."""
    return trained(world, tiny, tmp_path_factory.mktemp("runs") / "forward-s0")


NARROW = {"student.init": "random", "student.hidden_size": 16, "student.head_dim": 4, "seed": 3}


@pytest.fixture(scope="module")
def still(world: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow random student whose training moved nothing, nor its projectors."""
    rate = {"train.learning_rate": 1e-12, "train.final_learning_rate": 0.0, "train.weight_decay": 0.0}
    return trained(world, tiny, tmp_path_factory.mktemp("runs") / "still", **NARROW, **rate)


def test_the_command_measures_a_training_folder_once(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["angles", str(run), "--rows", str(ROWS)])
    out = capfd.readouterr().out
    assert "forward-s0 | teacher | before" in out and f"{ROWS} held-out rows" in out and "paper_code" in out
    file = run / "angles" / "forward-s0.json"
    found = json.loads(file.read_text())
    (stack,) = found["stacks"]
    assert (found["error"], found["rows"], stack["teacher_blocks"], stack["student_blocks"]) == (None, ROWS, 6, 3)
    assert found["projector"] is None and found["final_state"] == "raw" and stack["tokens"] < stack["positions"]
    before, after = (stack[when]["blocks"] for when in ("before", "after"))
    assert before[0]["without_direction"] == [stack["tokens"], 0, 0, 0, 0, 0]  # `spread` copies block 0
    assert after[0]["without_direction"] == [0] * 6 and after[0]["mean"] != before[0]["mean"]
    assert stack["before"]["paper_code"]["tokens"]["mean"] == 0
    assert [len(block["histogram"]) for block in after] == [15] * 3
    assert not list((run / "angles").glob("initial-*"))

    monkeypatch.setattr(child, "Child", lambda *_, **__: pytest.fail("it is up to date"))
    main(["angles", str(run), "--rows", str(ROWS)])
    assert json.loads(file.read_text()) == found and "before" in capfd.readouterr().out


def test_training_that_moves_nothing_has_the_same_angles_before_and_after(still: Path, inside: list[Any]) -> None:
    """The start is made anew as training made it, and the projector in the checkpoint is the one that was drawn."""
    found = json.loads(measure.angles(still, rows=ROWS)["still"].read_text())
    assert found["error"] is None
    assert found["projector"] == {
        "before": "as drawn from the recipe's seed",
        "after": "trained, from checkpoints/step-00000001",
    }
    (stack,) = found["stacks"]
    assert len(stack["before"]["blocks"]) == 3
    for ours, theirs in zip(stack["before"]["blocks"], stack["after"]["blocks"], strict=True):
        assert ours["counted"] == theirs["counted"] and ours["mean"][0][5] != 1
        for row, other in zip(ours["mean"], theirs["mean"], strict=True):
            assert row == pytest.approx(other, abs=1e-5)
    codes = [stack[when]["paper_code"]["tokens"]["mean"] for when in ("before", "after")]
    assert codes[0] == pytest.approx(codes[1], abs=1e-5)


def test_a_projector_at_equal_width_is_left_out_and_the_file_says_so(
    world: Any, tiny: Path, run: Path, tmp_path: Path, inside: list[Any]
) -> None:
    """The states are raw: without its projectors in the checkpoints, the same angles."""
    folder = trained(world, tiny, tmp_path / "always", **{"matching.projector": "always"})
    found = json.loads(measure.angles(folder, rows=2)["always"].read_text())
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "angles")
    again = json.loads(measure.angles(folder, rows=2)["always"].read_text())
    assert found["error"] is None and found["projector"] is None and found["projector_left_out"] is True
    assert found["stacks"] == again["stacks"]
    shutil.copytree(run, tmp_path / "plain", ignore=shutil.ignore_patterns("angles"))
    plain = measure.angles(tmp_path / "plain", rows=2)["plain"]
    assert json.loads(plain.read_text())["projector_left_out"] is False


def test_other_rows_or_another_model_are_measured_again(run: Path, tmp_path: Path, inside: list[Any]) -> None:
    folder = tmp_path / "forward-s0"
    shutil.copytree(run, folder)
    measure.angles(folder, rows=2)
    measure.angles(folder, rows=2)
    measure.angles(folder, rows=3)
    assert [order["shared"]["rows"] for order in inside] == [2, 3]
    config = folder / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    measure.angles(folder, rows=3)
    assert len(inside) == 3


def spoil_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def spoil_pairs(folder: Path) -> None:
    file = folder / "model" / "llmkd.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pairs": []}))


def spoil_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            spoil_checkpoints,
            "16 wide and the teacher's 32, and no checkpoint is left in .*train it again and keep its",
        ),
        (spoil_pairs, "16 wide and the teacher's 32, and the run matched no pair, .* or give a student of the teacher"),
        (spoil_weights, "still: .*model: can't be loaded with attention .*; choose another model"),
    ],
)
def test_a_student_that_can_not_be_looked_from_is_named(
    still: Path, tmp_path: Path, inside: list[Any], spoil: Callable[[Path], None], sentence: str
) -> None:
    folder = tmp_path / "still"
    shutil.copytree(still, folder, ignore=shutil.ignore_patterns("angles"))
    spoil(folder)
    with pytest.raises(InputError, match=sentence):
        angles_text(measure.angles(folder, rows=2))
    measure.angles(folder, rows=2)
    assert len(inside) == 2  # a noted error is no result


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "loss.hidden=0",
            "the run matched no pair, .*; train it again with loss.hidden above 0 and keep its checkpoints",
        ),
        (
            "matching.strategy=none",
            "the run matched no pair, .*; train it again with a strategy other than none and keep",
        ),
    ],
)
def test_a_run_without_pairs_is_told_what_would_have_matched_some(
    still: Path, tmp_path: Path, inside: list[Any], override: str, sentence: str
) -> None:
    folder = tmp_path / "still"
    shutil.copytree(still, folder, ignore=shutil.ignore_patterns("angles"))
    spoil_pairs(folder)
    key, _, value = override.partition("=")
    file = folder / "model" / "llmkd.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({**meta, "inputs": {**meta["inputs"], key: yaml.safe_load(value)}}))
    with pytest.raises(InputError, match=sentence):
        angles_text(measure.angles(folder, overrides=[override], rows=2))


def test_a_study_is_measured_student_by_student(run: Path, tmp_path: Path, inside: list[Any]) -> None:
    """Three students of one start, one of them not trained yet and left out; the start is measured once."""
    asked = {"study.strategies": ["forward", "reverse"], "study.seeds": [0], "study.baselines": ["ce_only"]}
    recipe = load_recipe(run / "recipe.yaml").changed(asked)
    StudyFile("tiny", "forward", {}, [], study_entries(recipe)).write(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(InputError, match="no student of this study has been trained yet; run llmkd study first"):
        measure.angles(tmp_path)
    # "forward" is the default, and a key at its default is not among the inputs
    for name, changed in (("forward-s0", {}), ("ce_only-s0", {"matching.strategy": "none"})):
        folder = tmp_path / "students" / name
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("angles"))
        meta = json.loads((folder / "model" / "llmkd.json").read_text())
        (folder / "model" / "llmkd.json").write_text(json.dumps({**meta, "inputs": {**meta["inputs"], **changed}}))
    files = measure.angles(tmp_path, rows=2)
    assert list(files) == ["ce_only-s0", "forward-s0"]
    ours, theirs = (json.loads(file.read_text()) for file in files.values())
    assert ours["stacks"] == theirs["stacks"]
    assert "ce_only-s0" in angles_text(files)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda folder, run: folder,
            "neither a study .* give e.g. runs/quickstart or runs/quickstart/students/forward",
        ),
        (lambda folder, run: run / "model", "a model's folder; give the training folder around it, .*forward-s0"),
        (
            lambda folder, run: (folder / "checkpoints").mkdir() or folder,
            "has not ended, so there is no model yet; run",
        ),
    ],
)
def test_a_wrong_folder_is_named_with_the_cure(
    run: Path, tmp_path: Path, make: Callable[[Path, Path], Path], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        measure.angles(make(tmp_path, run))


def test_a_wrong_recipe_is_named_with_the_cure(run: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="student.blocks was 3, here it is 2; give its own recipe by --recipe"):
        measure.angles(run, overrides=["student.blocks=2"])
    with pytest.raises(
        InputError, match="evaluation.generation: the recipe has no such section, which names the held-out rows; add it"
    ):
        measure.angles(run, recipe=str(tiny / "recipe.yaml"))
    with pytest.raises(
        InputError, match="angles_rows: the held-out rows are those of evaluation.generation, of encoders .*; add"
    ):
        load_recipe(tiny / "recipe.yaml", ["evaluation.angles_rows=3"])
    folder = tmp_path / "forward-s0"
    shutil.copytree(run, folder)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(InputError, match="has no recipe.yaml; give the recipe that trained"):
        measure.angles(folder)
    meta = json.loads((folder / "model" / "llmkd.json").read_text())
    (folder / "model" / "llmkd.json").write_text(json.dumps({**meta, "inputs": {"finetune.seed": 0}}))
    with pytest.raises(InputError, match="a teacher's run, and angles are seen from a student"):
        measure.angles(folder)


def test_rows_that_can_not_be_had_are_refused(run: Path, tmp_path: Path, inside: list[Any]) -> None:
    """By the child, in one sentence; nothing is measured."""
    folder = tmp_path / "forward-s0"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("angles"))
    with pytest.raises(InputError, match="no file or folder '/nowhere.jsonl'"):
        measure.angles(folder, overrides=["evaluation.generation.source=/nowhere.jsonl"])
    assert not list((folder / "angles").glob("*.json"))
