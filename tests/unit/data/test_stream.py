"""Streams: every row once in a pass, in an order of the seed, from any place on as if it had never been left."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from llmkd.data import streams
from llmkd.data.batches import Batch, TokenRow, collate, collate_sequences
from llmkd.data.rows import first_streamed_rows, stream_contents, streamed_rows
from llmkd.data.streams import Place, Share, Stream
from llmkd.data.token_files import Columns, Encode
from llmkd.errors import InputError

SHARE = Share(
    rank=0, world_size=1, accumulation=2, micro_batch_size=2, seed=3, shuffle_rows=10, max_length=9, too_long="drop"
)


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "AT_ONCE", 3)


def write(folder: Path, kind: str, files: int, rows: int) -> Path:
    """So many files of so many rows each, numbered through, as JSONL, gzipped JSONL, Parquet or CSV."""
    folder.mkdir(parents=True)
    for number in range(files):
        of_file = [{"text": str(number * rows + place)} for place in range(rows)]
        lines = "".join(json.dumps(row) + "\n" for row in of_file)
        if kind == "parquet":
            Dataset.from_list(of_file).to_parquet(folder / f"{number}.parquet")
        elif kind == "csv":
            Dataset.from_list(of_file).to_csv(folder / f"{number}.csv")
        elif kind == "jsonl.gz":
            with gzip.open(folder / f"{number}.jsonl.gz", "wt") as file:
                file.write(lines)
        else:
            (folder / f"{number}.jsonl").write_text(lines)
    return folder


def encoder(columns: Sequence[str]) -> Encode:
    """A row's text n becomes 2 to 8 tokens n + 1; one row in ten is longer than 9, one in ten has nothing to train."""
    assert list(columns) == ["text"]

    def encode(rows: Columns, numbers: list[int]) -> Columns:
        values = [int(text) for text in rows["text"]]
        lengths = [12 if value % 10 == 9 else 2 + value % 7 for value in values]
        return {
            "input_ids": [[value + 1] * length for value, length in zip(values, lengths, strict=True)],
            "trained": [[True] * length for length in lengths],
            "length": lengths,
            "whole": lengths,
            "useful": [value % 10 != 4 for value in values],
            "row": numbers,
        }

    return encode


def make(units: list[list[TokenRow]]) -> Batch:
    if all(len(unit) == 1 for unit in units):
        return collate([row for [row] in units], pad_id=0, packed=False, numbers=[row["row"] for [row] in units])
    return collate_sequences(units, width=9, pad_id=0)


def stream(folder: Path, share: Share = SHARE, saved: tuple[int, Place] | None = None, **more: Any) -> Stream:
    source = streamed_rows(str(folder), name=None, split="train", columns={})
    return Stream(source, more.get("encoder", encoder), more.get("make", make), share, saved=saved)


def values_of(steps: Iterator[list[Batch]] | list[list[Batch]]) -> list[list[list[int]]]:
    """By step and micro-batch, the texts that the rows had."""
    return [[(batch.input_ids[:, 0] - 1).tolist() for batch in batches] for batches in steps]


KEPT = {value for value in range(60) if value % 10 not in (4, 9)}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "csv"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_every_row_of_a_pass(tmp_path: Path, kind: str, ranks: int) -> None:
    """Two files: by file on two ranks, every third row on three. After 60 rows a rank's share has come more than once."""
    folder, seen = write(tmp_path / "rows", kind, files=2, rows=30), []
    for rank in range(ranks):
        share = Share(**{**vars(SHARE), "rank": rank, "world_size": ranks})
        own = sum(values_of(stream(folder, share).rows(start_step=0, steps=24)), [])
        assert all(len(values) == 2 for values in own)
        counts = Counter(value for values in own for value in values)
        assert max(counts.values()) - min(counts.values()) <= 1 + 1  # a pass behind, and rows that wait for a window
        seen.append(set(counts))
    assert set.union(*seen) == KEPT and sum(map(len, seen)) == len(KEPT)


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "csv"])
@pytest.mark.parametrize("packed", [False, True])
def test_it_goes_on_from_every_place(tmp_path: Path, kind: str, packed: bool) -> None:
    """As JSON, as a checkpoint keeps it; through windows, passes and rows that filled no step."""
    folder = write(tmp_path / "rows", kind, files=3, rows=7)
    share = Share(**{**vars(SHARE), "packed": packed})
    whole = stream(folder, share)
    steps, places = [], []
    for batches in whole.followed(whole.rows(start_step=0, steps=14)):
        steps.append(batches)
        places.append(json.loads(json.dumps(whole.place.as_json())))
    assert any(place["left"] for place in places) and places[-1]["passes"] > 1 and places[-1]["window"] > 2
    for done, place in enumerate(places, start=1):
        resumed = stream(folder, share, (done, Place.of(place)))
        ours = list(resumed.rows(start_step=done, steps=14))
        assert len(ours) == 14 - done
        for own, theirs in zip(ours, steps[done:], strict=True):
            for one, other in zip(own, theirs, strict=True):
                assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.targets, other.targets)
                assert torch.equal(one.position_ids, other.position_ids) and one.rows == other.rows


def test_the_place_is_that_of_the_trained_step_not_of_the_prepared_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", "jsonl", files=1, rows=20)
    prepared = stream(folder)
    rows = prepared.rows(start_step=0, steps=9)
    waiting = [next(rows), next(rows)]  # as a teacher's announcements hold them back
    assert prepared.place == Place()
    trained = prepared.followed([*waiting, *rows])
    next(trained)
    assert prepared.place.used == 1 and prepared.place.window == 0


def test_the_first_batches_may_be_read_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", "jsonl", files=1, rows=40)
    twice = stream(folder)
    first = values_of(twice.rows(start_step=0, steps=3))
    run = twice.rows(start_step=0, steps=8)
    assert values_of(twice.followed(run))[:3] == first
    resumed = stream(folder, saved=(8, twice.place))
    assert values_of(resumed.rows(start_step=0, steps=3)) == first
    assert values_of(resumed.rows(start_step=8, steps=9)) == values_of(stream(folder).rows(start_step=0, steps=9))[8:]


def test_the_order_is_the_seeds(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", "jsonl", files=1, rows=40)
    orders = [
        values_of(stream(folder, Share(**{**vars(SHARE), "seed": seed})).rows(start_step=0, steps=8))
        for seed in (3, 3, 4)
    ]
    assert orders[0] == orders[1] != orders[2]
    in_file = [value for step in orders[0] for micro in step for value in micro]
    assert in_file != sorted(in_file)


def test_rows_of_a_step_are_of_similar_length(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", "jsonl", files=1, rows=200)
    share = Share(**{**vars(SHARE), "shuffle_rows": 100})
    spreads = []
    for batches in stream(folder, share).rows(start_step=0, steps=20):
        lengths = np.concatenate([batch.attended.sum(1) for batch in batches])
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
        spreads.append(lengths[0] - lengths[-1])
    assert max(spreads) <= 1


def test_packed_sequences_are_full_and_hold_each_row_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", "jsonl", files=1, rows=60)
    share = Share(**{**vars(SHARE), "packed": True, "shuffle_rows": 30})
    batches = sum(stream(folder, share).rows(start_step=0, steps=5), [])
    assert all(batch.input_ids.shape == (2, 9) for batch in batches)
    full = sum(int(batch.attended.sum()) for batch in batches) / (len(batches) * 18)
    assert full > 0.95
    rows = [
        (int(value), int(count))
        for batch in batches
        for value, count in zip(*np.unique(batch.input_ids, return_counts=True), strict=True)
    ]
    assert all(count == 2 + (value - 1) % 7 for value, count in rows if value)
    assert len({value for value, _ in rows if value}) == sum(value > 0 for value, _ in rows)


def test_tokenizing_goes_on_while_a_step_is_trained(tmp_path: Path) -> None:
    """The next window is read as soon as its predecessor is there, and only that one."""
    folder = write(tmp_path / "rows", "jsonl", files=1, rows=100)
    read: list[int] = []

    def noting(columns: Sequence[str]) -> Encode:
        encode = encoder(columns)

        def noted(rows: Columns, numbers: list[int]) -> Columns:
            read.extend(numbers)
            return encode(rows, numbers)

        return noted

    rows = stream(folder, encoder=noting).rows(start_step=0, steps=100)
    next(rows)
    deadline = time.monotonic() + 20
    while len(read) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert read == list(range(20))
    rows.close()


def test_a_stopped_reader_reads_no_further(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", "jsonl", files=1, rows=20)
    share = Share(**{**vars(SHARE), "shuffle_rows": 10**9})
    stopped, reads = threading.Event(), []

    def slow(columns: Sequence[str]) -> Encode:
        reads.append(1)
        if len(reads) == 2:
            stopped.set()
        return encoder(columns)

    endless = stream(folder, share, encoder=slow)
    assert list(endless._windows(Place(), stopped)) == [] and len(reads) == 2  # pyright: ignore[reportPrivateUsage]


def test_no_thread_is_left(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", "jsonl", files=1, rows=40)
    before = threading.active_count()
    rows = stream(folder).rows(start_step=0, steps=100)
    next(rows)
    assert threading.active_count() > before
    rows.close()
    assert threading.active_count() == before
    list(stream(folder).rows(start_step=0, steps=4))
    assert threading.active_count() == before


def test_what_is_wrong_with_the_rows_is_said(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match="the stream has no rows for this rank"):
        next(stream(empty).rows(start_step=0, steps=1))
    with pytest.raises(InputError, match="has no rows; give data with some"):
        first_streamed_rows(str(empty), name=None, split="train", columns={}, count=3)
    useless = tmp_path / "useless.jsonl"
    useless.write_text('{"text": "9"}\n{"text": "4"}\n')
    with pytest.raises(
        InputError, match="data.max_length: of 10 rows of the stream, none has a token to train within 9"
    ):
        next(stream(useless).rows(start_step=0, steps=1))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "1"}\nno JSON\n')
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        next(stream(broken).rows(start_step=0, steps=1))
    cut = write(tmp_path / "cut", "parquet", files=1, rows=20) / "0.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"data.source: .*can't be read"):
        next(stream(cut).rows(start_step=0, steps=1))
    with pytest.raises(InputError, match="no file or folder './none.jsonl'"):
        streamed_rows("./none.jsonl", name=None, split="train", columns={})


def test_first_rows_and_columns(tmp_path: Path) -> None:
    """JSON's values stay as they are, and columns are renamed."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "a", "day": "2024-01-01", "more": [1, "x"]}\n{"q": "b", "day": 7}\n')
    rows = first_streamed_rows(str(file), name=None, split="train", columns={"q": "text"}, count=5)
    assert rows[:] == {"text": ["a", "b"], "day": ["2024-01-01", 7], "more": [[1, "x"], None]}
    parquet = write(tmp_path / "parquet", "parquet", files=1, rows=3)
    rows = first_streamed_rows(str(parquet), name=None, split="train", columns={"text": "prompt"}, count=2)
    assert rows[:] == {"prompt": ["0", "1"]}
    with pytest.raises(InputError, match="has no column 'x'"):
        first_streamed_rows(str(file), name=None, split="train", columns={"x": "text"}, count=1)
    source = streamed_rows(str(parquet), name=None, split="train", columns={})
    seen: list[str] = []

    def noting(columns: Sequence[str]) -> Encode:
        seen.extend(columns)
        return encoder(["text"])

    renamed = Stream(source, noting, make, SHARE, names={"text": "prompt"})
    with pytest.raises(KeyError):  # the encoder looks for "text"
        next(renamed.rows(start_step=0, steps=1))
    assert seen == ["prompt"]


def test_a_streams_files_are_told_apart_without_reading_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", "jsonl", files=2, rows=5)
    before = stream_contents(str(folder), "train")
    assert before == stream_contents(str(folder), "train") and stream_contents("some/name", "train") is None
    (folder / "1.jsonl").write_text((folder / "1.jsonl").read_text().replace("5", "6"))
    assert stream_contents(str(folder), "train") != before
