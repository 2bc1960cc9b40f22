"""The rows of a study's runs, looked at before its first model is trained: each section `data` once, whichever runs read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from llmkd.data import other_families
from llmkd.data.batches import Family
from llmkd.data.formats import GUESSED, format_of
from llmkd.data.token_files import Encode, Written, check_some, kept_rows
from llmkd.data.tokenized import Tokens
from llmkd.errors import InputError
from llmkd.models.folders import resolve
from llmkd.models.load import load_tokenizer
from llmkd.planning.data import packed
from llmkd.planning.run_checks import check_length, check_prompted, tokenizer_folder
from llmkd.recipe.data import Data, Rows
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.rollouts import TEXTS
from llmkd.training.build import accumulation_steps, total_steps
from llmkd.training.jobs import read_rows
from llmkd.training.tokens import first_rows, together
from llmkd.training.validation_rows import (
    check_apart,
    check_row_for_each,
    divided,
    held_out_count,
    named_validation,
    trained_count,
)

LOOKED_AT = 2000
"""Of a larger source so many rows are made into tokens, and nothing is said of what all of its tokens would be."""


@dataclass(frozen=True)
class _Look:
    """What is known of the rows of a section before a run has made tokens of them."""

    counts: tuple[int, ...]
    """By source, the rows of text; of a stream those that were looked at."""
    texts: bool
    """Whether some source has texts, that is rows without a prompt."""
    tokens: Tokens | None
    """Of all rows or the first ones; None where there is no tokenizer yet, and where none of the first rows is kept."""
    is_whole: bool
    """Whether the tokens are those of all rows."""


class StudyRows:
    """Checks the rows of a study's runs. `family`: of the models."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._looks: dict[tuple[str, Path | None], _Look] = {}

    def check_student(self, recipe: Recipe, ranks: int) -> None:
        """Raise InputError where the training of a student would refuse its rows."""
        own = recipe.student.path if recipe.student.init == "checkpoint" else None
        self._check(recipe, tokenizer_folder(recipe) if own is None else resolve(own, "student.path"), ranks)

    def check_teacher(self, recipe: Recipe, ranks: int) -> None:
        """Raise InputError where the fine-tuning of the teacher would refuse its rows."""
        tuned = recipe.finetune
        assert tuned is not None
        own = {"train": tuned.train, "data": tuned.data or recipe.data, "rollouts": None}
        self._check(recipe.model_copy(update=own), tokenizer_folder(recipe), ranks)

    def _check(self, recipe: Recipe, tokenizer: Path | None, ranks: int) -> None:
        data, train = recipe.data, recipe.train
        accumulation_steps(train, ranks)
        trust = recipe.teacher.trust_remote_code
        rows = self._look(data, tokenizer, trust)
        if not data.streaming:
            total_steps(train, sum(trained_count(data, count) for count in rows.counts))
        if rows.texts and recipe.rollouts is not None and recipe.rollouts.writes:
            raise InputError(TEXTS)
        if rows.tokens is not None:
            check_prompted(recipe, rows.tokens)
        if rows.tokens is not None and rows.is_whole:
            tokens = divided(data, rows.tokens)
            weighed = any(data.weights)
            check_length(recipe, packed(tokens, data.max_length, weighed) if data.batching == "packed" else tokens)
        self._check_validation(recipe, rows, tokenizer, ranks)

    def _check_validation(self, recipe: Recipe, rows: _Look, tokenizer: Path | None, ranks: int) -> None:
        data, given = recipe.data, recipe.data.validation
        if given is None:
            return
        check_apart(data)
        if data.held_out is None:
            assert given.share is not None
            count = sum(held_out_count(of_source, given.share) for of_source in rows.counts)
        else:
            with named_validation():
                apart = self._look(data.held_out, tokenizer, recipe.teacher.trust_remote_code)
            count = sum(apart.counts) if apart.tokens is None or not apart.is_whole else len(apart.tokens.rows)
        if recipe.train.validate_every:
            check_row_for_each(min(count, given.rows), ranks)

    def _look(self, data: Data, tokenizer: Path | None, trust: bool) -> _Look:
        key = data.model_dump_json(), tokenizer
        if key not in self._looks:
            loaded = None if tokenizer is None else load_tokenizer(tokenizer, trust_remote_code=trust)
            self._looks[key] = _look(data, self._family, loaded)
        return self._looks[key]


def _look(data: Data, family: Family, tokenizer: Any) -> _Look:
    """Raises InputError for rows that can't be read, or are not what the section says, and where no row is left of all."""
    texts = [first_rows(part) if data.streaming else read_rows(part) for part in data.parts]
    formats = [_format(family, part, rows) for part, rows in zip(data.parts, texts, strict=True)]
    made: list[Dataset] = []
    is_whole = not data.streaming and all(len(rows) <= LOOKED_AT for rows in texts)
    for part, rows in zip(data.parts, texts, strict=True) if tokenizer is not None else ():
        cut = {"max_length": data.max_length, "too_long": data.too_long}
        encode = other_families.encoder_for(family, rows.column_names, tokenizer, row_format=part.row_format, **cut)
        made.append(_first_tokens(rows, encode, data))
    counts = tuple(len(rows) for rows in texts)
    known = None
    if tokenizer is not None and all(len(rows) for rows in made):
        known = together(data, made, [np.array(rows["length"], dtype=np.int32) for rows in made])
    return _Look(counts, "text" in formats, known, is_whole)


def _format(family: Family, part: Rows, rows: Dataset) -> str:
    """What a source's rows hold; an encoder's are always read alike."""
    if family.kind == "encoder":
        return "classification"
    among = GUESSED if family.kind == "decoder" else other_families.FORMATS[family.kind][1:]
    return format_of(rows.column_names, part.format, among)


def _first_tokens(rows: Dataset, encode: Encode, data: Data) -> Dataset:
    """The first rows as tokens. Raises InputError where all rows are looked at, and none is left."""
    first = rows[:LOOKED_AT]
    count = min(len(rows), LOOKED_AT)
    dropped = {"long": 0, "useless": 0}
    kept = kept_rows(encode(first, list(range(count))), data.max_length, data.too_long, dropped)
    if count == len(rows) and not data.streaming:
        check_some(Written(count, len(kept["length"]), 0, **dropped), data.max_length, rows, encode)
    return Dataset.from_dict(dict(kept))
