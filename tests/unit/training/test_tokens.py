"""A run's rows as tokens: made once for all runs that have the same, mixed by weight, packed; the same student whoever made them."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkd.data import file_hashes, token_files
from llmkd.data import tokens as text_tokens
from llmkd.data.batches import Batch, Family
from llmkd.data.tokenized import Tokens
from llmkd.errors import InputError
from llmkd.models.load import load_tokenizer
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.train import train
from llmkd.training import jobs, prepare, tokens
from llmkd.training.tokens import tokenizer_hash, tokens_of
from llmkd.training.validation_rows import run_rows
from tests.tiny import quick


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Recipe:
    """With an output, and so a folder of tokens, of its own."""
    return load_recipe(tiny / "recipe.yaml").changed(
        {**quick(tiny), "output": str(tmp_path / "runs"), "train.steps": 2, "train.warmup_steps": 0}
    )


def trained(world: Any, recipe: Recipe, folder: Path, **changes: Any) -> Path:
    own = recipe.changed(changes)
    assert train(world, jobs.distil_job(world, own, folder))
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same_to_the_bit(ours: Path, theirs: Path) -> None:
    for name, weight in weights(ours).items():
        assert torch.equal(weight, weights(theirs)[name]), name


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_students_of_one_recipe_share_their_tokens(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    make = token_files._made
    monkeypatch.setattr(token_files, "_made", lambda folder, *rest: (made.append(folder), make(folder, *rest))[1])
    for strategy in ("forward", "reverse", "none"):
        trained(world, recipe, tmp_path / strategy, **{"matching.strategy": strategy})
    (folder,) = made
    assert folder.parent == tmp_path / "runs" / "tokens" and [*folder.parent.rglob("tokens.json")] == [
        folder / "tokens.json"
    ]
    first = tmp_path / "forward"
    moved = {"matching.strategy": "forward", "data.tokens": str(tmp_path / "elsewhere")}
    same_to_the_bit(first, trained(world, recipe, tmp_path / "again", **moved))
    assert len(made) == 2 and made[1].parent == tmp_path / "elsewhere" and made[1].name == folder.name


def test_a_later_start_does_not_read_the_source(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the tokens nor for the run's inputs; a doctor's look does not either."""
    source = tmp_path / "rows.jsonl"
    shutil.copy(recipe.data.source, source)
    monkeypatch.setattr(file_hashes, "RACY", -(10**18))  # as if it had been there for long
    own = recipe.changed({"data.source": str(source)})
    first = trained(world, own, tmp_path / "first")
    monkeypatch.setattr(file_hashes, "_known", {})
    monkeypatch.setattr(file_hashes, "sha256", lambda file: pytest.fail(f"{file} is read again"))
    same_to_the_bit(first, trained(world, own, tmp_path / "second"))
    assert all(tokens.found(own, own.data, Family("decoder"), load_tokenizer(Path(own.teacher_path))))


@pytest.mark.parametrize(
    "change", [{"data.max_length": 32}, {"data.rows": 39}, {"data.too_long": "truncate"}, {"data.format": "prompt_completion"}]
)  # fmt: skip
def test_what_decides_the_tokens_decides_their_folder(recipe: Recipe, world: Any, tiny: Path, change: Any) -> None:
    tokenizer = load_tokenizer(tiny / "teacher")
    folders = {
        tokens_of(world, jobs.distil_job(world, own, Path("unused")), tokenizer).folders
        for own in (recipe, recipe.changed({"seed": 5}), recipe.changed(change))
    }
    assert len(folders) == 2


def test_neither_a_source_s_weight_nor_its_place_decides_its_tokens(
    mixture: Recipe, world: Any, tiny: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny / "teacher")
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "texts.jsonl").write_bytes((tmp_path / "texts.jsonl").read_bytes())
    rows, texts = (part.model_dump() for part in mixture.data.sources)
    moved = {**texts, "source": str(tmp_path / "moved" / "texts.jsonl"), "weight": 2.0}
    folders = [
        tokens_of(world, jobs.distil_job(world, own, Path("unused")), tokenizer).folders
        for own in (mixture, mixture.changed({"data.sources": [rows, moved]}))
    ]
    assert folders[0] == folders[1]


def test_a_tokenizers_hash_is_of_what_it_does(tiny: Path) -> None:
    tokenizer, other = load_tokenizer(tiny / "teacher"), load_tokenizer(tiny / "teacher")
    first = tokenizer_hash(tokenizer)
    tokenizer("red green blue", truncation=True, max_length=2)  # leaves its mark in a fast tokenizer
    assert tokenizer_hash(tokenizer) == first
    other.chat_template = "{{ messages }}"
    assert tokenizer_hash(other) != first
    tokenizer.add_tokens(["<more>"])
    assert tokenizer_hash(tokenizer) != first


def test_nodes_that_made_other_tokens_are_refused() -> None:
    tokens._check_same([["a", "b"], ["a", "b"]])
    with pytest.raises(
        InputError, match=r"data\.source: node 1 made other tokens of it than node 0 \(a, c, not a, b\)"
    ):
        tokens._check_same([["a", "b"], ["a", "c"]])


@pytest.fixture
def mixture(recipe: Recipe, tiny: Path, tmp_path: Path) -> Recipe:
    """Two sources of two formats; the second gives a quarter of the rows."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"red {n} tree"}) + "\n" for n in range(7)))
    rows = {"source": recipe.data.source, "weight": 3.0}
    texts = {"source": str(tmp_path / "texts.jsonl"), "weight": 1.0, "format": "text"}
    return recipe.changed({"data.source": "records", "data.sources": [rows, texts], "train.steps": 4})


def test_a_mixtures_shares_are_logged_and_what_was_drawn(mixture: Recipe, world: Any, tmp_path: Path) -> None:
    run = trained(world, mixture, tmp_path / "run")
    assert [line["sources"] for line in lines(run)] == [{"rows": 6 * n, "texts": 2 * n} for n in (1, 2, 3, 4)]
    assert json.loads((run / "summary.json").read_text())["sources"] == {"rows": 24, "texts": 8}


def test_a_mixture_resumes_to_the_bit_and_repeats(mixture: Recipe, world: Any, tmp_path: Path) -> None:
    whole = trained(world, mixture, tmp_path / "whole")
    same_to_the_bit(whole, trained(world, mixture, tmp_path / "repeated"))

    class AfterTwo:
        asked, name, seen = False, "a test", 0

    stopping: Any = AfterTwo()
    job = jobs.distil_job(world, mixture, tmp_path / "stopped")
    count = tokens.drawn

    def stops(*arguments: Any) -> Any:
        units, make = count(*arguments)

        def making(numbers: Any) -> Any:
            stopping.seen += 1
            stopping.asked = stopping.seen >= 4  # two steps of two micro-batches are made
            return make(numbers)

        return units, making

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "drawn", stops)
        assert not train(world, job, stopping)
    assert train(world, jobs.distil_job(world, mixture, tmp_path / "stopped"))
    same_to_the_bit(whole, tmp_path / "stopped")
    assert lines(tmp_path / "stopped")[-1]["sources"] == {"rows": 24, "texts": 8}


def test_packed_micro_batches_have_one_number_of_tokens(
    recipe: Recipe, world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed = {"data.batching": "packed", "train.batch_size": 4, "train.micro_batch_size": 2}
    job = jobs.distil_job(world, recipe.changed(packed), tmp_path / "run")
    data = tokens_of(world, job, load_tokenizer(Path(str(job.teacher))))
    with caplog.at_level(logging.INFO):
        sequences, make = tokens.drawn(world, job, data, 0)
    batch = make(sequences.window(0, batch_size=4, seed=0)[0][:2])
    assert batch.input_ids.shape == (2, 64) and batch.attention_mask is None
    assert batch.counts.attended == int(data.lengths_of(torch.tensor(batch.rows).numpy()).sum()) > 110
    assert "40 rows are packed into" in caplog.text
    assert train(world, job)


def test_validation_rows_are_in_no_packed_sequence(recipe: Recipe, world: Any, tiny: Path) -> None:
    held = {
        "data.validation": {"share": 0.2},
        "train.validate_every": 1,
        "data.batching": "packed",
        "train.batch_size": 4,
        "train.micro_batch_size": 4,
    }
    job = jobs.distil_job(world, recipe.changed(held), Path("unused"))
    rows = run_rows(world, job, load_tokenizer(tiny / "teacher"))
    sequences: Any = tokens.drawn(world, job, rows.training, 0)[0]
    packed = [row for n in range(sequences.count) for row in sequences.rows_of(n).tolist()]
    assert rows.validation is not None and len(packed) == 32 and not {*packed} & {*rows.validation.tolist()}


def units_of(batch: Batch, data: Tokens) -> Iterator[list[int]]:
    """The numbers of the rows of each row or sequence of a batch, which must hold their tokens end to end."""
    numbers = iter(batch.rows)
    for ids, attended in zip(batch.input_ids, batch.attended, strict=True):
        unit, found = [], []
        while len(found) < attended.sum():
            unit.append(next(numbers))
            found += data.row(unit[-1])["input_ids"].tolist()
        assert found == ids[attended].tolist()
        yield unit
    assert next(numbers, None) is None


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_a_mixture_with_rows_held_out_is_drawn_in_its_shares_pass_by_pass(
    recipe: Recipe, world: Any, tiny: Path, tmp_path: Path, batching: str
) -> None:
    """Of 30 rows 24 are trained on, of 10 texts 8; at 3 to 1 a window of four steps of 8 is a pass over both."""
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"red {n} tree" + " bird" * 9}) + "\n" for n in range(10))
    )
    sources = [
        {"source": recipe.data.source, "rows": 30, "weight": 3.0},
        {"source": str(tmp_path / "texts.jsonl"), "weight": 1.0, "format": "text"},
    ]
    mixed = {"data.source": "records", "data.sources": sources, "data.validation": {"share": 0.2}}
    size = {"train.batch_size": 8 if batching == "grouped" else 4, "train.micro_batch_size": 2, "train.steps": 12}
    own = recipe.changed({**mixed, **size, "data.batching": batching, "train.validate_every": 1})
    job = jobs.distil_job(world, own, tmp_path / "run")
    run, data = prepare.prepare(world, job), run_rows(world, job, load_tokenizer(tiny / "teacher"))
    held_out = {*data.training.held_out.tolist()}
    assert [len({row for row in held_out if row < 30}), len(held_out)] == [6, 8]
    assert sorted(number for batch in run.validation for number in batch.rows) == sorted(held_out)

    drawn = tokens.drawn(world, job, data.training, 0)[0].sources
    assert [source.trained for source in drawn] == [24, 8] or (batching == "packed" and len(drawn) == 2)
    seen, of_source = Counter[int](), Counter[str]()
    for step, batches in enumerate(run.batches(), start=1):
        units = [unit for batch in batches for unit in units_of(batch, data.training)]
        assert len(units) == own.train.batch_size and (batching == "packed" or all(len(unit) == 1 for unit in units))
        assert all(len({row < 30 for row in unit}) == 1 for unit in units), "a sequence is of one source"
        seen.update(row for unit in units for row in unit)
        of_source.update("rows" if unit[0] < 30 else "texts" for unit in units)
        assert not held_out & seen.keys()
        assert of_source == run.taken(step) == {"rows": of_source.total() * 3 // 4, "texts": of_source.total() // 4}
        if batching == "grouped" and step % 4:
            continue  # rows of a window change places, by length
        for source, name, first, last in ((0, "rows", 0, 30), (1, "texts", 30, 40)):
            passes, more = divmod(of_source[name], drawn[source].trained)
            times = {seen[row] for row in range(first, last) if row not in held_out}
            assert times <= {passes, passes + bool(more)} and passes in times, "each pass takes every row once"
    assert step == 12 and min(seen.values()) >= 2


def test_a_resumed_run_whose_tokens_are_others_is_refused_and_loses_nothing(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another version of a package makes other tokens of the same rows."""
    saving = recipe.changed({"train.steps": 4, "train.save_every": 2, "train.keep_checkpoints": 9})
    whole, run = trained(world, saving, tmp_path / "whole"), tmp_path / "run"
    shutil.copytree(whole / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000002")
    files = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    close = text_tokens._closed
    with monkeypatch.context() as patch:
        patch.setattr(text_tokens, "_closed", lambda ids, tokenizer: [[*row, 5] for row in close(ids, tokenizer)])
        sentence = r"data: its tokens are not those that .*/step-00000002 was trained on \(now \w+, then \w+\): .* or remove .*/checkpoints"
        with pytest.raises(InputError, match=sentence):
            trained(world, saving, run, **{"data.tokens": str(tmp_path / "other")})
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == files
    same_to_the_bit(whole, trained(world, saving, run))
    assert [line["step"] for line in lines(run)] == [3, 4], "it went on where it was"


def test_a_streams_format_is_the_one_of_its_first_rows(recipe: Recipe, world: Any, tiny: Path, tmp_path: Path) -> None:
    """After more rows than are looked at, a file has a further column, by which its rows would fit two formats."""
    rows = 4 * [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    runs = []
    for name, more in (("plain", {}), ("further", {"text": "green"})):
        (tmp_path / name).mkdir()
        for file, part in (("0.jsonl", rows[:120]), ("1.jsonl", [{**row, **more} for row in rows[120:]])):
            (tmp_path / name / file).write_text("".join(json.dumps(row) + "\n" for row in part))
        streamed = {"data.source": str(tmp_path / name), "data.streaming": True, "data.shuffle_rows": 160}
        runs.append(trained(world, recipe, tmp_path / f"run_{name}", **streamed))
    same_to_the_bit(*runs)


def test_a_signal_while_rows_are_tokenized_stops_the_run_before_anything_is_trained(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Asked:
        asked, name = True, "SIGTERM"

    monkeypatch.setattr(token_files, "SHARD_ROWS", 4)
    monkeypatch.setattr(token_files.os, "sched_getaffinity", lambda _: {0})
    asked: Any = Asked()
    with caplog.at_level(logging.INFO):
        assert not train(world, jobs.distil_job(world, recipe, tmp_path / "run"), asked)
    assert "run: stopped by SIGTERM before all its rows were there; the same command goes on" in caplog.text
    assert not (tmp_path / "run").exists()
    trained(world, recipe, tmp_path / "run")


def test_another_revision_of_hub_data_is_other_tokens(
    recipe: Recipe, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which rows a name at the hub stands for is what `datasets` has read: its fingerprint differs from revision to revision."""
    own = recipe.changed({"data.source": "organisation/rows", "data.split": "train"})
    read = tokens.read_rows(recipe.data.parts[0])
    tokenizer = load_tokenizer(tiny / "teacher")
    monkeypatch.setattr(tokens, "source_contents", lambda *_: None)

    def identity(revision: str) -> dict[str, Any]:
        read._fingerprint = revision
        monkeypatch.setattr(tokens, "read_rows", lambda _: read)
        return tokens._identity(own.data, tmp_path, Family("decoder"), own.data.parts[0], tokenizer)

    assert identity("one") == identity("one") != identity("other")
