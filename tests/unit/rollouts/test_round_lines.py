"""A round's line in rollouts.jsonl: one for each round whatever happens, with what the student writes after the same few prompts."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmkd.data.tokenized import Tokens
from llmkd.files import read_lines
from llmkd.models.load import load_tokenizer
from llmkd.recipe.recipe import load_recipe
from llmkd.rollouts import source
from llmkd.rollouts.prompts import fixed_prompts, in_words
from llmkd.rollouts.texts import Text, forget_rounds_after, measures, note_round, read_round, round_file
from llmkd.rollouts.wanted import Schedule
from llmkd.train import train
from llmkd.training import initial, jobs
from tests.tiny import in_memory, load, plain_text

CHANGES: dict[str, Any] = {
    "loss.ce": 0.0,
    "matching.strategy": "none",
    "train.steps": 6,
    "train.save_every": 2,
    "train.learning_rate": 0.05,
    "rollouts": {"max_new_tokens": 12, "every": 3, "temperature": 0.8},
}


def run(tiny: Path, world: Any, folder: Path) -> Path:
    """A run of two rounds, or what is left of it."""
    assert train(world, jobs.distil_job(world, load_recipe(tiny / "recipe.yaml").changed(CHANGES), folder))
    return folder


@pytest.fixture(scope="module")
def whole(tiny: Path, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny, world, tmp_path_factory.mktemp("lines") / "run")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Without their times, which are never the same."""
    lines = read_lines(folder / "rollouts.jsonl")
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]


def texts_of(folder: Path, first: int) -> Sequence[Text]:
    metadata = pq.read_schema(round_file(folder, first)).metadata
    texts = read_round(round_file(folder, first), metadata[b"llmkd.fingerprint"].decode())
    assert texts is not None
    return texts


def test_a_line_has_the_numbers_of_its_round_alone(whole: Path) -> None:
    lines = read_lines(whole / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [0, 3]
    for line in lines:
        texts = texts_of(whole, line["step"])
        assert len(texts) == 24  # three steps of 8: those of the fixed prompts are not among them
        assert {key: line[key] for key in measures(texts)} == measures(texts)
        assert 0 < line["weights_seconds"] < line["seconds"]


def test_fixed_prompts_are_continued_as_a_plain_loop_does(tiny: Path, whole: Path, tmp_path: Path) -> None:
    recipe, tokenizer = load_recipe(tiny / "recipe.yaml").changed(CHANGES), load_tokenizer(tiny / "teacher")
    first, last = lines_of(whole)
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()[:3]]
    assert [sample["prompt"] for sample in first["samples"]] == [row["prompt"] for row in rows]
    assert [sample["prompt"] for sample in last["samples"]] == [row["prompt"] for row in rows]
    assert recipe.rollouts is not None
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "initial")
    student = load(tmp_path / "initial")
    seeds = Schedule(3, 1.0, 1, recipe.seed, 6).shown_seeds(3)
    assert len(set(seeds)) == 3
    for sample, row, seed in zip(first["samples"], rows, seeds, strict=True):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        ids = plain_text(recipe.rollouts, prompt, seed, None, student, tokenizer.eos_token_id, 64)
        assert sample["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert [sample["text"] for sample in first["samples"]] != [sample["text"] for sample in last["samples"]]


def test_the_log_and_tensorboard_have_the_numbers_of_the_round_that_a_step_is_trained_on(whole: Path) -> None:
    logged = [line["rollouts"] for line in read_lines(whole / "metrics.jsonl")]
    first, second = (dict(measures(texts_of(whole, step))) for step in (0, 3))
    assert logged == [first] * 3 + [second] * 3 and first != second
    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    lengths = [event.value for event in board.Scalars("rollouts/length")]
    assert lengths == pytest.approx([first["length"]] * 3 + [second["length"]] * 3)


def test_the_summary_has_what_the_texts_took(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    spent, lines = summary["rollouts"], read_lines(whole / "rollouts.jsonl")
    assert (
        spent["writing"] == pytest.approx(sum(line["seconds"] for line in lines))
        and spent["writing"] < summary["seconds"]
    )
    assert spent["weights"] == pytest.approx(sum(line["weights_seconds"] for line in lines))
    assert (spent["rounds"], spent["texts"]) == (2, 48)
    assert spent["share"] == pytest.approx(spent["writing"] / summary["seconds"]) and "began" not in spent


def test_each_round_s_line_says_what_share_of_the_time_is_writing(
    tiny: Path, world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "llmkd"):
        run(tiny, world, tmp_path / "run")
    shares = re.findall(r"rollouts for step \d+: .*; writing is (\d+)% of the run's time so far", caplog.text)
    assert len(shares) == 2 and all(0 < int(share) <= 100 for share in shares) and int(shares[1]) < 100


@pytest.mark.parametrize("died", ["publishing", "training"])
def test_a_resumed_run_has_each_round_s_line_once(
    tiny: Path, world: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died: str
) -> None:
    """`publishing`: the line is written, the file is not. `training`: both are, and the round is not trained on yet."""
    publish, calls = source.write_round, 0

    def dies(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 and died == "publishing":
            raise KeyboardInterrupt
        publish(*arguments)
        if calls == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(source, "write_round", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, world, tmp_path / "run")
    assert len(lines_of(tmp_path / "run")) == 2
    assert lines_of(run(tiny, world, tmp_path / "run")) == lines_of(whole)


def test_lines_of_rounds_that_will_be_written_again_are_dropped(tmp_path: Path) -> None:
    for first in (0, 3, 6):
        note_round(tmp_path, first, {"length": 1.0})
    with (tmp_path / "rollouts.jsonl").open("a") as lines:
        lines.write('{"step": 9, "le')
    round_file(tmp_path, 0).parent.mkdir()
    for first in (0, 3):
        round_file(tmp_path, first).touch()
    forget_rounds_after(tmp_path, 6)  # of the round at 6 only the line is there
    assert [line["step"] for line in read_lines(tmp_path / "rollouts.jsonl")] == [0, 3]
    forget_rounds_after(tmp_path, 3)
    assert [line["step"] for line in read_lines(tmp_path / "rollouts.jsonl")] == [0, 3]
    forget_rounds_after(tmp_path, 2)  # within the first round
    assert [line["step"] for line in read_lines(tmp_path / "rollouts.jsonl")] == [0]


def test_fixed_prompts_are_different_ones_that_have_room(data: Any) -> None:
    rows = [
        ([1, 2], [False, True]),
        ([1, 3], [False, True]),  # the same prompt
        ([7, 7], [True, True]),  # none
        ([4, 4, 4, 4, 5], [False] * 4 + [True]),  # too long
        ([6, 6, 5], [False, False, True]),
        ([8, 5], [False, True]),
        ([9, 5], [False, True]),
    ]
    tokens = in_memory(data(rows))
    assert isinstance(tokens, Tokens)
    assert [prompt.tolist() for prompt in fixed_prompts(tokens, 4)] == [[1], [6, 6], [8]]


@pytest.fixture
def data() -> Any:
    """Makes tokenized rows of (tokens, which are trained)."""

    def make(rows: Sequence[tuple[list[int], list[bool]]]) -> Dataset:
        columns = {"input_ids": [ids for ids, _ in rows], "trained": [trained for _, trained in rows]}
        return Dataset.from_dict({**columns, "length": [len(ids) for ids, _ in rows], "row": list(range(len(rows)))})

    return make


class Letters:
    """A tokenizer whose every token is one letter."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids))


def test_long_texts_keep_a_prompt_s_end_and_a_text_s_beginning() -> None:
    ids = np.arange(97, 97 + 500, dtype=np.int32)
    words = in_words(Text(0, 0, 0, ids, ids, False), Letters())
    everything = "".join(map(chr, ids))
    assert words == {"prompt": f"… {everything[-400:]}", "text": f"{everything[:400]} …"}
    short = ids[:400]
    assert in_words(Text(0, 0, 0, short, short, False), Letters()) == dict.fromkeys(
        ["prompt", "text"], everything[:400]
    )


@pytest.mark.parametrize(("every", "steps"), [(1, 5), (1, 1000), (10, 1003), (7, 300), (50, 20)])
def test_prompts_are_shown_in_some_rounds_the_first_and_the_last_among_them(every: int, steps: int) -> None:
    schedule = Schedule(every, 1.0, 1, 0, steps)
    firsts = list(range(0, steps, every))
    shown = [first for first in firsts if schedule.shows(first)]
    assert shown[0] == 0 and shown[-1] == firsts[-1]
    assert shown == firsts if len(firsts) <= 20 else 20 <= len(shown) <= 41
