"""Students in turn in one process: one that diverges, a signal in the middle, what is refused."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkd import train as loop
from llmkd.distributed.clocks import WARM_UP
from llmkd.errors import FoundByAll, InputError
from llmkd.processes import only_one_in
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.teachers.resident import ResidentTeacher
from llmkd.train import Stopping, train, train_in_turn
from llmkd.training import build, checks, jobs
from tests.tiny import quick


@pytest.fixture
def recipe(tiny: Path) -> Recipe:
    return load_recipe(tiny / "recipe.yaml").changed(
        {**quick(tiny), "train.steps": 4, "train.warmup_steps": 1, "train.log_every": 1}
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_that_diverges_is_named_when_the_others_are_done(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    spoilt = recipe.changed({"train.learning_rate": 1e30, "train.weight_decay": 1e20})
    given = {"good": recipe, "bad": spoilt, "too": recipe.changed({"matching.strategy": "none"})}
    todo = [jobs.distil_job(world, own, tmp_path / name) for name, own in given.items()]
    with pytest.raises(FoundByAll, match=r"^bad: .*the training has diverged"):
        train_in_turn(world, todo)
    assert not (tmp_path / "bad" / "model").exists() and not (tmp_path / "bad" / "summary.json").exists()
    for name in ("good", "too"):
        assert train(world, jobs.distil_job(world, given[name], tmp_path / "alone" / name))
        assert_equal(tmp_path / name, tmp_path / "alone" / name)
    summary = json.loads((tmp_path / "good" / "summary.json").read_text())
    assert summary["students_in_turn"] == 3
    assert summary["seconds"] == pytest.approx(sum(summary["seconds_by_part"].values()), rel=0.5)


@pytest.mark.parametrize("fault", ["damaged", "held", "other"])
def test_one_that_can_not_be_trained_costs_the_others_nothing(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Its only checkpoint is damaged; another process is in its folder; its folder holds the model of another recipe."""
    given = {
        "first": recipe,
        "bad": recipe.changed({"matching.strategy": "reverse"}),
        "too": recipe.changed({"loss.kl": 0.0}),
    }
    todo = [jobs.distil_job(world, own, tmp_path / name) for name, own in given.items()]
    sentence = {
        "damaged": "state.json is damaged",
        "held": "works in this folder",
        "other": "was made by another recipe",
    }[fault]
    with contextlib.ExitStack() as held:
        if fault == "damaged":
            stopping = Stopping()
            monkeypatch.setattr(loop, "_counts", lambda *given, real=loop._counts: (real(*given)[0], True))
            assert not train(world, todo[1], stopping)
            monkeypatch.undo()
            (checkpoint,) = (tmp_path / "bad" / "checkpoints").iterdir()
            (checkpoint / "state.json").write_text("{")
        elif fault == "held":
            held.enter_context(only_one_in(tmp_path / "bad"))
        else:
            assert train(world, jobs.distil_job(world, recipe, tmp_path / "bad"))
        before = {file: file.read_bytes() for file in (tmp_path / "bad").rglob("*") if file.is_file()}
        with pytest.raises(FoundByAll, match=rf"^bad: .*{sentence}"):
            train_in_turn(world, todo)
        assert {file: file.read_bytes() for file in (tmp_path / "bad").rglob("*") if file.is_file()} == before
    for name in ("first", "too"):
        assert train(world, jobs.distil_job(world, given[name], tmp_path / "alone" / name))
        assert_equal(tmp_path / name, tmp_path / "alone" / name)


def test_a_signal_between_two_students_steps_stops_both_and_all_goes_on(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one has then done a step more than the other."""
    given = {"forward": recipe, "none": recipe.changed({"matching.strategy": "none"})}

    def todo() -> list[jobs.Job]:
        return [jobs.distil_job(world, own, tmp_path / name) for name, own in given.items()]

    stopping, real, passes = Stopping(), loop._train_on, iter(range(100))

    def signalled(*arguments: Any) -> Any:
        if next(passes) == 2:  # in the second step, of the one whose turn is first
            stopping.asked = True
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_on", signalled)
        assert not train_in_turn(world, todo(), stopping)
    saved = {name: [f.name for f in sorted((tmp_path / name / "checkpoints").iterdir())] for name in given}
    assert saved == {"forward": ["step-00000002"], "none": ["step-00000003"]}
    assert train_in_turn(world, todo())
    for name, own in given.items():
        assert train(world, jobs.distil_job(world, own, tmp_path / "alone" / name))
        assert_equal(tmp_path / name, tmp_path / "alone" / name)
        steps = [json.loads(line)["step"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4]


def test_those_that_are_done_are_left_alone(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    jobs_of = [jobs.distil_job(world, recipe, tmp_path / name) for name in ("one", "two")]
    assert train(world, jobs_of[0])
    before = (tmp_path / "one" / "summary.json").read_bytes()
    assert train_in_turn(world, jobs_of)
    assert (tmp_path / "one" / "summary.json").read_bytes() == before
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["students_in_turn"] == 1
    assert_equal(tmp_path / "one", tmp_path / "two")


def test_times_of_students_in_turn_compare(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass takes a minute, a validation's too, and loading the teacher an hour, by the clock alone: each student that uses the teacher
    has a third of each pass in its steps, and none the loading. One that uses none has neither, though it goes first at times."""
    clock, late = time.perf_counter, [0.0]
    signals, load = ResidentTeacher.signals, build.load_teacher

    def slow(self: ResidentTeacher, *arguments: Any) -> Any:
        late[0] += 60
        return signals(self, *arguments)

    def loaded(*arguments: Any, **options: Any) -> Any:
        late[0] += 3600
        return load(*arguments, **options)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    monkeypatch.setattr(ResidentTeacher, "signals", slow)
    monkeypatch.setattr(build, "load_teacher", loaded)
    steps, validations = WARM_UP + 4, 2
    validated = {"data.validation": {"share": 0.2}, "train.validate_every": 4}
    recipe = recipe.changed({"train.steps": steps, **validated})
    given = {"ce_only": recipe.changed({"matching.strategy": "none", "loss.kl": 0.0, "loss.hidden": 0.0})}
    given |= {name: recipe.changed({"matching.strategy": name}) for name in ("none", "forward", "reverse")}
    assert train_in_turn(world, [jobs.distil_job(world, own, tmp_path / name) for name, own in given.items()])
    assert 3600 + 60 * (steps + validations) == late[0]
    noise = 15  # what seven steps and a validation may take in truth on a busy machine
    for name in given:
        third = 0 if name == "ce_only" else 20
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert summary["step"]["median_seconds"] == pytest.approx(third, abs=5)
        assert summary["step"]["quartiles"] == pytest.approx([third, third], abs=5)
        assert summary["teacher_seconds"] == pytest.approx(steps * third, abs=1)
        assert summary["validation_seconds"] == pytest.approx(validations * third, abs=noise)
        assert summary["seconds"] == pytest.approx((steps + validations) * third, abs=noise)
        of_training = summary["seconds"] - summary["validation_seconds"]
        assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / of_training)
        parts = [line["seconds_by_part"]["teacher"] for line in lines if "seconds_by_part" in line]
        assert len(parts) == steps and parts == pytest.approx([third] * steps, abs=1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"train.batch_size": 16},
            r"two: train\.batch_size is 16 and that of one is 8: they can't learn from one pass",
        ),
        ({"seed": 5}, r"two: seed is 5 and that of one is 0.*make them alike, or train them apart"),
        ({"matching.final_state": "normed"}, r"two: matching\.final_state is 'normed'"),
        ({"train.profile_steps": 2}, r"two: train\.profile_steps: one training in a process is profiled; write 0, or "),
        (
            {"rollouts": {"max_new_tokens": 4}, "loss.ce": 0.0},
            r"two: rollouts: the student writes texts of its own.*study\.together: 1",
        ),
        ({"teacher.offload_states": True}, r"teacher\.offload_states: .*; write false, or write study\.together: 1"),
    ],
)
def test_what_can_t_be_shared_is_refused(recipe: Recipe, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        checks.check_in_turn({"one": recipe, "two": recipe.changed(changes)})
    assert re.search(sentence, str(refused.value)), refused.value
    checks.check_in_turn({"two": recipe.changed(changes)})


def test_what_differs_in_students_alone_is_shared(recipe: Recipe) -> None:
    others = ({"matching.strategy": "reverse"}, {"loss.kl": 0.0}, {"train.learning_rate": 2e-3}, {"student.blocks": 2})
    checks.check_in_turn({str(n): recipe.changed(own) for n, own in enumerate(({}, *others))})


def test_students_of_two_teachers_are_refused(tiny: Path, tmp_path: Path) -> None:
    """Recipes of two names that make their teachers alike: each has its own, in its own folder."""
    made = load_recipe("quickstart", [f"output={tmp_path}"])
    other = made.changed({"name": "other"})
    with pytest.raises(
        InputError, match=r"two: the teacher's folder is .*other/teacher.* and that of one is .*quickstart/t"
    ):
        checks.check_in_turn({"one": made, "two": other})


def test_what_stands_beside_is_looked_at_before_anything_is_done(tiny: Path, tmp_path: Path) -> None:
    file, run = str(tiny / "recipe.yaml"), str(tmp_path / "run")

    def told(*arguments: str) -> str:
        with pytest.raises(InputError) as refused:
            loop.command(["--recipe", file, "--output", run, *arguments], standalone_mode=False)
        return str(refused.value)

    assert told("--beside", file, run) == "--beside: two students have one folder; give each an OUTPUT of its own"
    for alone in ("--teacher-only", "--cache-only"):
        assert told("--beside", file, str(tmp_path / "other"), alone).startswith(
            "--beside: it names a student to be trained"
        )
    other = tmp_path / "other.yaml"
    other.write_text((tiny / "recipe.yaml").read_text() + "\nseed: 3\n")
    assert "seed is 3 and that of" in told("--beside", str(other), str(tmp_path / "other"))
    assert not (tmp_path / "run").exists() and not (tmp_path / "other").exists()
