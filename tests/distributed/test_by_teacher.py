"""Sequence-level distillation: the teacher's texts are those of a plain loop, on any ranks, killed and resumed or not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmkd.errors import InputError
from llmkd.models.load import load_tokenizer
from llmkd.processes import Stopping
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.rollouts import by_teacher
from llmkd.train import train
from llmkd.training import initial, jobs, write_cache, written_texts
from tests.distributed.runner import run_on_ranks
from tests.tiny import assert_same_weights, plain_run

WRITTEN: dict[str, Any] = {"rollouts": {"by": "teacher", "max_new_tokens": 20}}
SCENARIOS: dict[str, dict[str, Any]] = {
    "all": {**WRITTEN},
    "part": {"rollouts": {**WRITTEN["rollouts"], "share": 0.6, "temperature": 0.7, "top_p": 0.8}},
    "greedy": {"rollouts": {**WRITTEN["rollouts"], "temperature": 0.0}},
    "dropped": {"rollouts": {**WRITTEN["rollouts"], "share": 0.5, "truncated": "drop", "max_new_tokens": 45}},
    "prompts": {**WRITTEN, "data.format": "prompts", "data.source": "PROMPTS"},
}


def recipe_of(tiny: Path, output: Path, name: str) -> Recipe:
    changes = {
        key: str(tiny / "asked.jsonl") if value == "PROMPTS" else value for key, value in SCENARIOS[name].items()
    }
    return load_recipe(tiny / "recipe.yaml").changed({**changes, "data.tokens": str(output / "tokens")})


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario's run, on one rank and on two, each with tokens of its own."""
    folder = tmp_path_factory.mktemp("by_teacher")
    rows = map(json.loads, (tiny / "rows.jsonl").read_text().splitlines())
    (tiny / "asked.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    for ranks in (1, 2):
        recipes = {name: recipe_of(tiny, folder / str(ranks), name) for name in SCENARIOS}
        changes = {
            name: {**SCENARIOS[name], "data.source": recipe.data.source, "data.tokens": recipe.data.tokens}
            for name, recipe in recipes.items()
        }
        assert run_on_ranks(ranks, tiny / "recipe.yaml", changes, folder / str(ranks)) == {}
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_student_is_that_of_a_plain_loop(tiny: Path, runs: Path, tmp_path: Path, name: str, ranks: int) -> None:
    recipe = recipe_of(tiny, runs, name)
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "initial")
    weights, losses = plain_run(recipe, tiny / "teacher", tmp_path / "initial")
    run = runs / str(ranks) / name
    assert_same_weights(load_file(run / "model" / "model.safetensors"), weights, 1e-5)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged] == pytest.approx([line["loss"] for line in losses], rel=1e-5, abs=1e-6)


def test_one_rank_and_two_write_the_same_files(runs: Path) -> None:
    one, two = (
        {file.parent.name: file.read_bytes() for file in (runs / ranks / "tokens").glob("*/00000.arrow")}
        for ranks in ("1", "2")
    )
    assert len(one) == 2 + len(SCENARIOS) and one == two  # the data's own rows, and prompts alone


@pytest.mark.parametrize("name", ["all", "part", "dropped"])
def test_the_summary_has_what_the_teacher_wrote_in_numbers(tiny: Path, runs: Path, name: str) -> None:
    """As the shard itself has it, the texts that were left out among them."""
    recipe = recipe_of(tiny, runs, name)
    assert recipe.rollouts is not None
    one, two = (
        json.loads((runs / ranks / name / "summary.json").read_text())["teachers_texts"] for ranks in ("1", "2")
    )
    assert one.pop("seconds") > 0 and two.pop("seconds") > 0 and one == two
    assert one["texts"] == round(40 * recipe.rollouts.share)
    assert 0 < one["unended"] <= one["texts"] and one["tokens"] <= one["texts"] * recipe.rollouts.max_new_tokens
    assert one["left_out"] == one["empty"] + (one["unended"] if recipe.rollouts.truncated == "drop" else 0)


class Spy:
    """Counts the orders of a writer, and may end the process's work at one of them."""

    def __init__(self, writer: Any, orders: list[int], last: int | None = None) -> None:
        self._writer, self._orders, self._last = writer, orders, last

    def write(self, asked: Any) -> Any:
        if len(self._orders) == self._last:
            raise Killed
        self._orders.append(len(asked.prompts))
        return self._writer.write(asked)

    def close(self) -> None:
        self._writer.close()


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How many texts each order asked for, and after how many the process is killed; ten rows are a shard."""
    spied: dict[str, Any] = {"orders": [], "last": None}
    real = written_texts.writer_of
    monkeypatch.setattr(by_teacher, "SHARD_ROWS", 10)
    monkeypatch.setattr(written_texts, "writer_of", lambda *given: Spy(real(*given), spied["orders"], spied["last"]))
    return spied


def rows_of(world: Any, recipe: Recipe, tiny: Path, stopping: Stopping | None = None) -> Any:
    job = jobs.distil_job(world, recipe, Path("unused"))
    return written_texts.rows_of(world, job, load_tokenizer(tiny / "teacher"), stopping)


def test_killed_or_stopped_it_goes_on_at_the_next_shard(
    tiny: Path, world: Any, tmp_path: Path, orders: dict[str, Any]
) -> None:
    recipe = recipe_of(tiny, tmp_path, "all")
    whole = rows_of(world, recipe.changed({"data.tokens": str(tmp_path / "whole")}), tiny).training
    assert orders["orders"] == [10, 10, 10, 10]
    orders["orders"].clear()
    orders["last"] = 2
    with pytest.raises(Killed):
        rows_of(world, recipe, tiny)
    orders["last"] = None
    stopped = Stopping()
    stopped.asked, stopped.name = True, "SIGTERM"
    with pytest.raises(written_texts.StoppedTokenizing):
        rows_of(world, recipe, tiny, stopped)
    resumed = rows_of(world, recipe, tiny).training
    assert orders["orders"] == [10, 10, 10, 10] and resumed.digests == whole.digests
    assert rows_of(world, recipe, tiny).training.digests == whole.digests and len(orders["orders"]) == 4


def test_a_damaged_shard_is_written_again(
    tiny: Path, world: Any, tmp_path: Path, orders: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tiny, tmp_path, "all")
    whole = rows_of(world, recipe, tiny).training
    shard = whole.folders[0] / "00002.arrow"
    content = bytearray(shard.read_bytes())
    content[-200] ^= 1
    shard.write_bytes(content)
    orders["orders"].clear()
    with caplog.at_level(logging.WARNING, "llmkd"):
        again = rows_of(world, recipe, tiny).training
    assert orders["orders"] == [10] and again.digests == whole.digests and "00002.arrow: not what was" in caplog.text


class InTraining(Stopping):
    """A signal that comes when a step is logged."""

    name = "SIGTERM"

    def __init__(self, run: Path) -> None:
        self._run = run

    @property
    def asked(self) -> bool:  # type: ignore[override]
        return (self._run / "metrics.jsonl").is_file()


def test_a_resumed_run_whose_damaged_texts_come_back_as_others_is_told_the_cure(
    tiny: Path, world: Any, tmp_path: Path, orders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's may."""
    recipe = recipe_of(tiny, tmp_path, "all")
    shard = rows_of(world, recipe, tiny).training.folders[0] / "00002.arrow"
    assert not train(world, jobs.distil_job(world, recipe, tmp_path / "run"), InTraining(tmp_path / "run"))
    shard.write_bytes(shard.read_bytes()[:-1])
    monkeypatch.setattr(Spy, "write", lambda self, asked: [[7, 8] for _ in asked.prompts])
    cure = rf"the teacher's texts are others, .*; put a copy of the old files into {shard.parent}, or remove .*/run/checkpoints"
    with pytest.raises(InputError, match=cure):
        train(world, jobs.distil_job(world, recipe, tmp_path / "run"))


def test_students_of_every_seed_and_map_read_the_same_texts(
    tiny: Path, world: Any, tmp_path: Path, orders: dict[str, Any]
) -> None:
    recipe = recipe_of(tiny, tmp_path, "all").changed({"train.steps": 1, "train.warmup_steps": 0})
    for number, changes in enumerate([{}, {"seed": 5}, {"matching.strategy": "reverse"}, {"loss.kl": 0.0}]):
        assert train(world, jobs.distil_job(world, recipe.changed(changes), tmp_path / str(number)))
    assert orders["orders"] == [10, 10, 10, 10]


def test_rows_of_validation_keep_their_own_text_and_are_never_trained(
    tiny: Path, world: Any, tmp_path: Path, orders: dict[str, Any]
) -> None:
    own = load_recipe(tiny / "recipe.yaml").changed({"data.validation": {"share": 0.25, "rows": 8}})
    recipe = own.changed({**WRITTEN, "data.tokens": str(tmp_path / "tokens")})
    data, rows = rows_of(world, own, tiny), rows_of(world, recipe, tiny)
    assert sum(orders["orders"]) == 30 and len(rows.validation) == 8
    texts = [
        [all_rows.row(n)["input_ids"].tolist() for n in of.validation] for of in (data, rows) for all_rows in [of.all]
    ]
    assert texts[0] == texts[1]
    held_out = {data.all.row(int(number))["row"] for number in data.all.held_out}
    trained = {rows.training.row(number)["row"] for number in range(len(rows.training.rows))}
    assert held_out.isdisjoint(trained) and len(held_out) == 10 and len(trained) <= 30


def test_a_cache_holds_the_written_rows_and_packing_lays_them_out(tiny: Path, world: Any, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, tmp_path, "all").changed({"cache.path": str(tmp_path / "cache")})
    cached = recipe.changed({"teacher.placement": "cache"})
    assert write_cache.cache(world, cached, Stopping())
    weights = []
    for name, one in {"plain": recipe, "cached": cached}.items():
        assert train(world, jobs.distil_job(world, one, tmp_path / name))
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert_same_weights(weights[1], weights[0], 1e-4)
    packed = recipe.changed({"data.batching": "packed"})
    assert train(world, jobs.distil_job(world, packed, tmp_path / "packed"))
    with pytest.raises(InputError, match="cache .* was made of other data; put the recipe back"):
        other = cached.changed({"rollouts.max_new_tokens": 10})
        train(world, jobs.distil_job(world, other, tmp_path / "other"))


def test_where_nothing_is_left_the_cure_is_named(tiny: Path, world: Any, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, tmp_path, "all").changed({"rollouts.max_new_tokens": 1, "rollouts.truncated": "drop"})
    with pytest.raises(InputError, match="nothing is left of what the teacher wrote: .* write a larger max_new_tokens"):
        rows_of(world, recipe, tiny)
