"""`student.copy_blocks` by measurement: what is refused, what is planned by, a study's undistilled students, and angles before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd import study
from llmkd.errors import InputError
from llmkd.evaluation.angles import measure
from llmkd.files import write_checked
from llmkd.models.width import Kept
from llmkd.planning.shapes import initial_student_config, teacher_config
from llmkd.recipe.recipe import load_recipe
from llmkd.recipe.study_entries import measured_start, study_entries
from llmkd.training import initial, jobs
from tests.cli.test_angles import trained
from tests.family_models import DECODERS, ENCODERS, family_recipe, new
from tests.unit.models.test_load_and_make import CONFIGS
from tests.unit.models.test_load_and_make import new as random_decoder

INFLUENCE, PERPLEXITY = ({"student.copy_blocks": rule} for rule in ("influence", "perplexity"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {**INFLUENCE, "student.init": "random"},
            "influence chooses blocks to copy, and init random copies none; leave",
        ),
        (
            {**INFLUENCE, "teacher.placement": "cache"},
            "a teacher with placement cache gives those of its map; write perplexity, or teacher.placement: replicated",
        ),
        ({**INFLUENCE, "teacher.share_cache": True}, "a teacher with share_cache gives those of its map"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tiny: Path, changes: dict[str, Any], sentence: str) -> None:
    recipe = load_recipe(tiny / "recipe.yaml")
    with pytest.raises(InputError, match=sentence):
        recipe.changed(changes)
    recipe.changed({**changes, **PERPLEXITY, "student.init": "teacher"})


def test_teachers_that_a_rule_can_not_be_measured_on_are_refused_before_anything_is_written(
    tmp_path: Path, world: Any
) -> None:
    """By the sentence of each; the other rule is taken where it can be."""
    spread = "write spread, matched or a list"
    teachers = {
        "bert": ("encoder", new(ENCODERS["bert"](4), "encoder"), f"influence is measured of decoders, .* {spread}"),
        "opt": ("decoder", new(DECODERS["opt"](4), "decoder"), "a 'opt' model has not been shown to; write perplexity"),
        "smollm3": ("decoder", random_decoder(CONFIGS["smollm3"]()), "has blocks of several kinds; write influence"),
    }
    for name, (kind, teacher, sentence) in teachers.items():
        (tmp_path / name).mkdir()
        rule, other = (PERPLEXITY, INFLUENCE) if name == "smollm3" else (INFLUENCE, PERPLEXITY)
        more = {"matching.embedding": False}
        recipe = family_recipe(tmp_path / name, kind, teacher, **rule, **more)
        with pytest.raises(InputError, match=f"student.copy_blocks: .*{sentence}"):
            jobs.distil_job(world, recipe, tmp_path / name / "run")
        assert not (tmp_path / name / "run").exists()
        if name != "bert":
            assert jobs.distil_job(world, recipe.changed(other), tmp_path / name / "run").student_depths == (2,)


def test_what_is_yet_to_be_measured_is_planned_by_as_many_blocks(tiny: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed(INFLUENCE)
    assert initial_student_config(recipe, teacher_config(recipe)).num_hidden_layers == 3
    assert recipe.student.planned_blocks == "spread" and recipe.changed({"student.copy_blocks": [0, 1, 2]}) != recipe
    assert recipe.changed({"student.copy_blocks": "matched"}).student.planned_blocks == "matched"


def test_the_undistilled_students_of_a_study_have_the_blocks_that_were_measured(file: Path) -> None:
    """One for each seed, whose rows they were measured on, from a student that begins as the recipe's own does."""
    fewer = {"student.blocks": 2, "student.copy_blocks": "spread"}
    recipe = load_recipe(file).changed(
        {**INFLUENCE, "study.seeds": [3, 4], "study.baselines": ["undistilled"], "study.variants": {"fewer": fewer}}
    )
    entries = study_entries(recipe)
    baselines = [entry for entry in entries if entry.strategy == "undistilled"]
    assert [(entry.name, entry.seed) for entry in baselines] == [("undistilled-s3", 3), ("undistilled-s4", 4)]
    assert [measured_start(recipe, entries, entry).name for entry in baselines] == ["forward-s3", "forward-s4"]
    study.check(recipe, entries, 1)
    alone = recipe.changed({"study.strategies": []})
    with pytest.raises(
        InputError, match="study.baselines: undistilled-s3 has the blocks that copy_blocks: influence fi"
    ):
        study.check(alone, study_entries(alone), 1)
    cached = recipe.changed({**PERPLEXITY, "teacher.share_cache": True, "study.baselines": ["undistilled", "ce_only"]})
    every = study_entries(cached)
    undistilled = next(entry for entry in every if entry.strategy == "undistilled")
    assert measured_start(cached, every, undistilled).name == "ce_only-s3"


def test_undistilled_students_are_written_of_the_measured_blocks(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed(
        {**INFLUENCE, "output": str(tmp_path), "study": {"seeds": [3, 4], "strategies": ["forward"]}}
    )
    made: dict[str, Any] = {}
    monkeypatch.setattr(study, "initial_student", lambda own, teacher, folder, kept: _made(made, own, folder))
    for seed, blocks in ((3, [0, 1, 5]), (4, [0, 2, 5])):
        run = recipe.folder / "students" / f"ce_only-s{seed}"
        run.mkdir(parents=True)
        write_checked(run / "blocks.json", {"rule": "influence", "blocks": blocks})
    study._write_undistilled(recipe, study_entries(recipe))
    assert made == {"s3": (0, 1, 5), "s4": (0, 2, 5)}
    made.clear()
    study._write_undistilled(recipe, study_entries(recipe))
    assert made == {}, "what is there is not made again"
    write_checked(recipe.folder / "students" / "ce_only-s4" / "blocks.json", {"blocks": [1, 2, 3]})
    study._write_undistilled(recipe, study_entries(recipe))
    assert made == {"s4": (1, 2, 3)}


def _made(made: dict[str, Any], recipe: Any, folder: Path) -> None:
    made[folder.name] = recipe.student.copy_blocks
    folder.mkdir(parents=True, exist_ok=True)


def test_angles_before_training_are_those_of_the_measured_blocks(
    world: Any, tiny: Path, tmp_path: Path, inside: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(world, tiny, tmp_path / "run", **INFLUENCE)
    chosen = json.loads((run / "blocks.json").read_text())["blocks"]
    seen = []

    def watched(recipe: Any, *rest: Any) -> None:
        seen.append(list(recipe.student.copy_blocks))
        initial.initial_student(recipe, *rest)

    monkeypatch.setattr(measure, "initial_student", watched)
    result = json.loads(measure.angles(run, rows=4)["run"].read_text())
    assert result["error"] is None and seen == [chosen] and chosen != [0, 3, 5]
    (run / "blocks.json").unlink()
    with pytest.raises(InputError, match="blocks.json: the blocks that this run's student was made of are missing"):
        initial.with_blocks(load_recipe(run / "recipe.yaml"), run)


def test_angles_before_training_are_those_of_the_narrowed_student(
    world: Any, tiny: Path, tmp_path: Path, inside: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = {"student.intermediate_size": 20, "student.num_attention_heads": 2}
    run = trained(world, tiny, tmp_path / "run", **narrow)
    seen = []

    def watched(recipe: Any, teacher: Path, folder: Path, kept: Any) -> None:
        seen.append(kept)
        initial.initial_student(recipe, teacher, folder, kept)

    monkeypatch.setattr(measure, "initial_student", watched)
    result = json.loads(measure.angles(run, rows=4)["run"].read_text())
    kept = Kept.of(json.loads((run / "width.json").read_text()))
    assert result["error"] is None and seen == [kept] and kept.sizes["intermediate_size"] == 20
