"""What a teacher wrote, in numbers, as it is read again."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import pytest

from llmkd.files import write_checked
from llmkd.rollouts.by_teacher import WROTE, teachers_texts, wrote_into
from llmkd.rollouts.texts import Wrote


@pytest.mark.parametrize("damage", [None, "cut", "flipped", "other"])
def test_a_damaged_count_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str | None
) -> None:
    for number in range(2):
        values = asdict(Wrote(texts=3 + number, tokens=20, unended=1, empty=0, left_out=2, seconds=0.1))
        write_checked(tmp_path / f"{number}{WROTE}", values)
    file = tmp_path / f"1{WROTE}"
    text = file.read_text()
    contents = {"cut": text[:30], "flipped": text.replace('"tokens": 20', '"tokens": 60'), "other": "[1, 2]"}
    if damage is not None:
        file.write_text(contents[damage])
    with caplog.at_level(logging.WARNING):
        total = teachers_texts([tmp_path])
    assert total["texts"] == (7 if damage is None else 3) and total["tokens"] == (40 if damage is None else 20)
    assert [str(file) in record.getMessage() for record in caplog.records] == [True] * (damage is not None)


def test_a_folder_without_texts(tmp_path: Path) -> None:
    assert teachers_texts([tmp_path]) == {} and not wrote_into(tmp_path)
