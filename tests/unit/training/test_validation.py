"""Rows are held out and never trained on; what a validation says is what the exported student scores in plain PyTorch."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmkd.data.batches import IGNORE, Batch, announced, collate
from llmkd.data.other_families import collate_for
from llmkd.distributed.clocks import WARM_UP
from llmkd.errors import InputError
from llmkd.models.load import load_tokenizer
from llmkd.processes import Stopping
from llmkd.recipe.inputs import training_inputs
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.train import train
from llmkd.training import jobs, prepare, validation, write_cache
from llmkd.training.journal import validation_line
from llmkd.training.validation import Validated, Validator
from llmkd.training.validation_rows import RunRows, held_out_count, run_rows, trained_count, validation_batches
from tests.family_models import CLASSES, ENCODER_DECODERS, ENCODERS, family_recipe, new
from tests.family_models import plain_losses as family_losses
from tests.tiny import in_memory, load, plain_losses, quick

SHARE: dict[str, Any] = {"data.validation": {"share": 0.2}, "train.validate_every": 2, "train.steps": 3}


@pytest.fixture
def recipe(tiny: Path) -> Recipe:
    return load_recipe(tiny / "recipe.yaml").changed({**quick(tiny), **SHARE})


def logged(run: Path) -> list[dict[str, Any]]:
    """A run's validations, each with its step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{"step": line["step"], **line["validation"]} for line in lines if "validation" in line]


# --- The rows


def rows_of(trained: int, held_out: int) -> RunRows:
    """Rows of uneven length, of which the last are validated."""
    count = trained + held_out
    data = Dataset.from_list(
        [{"input_ids": [n] * (n % 5 + 2), "trained": [True] * (n % 5 + 2), "length": n % 5 + 2} for n in range(count)]
    )
    tokens: Any = in_memory(data)
    return RunRows(tokens, tokens, np.arange(trained, count))


def test_a_share_is_drawn_by_its_seed_alone(recipe: Recipe, world: Any, tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny / "teacher")
    held_out = []
    for seed in (0, 0, 1):
        own = recipe.changed({"data.validation": {"share": 0.2, "seed": seed}})
        rows = run_rows(world, jobs.distil_job(world, own, Path("unused")), tokenizer)
        assert rows.validation is not None and rows.training.count == 32
        held_out.append(rows.validation.tolist())
        assert sorted(held_out[-1]) == rows.training.held_out.tolist()
    assert held_out[0] == held_out[1] and {*held_out[0]} != {*held_out[2]} and len({*held_out[0]}) == 8


def test_a_share_of_all_rows_is_refused_and_a_small_one_holds_out_a_row() -> None:
    assert held_out_count(3, 0.01) == 1
    with pytest.raises(
        InputError, match=r"data.validation.share: 0.9 of 3 rows leaves none to train on; write a smaller"
    ):
        held_out_count(3, 0.9)


@pytest.mark.parametrize(("rows", "ranks", "size"), [(7, 2, 2), (5, 2, 1), (8, 2, 4), (1, 1, 4), (3, 3, 8), (21, 4, 2)])
def test_every_rank_has_as_many_micro_batches_and_every_row_is_in_one(
    recipe: Recipe, world: Any, rows: int, ranks: int, size: int
) -> None:
    from dataclasses import replace

    job = jobs.distil_job(world, recipe.changed({"train.micro_batch_size": size}), Path("unused"))
    data = rows_of(100, rows)
    of_ranks = [validation_batches(replace(world, rank=rank, size=ranks), job, data, pad_id=0) for rank in range(ranks)]
    assert len({len(batches) for batches in of_ranks}) == 1
    numbers = [number for batches in of_ranks for batch in batches for number in batch.rows]
    assert sorted(numbers) == list(range(100, 100 + rows))
    sizes = [len(batch.rows) for batches in of_ranks for batch in batches]
    assert min(sizes) >= 1 and max(sizes) <= max(size, 2)


def test_fewer_rows_than_ranks_are_refused(recipe: Recipe, world: Any) -> None:
    from dataclasses import replace

    job = jobs.distil_job(world, recipe, Path("unused"))
    with pytest.raises(InputError, match="data.validation: 2 rows for 3 ranks, and each needs one"):
        validation_batches(replace(world, size=3), job, rows_of(9, 2), pad_id=0)


def test_held_out_rows_are_not_in_any_batch_of_an_epoch(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    job = jobs.distil_job(world, recipe.changed({"train.steps": 8}), tmp_path / "run")
    run = prepare.prepare(world, job)

    def texts(batches: list[Batch]) -> set[tuple[int, ...]]:
        return {tuple(row[mask].tolist()) for b in batches for row, mask in zip(b.input_ids, b.attended, strict=True)}

    trained = texts([batch for step in run.batches() for batch in step])
    validated = texts(list(run.validation))
    assert len(validated) == 8 and len(trained) == 32 and not trained & validated


def test_all_seeds_of_a_study_are_validated_on_the_same_rows(recipe: Recipe, world: Any, tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny / "teacher")
    held_out = [
        run_rows(world, jobs.distil_job(world, recipe.changed({"seed": seed}), Path("unused")), tokenizer).validation
        for seed in (0, 1)
    ]
    assert held_out[0] is not None and held_out[1] is not None
    assert held_out[0].tolist() == held_out[1].tolist()


def test_a_source_of_its_own_is_read_with_its_own_mistakes(
    recipe: Recipe, world: Any, tiny: Path, tmp_path: Path
) -> None:
    tokenizer, file = load_tokenizer(tiny / "teacher"), tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"red {word}", "completion": " tree"}) + "\n" for word in "abc"))
    own = recipe.changed({"data.validation": {"source": str(file), "rows": 2}})
    rows = run_rows(world, jobs.distil_job(world, own, Path("unused")), tokenizer)
    assert rows.validation is not None and rows.training.count == 40 and rows.validation.tolist() == [40, 41]
    red_a = tokenizer("red a")["input_ids"]
    assert rows.all.row(40)["input_ids"][: len(red_a)].tolist() == red_a
    file.write_text('{"prompt": "red"}\n')
    with pytest.raises(InputError, match=r"^data.validation"):
        run_rows(world, jobs.distil_job(world, own, Path("unused")), tokenizer)


def test_rows_that_are_trained_on_are_refused(recipe: Recipe, world: Any, tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny / "teacher")
    for given in ({"source": str(tiny / "rows.jsonl"), "split": "test"}, {"split": "test"}):
        same = recipe.changed({"data.validation": given})
        with pytest.raises(InputError, match=r"data.validation: .*rows.jsonl is trained on too; .* write share: 0.05"):
            run_rows(world, jobs.distil_job(world, same, Path("unused")), tokenizer)


def test_slices_of_a_file_that_share_a_row_are_refused_whatever_their_split_is_called(
    recipe: Recipe, world: Any, tiny: Path
) -> None:
    tokenizer = load_tokenizer(tiny / "teacher")

    def rows(trained: str, validated: str) -> RunRows:
        sliced = recipe.changed({"data.split": trained, "data.validation": {"split": validated}})
        return run_rows(world, jobs.distil_job(world, sliced, Path("unused")), tokenizer)

    apart = rows("train[20%:]", "train[:20%]")
    assert apart.training.count == 32 and apart.validation is not None and len(apart.validation) == 8
    for trained, validated in (("train[20%:]", "test[:30%]"), ("train[20%:]", "test"), ("train[30:]", "test[:80%]")):
        with pytest.raises(InputError, match=r"data.validation: .*rows.jsonl is trained on too"):
            rows(trained, validated)


def test_a_copy_of_what_is_trained_on_is_refused(recipe: Recipe, world: Any, tiny: Path, tmp_path: Path) -> None:
    tokenizer, rows = load_tokenizer(tiny / "teacher"), (tiny / "rows.jsonl").read_bytes()
    (tmp_path / "copy.jsonl").write_bytes(rows)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(rows))
    for file, reason in (
        ("copy.jsonl", r"copy.jsonl holds what .*rows.jsonl does, which is trained on"),
        ("packed.jsonl.gz", r"packed.jsonl.gz has the rows of .*rows.jsonl, which is trained on"),
    ):
        copied = recipe.changed({"data.validation": {"source": str(tmp_path / file)}})
        with pytest.raises(InputError, match=f"data.validation: .*{reason}; .* write share: 0.05"):
            run_rows(world, jobs.distil_job(world, copied, Path("unused")), tokenizer)


def test_a_share_of_rows_that_are_there_twice_is_refused(
    recipe: Recipe, world: Any, tiny: Path, tmp_path: Path
) -> None:
    """Each copy would hold out other rows, so that all that is validated would be trained on."""
    tokenizer, rows = load_tokenizer(tiny / "teacher"), (tiny / "rows.jsonl").read_bytes()
    (tmp_path / "copy.jsonl").write_bytes(rows)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "link.jsonl").symlink_to(tiny / "rows.jsonl")
    cure = r"write it once, with the sum of the weights, or give data.validation a source of its own"

    def twice(file: Path, **how: Any) -> Recipe:
        sources = [{"source": str(tiny / "rows.jsonl")}, {"source": str(file), **how}]
        return recipe.changed({"data.source": "records", "data.sources": sources})

    for how in ({}, {"columns": {"completion": "text"}, "format": "text"}):
        with pytest.raises(InputError, match=r"data.sources.1.source: .* is there twice.* write it once, with the sum"):
            twice(tiny / "rows.jsonl", **how)
    for file, reason in (
        ("copy.jsonl", "copy.jsonl holds what .*rows.jsonl does"),
        ("link.jsonl", "rows.jsonl is read twice"),
        ("packed.jsonl.gz", "packed.jsonl.gz has the rows of .*rows.jsonl"),
    ):
        with pytest.raises(InputError, match=f"data.sources: .*{reason}, .*{cure}"):
            run_rows(world, jobs.distil_job(world, twice(tmp_path / file), Path("unused")), tokenizer)


def test_rows_may_be_trained_on_twice(recipe: Recipe, tiny: Path) -> None:
    """Also where others are validated."""
    sources = [{"source": str(tiny / "rows.jsonl")}] * 2
    for apart in (None, {"source": "held_out.jsonl"}):
        given = {"data.validation": apart, "train.validate_every": 2 if apart else 0}
        assert len(recipe.changed({"data.source": "records", "data.sources": sources, **given}).data.parts) == 2


def test_how_many_rows_are_trained_on(recipe: Recipe) -> None:
    assert trained_count(recipe.data, 40) == 32
    assert trained_count(recipe.changed({"data.validation": {"split": "test"}}).data, 40) == 40


# --- The keys


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.validation": None}, r"train.validate_every: there are no rows to validate on; give data.validation"),
        ({"data.validation": {}}, "data.validation.share: give exactly one of share, split"),
        ({"data.validation": {"share": 0.1, "split": "test"}}, "data.validation.share: give exactly one of"),
        ({"data.validation": {"share": 0.1, "name": "x"}}, "data.validation.name: it belongs to a source of its own"),
        ({"data.validation": {"split": "x", "seed": 3}}, "data.validation.seed: it decides which rows a share"),
        ({"data.validation": {"split": "train"}}, r"data.validation.split: the split 'train' of .* is trained on"),
        (
            {"data.validation": {"split": "train[:5%]"}},
            r"split: the split 'train\[:5%\]' of .* is trained on, or a part of it \(split 'train'\)",
        ),
        (
            {"data.split": "train[:50%]", "data.validation": {"split": "train[25%:75%]"}},
            r"split: the split 'train\[25%:75%\]' of .* is trained on, or a part of it \(split 'train\[:50%\]'\)",
        ),
        (
            {"data.split": "train[:5%]", "data.validation": {"split": "train"}},
            r"the split 'train' of .* is trained on, or a part of it \(split 'train\[:5%\]'\); write another split, or",
        ),
        ({"train.validate_every": 0, "train.keep": "best"}, "train.validate_every: keep: best goes by validations"),
        ({"train.validate_every": 0, "train.patience": 3}, "train.validate_every: patience goes by validations"),
        ({"train.keep_by": "validation/kl"}, "train.keep_by: nothing is chosen by it; write keep: best"),
        (
            {"train.keep": "best", "train.keep_by": "validation/kl", "loss.kl": 0.0},
            "train.keep_by: validation/kl compares with the teacher's distribution.* write validation/ce",
        ),
    ],
)
def test_what_can_not_be_is_refused_with_the_cure(recipe: Recipe, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        recipe.changed(changes)


def test_another_slice_of_a_split_may_be_validated_on(recipe: Recipe) -> None:
    apart = recipe.changed({"data.split": "train[5%:]", "data.validation": {"split": "train[:5%]"}}).data
    assert apart.held_out is not None and (apart.split, apart.held_out.split) == ("train[5%:]", "train[:5%]")
    recipe.changed({"data.validation": {"split": "train_more"}})


def test_what_only_looks_is_no_input_and_what_chooses_is(recipe: Recipe) -> None:
    inputs = training_inputs(recipe)
    assert inputs["data.validation.share"] == 0.2 and "train.validate_every" not in inputs
    for changes in ({"train.validate_every": 0}, {"train.validate_every": 7}, {"data.validation.rows": 3}):
        assert training_inputs(recipe.changed(changes)) == inputs, changes
    assert training_inputs(recipe.changed({"data.validation.seed": 1})) != inputs
    split = recipe.changed({"data.validation": {"split": "test"}})
    without = recipe.changed({"data.validation": None, "train.validate_every": 0})
    assert training_inputs(split) == training_inputs(without)
    best = recipe.changed({"train.keep": "best"})
    assert training_inputs(best)["train.validate_every"] == 2
    assert training_inputs(best.changed({"data.validation.rows": 3})) != training_inputs(best)


# --- The order in which a teacher is told


def test_a_step_after_which_others_follow_is_done_before_the_next_is_announced() -> None:
    told: list[str] = []
    steps = [([f"step {n}"], n in (2, 3)) for n in range(1, 6)]
    for batches in announced(steps, lambda batches: told.append(f"announced {batches[0]}")):  # type: ignore[arg-type]
        told.append(f"done {batches[0]}")  # type: ignore[str-format]
    order = {line: place for place, line in enumerate(told)}
    assert [line for line in told if line.startswith("done")] == [f"done step {n}" for n in range(1, 6)]
    assert order["announced step 2"] < order["done step 1"]
    assert order["done step 2"] < order["announced step 3"] and order["done step 3"] < order["announced step 4"]
    assert order["announced step 5"] < order["done step 4"]


# --- The numbers


def test_the_last_validation_is_what_the_exported_student_scores(
    recipe: Recipe, world: Any, tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = jobs.distil_job(world, recipe, run)
    assert train(world, job)
    (_, last) = logged(run)
    assert last["step"] == 3 and [line["step"] for line in logged(run)] == [2, 3]
    rows = run_rows(world, job, load_tokenizer(tiny / "teacher"))
    assert rows.validation is not None and len(rows.validation) == 8
    batch = rows.all.batch(rows.validation, collate=collate, pad_id=0)
    teacher, student = load(tiny / "teacher").eval(), load(run / "model").eval()
    with torch.no_grad():
        plain = plain_losses(recipe, teacher, student, None, job.pairs, batch)
        inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        at = batch.targets != IGNORE
        same = teacher(**inputs).logits[at].argmax(-1) == student(**inputs).logits[at].argmax(-1)
    assert last["ce"] == pytest.approx(plain["ce"].item(), rel=1e-5)
    assert last["perplexity"] == pytest.approx(plain["ce"].exp().item(), rel=1e-4)
    assert last["kl"] == pytest.approx(plain["kl"].item(), rel=1e-5)
    assert last["agreement"] == pytest.approx(same.float().mean().item())
    assert sum(last["pairs"].values()) / 3 == pytest.approx(plain["hidden"].item(), rel=1e-5)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("validation/kl")] == [2, 3]
    assert board.Scalars("validation/pairs/0<1")[-1].value == pytest.approx(last["pairs"]["0<1"])


def test_a_validation_is_reduced_once(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many micro-batches and pairs it has; the counts are those of the same rows each time, and are added up once."""
    reduced: list[tuple[str, int]] = []

    def counted(name: str) -> None:
        plain = getattr(validation, name)

        def call(world: Any, values: Any) -> Any:
            reduced.append((name, len(values)))
            return plain(world, values)

        monkeypatch.setattr(validation, name, call)

    counted("sum_tensor")
    counted("sum_counts")
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    assert len(logged(tmp_path / "run")) == 2
    pairs = 3
    assert reduced == [("sum_counts", 3), ("sum_tensor", 3 + pairs), ("sum_tensor", 3 + pairs)]


def test_kl_is_forward_kl_at_temperature_1_whatever_is_trained(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    other = {
        "loss.divergence": "reverse_kl",
        "loss.temperature": 3.0,
        "train.steps": 1,
        "train.warmup_steps": 0,
        "train.learning_rate": 1e-20,
        "train.final_learning_rate": 0.0,
    }
    values = []
    for name, changes in (
        ("plain", {**other, "loss.divergence": "forward_kl", "loss.temperature": 1.0}),
        ("other", other),
    ):
        assert train(world, jobs.distil_job(world, recipe.changed(changes), tmp_path / name))
        values.append(logged(tmp_path / name)[0]["kl"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_without_a_teacher_there_is_cross_entropy_alone(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    alone = {"loss.kl": 0.0, "loss.hidden": 0.0, "matching.strategy": "none"}
    assert train(world, jobs.distil_job(world, recipe.changed(alone), tmp_path / "run"))
    assert all(line.keys() == {"step", "ce", "perplexity", "seconds"} for line in logged(tmp_path / "run"))


def test_a_summary_has_the_time_of_a_step_without_validations(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short run's steps are all of the first ones, which are left out. Validations take two seconds, by the clock alone."""
    validate, clock, late = Validator.validate, time.perf_counter, [0.0]

    def slow(self: Validator, step: int) -> Generator[int, None, Validated]:
        late[0] += 2
        return validate(self, step)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    monkeypatch.setattr(Validator, "validate", slow)
    alone = {"loss.kl": 0.0, "loss.hidden": 0.0, "matching.strategy": "none", "train.log_every": 1}
    found = []
    for steps in (WARM_UP, WARM_UP + 2):
        changes = {**alone, "train.steps": steps, "train.validate_every": 1}
        assert train(world, jobs.distil_job(world, recipe.changed(changes), tmp_path / str(steps)))
        found.append(json.loads((tmp_path / str(steps) / "summary.json").read_text()))
    short, long = found
    assert short["step"] is None and long["step"]["steps"] == 2
    assert 0 < long["step"]["median_seconds"] < 2 < long["seconds"] / 5 and long["step"]["cpu_seconds"] > 0
    assert long["last"]["seconds_per_step"] < 2


def test_a_line_of_the_log() -> None:
    validated = Validated(ce=2.31, perplexity=10.07, kl=0.41, agreement=0.71, pairs={"0<3": 0.12}, seconds=1.0)
    assert validation_line(200, 1000, validated.values()) == (
        "validation 200/1000 ce 2.3100 perplexity 10.0700 kl 0.4100 agreement 0.7100 [0<3:0.1200]"
    )


def test_a_source_that_decides_what_is_exported_is_known_by_its_contents(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "held.jsonl"
    best = recipe.changed({"data.validation": {"source": str(file)}, "train.keep": "best"})
    found = []
    for text in ("red", "blue"):
        file.write_text(json.dumps({"prompt": text, "completion": " tree"}) + "\n")
        found.append((jobs.student_inputs(best), jobs.student_inputs(best.changed({"train.keep": "last"}))))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_families_are_validated_too(name: str, world: Any, tmp_path: Path) -> None:
    """The numbers are those of the exported student in transformers; of classes there is no perplexity."""
    kind = "encoder" if name == "bert" else "encoder_decoder"
    teacher = new(ENCODERS[name](3) if kind == "encoder" else ENCODER_DECODERS[name](3, 3), kind)
    own = family_recipe(tmp_path, kind, teacher, **{**SHARE, "train.steps": 2, "train.micro_batch_size": 8})
    job = jobs.distil_job(world, own, tmp_path / "run")
    assert train(world, job)
    (last,) = logged(tmp_path / "run")
    names = {"step", "ce", "kl", "agreement", "pairs", "seconds"}
    assert last.keys() == (names if kind == "encoder" else {*names, "perplexity"})
    rows = run_rows(world, job, load_tokenizer(tmp_path / "teacher"))
    assert rows.validation is not None
    student = CLASSES[kind].from_pretrained(tmp_path / "run" / "model").eval()
    batch = rows.all.batch(rows.validation, collate=collate_for(job.family), pad_id=0)
    with torch.no_grad():
        ce, kl, distances = family_losses(teacher, student, job.pairs, batch)
    assert last["ce"] == pytest.approx(ce.item(), rel=1e-4) and last["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert 0 <= last["agreement"] <= 1 and len(last["pairs"]) == len(distances)
    if kind == "encoder":
        assert [*last["pairs"].values()] == pytest.approx([distance.item() for distance in distances], rel=1e-4)


def test_a_teacher_is_validated_while_it_is_made(tiny: Path, world: Any, tmp_path: Path) -> None:
    values = load_recipe(tiny / "recipe.yaml").changed(quick(tiny)).model_dump(mode="json")
    tuned = {"path": str(tiny / "teacher"), "train": {**values["train"], "validate_every": 2, "keep": "best"}}
    values |= {"teacher": {"dtype": "float32"}, "finetune": tuned, "output": str(tmp_path)}
    values["data"]["validation"] = {"share": 0.2}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    job = jobs.finetune_job(world, load_recipe(tmp_path / "recipe.json"), tmp_path / "teacher")
    assert train(world, job)
    assert [line.keys() for line in logged(tmp_path / "teacher")] == [{"step", "ce", "perplexity", "seconds"}] * 2
    assert json.loads((tmp_path / "teacher" / "summary.json").read_text())["kept"]["step"] in (2, 3)


def test_a_cache_without_the_rows_is_refused_with_the_cure(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    without = {"teacher.placement": "cache", "cache.path": str(tmp_path / "cache"), "data.validation": None}
    cached = recipe.changed({**without, "train.validate_every": 0})
    assert write_cache.cache(world, cached, Stopping())
    share = cached.changed({"data.validation": {"share": 0.2}, "train.validate_every": 2})
    assert train(world, jobs.distil_job(world, share, tmp_path / "share")), "the rows of a share are in the cache"
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "red", "completion": " tree"}) + "\n")
    looking = share.changed({"data.validation": {"source": str(tmp_path / "held.jsonl")}})
    with pytest.raises(
        InputError, match=r"cache was made of other data.*data.validation was None.*write another with llmkd cache"
    ):
        train(world, jobs.distil_job(world, looking, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
