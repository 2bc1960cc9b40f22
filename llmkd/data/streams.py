"""Streams: rows of a source too large to tokenize first are read, tokenized and put into order as training goes, and never kept.

Each rank has a share of the source, which begins again when it ends. It is read in windows; a window's rows are shuffled and cut into this
rank's steps. One window is read, and one step prepared, ahead of the training. A place in a stream is a few numbers, datasets' own state
and the rows that filled no step, all JSON: from it the stream goes on at the exact row.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from llmkd.data.batches import Batch, TokenRow
from llmkd.data.order import permuted
from llmkd.data.packing import best_fit
from llmkd.data.rows import renamed_row
from llmkd.data.token_files import Encode, kept_rows
from llmkd.errors import InputError, first_line

log = logging.getLogger("llmkd")

AT_ONCE = 500
"""Rows that are tokenized together; between them a reader notices that it is to stop."""
T = TypeVar("T")
_ROWS, _STEPS = 4, 5
"""What a permutation orders: part of its key."""


@dataclass(frozen=True)
class Place:
    """Where in its stream a rank is: before a window, and after some of its steps."""

    window: int = 0
    passes: int = 0
    """How often the source has ended."""
    read: int = 0
    """Rows of text before the window."""
    state: dict[str, Any] | None = None
    """datasets' own, before the window; None at the beginning."""
    left: tuple[TokenRow, ...] = ()
    """Rows of earlier windows that filled no step."""
    used: int = 0
    """Steps of the window that are done."""

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values; `Place.of` reads them."""
        rows = [{name: np.asarray(value).tolist() for name, value in row.items()} for row in self.left]
        return {**asdict(replace(self, left=())), "left": rows}

    @staticmethod
    def of(values: Mapping[str, Any]) -> Place:
        """From the values of `as_json`."""
        return Place(**{**values, "left": tuple(map(_compact, values["left"]))})


@dataclass(frozen=True)
class Share:
    """What decides a rank's steps of a stream, beside its rows."""

    rank: int
    world_size: int
    accumulation: int
    """Micro-batches of a step."""
    micro_batch_size: int
    seed: int
    shuffle_rows: int
    """Rows of text in a window."""
    max_length: int
    too_long: str
    packed: bool = False
    """Whether micro-batches hold sequences of `max_length` tokens, each of several rows, in place of rows."""

    @property
    def units(self) -> int:
        """Rows, or sequences, of a step."""
        return self.accumulation * self.micro_batch_size


@dataclass(frozen=True)
class _Window:
    place: Place
    steps: list[list[list[TokenRow]]]
    """By step its rows, each alone in a list, or its sequences of rows."""


class Stream:
    """A rank's micro-batches of an endless source.

    `source`: all rows of text; `encoder`: from their columns to what makes tokens of them; `make`: from a micro-batch's rows, each alone in
    a list, or its sequences of rows, to the batch. `names`: other names of columns, as `data.columns`; `saved`: (steps done, place) of a
    run that is resumed.
    """

    def __init__(
        self,
        source: IterableDataset,
        encoder: Callable[[Sequence[str]], Encode],
        make: Callable[[list[list[TokenRow]]], Batch],
        share: Share,
        *,
        names: Mapping[str, str] | None = None,
        saved: tuple[int, Place] | None = None,
    ) -> None:
        self._source = split_dataset_by_node(source, share.rank, share.world_size)
        self._beginning = self._source.state_dict()
        self._encoder, self._make, self._share, self._names = encoder, make, share, names or {}
        self._places = {0: Place()} | ({} if saved is None else dict([saved]))
        self._coming: deque[Place] = deque()
        self.place = self._places[0 if saved is None else saved[0]]
        """After the step that `followed` gave last: what a checkpoint of that step holds."""

    def rows(self, *, start_step: int, steps: int) -> Generator[list[Batch], None, None]:
        """For each step from `start_step` on, which is 0 or the saved one, this rank's micro-batches."""
        self._coming.clear()
        stopped = threading.Event()
        count = steps - start_step
        with contextlib.closing(_ahead(self._steps(self._places[start_step], count, stopped))) as prepared:
            try:
                for batches, after in prepared:
                    self._coming.append(after)
                    yield batches
            finally:
                stopped.set()  # or closing would wait for a whole window

    def followed(self, steps: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """The steps of `rows` as they are trained, which may be later than they were prepared; `place` is then each one's."""
        for batches in steps:
            self.place = self._coming.popleft()
            yield batches

    def _steps(
        self, place: Place, count: int, stopped: threading.Event
    ) -> Generator[tuple[list[Batch], Place], None, None]:
        """So many steps' micro-batches, each with the place after it."""
        if count <= 0:
            return
        size = self._share.micro_batch_size
        with contextlib.closing(_ahead(self._windows(place, stopped))) as windows:
            for window in windows:
                for number in range(window.place.used, len(window.steps)):
                    units = window.steps[number]
                    batches = [self._make(units[first : first + size]) for first in range(0, len(units), size)]
                    if torch.cuda.is_available():
                        batches = [batch.pinned() for batch in batches]
                    yield batches, replace(window.place, used=number + 1)
                    if (count := count - 1) == 0:
                        stopped.set()
                        return

    def _windows(self, place: Place, stopped: threading.Event) -> Generator[_Window, None, None]:
        reader = _Reader(self._source, self._beginning, place)
        used, left = place.used, place.left
        for window in itertools.count(place.window):
            begins = Place(window, reader.passes, reader.read, reader.state, left, used)
            rows = self._tokens(reader, stopped)
            if rows is None:
                return
            steps, left = window_steps([*left, *rows], window, self._share)
            yield _Window(begins, steps)
            used = 0

    def _tokens(self, reader: _Reader, stopped: threading.Event) -> list[TokenRow] | None:
        """The next window's rows that are trained on; None where the reader is to stop."""
        share, first = self._share, reader.read
        dropped = {"long": 0, "useless": 0}
        rows: list[TokenRow] = []
        while (left := first + share.shuffle_rows - reader.read) > 0:
            if stopped.is_set():
                return None
            number = reader.read
            texts = [renamed_row(row, self._names) for row in reader.next(min(left, AT_ONCE))]
            columns = {
                name: [row.get(name) for row in texts] for name in dict.fromkeys(n for row in texts for n in row)
            }
            try:
                encoded = self._encoder(list(columns))(columns, list(range(number, number + len(texts))))
            except InputError as error:
                where = f" (counted in the share of rank {share.rank} of {share.world_size})"
                raise InputError(f"{error}{where if share.world_size > 1 else ''}") from error
            tokens = kept_rows(encoded, share.max_length, share.too_long, dropped)
            rows += [_compact(dict(zip(tokens, values, strict=True))) for values in zip(*tokens.values(), strict=True)]
        if not rows:
            raise InputError(
                f"data.max_length: of {share.shuffle_rows} rows of the stream, none has a token to train within {share.max_length} tokens; "
                "write a larger max_length, or a larger shuffle_rows, or look at the data"
            )
        if first == 0 and len(rows) < share.shuffle_rows:
            log.info(
                "data: %d of the stream's first %d rows are used; %d longer than %d tokens (%s), %d with nothing to train (dropped)",
                len(rows), share.shuffle_rows, dropped["long"], share.max_length,
                "truncated" if share.too_long == "truncate" else "dropped", dropped["useless"],
            )  # fmt: skip
        return rows


class _Reader:
    """Reads a source from a place on; where it ends, again from its beginning."""

    def __init__(self, source: IterableDataset, beginning: dict[str, Any], place: Place) -> None:
        self._source, self._beginning = source, beginning
        self.passes, self.read = place.passes, place.read
        self._begin(beginning if place.state is None else place.state)

    def _begin(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)
        self._rows = iter(self._source)
        self.state = state

    def next(self, count: int) -> list[dict[str, Any]]:
        """The next `count` rows. Raises InputError where they can't be read, and for a source without rows."""
        rows: list[dict[str, Any]] = []
        try:
            rows += itertools.islice(self._rows, count)
            while len(rows) < count:
                self._begin(self._beginning)
                self.passes += 1
                before = len(rows)
                rows += itertools.islice(self._rows, count - before)
                if len(rows) == before:
                    raise InputError("data.source: the stream has no rows for this rank; give data with more")
        except InputError:
            raise
        except Exception as error:  # a parser's own, or the network's
            raise InputError(
                f"data.source: the stream can't be read on after {self.read} rows ({first_line(error)}); correct the data or wait for the "
                "network, and the same command resumes from the last checkpoint"
            ) from error
        self.read += count
        self.state = self._source.state_dict()
        return rows


def window_steps(
    rows: Sequence[TokenRow], window: int, share: Share
) -> tuple[list[list[list[TokenRow]]], tuple[TokenRow, ...]]:
    """(a window's rows by step, the rows that fill no step). A pure function of its arguments.

    Rows are shuffled, and those of a step are of similar length, as in `llmkd.data.order`; packed, they are laid into sequences, and the
    emptiest ones wait for the next window. All ranks have their steps in one order, so that the longest meet.
    """
    rows = [rows[place] for place in permuted(np.arange(len(rows)), len(rows), (share.seed, share.rank, _ROWS, window))]
    lengths = np.array([row["length"] for row in rows])
    sequences = best_fit(lengths, share.max_length) if share.packed else [[place] for place in range(len(rows))]
    sizes = np.array([lengths[places].sum() for places in sequences])
    count = len(sequences) // share.units
    if share.packed:  # the fullest are trained on, in no order of their own
        by_size = np.argsort(-sizes, kind="stable")
        chosen, rest = by_size[: count * share.units], by_size[count * share.units :]
        chosen = chosen[permuted(np.arange(len(chosen)), max(1, len(chosen)), (share.seed, share.rank, _STEPS, window))]
    else:
        chosen, rest = np.arange(count * share.units), np.arange(count * share.units, len(sequences))
        chosen = chosen[np.argsort(-sizes[chosen], kind="stable")]
    units = [[rows[place] for place in sequences[number]] for number in chosen]
    steps = [units[step * share.units :][: share.units] for step in range(count)]
    order = permuted(np.arange(count), max(1, count), (share.seed, _STEPS, window))
    return [steps[step] for step in order], tuple(rows[place] for number in rest for place in sequences[number])


def _compact(row: Mapping[str, Any]) -> TokenRow:
    """A row with arrays in place of lists."""
    return {
        name: np.array(value, dtype=bool if name == "trained" else np.int32) if isinstance(value, list) else value
        for name, value in row.items()
    }


def _ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items, each made in a thread while the one before it is used."""
    # A thread, not a process: a process would be ended by the signal that asks this one to save and stop.
    with contextlib.closing(items), ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (ready := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield ready
