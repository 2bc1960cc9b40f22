"""`llmkd doctor` tells what is trained, and what would spoil a run in silence."""

from __future__ import annotations

import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets

from llmkd.cli import main
from llmkd.data.batches import batches, collate
from llmkd.data.formats import RowFormat
from llmkd.data.tokens import tokenize
from llmkd.errors import InputError
from llmkd.files import ROOT
from llmkd.models import load, make
from llmkd.planning import data as planning_data
from llmkd.planning.cache import cache_rows, cache_traffic
from llmkd.planning.data import Finding
from llmkd.planning.doctor import CLOSE, OPEN, examine, marked
from llmkd.planning.shapes import teacher_config
from llmkd.planning.teacher import PlannedTeacher
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.training.jobs import distil_job, read_rows
from llmkd.training.prepare import prepare
from llmkd.training.tokens import packed
from llmkd.training.validation_rows import run_rows
from tests.tiny import in_memory
from tests.unit.data.test_data import QWEN3_LIKE


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """The tiny recipe with a teacher of its own, which a test may spoil."""
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    (tmp_path / "recipe.yaml").write_text(
        (tiny / "recipe.yaml").read_text().replace(f"{tiny}/teacher", f"{tmp_path}/teacher")
    )
    return tmp_path


def _said(recipe: Recipe, grade: str) -> list[str]:
    return [finding.what for finding in examine(recipe)[0] if finding.grade == grade]


def test_a_good_recipe_has_no_warning(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", str(place / "recipe.yaml")])
    out = capsys.readouterr().out
    assert "nothing found that would spoil a run" in out and "40 rows" in out and "warning" not in out
    assert sorted(p.name for p in place.iterdir()) == ["recipe.yaml", "teacher"]  # nothing is written


def test_rows_are_shown_with_what_is_trained(place: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    rows = read_rows(recipe.data)
    _, shown = examine(recipe, rows=3)
    assert list(shown) == ["row 0", "row 1", "row 2"]
    for number, text in enumerate(shown.values()):
        row = rows[number]
        assert text == f"{row['prompt']}{OPEN}{row['completion']}<eos>{CLOSE}"


def test_the_first_token_of_a_text_is_not_trained(place: Path) -> None:
    tokenizer = load.load_tokenizer(place / "teacher")
    ids = tokenizer("red bird")["input_ids"]
    text = marked({"input_ids": ids, "trained": [True] * len(ids)}, tokenizer)
    assert text == f"{tokenizer.decode(ids[:1])}{OPEN}{tokenizer.decode(ids[1:])}{CLOSE}"


def made_up(count: int) -> Dataset:
    """Rows of 2 to 9 tokens, of which some are trained, the first perhaps among them."""
    random = np.random.default_rng(0)
    lengths = random.integers(2, 10, count)
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    trained = random.random(offsets[-1]) < 0.3
    trained[offsets[1:] - random.integers(1, lengths)] = True
    ids = random.integers(0, 50, offsets[-1]).astype(np.int32)
    columns = {name: pa.ListArray.from_arrays(offsets, of) for name, of in (("input_ids", ids), ("trained", trained))}
    return Dataset(pa.table({**columns, "length": lengths}))


def test_trained_tokens_are_counted_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_data, "ROWS_AT_ONCE", 7)
    for rows in (made_up(50), made_up(50).select([40, 3, 11]), concatenate_datasets([made_up(5), made_up(20)])):
        count, lasts = planning_data.trained_of(rows)
        assert planning_data.lengths_of(rows).tolist() == list(rows["length"])
        assert count == sum(sum(marks[1:]) for marks in rows["trained"])
        each: list[Any] = list(rows)
        assert lasts.tolist() == [
            [token for token, is_trained in zip(row["input_ids"], row["trained"], strict=True) if is_trained][-1]
            for row in each
        ]


def test_a_million_rows_take_seconds() -> None:
    rows = made_up(1_000_000)
    began = time.process_time()
    count, lasts = planning_data.trained_of(rows)
    assert time.process_time() - began < 5 and len(lasts) == 1_000_000 < count  # row by row: half a minute


def test_the_share_of_padding_is_that_of_the_batches(place: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    tokenizer = load.load_tokenizer(place / "teacher")
    data = tokenize(read_rows(recipe.data), tokenizer, row_format=RowFormat(), max_length=64, too_long="drop")
    tokens: Any = in_memory(data)
    make = functools.partial(tokens.batch, collate=collate, pad_id=0)
    settings: dict[str, Any] = dict(seed=0, start_step=0, steps=5, batch_size=8, accumulation=2, rank=0, world_size=1)
    made = [b for step in batches(tokens, make=make, **settings) for b in step]
    share = 1 - np.mean(np.concatenate([b.attended.flatten().numpy() for b in made]))
    assert any(f"{share:.1%} of the places of a batch are padding" in what for what in _said(recipe, "ok"))


def test_an_end_that_generation_does_not_stop_at_is_a_warning(place: Path) -> None:
    file = place / "teacher" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [5, 6]}))
    (warning,) = _said(load_recipe(place / "recipe.yaml"), "warning")
    assert "generation_config.json stops at" in warning and "never trained as an end" in warning
    file.write_text(json.dumps({"eos_token_id": [5, 1]}))
    assert _said(load_recipe(place / "recipe.yaml"), "warning") == []


def test_a_pad_that_is_the_end_is_a_note(place: Path) -> None:
    tokenizer = load.load_tokenizer(place / "teacher")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(place / "teacher")
    assert any("share id 1" in what for what in _said(load_recipe(place / "recipe.yaml"), "note"))


def test_a_student_of_another_template_or_other_tokens(place: Path) -> None:
    student = place / "student"
    make.copied_student(place / "teacher", (0, 5), student, dtype=load.DTYPES["float32"])
    tokenizer = load.load_tokenizer(student)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(student)
    changes = {"student.init": "checkpoint", "student.path": str(student), "student.blocks": None}
    recipe = load_recipe(place / "recipe.yaml").changed(changes)
    assert any("chat template is not the teacher's" in what for what in _said(recipe, "warning"))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(student)
    assert any("only the student has 1 more tokens, first '<new>'" in what for what in _said(recipe, "note"))
    (place / "new.jsonl").write_text(json.dumps({"prompt": "a", "completion": "<new>"}) + "\n")
    with pytest.raises(InputError, match=r"token '<new>' \(id 320\) is in only one of the teacher's and the student's"):
        examine(recipe.changed({"data.source": str(place / "new.jsonl")}))
    make.new_tokenizer(["some other words"], 300).save_pretrained(student)
    with pytest.raises(InputError, match="tokenizers differ"):
        examine(recipe)


def test_findings_say_what_is_installed(place: Path) -> None:
    findings, _ = examine(load_recipe(place / "recipe.yaml"), rows=0)
    assert any(f.what.startswith("installed: llmkd") and "torch" in f.what for f in findings)
    assert all(isinstance(f, Finding) and f.what and "\n" not in f.what for f in findings)


def test_empty_thoughts_that_are_trained_are_a_note(place: Path) -> None:
    tokenizer = load.load_tokenizer(place / "teacher")
    tokenizer.chat_template = QWEN3_LIKE.replace("<|im_start|>", "").replace("<|im_end|>", "")
    tokenizer.save_pretrained(place / "teacher")
    said = [
        [{"role": "user", "content": "red"}, {"role": "assistant", "content": text}]
        for text in ("bird", "<think>wind</think>door")
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in said))
    given = {"data.source": str(place / "chats.jsonl"), "train.batch_size": 1, "train.micro_batch_size": 1}
    recipe = load_recipe(place / "recipe.yaml").changed(given)
    (note,) = (what for what in _said(recipe, "note") if "think" in what)
    assert (
        "1 of the first 2 rows have no thoughts, and the chat template writes <think></think>, which is trained" in note
    )
    assert "data.template_options: {enable_thinking: false}" in note
    (place / "chats.jsonl").write_text(json.dumps({"messages": said[0]}) + "\n")
    recipe = recipe.changed({"data.template_options": {"enable_thinking": False}})
    assert not any("think" in what for what in _said(recipe, "note"))
    texts = recipe.changed({"data.source": load_recipe(place / "recipe.yaml").data.source})
    assert any(
        "data.template_options are for chats, and the rows are texts" in what for what in _said(texts, "warning")
    )


def test_rows_of_validation_are_counted(place: Path, tmp_path: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml").changed({"data.validation": {"share": 0.25, "rows": 8}})
    held_out = "validation: 10 of the 40 rows are held out and never trained on, 8 of them are validated"
    assert f"{held_out} when train.validate_every is set, which it is not" in _said(recipe, "note")
    assert f"{held_out} every 5 steps" in _said(recipe.changed({"train.validate_every": 5}), "ok")
    row = '{"prompt": "a", "completion": "b"}\n'
    too_long = json.dumps({"prompt": "red", "completion": " bird" * 70}) + "\n"
    (tmp_path / "held.jsonl").write_text(row)
    own = recipe.changed({"data.validation": {"source": str(tmp_path / "held.jsonl")}, "train.validate_every": 5})
    assert "validation: 1 rows of their own, 1 of them are validated every 5 steps" in _said(own, "ok")
    (tmp_path / "held.jsonl").write_text(row * 2 + too_long)
    left_out = "(1 more are left out, too long or with nothing to train)"
    assert f"validation: 2 rows of their own {left_out}, 2 of them are validated every 5 steps" in _said(own, "ok")
    (tmp_path / "held.jsonl").write_text(too_long)
    with pytest.raises(InputError, match=r"^data\.validation\.max_length: no row has a token to train within 64"):
        examine(own)
    (tmp_path / "held.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"^data\.validation\.format: the columns prompt are none of"):
        examine(own)
    with pytest.raises(InputError, match=r"data.validation: .* is trained on too"):
        examine(recipe.changed({"data.validation": {"split": "test"}}))


ON_POLICY = {"loss.ce": 0.0, "rollouts": {"max_new_tokens": 8}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train.batch_size": 64}, "train.batch_size: 64 rows per step, but the data has only 40"),
        (
            {"data.batching": "packed", "train.batch_size": 16},
            r"train.batch_size: 16 rows .* \(packed: sequences of rows\)",
        ),
        ({"train.steps": None, "train.epochs": 1, "train.warmup_steps": 5}, "train.warmup_steps: "),
        ({**ON_POLICY, "data.columns": {"completion": "text"}, "data.format": "auto"}, "rollouts: row 0 has no prompt"),
        (
            {**ON_POLICY, "rollouts.backend": "vllm", "rollouts.devices": [1]},
            "rollouts.devices: there is no GPU here; leave the key out",
        ),
        (
            {**ON_POLICY, "rollouts.share": 0.02, "train.steps": None, "train.epochs": 1, "train.warmup_steps": 0},
            "rollouts.share: 0.02 of 5 steps of 8 rows is less than one text",
        ),
        ({"teacher.offload_states": True}, "teacher.offload_states: there is no GPU here"),
        ({"matching.strategy": "explicit", "matching.pairs": [[0, 9]]}, r"pairs\[0\] is \[0, 9\]: 9 is not"),
        ({"data.max_length": 65}, "data.max_length: 65 tokens are more than the 64 positions"),
    ],
)
def test_what_a_run_refuses_is_refused(place: Path, world: Any, changes: dict[str, Any], sentence: str) -> None:
    """With the run's own sentence."""
    recipe = load_recipe(place / "recipe.yaml").changed(changes)
    with pytest.raises(InputError, match=sentence) as said:
        examine(recipe)
    with pytest.raises(InputError) as of_run:
        prepare(world, distil_job(world, recipe, place / "run"))
    assert str(said.value) == str(of_run.value)


def test_a_row_without_a_prompt_is_refused_where_prompts_are_continued(place: Path) -> None:
    rows = [{"prompt": "red", "completion": " bird"}, {"prompt": "", "completion": "a bird"}]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    recipe = load_recipe(place / "recipe.yaml").changed({"data.source": str(place / "rows.jsonl")})
    examine(recipe)
    with pytest.raises(InputError, match="rollouts: row 1 has no prompt, all of it is trained"):
        examine(recipe.changed(ON_POLICY))


def test_the_rule_by_which_a_student_is_chosen_is_told(place: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml").changed({"data.validation": {"share": 0.25}, "train.validate_every": 5})

    def rule(**changes: Any) -> list[str]:
        said = _said(recipe.changed({f"train.{key}": value for key, value in changes.items()}), "ok")
        return [what for what in said if "exported" in what or "stops" in what]

    assert rule() == []
    assert rule(keep="best") == ["validation: the student of the step with the lowest validation/ce is exported"]
    assert rule(patience=3) == [
        "validation: a run stops after 3 validations in a row without a new lowest validation/ce"
    ]
    (both,) = rule(keep="best", keep_by="validation/agreement", patience=2)
    assert both == (
        "validation: the student of the step with the highest validation/agreement is exported; "
        "a run stops after 2 validations in a row without a new highest validation/agreement"
    )


def _mixture(place: Path, **changes: Any) -> Recipe:
    """The tiny rows three times as often as four texts of another format, whose column has another name."""
    texts = [{"document": "red green blue small large", "origin": "a book"}] * 4
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    recipe = load_recipe(place / "recipe.yaml")
    sources = [
        {"source": recipe.data.source, "weight": 3},
        {"source": str(place / "texts.jsonl"), "columns": {"document": "text"}, "weight": 1},
    ]
    data = {"data.source": "records", "data.sources": sources}
    return recipe.changed({**data, "train.steps": 10, "train.batch_size": 8, **changes})


def test_every_source_of_a_mixture_is_looked_at(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings, shown = examine(_mixture(place), rows=1)
    ok, notes = ([f.what for f in findings if f.grade == grade] for grade in ("ok", "note"))
    assert any(what.startswith("data (rows): 40 rows of the format prompt_completion, ") for what in ok)
    assert any(what.startswith("data (texts): 4 rows of the format text, ") for what in ok)
    assert "data (texts): the columns origin are not read" in notes
    assert "data: in 10 steps of 8 rows: rows 75.0% (60 rows, 1.5 passes), texts 25.0% (20 rows, 5 passes)" in ok
    assert list(shown) == ["rows row 0", "texts row 0"]
    assert shown["texts row 0"].endswith(f"blue small large<eos>{CLOSE}")
    held_out = _said(_mixture(place, **{"data.validation": {"share": 0.25}, "train.validate_every": 5}), "ok")
    assert any(what.startswith("validation: 11 of the 44 rows are held out") for what in held_out)
    assert any("(60 rows, 2 passes), texts 25.0% (20 rows, 6.67 passes)" in what for what in held_out)


def test_template_options_of_one_source_are_named_with_it(place: Path) -> None:
    tokenizer = load.load_tokenizer(place / "teacher")
    tokenizer.chat_template = QWEN3_LIKE
    tokenizer.save_pretrained(place / "teacher")
    recipe = _mixture(place)
    sources = [part.model_dump(exclude_defaults=True) for part in recipe.data.sources]
    sources[1]["template_options"] = {"enable_thinking": False}
    (warning,) = _said(recipe.changed({"data.sources": sources}), "warning")
    assert warning.startswith("data (texts): data.template_options are for chats")


def test_packed_rows_that_are_attended_under_masks_are_told(place: Path) -> None:
    recipe = _mixture(place, **{"data.batching": "packed", "student.attention": "sdpa"})
    found = [what for what in _said(recipe, "note") if "masked" in what]
    assert found == [
        "student: attention to packed rows is computed over the whole sequence, masked (sdpa: as the recipe says)"
    ]
    assert not any("masked" in what for what in _said(recipe.changed({"data.batching": "grouped"}), "note"))


def test_how_full_packed_sequences_are_is_what_a_run_says(
    place: Path, world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """And once the run has made them, the folder of the tokens is named with its size."""
    own = {"output": str(place / "own")}  # without the tokens of other tests
    recipe = _mixture(place, **own, **{"data.batching": "packed", "data.validation": {"share": 0.25, "seed": 3}})
    (before,) = (what for what in _said(recipe, "ok") if what.startswith("tokens:"))
    assert (
        before == f"tokens: kept in {recipe.tokens_folder(recipe.data)}, for all runs that have the same; not made yet"
    )
    assert not recipe.tokens_folder(recipe.data).exists()
    job = distil_job(world, recipe, recipe.folder)
    tokenizer = load.load_tokenizer(place / "teacher")
    with caplog.at_level("INFO", "llmkd"):
        packed(world, job, run_rows(world, job, tokenizer).training)
    (said,) = (r.getMessage() for r in caplog.records if "are packed into" in r.getMessage())
    found = _said(recipe, "ok")
    step = f"a step takes {recipe.train.batch_size} of them, {recipe.train.batch_size * 64} tokens at most"
    assert f"{said.replace(f'{job.title}:', 'data:')}; {step}" in found
    by_tokens = recipe.changed({"train.batch_tokens": 512})
    assert any(what.endswith("a step takes 8 of them, 512 tokens at most") for what in _said(by_tokens, "ok"))
    (after,) = (what for what in found if what.startswith("tokens:"))
    mib = sum(file.stat().st_size for file in recipe.tokens_folder(recipe.data).rglob("*.arrow")) / 2**20
    assert after == before.replace("not made yet", f"there already, {mib:.1f} MiB")
    elsewhere = recipe.changed({"data.tokens": str(place / "elsewhere")})
    assert any(what.startswith(f"tokens: kept in {place / 'elsewhere'}, ") for what in _said(elsewhere, "ok"))
    longer = recipe.changed({"data.max_length": 63})
    assert any(what.endswith("not made yet") for what in _said(longer, "ok"))


@pytest.mark.parametrize("mixed", [False, True])
def test_tokens_that_are_there_are_read_and_not_made(
    place: Path, world: Any, monkeypatch: pytest.MonkeyPatch, mixed: bool
) -> None:
    """And what is said of them is what is said of those that are made; a mixture's only where all are there, and none is damaged."""
    own = {"output": str(place / "own")}
    recipe = _mixture(place, **own) if mixed else load_recipe(place / "recipe.yaml").changed(own)
    made: list[int] = []
    monkeypatch.setattr(
        planning_data, "tokenize", lambda rows, *a, **b: (made.append(len(rows)), tokenize(rows, *a, **b))[1]
    )

    def said() -> tuple[list[str], dict[str, str]]:
        made.clear()
        findings, shown = examine(recipe)
        return [finding.what for finding in findings if not finding.what.startswith("tokens:")], shown

    before, all_rows = said(), [40, 4] if mixed else [40]
    assert made == all_rows
    run_rows(world, distil_job(world, recipe, recipe.folder), load.load_tokenizer(place / "teacher"))
    assert said() == before and made == []
    file = next(recipe.tokens_folder(recipe.data).rglob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert said() == before and made == all_rows


def test_the_plan_of_a_cache_counts_the_rows_of_all_sources(place: Path) -> None:
    recipe = _mixture(place, **{"teacher.placement": "cache"})
    sources = [part.model_dump(exclude_defaults=True) for part in recipe.data.sources]

    def planned(*rows: int | None) -> tuple[int, str, str]:
        asked = [{**source, "rows": count} for source, count in zip(sources, rows, strict=True)]
        teacher = PlannedTeacher(recipe.changed({"data.sources": asked}), teacher_config(recipe), 1)
        (found,) = (row for row in cache_rows(teacher) if row.what == "teacher's cache")
        return found.bytes, found.how, cache_traffic(teacher)[1]

    size, how, seen = planned(30, 10)
    assert "at most, 40 rows of 64 tokens" in how and "here 2 epochs x" in seen  # 10 steps of 8 rows
    assert size * 2 == planned(60, 20)[0]
    size, how, seen = planned(30, None)
    assert "each 1,000 rows of 64 tokens" in how and "epochs" not in seen


def test_the_shipped_mixture_is_checked_whole(
    tiny: Path, tmp_path: Path, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny teacher and rows where its scripts put them; without them, the script that fetches each is named."""
    recipe = load_recipe(ROOT / "recipes" / "smollm2_mixture.yaml").changed({"data.max_length": 64})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"teacher\.path.*scripts/fetch_smollm2\.py"):
        examine(recipe)
    shutil.copytree(tiny / "teacher", recipe.teacher_path)
    with pytest.raises(InputError, match=r"hellaswag\.jsonl.*scripts/fetch_choice_data\.py"):
        examine(recipe)
    for number, part in enumerate(recipe.data.sources):
        Path(part.source).parent.mkdir(parents=True, exist_ok=True)
        lines = (tiny / "rows.jsonl").read_text().splitlines(keepends=True)
        Path(part.source).write_text("".join(lines[number:] + lines[:number]))
    said = _said(recipe, "ok")
    assert any("in 100 steps of 8 sequences: hellaswag 75.0% (600 sequences" in what for what in said)
    assert any("validation: 2 of the 80 rows are held out" in what and "every 10 steps" in what for what in said)
    for strategy in recipe.study.strategies:
        job = distil_job(world, recipe.changed({"matching.strategy": strategy}), recipe.folder)
        assert job.train.keep == "best" and job.train.keep_by == "validation/ce"


def test_a_streams_first_rows_are_looked_at(place: Path) -> None:
    file = place / "long.jsonl"
    row = {"prompt": "red", "completion": " bird", "further": [1, "a"]}
    file.write_text((json.dumps(row) + "\n") * 300 + "no JSON\n")
    recipe = load_recipe(place / "recipe.yaml").changed({"data.source": str(file), "data.streaming": True})
    findings, shown = examine(recipe)
    said = [finding.what for finding in findings]
    assert "data: a stream; what is said of its rows is said of the first 100" in said
    assert any(text.startswith("data: 100 rows") for text in said) and "data: the columns further are not read" in said
    assert shown["row 0"] == f"red{OPEN} bird<eos>{CLOSE}"
