"""Tokens on disk: made once, by any number of processes, resumed at the shard, mended where they are damaged."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from llmkd.data import arrays, token_files
from llmkd.data.token_files import Columns, made, mapped_rows, opened
from llmkd.errors import InputError

ROWS = 50
CUT: dict[str, Any] = {"max_length": 9, "too_long": "drop"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SHARD_ROWS", 8)


def cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(token_files.os, "sched_getaffinity", lambda _: set(range(count)))


def text() -> Dataset:
    return Dataset.from_dict({"number": list(range(ROWS))})


def encode(columns: Columns, numbers: list[int]) -> Columns:
    """Row n has n % 11 + 1 tokens; those of 11 are too long, and every seventh has nothing to train."""
    assert columns["number"] == numbers
    ids = [[n] * (n % 11 + 1) for n in numbers]
    length = [len(row) for row in ids]
    useful = [n % 7 != 0 for n in numbers]
    trained = [[True] * len(row) for row in ids]
    return dict(input_ids=ids, trained=trained, length=length, whole=length, useful=useful, row=numbers)


def tokens(folder: Path, encode: Callable[..., Columns] = encode) -> list[Any]:
    files = made(folder, lambda: (text(), encode), identity={"of": "a test"}, **CUT)
    assert files is not None
    return list(files.rows())


def expected() -> list[Any]:
    return list(mapped_rows(text(), encode, **CUT))


def watched(file: Path) -> Callable[..., Columns]:
    """`encode` that writes down the rows it is given; across processes."""

    def watching(columns: Columns, numbers: list[int]) -> Columns:
        with file.open("a") as lines:
            lines.write("".join(f"{n}\n" for n in numbers))
        return encode(columns, numbers)

    return watching


def test_any_number_of_processes_makes_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for count in (1, 4):
        cores(monkeypatch, count)
        files: Any = made(tmp_path / str(count) / "same", lambda: (text(), encode), identity={}, **CUT)
        assert list(files.rows()) == expected() and len(files.shards) == 7
        assert files.lengths().tolist() == [row["length"] for row in expected()]
        digests.append(files.digest)
    assert digests[0] == digests[1]
    assert isinstance(files.lengths(), np.memmap)


def test_what_is_there_is_not_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        first = tokens(tmp_path)
        again: Any = made(tmp_path, lambda: pytest.fail("rows were read again"), identity={}, **CUT)
    assert list(again.rows()) == first
    sentence = "36 of 50 rows are used; 8 longer than 9 tokens (dropped), 8 with nothing to train (dropped)"
    assert caplog.text.count(sentence) == 2, "a run that finds its tokens says the same"


def test_a_killed_tokenization_goes_on_at_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 1)

    def killed(columns: Columns, numbers: list[int]) -> Columns:
        if 24 in numbers:
            os.kill(os.getpid(), 9)
        return encode(columns, numbers)

    with pytest.raises(InputError, match=r"was killed, most likely for want of memory; the same command goes on"):
        tokens(tmp_path / "store", killed)
    assert opened(tmp_path / "store") is None
    assert tokens(tmp_path / "store", watched(tmp_path / "seen")) == expected()
    seen = {int(line) for line in (tmp_path / "seen").read_text().splitlines()}
    assert min(seen) == 24 and not list((tmp_path / "store").glob("tmp*"))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_named_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cores(monkeypatch, 1)
    tokens(tmp_path / "store")
    file = tmp_path / "store" / "00002.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes(content) if damage == "flipped" else file.read_bytes()[:-9])
    assert tokens(tmp_path / "store", watched(tmp_path / "seen")) == expected()
    assert f"{file}: not what was written; it is made again" in caplog.text
    assert {int(line) for line in (tmp_path / "seen").read_text().splitlines()} == set(range(16, 24))


@pytest.mark.parametrize("damage", ["exchanged", "flipped"])
def test_a_record_that_is_another_shards_or_changed_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The rows would come in another order, or be counted otherwise."""
    cores(monkeypatch, 1)
    tokens(tmp_path / "store")
    (tmp_path / "store" / "tokens.json").unlink()
    records = [tmp_path / "store" / f"0000{number}.json" for number in (2, 3)]
    one, other = (record.read_text() for record in records)
    if damage == "exchanged":
        records[0].write_text(other)
        records[1].write_text(one)
    else:
        records[0].write_text(one.replace('"rows": 6', '"rows": 7'))
        assert records[0].read_text() != one
    assert tokens(tmp_path / "store", watched(tmp_path / "seen")) == expected()
    again = set(range(16, 32)) if damage == "exchanged" else set(range(16, 24))
    assert {int(line) for line in (tmp_path / "seen").read_text().splitlines()} == again
    known = [json.loads(text)["sha256"] for text in (one, other)]
    assert [json.loads(record.read_text())["sha256"] for record in records] == known


def test_a_changed_list_of_all_shards_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 1)
    tokens(tmp_path / "store")
    file = tmp_path / "store" / "tokens.json"
    whole = file.read_text()
    file.write_text(whole.replace('"00001.arrow"', '"00000.arrow"', 1))
    assert file.read_text() != whole and opened(tmp_path / "store") is None
    assert tokens(tmp_path / "store") == expected() and file.read_text() == whole


def test_a_hash_that_is_no_text_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 1)
    tokens(tmp_path / "store")
    lengths, kept = tmp_path / "store" / "lengths.npy", tmp_path / "store" / "lengths.sha256"
    numbers, checksum = lengths.read_bytes(), kept.read_bytes()
    lengths.write_bytes(checksum)
    kept.write_bytes(numbers)
    assert opened(tmp_path / "store") is None and tokens(tmp_path / "store") == expected()
    assert lengths.read_bytes() == numbers and kept.read_bytes() == checksum


def test_a_file_is_hashed_only_where_its_time_of_change_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(monkeypatch, 1)
    tokens(tmp_path / "store")
    hashed: list[str] = []
    whole = token_files.sha256
    monkeypatch.setattr(token_files, "sha256", lambda file: hashed.append(file.name) or whole(file))
    assert opened(tmp_path / "store") is not None and hashed == []
    os.utime(tmp_path / "store" / "00003.arrow")  # as a copy has it
    assert opened(tmp_path / "store") is not None and hashed == ["00003.arrow"]


def test_the_first_row_that_can_t_be_tokenized_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 4)

    def refuses(columns: Columns, numbers: list[int]) -> Columns:
        for number in numbers:
            if number in (21, 44):
                raise InputError(f"data row {number}: no text")
        return encode(columns, numbers)

    with pytest.raises(InputError, match="data row 21: no text"):
        tokens(tmp_path, refuses)
    assert not (tmp_path / "tokens.json").exists()


def test_no_row_has_something_to_train(tmp_path: Path) -> None:
    def useless(columns: Columns, numbers: list[int]) -> Columns:
        return {**encode(columns, numbers), "useful": [False] * len(numbers)}

    said = r"data\.max_length: no row has a token to train within 11 tokens; the rows have 1 to 11, half of them up to 6, so that none"
    with pytest.raises(InputError, match=said):
        made(tmp_path, lambda: (text(), useless), identity={}, max_length=11, too_long="drop")


def test_where_no_row_is_short_enough_their_lengths_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def long(columns: Columns, numbers: list[int]) -> Columns:
        return {**encode(columns, numbers), "whole": [number + 20 for number in numbers]}

    said = r"no row has a token to train within 9 tokens; the rows have 20 to 69, half of them up to 45; write 45, enough for half"
    with pytest.raises(InputError, match=said):
        tokens(tmp_path / "store", long)
    monkeypatch.setattr(token_files, "LOOKED_AT", 11)
    with pytest.raises(InputError, match="; the first 11 rows have 20 to 30, half of them up to 25; write 25, "):
        mapped_rows(text(), long, **CUT)


@pytest.mark.parametrize("name", ["lengths.npy", "pairs-1.npy"])
def test_a_flipped_byte_of_an_array_is_noticed(tmp_path: Path, name: str) -> None:
    tokens(tmp_path)
    pairs = [np.arange(5), np.arange(7)]
    arrays.saved(tmp_path, "pairs", lambda: pairs, count=2)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(bytes(content))
    assert tokens(tmp_path) == expected()
    again = arrays.saved(tmp_path, "pairs", lambda: pairs, count=2)
    assert [numbers.tolist() for numbers in again] == [list(range(5)), list(range(7))]
    lengths = [row["length"] for row in expected()]
    files: Any = token_files.recorded(tmp_path)
    assert files.lengths().tolist() == lengths
    assert arrays.saved(tmp_path, "pairs", lambda: pytest.fail("made again"), count=2)[1].tolist() == [*range(7)]


def _make(folder: Path, seen: Path) -> None:
    token_files.SHARD_ROWS = 8
    slow = watched(seen)

    def encode(columns: Columns, numbers: list[int]) -> Columns:
        time.sleep(0.05)
        return slow(columns, numbers)

    assert tokens(folder, encode) == expected()


def test_processes_that_want_the_same_tokens_wait_for_the_one_that_makes_them(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=_make, args=(tmp_path / "store", tmp_path / "seen"))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    lines = (tmp_path / "seen").read_text().split()
    assert sorted(map(int, lines)) == sorted([*range(ROWS), *range(0, ROWS, 8)]), (
        "each once, and a look at each shard's first"
    )


@pytest.mark.parametrize("count", [1, 2])
def test_asked_to_stop_it_finishes_the_shards_under_way_and_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    cores(monkeypatch, count)
    how: dict[str, Any] = {"identity": {"of": "a test"}, **CUT}
    assert made(tmp_path / "store", lambda: (text(), watched(tmp_path / "seen")), **how, asked=lambda: True) is None
    first = {int(line) for line in (tmp_path / "seen").read_text().splitlines()}
    assert first == set(range(8 * count)), "one shard of each process, and none that had to wait for one"
    (tmp_path / "seen").unlink()
    assert tokens(tmp_path / "store", watched(tmp_path / "seen")) == expected()
    assert not first & {int(line) for line in (tmp_path / "seen").read_text().splitlines()}


def test_a_signal_ends_the_wait_for_another_process(tmp_path: Path) -> None:
    how: dict[str, Any] = {"identity": {}, **CUT}
    held = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert held.stdout is not None and held.stdout.readline()
    asked = iter([False, False, True])
    try:
        assert made(tmp_path, lambda: pytest.fail("read"), **how, asked=lambda: next(asked)) is None
    finally:
        held.kill()
        held.wait()
    files: Any = made(tmp_path, lambda: (text(), encode), **how)
    assert list(files.rows()) == expected()


HOLD = """
import sys, time
from pathlib import Path
from llmkd.processes import only_one_in
with only_one_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_rows_are_cut_where_the_recipe_says_so(tmp_path: Path) -> None:
    files: Any = made(tmp_path, lambda: (text(), encode), identity={}, max_length=9, too_long="truncate")
    assert files.total.rows == 42 and files.total.long == 8
