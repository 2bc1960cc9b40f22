"""Rollouts as a source of batches: before each round the student's weights are handed to the writers, and what they write fills the steps.

The training loop knows nothing of it. A round is asked for when its first step is, which is after the last step of the round before.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from llmkd.data.batches import Batch, TokenRow, ahead, collate, left_out
from llmkd.data.tokenized import Tokens
from llmkd.distributed.ranks import World, on_main
from llmkd.errors import InputError
from llmkd.recipe.inputs import fingerprint
from llmkd.rollouts.prompts import fixed_prompts, in_words, prompt_of
from llmkd.rollouts.texts import (
    KnownTokens,
    Text,
    answered,
    forget_rounds_after,
    measures,
    note_round,
    read_round,
    round_file,
    write_round,
)
from llmkd.rollouts.wanted import Schedule, Wanted
from llmkd.rollouts.weights import Handing
from llmkd.rollouts.writer import Writer, Writing, written_together

log = logging.getLogger("llmkd")


@dataclass(frozen=True)
class Micro:
    """How a step's rows become this rank's micro-batches."""

    batch_size: int
    accumulation: int
    seed: int
    """Of the order of the data's rows."""
    pad_id: int
    apart: int | None = None
    """How many rows a micro-batch has, where none has both texts that were written and others."""


@dataclass
class Spent:
    """Seconds of this start of a run."""

    weights: float = 0.0
    """Handing the weights over."""
    writing: float = 0.0
    """Weights included."""
    rounds: int = 0
    texts: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter, repr=False)
    """By the clock, when there was nothing spent yet."""

    def told(self, seconds: float) -> dict[str, float]:
        """As summary.json has it. `seconds`: what this start of the run took, of which `share` is the part that writing took."""
        spent = {name: value for name, value in vars(self).items() if name != "began"}
        return {**spent, "share": self.writing / seconds if seconds else 0.0}


@dataclass(frozen=True)
class Rollouts:
    """The batches of a run whose texts are written as it goes."""

    world: World
    folder: Path
    """The run's."""
    tokens: Tokens
    """The data's rows."""
    schedule: Schedule
    micro: Micro
    writing: Writing
    weights: Handing
    """The student's, as the writers read them."""
    new_writer: Callable[[], Writer]
    """Makes this rank's writer, which reads them."""
    drops_truncated: bool
    tokenizer: Any
    """The student's, to show what it writes."""
    known: KnownTokens
    """Those of the teacher: a text is cut before another."""
    run: str
    """A hash of all that decides the run."""
    spent: Spent = field(default_factory=Spent)
    present: dict[str, float] = field(default_factory=dict)
    """What the texts of the present round are like: `measures`."""

    def rows(self, *, start_step: int, steps: int) -> Iterator[list[Batch]]:
        """For each step from `start_step` on, this rank's micro-batches (all ranks take part wherever a round begins)."""
        # of a run without a checkpoint even the first: another student may have written it
        on_main(self.world, lambda: forget_rounds_after(self.folder, start_step or -1))
        writer = self.new_writer()
        # one thread for the whole run: a process that it starts ends with it
        with ThreadPoolExecutor(1) as thread, contextlib.closing(writer):
            step = start_step
            while step < steps:
                steps_of_round = self.schedule.round_of(step)
                texts = self._round(writer, thread, steps_of_round, resumed_at=step)
                self.present.update(measures(texts))
                last = min(steps_of_round.stop, steps)
                yield from ahead(functools.partial(self._batches, texts), step, last)
                step = last

    # --- a round

    def _round(self, writer: Writer, thread: Executor, steps: range, resumed_at: int) -> list[Text]:
        """The round's texts, read or written. Raises InputError where a run that is resumed within a round has lost its file."""
        file = round_file(self.folder, steps.start)
        decides = fingerprint(self._decides(steps.start))
        texts = on_main(self.world, lambda: _as_values(read_round(file, decides)))
        if texts is not None:
            return _as_texts(texts)
        if resumed_at > steps.start:
            raise InputError(
                f"{file}: it is gone, and the student that wrote it has been trained on since; put it back, or remove the checkpoints "
                f"after step {steps.start}"
            )
        return self._written(writer, thread, steps, file, decides)

    def _decides(self, first: int) -> dict[str, Any]:
        """What decides the texts of the round that begins with this step; run and step stand for the student's weights."""
        writing = {**self.writing.decides(), "mixed_with": None}
        return {
            "run": self.run,
            "first": first,
            "writing": writing,
            "schedule": {**vars(self.schedule), "steps": None},
            "batch": [self.micro.batch_size, self.micro.seed],
            "data": list(self.tokens.digests),
        }

    def _written(self, writer: Writer, thread: Executor, steps: range, file: Path, decides: str) -> list[Text]:
        began = time.perf_counter()
        wanted = [self._wanted(step) for step in steps]
        asked = [
            (one.step, *of_text) for one in wanted for of_text in zip(one.places, one.rows, one.seeds, strict=True)
        ]
        shown = fixed_prompts(self.tokens, self.writing.max_length) if self.schedule.shows(steps.start) else []
        prompts = [*(prompt_of(self.tokens.row(int(row))) for _, _, row, _ in asked), *shown]
        seeds = [*(int(seed) for *_, seed in asked), *self.schedule.shown_seeds(len(shown))]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the writer is on the same device
        with self.weights.handed_over(self.world) as folder:
            handed = time.perf_counter() - began
            ids = written_together(self.world, thread, writer, self.writing, folder, prompts, seeds)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        texts = [
            self._text(int(step), int(place), int(row), prompts[number], ids[number])
            for number, (step, place, row, _) in enumerate(asked)
        ]
        samples = [
            self._text(steps.start, place, -1, prompt, ids[len(asked) + place]) for place, prompt in enumerate(shown)
        ]
        values = {**measures(texts), "weights_seconds": handed, "seconds": time.perf_counter() - began}

        def publish() -> None:
            words = [in_words(text, self.tokenizer) for text in samples]
            # first the line: where a round's file is, its line is too
            note_round(self.folder, steps.start, {**values, "samples": words})
            write_round(file, texts, decides)

        on_main(self.world, publish)
        self._note(steps.start, values)
        if texts and not any(map(self._is_used, texts)) and self.world.is_main:
            log.warning(
                "rollouts: none of the %d texts is trained on: each is empty or, with rollouts.truncated: drop, cut off at "
                "rollouts.max_new_tokens (%d); write a larger number, or truncated: train",
                len(texts),
                self.writing.max_new_tokens,
            )
        return texts

    def _wanted(self, step: int) -> Wanted:
        return self.schedule.wanted(step, self._rows(step))

    def _rows(self, step: int) -> np.ndarray:
        """The data's rows of a step's batch."""
        window, place = divmod(step, self.tokens.window_steps(self.micro.batch_size))
        return self._window(window)[place]

    @functools.cached_property
    def _window(self) -> Callable[[int], np.ndarray]:
        """The rows of a window's steps; those of the last two asked for are kept."""
        how = {"batch_size": self.micro.batch_size, "seed": self.micro.seed}
        return functools.lru_cache(maxsize=2)(functools.partial(self.tokens.window, **how))

    def _text(self, step: int, place: int, row: int, prompt: np.ndarray, ids: Sequence[int]) -> Text:
        text, ended = self.known.cut(ids, self.writing.stops)
        return Text(step, place, row, prompt.astype(np.int32), text, ended)

    def _note(self, first: int, values: Mapping[str, float]) -> None:
        self.spent.weights += values["weights_seconds"]
        self.spent.writing += values["seconds"]
        self.spent.rounds += 1
        self.spent.texts += int(values["texts"])
        self.spent.tokens += int(values["tokens"])
        if not self.world.is_main:
            return
        log.info(
            "rollouts for step %d: %d texts of %.0f tokens, %.0f%% ended, %d empty, repetition %.2f, %.1f s (weights %.1f s); "
            "writing is %.0f%% of the run's time so far",
            first + 1, values["texts"], values["length"], 100 * values["ended"], values["empty"], values["repetition"],
            values["seconds"], values["weights_seconds"], 100 * self.spent.writing / (time.perf_counter() - self.spent.began),
        )  # fmt: skip

    # --- a step

    def _batches(self, texts: Sequence[Text], step: int) -> list[Batch]:
        """This rank's micro-batches of a step: the data's rows with the texts in their places, the longest first."""
        others: list[_Row] = []
        own: list[_Row] = []
        unused: list[_Row] = []
        numbers = self._rows(step)
        written = {text.place: text for text in texts if text.step == step}
        lengths = self.tokens.lengths_of(numbers)
        for place, (number, length) in enumerate(zip(numbers.tolist(), lengths.tolist(), strict=True)):
            text = written.get(place)
            if text is None:
                others.append(_Row(place, length, number, None))
            else:
                row = _Row(place, len(text.prompt) + len(text.text), text.row, written_row(text))
                (own if self._is_used(text) else unused).append(row)
        count = self.micro.accumulation * self.world.size
        if self.micro.apart is None:
            parts = _parts([*others, *own], unused, count)
        else:
            of_own = len(written) // self.micro.apart  # the recipe's checks see to it that they fill them
            parts = [*_parts(others, [], count - of_own), *_parts(own, unused, of_own)]
        return [self._batch(part) for part in parts[self.world.rank :: self.world.size]]

    def _is_used(self, text: Text) -> bool:
        """Whether a text is trained on."""
        return not text.is_empty and (text.ended or not self.drops_truncated)

    def _batch(self, part: Sequence[_Row]) -> Batch:
        given = [self.tokens.row(row.number) if row.tokens is None else row.tokens for row in part]
        batch = collate(given, pad_id=self.micro.pad_id, packed=False, numbers=[row.number for row in part])
        batch = left_out(batch, [place for place, row in enumerate(part) if row.fills])
        if self.micro.apart is not None:
            batch = replace(batch, own=part[0].tokens is not None)
        return batch.pinned() if torch.cuda.is_available() else batch


class _Row(NamedTuple):
    """A row of a step."""

    place: int
    length: int
    number: int
    """In the data: of the row, or of that whose prompt was continued."""
    tokens: TokenRow | None
    """What was written; None: the data's row."""
    fills: bool = False
    """Whether it only fills a micro-batch that would have no row: nothing of it counts."""


def _parts(rows: Sequence[_Row], unused: Sequence[_Row], count: int) -> list[list[_Row]]:
    """So many micro-batches of rows of similar length, as even as can be: a text that is not trained on makes one shorter.

    A micro-batch needs a row: where there are too few, some are of `unused`, and nothing of these counts.
    """
    fill = [row._replace(fills=True) for row in unused]
    order = sorted([*rows, *fill[: max(0, count - len(rows))]], key=lambda row: (-row.length, row.place))
    places = np.array_split(np.arange(len(order)), count) if count else []
    return [[order[place] for place in part] for part in places]


def written_row(text: Text) -> TokenRow:
    """A text as a row like any other, of which what was written is trained."""
    return {**answered(text.prompt, text.text), "row": text.row}


def _as_values(texts: list[Text] | None) -> list[tuple[Any, ...]] | None:
    """As lists of numbers, which travel from rank to rank."""
    if texts is None:
        return None
    return [(t.step, t.place, t.row, t.prompt.tolist(), t.text.tolist(), t.ended) for t in texts]


def _as_texts(values: list[tuple[Any, ...]]) -> list[Text]:
    return [
        Text(step, place, row, np.array(prompt, dtype=np.int32), np.array(text, dtype=np.int32), ended)
        for step, place, row, prompt, text, ended in values
    ]
