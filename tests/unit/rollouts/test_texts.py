"""A round's file and what is counted of its texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmkd.errors import InputError
from llmkd.rollouts.source import prompt_of, written_row
from llmkd.rollouts.texts import (
    KnownTokens,
    Text,
    forget_rounds_after,
    measures,
    read_round,
    repetition,
    round_file,
    write_round,
)


def text(*ids: int, ended: bool = True, step: int = 0) -> Text:
    return Text(step, 1, 17, np.array([4, 5, 6], dtype=np.int32), np.array(ids, dtype=np.int32), ended)


def test_a_round_is_read_as_it_was_written(tmp_path: Path) -> None:
    texts = [text(8, 9, 1), text(1, step=1), text(ended=False), text(7, 7, ended=False)]
    file = round_file(tmp_path, 10)
    assert read_round(file, "decides") is None
    write_round(file, texts, "decides")
    read = read_round(file, "decides")
    assert read is not None and len(read) == 4
    for one, other in zip(read, texts, strict=True):
        assert (one.step, one.place, one.row, one.ended) == (other.step, other.place, other.row, other.ended)
        assert np.array_equal(one.prompt, other.prompt) and np.array_equal(one.text, other.text)
        assert one.text.dtype == np.int32
    with pytest.raises(InputError, match="other settings of rollouts or other data"):
        read_round(file, "decides otherwise")


def test_every_damaged_byte_of_the_ids_is_noticed(tmp_path: Path) -> None:
    file = round_file(tmp_path, 0)
    draw = np.random.default_rng(0)
    texts = [text(*draw.integers(0, 150_000, 50).tolist()) for _ in range(20)]
    write_round(file, texts, "decides")
    whole = file.read_bytes()
    wrong = 0
    for place in range(8, len(whole) // 2, 97):
        broken = bytearray(whole)
        broken[place] ^= 16
        file.write_bytes(broken)
        try:
            read = read_round(file, "decides")
        except InputError:
            continue
        assert read is not None
        wrong += any(not np.array_equal(one.text, other.text) for one, other in zip(read, texts, strict=True))
    assert wrong == 0


def test_rounds_that_will_be_written_again_are_removed(tmp_path: Path) -> None:
    for first in (0, 5, 10):
        write_round(round_file(tmp_path, first), [text(1)], "")
    (tmp_path / "rollouts" / "round-00000015.tmp").write_text("half")
    forget_rounds_after(tmp_path, 5)
    assert sorted(file.name for file in (tmp_path / "rollouts").iterdir()) == [
        "round-00000000.parquet",
        "round-00000005.parquet",
    ]


def test_what_is_counted() -> None:
    counted = measures([text(8, 9, 1), text(1), text(ended=False), text(2, 3, 2, 3, 2, 3, 2, ended=False)])
    assert counted == {
        "texts": 4,
        "tokens": 11,
        "length": 11 / 4,
        "ended": 0.5,
        "empty": 2,  # the end token alone, and nothing at all
        "repetition": pytest.approx(0.5 / 4),  # of four 4-grams, two stand there before
    }
    assert repetition(np.array([1, 2, 3], dtype=np.int32)) == 0.0
    assert repetition(np.array([5] * 9, dtype=np.int32)) == pytest.approx(5 / 6)


def test_the_prompt_ends_where_the_last_trained_stretch_begins() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5, 6, 7], "trained": [False, True, True, False, False, True, True]}
    assert prompt_of(row).tolist() == [1, 2, 3, 4, 5]
    assert prompt_of({"input_ids": [1, 2], "trained": [True, True]}).tolist() == []
    assert prompt_of({"input_ids": [1, 2], "trained": [False, False]}).tolist() == [1, 2]
    written = written_row(text(8, 9, 1))
    assert written["input_ids"].tolist() == [4, 5, 6, 8, 9, 1]
    assert written["trained"].tolist() == [False] * 3 + [True] * 3 and written["length"] == 6


@pytest.mark.parametrize(
    ("ids", "text", "ended"),
    [
        ([3, 4, 2], [3, 4, 2], True),
        ([3, 4, 7], [3, 4, 7], False),
        ([3, 10, 2], [3], False),  # the smaller vocabulary has ten tokens
        ([3, 4, 5, 2], [3, 4], False),  # token 5 is another one in the other vocabulary
        ([12, 2], [], False),
        ([], [], False),
    ],
)
def test_a_text_ends_before_a_token_that_one_model_lacks(ids: list[int], text: list[int], ended: bool) -> None:
    cut, has_ended = KnownTokens(10, frozenset([5])).cut(ids, stops=[2])
    assert (cut.tolist(), has_ended) == (text, ended) and cut.dtype == np.int32
