"""What is exported is the student of the best validation, whatever kills the run on its way; patience ends it early."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkd.data.batches import collate
from llmkd.errors import InputError
from llmkd.models.load import load_tokenizer
from llmkd.recipe.recipe import load_recipe
from llmkd.recipe.run import Train
from llmkd.recipe.study_entries import entry_recipe, study_entries
from llmkd.train import train
from llmkd.training import checkpoint, jobs, validation
from llmkd.training.kept import Keeping, Noted, best_of, is_over
from llmkd.training.validation_rows import run_rows
from tests.tiny import load, plain_losses, quick
from tests.unit.training.test_validation import logged

# By KL the student first gets better, then worse for two steps, then better and at the last step worse again.
BEST: dict[str, Any] = {
    "data.validation": {"share": 0.2},
    "train.validate_every": 1,
    "train.keep": "best",
    "train.keep_by": "validation/kl",
    "train.steps": 10,
    "train.save_every": 4,
    "train.schedule": "constant",
    "train.warmup_steps": 0,
    "train.learning_rate": 0.02,
}


class Killed(Exception):
    pass


def run(world: Any, tiny: Path, folder: Path, changes: dict[str, Any] | None = None) -> Path:
    recipe = load_recipe(tiny / "recipe.yaml").changed({**quick(tiny), **BEST, **(changes or {})})
    assert train(world, jobs.distil_job(world, recipe, folder))
    return folder


def kl(folder: Path) -> dict[int, float]:
    return {line["step"]: line["kl"] for line in logged(folder)}


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All that a run's validations gave but their time."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in logged(folder)]


def same_to_the_bit(ours: Path, theirs: Path) -> None:
    mine, others = (load_file(model / "model.safetensors") for model in (ours, theirs))
    assert mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.fixture(scope="module")
def uninterrupted(world: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(world, tiny, tmp_path_factory.mktemp("kept") / "run")


def test_the_best_validation_is_the_first_of_equals_and_never_a_nan() -> None:
    noted = [Noted(1, math.nan), Noted(2, 3.0), Noted(3, 2.0), Noted(4, 2.0), Noted(5, math.inf), Noted(6, 2.5)]
    assert best_of(noted, "validation/ce") == Noted(3, 2.0)
    assert best_of(noted, "validation/agreement") == Noted(2, 3.0)
    assert best_of(noted[:1], "validation/ce") is None and best_of([], "validation/ce") is None


def test_patience_counts_the_validations_since_the_best() -> None:
    settings = Train(steps=9, batch_size=1, micro_batch_size=1, learning_rate=0.1, validate_every=1, patience=2)
    noted = [Noted(1, 3.0), Noted(2, 2.0), Noted(3, 2.0), Noted(4, 2.5)]
    assert [is_over(noted[:count], settings) for count in range(5)] == [False, False, False, False, True]
    assert is_over([Noted(1, math.nan), Noted(2, math.nan)], settings)
    assert not is_over(noted, settings.model_copy(update={"patience": None}))


def test_the_export_is_the_student_that_scores_best(
    uninterrupted: Path, world: Any, tiny: Path, tmp_path: Path
) -> None:
    values = kl(uninterrupted)
    best = min(values, key=lambda step: values[step])
    assert 1 < best < 10, "no test of anything if the last or the first step is the best"
    meta, summary = (json.loads((uninterrupted / name).read_text()) for name in ("model/llmkd.json", "summary.json"))
    assert meta["kept"] == summary["kept"] == {"step": best, "value": values[best]}
    expected = {"every": 1, "rows": 8, "keep": "best", "by": "validation/kl", "patience": None}
    assert meta["validation"] == expected and summary["steps"] == 10
    assert f"{best} steps" in (uninterrupted / "model" / "README.md").read_text()
    assert not (uninterrupted / "best").exists()
    # the weights of that step, as a run that ends there has them
    last = {"train.steps": best, "train.keep": "last", "train.keep_by": "validation/ce"}
    same_to_the_bit(uninterrupted / "model", run(world, tiny, tmp_path / "last", last) / "model")
    # and what they score in plain PyTorch
    job = jobs.distil_job(
        world, load_recipe(tiny / "recipe.yaml").changed({**quick(tiny), **BEST}), tmp_path / "unused"
    )
    rows = run_rows(world, job, load_tokenizer(tiny / "teacher"))
    assert rows.validation is not None
    batch = rows.all.batch(rows.validation, collate=collate, pad_id=0)
    with torch.no_grad():
        teacher, student = load(tiny / "teacher").eval(), load(uninterrupted / "model").eval()
        scored = plain_losses(job.recipe, teacher, student, None, job.pairs, batch)["kl"].item()
    assert scored == pytest.approx(min(values.values()), rel=1e-5)


@pytest.mark.parametrize("at", [3, 7, 10])
def test_a_killed_run_keeps_the_same_student(
    uninterrupted: Path, world: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Killed after the best student as of its checkpoint was left behind by a better one, or before the first checkpoint."""
    note = Keeping.note

    def die(self: Keeping, step: int, validated: validation.Validated) -> None:
        note(self, step, validated)
        if step == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Keeping, "note", die)
        with pytest.raises(Killed):
            run(world, tiny, tmp_path / "run")
    kept = {folder.name for folder in (tmp_path / "run" / "best").iterdir()}
    checkpoints = [int(path.name[5:]) for path in checkpoint.whole(tmp_path / "run" / "checkpoints")]
    values = kl(uninterrupted)
    bests = {min(range(1, end + 1), key=lambda step: values[step]) for end in (*checkpoints, at)}
    assert kept == {f"step-{step:08d}" for step in bests}
    run(world, tiny, tmp_path / "run")
    same_to_the_bit(tmp_path / "run" / "model", uninterrupted / "model")
    assert numbers(tmp_path / "run") == numbers(uninterrupted)


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_best_student_that_was_taken_away_or_damaged_is_missed_before_anything_is_trained(
    world: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Keeping, "publish", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(world, tiny, tmp_path / "run", {"train.steps": 2})
    why = "is no longer here"
    if damage == "gone":
        shutil.rmtree(tmp_path / "run" / "best")
    else:
        (*_, last) = sorted((tmp_path / "run" / "best").iterdir())
        weights = bytearray((last / "model.safetensors").read_bytes())
        weights[-5] ^= 1
        (last / "model.safetensors").write_bytes(weights)
        why = r"model\.safetensors is damaged: it does not hold what was written"
    with pytest.raises(InputError, match=rf"best/step-0000000.: the student of step ., the best so far, {why}; put it"):
        run(world, tiny, tmp_path / "run", {"train.steps": 2})


def test_patience_ends_a_run_and_a_resumed_one_alike(
    uninterrupted: Path,
    world: Any,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    values, changes = kl(uninterrupted), {"train.patience": 2}
    assert min(values[3], values[4]) > values[2], "the two steps after the second must be worse"
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(Keeping, "publish", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(world, tiny, tmp_path / "run", changes)
    assert "stopping after step 4: none of 2 validations was better than validation/kl" in caplog.text
    assert list(kl(tmp_path / "run")) == [1, 2, 3, 4]
    run(world, tiny, tmp_path / "run", changes)
    assert list(kl(tmp_path / "run")) == [1, 2, 3, 4]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["kept"]["step"] == 2 and summary["validation"]["patience"] == 2


def test_patience_alone_exports_the_last_student(world: Any, tiny: Path, tmp_path: Path, uninterrupted: Path) -> None:
    alone = run(world, tiny, tmp_path / "run", {"train.patience": 2, "train.keep": "last"})
    summary = json.loads((alone / "summary.json").read_text())
    assert summary["kept"] is None and summary["steps"] == 4
    changes = {"train.steps": 4, "train.keep": "last", "train.keep_by": "validation/ce"}
    same_to_the_bit(alone / "model", run(world, tiny, tmp_path / "four", changes) / "model")


def test_a_rule_that_a_baseline_can_not_follow_is_refused_by_its_name(tiny: Path) -> None:
    study = {"study.strategies": ["forward"], "study.baselines": ["ce_only"], **BEST}
    recipe = load_recipe(tiny / "recipe.yaml").changed(study)
    with pytest.raises(InputError, match=r"^ce_only-s0: train.keep_by: validation/kl compares .* write validation/ce"):
        for entry in study_entries(recipe):
            if entry.train is not None:
                entry_recipe(recipe, entry)
    for_all = recipe.changed({"train.keep_by": "validation/ce"})
    kept = [entry_recipe(for_all, entry).train.keep for entry in study_entries(for_all) if entry.train is not None]
    assert kept == ["best", "best"]
