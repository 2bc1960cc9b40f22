"""A round's texts: what was written, its file, and what can be said of it in numbers.

    <run>/rollouts/round-00000010.parquet      the texts of the steps from 11 on, one row each
    <run>/rollouts.jsonl                       a line a round: its first step (from 0), the numbers, the texts of the fixed prompts

A round's file is published whole. A run that is resumed reads it, and whoever wants to know what a student wrote can read it later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmkd.errors import InputError, first_line
from llmkd.files import forget_after, sync

NGRAM = 4
"""Tokens of the sequences whose repetition is counted."""
_INTS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("place", pa.int32()),
        ("row", pa.int64()),
        ("prompt", _INTS),
        ("text", _INTS),
        ("ended", pa.bool_()),
    ]
)
_DECIDES = b"llmkd.fingerprint"


@dataclass(frozen=True)
class Text:
    """A prompt and what was written after it."""

    step: int
    """The step (from 0) that trains on it."""
    place: int
    """Where in that step's batch it stands."""
    row: int
    """The number of the row whose prompt it is."""
    prompt: np.ndarray
    """[P] int32 token ids."""
    text: np.ndarray
    """[N] int32, with the token that ended it."""
    ended: bool
    """Whether an end token ended it; otherwise it was cut."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written before the end token."""
        return len(self.text) <= int(self.ended)


@dataclass(frozen=True)
class Wrote:
    """What a teacher wrote for some rows, in numbers."""

    texts: int
    tokens: int
    """Of the texts alone."""
    unended: int
    """Texts that were cut at their most tokens."""
    empty: int
    left_out: int
    """Texts that are not trained on."""
    seconds: float
    """By the clock, all ranks at once."""


@dataclass(frozen=True)
class KnownTokens:
    """The tokens that teacher and student both have."""

    count: int
    """Ids from here on one of them lacks."""
    foreign: frozenset[int] = frozenset()
    """Further ids that one of them lacks."""

    def cut(self, ids: Sequence[int], stops: Sequence[int]) -> tuple[np.ndarray, bool]:
        """(a text [N] int32 before the first token that one of them lacks, whether it ends with one of `stops`)."""
        text = np.array(ids, dtype=np.int32)
        foreign = (text >= self.count) | np.isin(text, sorted(self.foreign))
        if foreign.any():
            text = text[: int(foreign.argmax())]
        return text, bool(len(text)) and int(text[-1]) in stops


def answered(prompt: np.ndarray, text: np.ndarray) -> dict[str, Any]:
    """A prompt and its text as the tokens of a row, of which the text is trained."""
    ids = np.concatenate([prompt, text]).astype(np.int32)
    return {"input_ids": ids, "trained": np.arange(len(ids)) >= len(prompt), "length": len(ids)}


def round_file(folder: Path, first: int) -> Path:
    """Where the round is kept that begins with this step (from 0). `folder`: the run's."""
    return folder / "rollouts" / f"round-{first:08d}.parquet"


def write_round(file: Path, texts: Sequence[Text], fingerprint: str) -> None:
    """Publish a round, completely or not at all. `fingerprint`: a hash of run, round and what decided the texts."""
    columns = {
        "step": [text.step for text in texts],
        "place": [text.place for text in texts],
        "row": [text.row for text in texts],
        "prompt": [text.prompt for text in texts],
        "text": [text.text for text in texts],
        "ended": [text.ended for text in texts],
    }
    table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata({_DECIDES: fingerprint.encode()})
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_suffix(".tmp")
    pq.write_table(table, tmp, compression="zstd", write_page_checksum=True)
    sync(tmp)
    os.replace(tmp, file)


def read_round(file: Path, fingerprint: str) -> list[Text] | None:
    """A round's texts; None where there is no such file. Raises InputError for a damaged one, and for one of other settings."""
    if not file.is_file():
        return None
    cure = "remove it, and checkpoints after the round's first step"
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        columns = {name: table.column(name) for name in _SCHEMA.names}
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{file}: a round of texts that can't be read ({first_line(error)}); {cure}") from error
    if (table.schema.metadata or {}).get(_DECIDES) != fingerprint.encode():
        raise InputError(
            f"{file}: it is another round's or another run's, or was written with other settings of rollouts or other data; {cure}"
        )
    arrays = {name: [np.asarray(ids.values) for ids in columns[name]] for name in ("prompt", "text")}
    plain = [columns[name].to_pylist() for name in ("step", "place", "row", "ended")]
    return [
        Text(step, place, row, prompt, text, ended)
        for step, place, row, ended, prompt, text in zip(*plain, *arrays.values(), strict=True)
    ]


def note_round(folder: Path, first: int, values: Mapping[str, Any]) -> None:
    """Add a round's line to the run's rollouts.jsonl."""
    with (folder / "rollouts.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": first, **values}) + "\n")


def forget_rounds_after(folder: Path, step: int) -> None:
    """Remove the rounds of a run that begin after so many steps: their weights will be made again, and with them the texts.

    So are the lines of rounds that will be written again, that of a round among them of which only the line is there.
    """
    for file in (folder / "rollouts").glob("round-*"):
        number = file.stem.removeprefix("round-")
        if file.suffix == ".tmp" or not number.isdigit() or int(number) > step:
            file.unlink()
    is_there = round_file(folder, step).is_file()
    forget_after(folder / "rollouts.jsonl", step if is_there else step - 1)


def measures(texts: Sequence[Text]) -> Mapping[str, float]:
    """What a round's texts are like: mean tokens, the shares that ended and that are empty, and how much they repeat themselves."""
    count = max(1, len(texts))
    return {
        "texts": len(texts),
        "tokens": sum(len(text.text) for text in texts),
        "length": sum(len(text.text) for text in texts) / count,
        "ended": sum(text.ended for text in texts) / count,
        "empty": sum(text.is_empty for text in texts),
        "repetition": sum(repetition(text.text) for text in texts) / count,
    }


def repetition(ids: np.ndarray) -> float:
    """The share of a text's sequences of `NGRAM` tokens that stand in it before; 0 of a text too short for one.

    1 − distinct n-grams / n-grams, as the repetition of Welleck et al., "Neural text generation with unlikelihood training" (2020).
    """
    count = len(ids) - NGRAM + 1
    if count <= 0:
        return 0.0
    return 1 - len({ids[place : place + NGRAM].tobytes() for place in range(count)}) / count
