"""Rollouts: the student's texts and what is learned from them are those of plain loops, on any ranks, killed and resumed or not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from llmkd.errors import InputError
from llmkd.processes import Stopping
from llmkd.recipe.recipe import load_recipe
from llmkd.rollouts import source, texts
from llmkd.rollouts.texts import round_file
from llmkd.train import train
from llmkd.training import initial, jobs
from tests.distributed.runner import run_on_ranks
from tests.tiny import assert_same_weights, plain_run

ON_POLICY: dict[str, Any] = {"loss.ce": 0.0, "loss.divergence": "reverse_kl", "rollouts": {"max_new_tokens": 20}}


def with_rollouts(changes: dict[str, Any] | None = None, **rollouts: Any) -> dict[str, Any]:
    """The changes of an on-policy run."""
    return {**ON_POLICY, "rollouts": {**ON_POLICY["rollouts"], **rollouts}, **(changes or {})}


# What is computed: each is compared with a plain loop of its own.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "strict": with_rollouts(),
    "rounds": with_rollouts({"matching.strategy": "none", "train.steps": 4}, every=3, share=0.6),
    "samples": with_rollouts({"loss.kl": 0.0}, samples=4, temperature=0.7, top_p=0.8, every=2),
    "greedy": with_rollouts({"loss.divergence": "jsd", "train.deepspeed": "zero2"}, temperature=0.0),
    "dropped": with_rollouts(
        {"train.micro_batch_size": 2, "train.batch_size": 20}, truncated="drop", share=0.5, max_new_tokens=45
    ),
    "mixed": with_rollouts(by="mixed", alpha=0.4, every=2),
    "both": with_rollouts(
        {"loss.divergence": "skew_kl", "loss.own_divergence": "skew_reverse_kl", "loss.skew": 0.2},
        by="both",
        share=0.5,
        every=2,
    ),
    "adapted": with_rollouts(
        {
            "student.lora": {"rank": 4, "alpha": 16, "dora": True},
            "train.learning_rate": 0.05,
            "train.steps": 4,
        },
        every=2,
    ),
    "prompts": with_rollouts({"data.source": "PROMPTS", "data.format": "prompts"}, every=2),
}
RANKS = {
    1: {
        "strict": {},
        "rounds": {"train.deepspeed": "zero2"},
        "samples": {},
        "greedy": {},
        "mixed": {},
        "prompts": {},
        "both": {},
        "adapted": {"train.deepspeed": "zero2"},
    },
    2: {
        "strict": {"train.deepspeed": "zero3"},
        "rounds": {"train.micro_batch_size": 2},
        "dropped": {"train.deepspeed": "zero3"},
        "staged": {"teacher.placement": "pipeline"},
        "sharded": {"teacher.placement": "zero3"},
        "both": {"teacher.placement": "pipeline", "train.micro_batch_size": 2},
        "adapted": {"train.deepspeed": "zero3"},
        "none": {},
    },
}
OBJECTIVES["staged"] = OBJECTIVES["sharded"] = OBJECTIVES["rounds"]
OBJECTIVES["none"] = {}


def changes_of(tiny: Path, ranks: int, name: str) -> dict[str, Any]:
    changes = {**OBJECTIVES[name], **RANKS[ranks][name]}
    return {key: str(tiny / "prompts.jsonl") if value == "PROMPTS" else value for key, value in changes.items()}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every objective's run, on one rank and on two."""
    folder = tmp_path_factory.mktemp("rollouts")
    rows = map(json.loads, (tiny / "rows.jsonl").read_text().splitlines())
    (tiny / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    for ranks, scenarios in RANKS.items():
        changes = {name: changes_of(tiny, ranks, name) for name in scenarios}
        refused = run_on_ranks(ranks, tiny / "recipe.yaml", changes, folder / str(ranks))
        assert refused == {}
    return folder


@pytest.mark.parametrize("name", ["rounds", "staged", "sharded"])
def test_what_is_written_after_the_fixed_prompts_is_the_same_on_two_ranks(runs: Path, name: str) -> None:
    one, two = ((runs / run / "rollouts.jsonl").read_text().splitlines() for run in ("1/rounds", f"2/{name}"))
    ours, theirs = ([json.loads(line) for line in lines] for lines in (one, two))
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs]
    assert [(line["step"], len(line["samples"]), line["texts"]) for line in ours] == [(0, 3, 14), (3, 3, 5)]


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in RANKS.items() for name in names])
def test_texts_and_student_are_those_of_a_plain_loop(
    tiny: Path, runs: Path, tmp_path: Path, ranks: int, name: str
) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes_of(tiny, ranks, name))
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "initial")
    weights, losses = plain_run(recipe, tiny / "teacher", tmp_path / "initial")
    run = runs / str(ranks) / name
    # a token drawn otherwise would change all that follows, so the texts are the same
    assert_same_weights(load_file(run / "model" / "model.safetensors"), weights, 1e-5)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(logged, losses, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)
    if name != "none":
        assert round_file(run, 0).is_file()


class Killed(BaseException):
    """Stands for the end of the process."""


LONG = with_rollouts(
    {"train.steps": 7, "train.save_every": 2, "train.keep_checkpoints": 9, "matching.strategy": "none"},
    every=3,
    max_new_tokens=8,
)


@pytest.fixture(scope="module")
def whole(tiny: Path, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `LONG`."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(world, jobs.distil_job(world, load_recipe(tiny / "recipe.yaml").changed(LONG), folder))
    return folder


def run_long(tiny: Path, world: Any, folder: Path, stopping: Stopping | None = None) -> bool:
    job = jobs.distil_job(world, load_recipe(tiny / "recipe.yaml").changed(LONG), folder)
    return train(world, job, stopping)


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights and texts, to the bit."""
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert all(ours[name].equal(theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    names = sorted(file.name for file in (other / "rollouts").iterdir())
    assert names == sorted(file.name for file in (one / "rollouts").iterdir()) and len(names) == 3
    for name in names:
        assert pq.read_table(one / "rollouts" / name).equals(pq.read_table(other / "rollouts" / name))


@pytest.mark.parametrize("where", ["writing", "publishing", "published"])
@pytest.mark.parametrize("round_number", [0, 2])
def test_killed_in_a_round_and_resumed(
    tiny: Path, world: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, round_number: int
) -> None:
    calls = 0

    def at_round(original: Any, dies_after: bool = False) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == round_number + 1:
                if dies_after:
                    original(*arguments)
                raise Killed
            return original(*arguments)

        return call

    with monkeypatch.context() as patch:
        if where == "writing":
            patch.setattr(source, "written_together", at_round(source.written_together))
        elif where == "publishing":
            patch.setattr(texts, "sync", at_round(texts.sync))  # the file has another name still
        else:
            patch.setattr(source, "write_round", at_round(source.write_round, dies_after=True))
        with pytest.raises(Killed):
            run_long(tiny, world, tmp_path / "run")
    assert run_long(tiny, world, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


class AtStep(Stopping):
    """A signal that comes before a step is trained."""

    name = "SIGTERM"

    def __init__(self, run: Path, step: int) -> None:
        self._file, self._step = run / "metrics.jsonl", step

    @property
    def asked(self) -> bool:  # type: ignore[override]
        return self._file.is_file() and len(self._file.read_text().splitlines()) == self._step - 1


@pytest.mark.parametrize("step", [3, 5])
def test_stopped_between_rounds_or_within_one_and_resumed(
    tiny: Path, world: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    assert not run_long(tiny, world, tmp_path / "run", AtStep(tmp_path / "run", step))
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert run_long(tiny, world, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_ends_the_run_before_another_round_is_written(
    tiny: Path, world: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping, passes, loop = Stopping(), 0, sys.modules["llmkd.train"]
    original = loop._train_on

    def signalled(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        stopping.asked = stopping.asked or passes == 5  # of two micro-batches in a step: in the round's last one
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_on", signalled)
        assert not run_long(tiny, world, tmp_path / "run", stopping)
    assert [file.name for file in (tmp_path / "run" / "rollouts").glob("*.parquet")] == ["round-00000000.parquet"]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert run_long(tiny, world, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_round_that_is_gone_or_damaged_or_anothers_is_named_and_nothing_is_lost(
    tiny: Path, world: Any, tmp_path: Path
) -> None:
    faster = load_recipe(tiny / "recipe.yaml").changed({**LONG, "train.learning_rate": 5e-3})
    train(world, jobs.distil_job(world, faster, tmp_path / "other"), AtStep(tmp_path / "other", 5))
    assert not run_long(tiny, world, tmp_path / "run", AtStep(tmp_path / "run", 5))
    file = round_file(tmp_path / "run", 3)
    written = file.read_bytes()
    file.unlink()
    with pytest.raises(
        InputError, match=r"round-00000003\.parquet: it is gone, .* or remove the checkpoints after step 3"
    ):
        run_long(tiny, world, tmp_path / "run")
    broken = bytearray(written)
    broken[len(written) // 3] ^= 1
    file.write_bytes(broken)
    with pytest.raises(InputError, match=r"round-00000003\.parquet: a round of texts that can't be read"):
        run_long(tiny, world, tmp_path / "run")
    for other in (round_file(tmp_path / "run", 0), round_file(tmp_path / "other", 3)):
        file.write_bytes(other.read_bytes())
        with pytest.raises(InputError, match=r"round-00000003\.parquet: it is another round's or another run's"):
            run_long(tiny, world, tmp_path / "run")
    file.write_bytes(written)
    assert run_long(tiny, world, tmp_path / "run")


def test_a_share_of_zero_is_the_run_without_rollouts(tiny: Path, world: Any, tmp_path: Path) -> None:
    for name, changes in (("with", {"rollouts": {"share": 0.0}}), ("without", {})):
        recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
        assert train(world, jobs.distil_job(world, recipe, tmp_path / name))
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("with", "without"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert not (tmp_path / "with" / "rollouts").exists()


def test_a_step_none_of_whose_texts_is_trained_on_changes_nothing(
    tiny: Path, world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And leaves the student as it is, at every distance and divergence, also where these look at each token."""
    changes = with_rollouts(
        {
            "train.steps": 2,
            "train.warmup_steps": 0,
            "train.micro_batch_size": 1,
            "train.weight_decay": 0.0,
            "loss.kl_positions": "attended",
        },
        truncated="drop",
        max_new_tokens=3,
    )
    run, recipe = tmp_path / "run", load_recipe(tiny / "recipe.yaml").changed(changes)
    with caplog.at_level("WARNING", "llmkd"):
        assert train(world, jobs.distil_job(world, recipe, run))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["kl"], line["hidden"], line["rollouts"]["ended"]) for line in logged]
    assert found == [(0.0, 0.0, 0.0), (0.0, 0.0, 0.0)]
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "before")
    weights, before = (load_file(file / "model.safetensors") for file in (run / "model", tmp_path / "before"))
    assert_same_weights(weights, before, 0.0)
    assert caplog.text.count("none of the 8 texts is trained on") == 2


def test_dropped_texts_count_for_nothing_however_a_step_is_divided(tiny: Path, world: Any, tmp_path: Path) -> None:
    """A micro-batch without a row of its own is filled up with a dropped one."""
    weights = []
    for size in (1, 8):
        changes = with_rollouts(
            {"train.steps": 2, "train.warmup_steps": 0, "train.micro_batch_size": size},
            truncated="drop",
            max_new_tokens=40,
        )
        run = tmp_path / str(size)
        assert train(world, jobs.distil_job(world, load_recipe(tiny / "recipe.yaml").changed(changes), run))
        ended = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["rollouts"]["ended"]
        assert 0 < ended < 1
        weights.append(load_file(run / "model" / "model.safetensors"))
    ours, theirs = weights
    assert_same_weights(ours, theirs, 1e-5)


def test_a_row_without_a_prompt_is_named_before_the_first_step(tiny: Path, world: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((tiny / "rows.jsonl").read_text() + json.dumps({"prompt": "", "completion": "red"}) + "\n")
    recipe = load_recipe(tiny / "recipe.yaml").changed(with_rollouts({"data.source": str(rows)}))
    with pytest.raises(InputError, match="rollouts: row 40 has no prompt, all of it is trained"):
        train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    assert not (tmp_path / "run" / "rollouts").exists()


def test_another_student_s_first_round_is_not_trained_on(
    tiny: Path, world: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed before its first checkpoint may be started again as another one."""

    def dies(*arguments: Any) -> None:
        write_round(*arguments)
        raise Killed

    write_round = source.write_round
    with monkeypatch.context() as patch:
        patch.setattr(source, "write_round", dies)
        recipe = load_recipe(tiny / "recipe.yaml").changed({**LONG, "student.blocks": 2})
        with pytest.raises(Killed):
            train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    assert run_long(tiny, world, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
