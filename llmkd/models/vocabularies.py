"""Whether two tokenizers mean the same by a token id: each token of the smaller vocabulary, and the rows that are read by both models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from llmkd.errors import InputError

TOKEN_COLUMNS = ("input_ids", "source_ids", "target_ids")
"""Of tokenized rows, the columns of token ids."""
ROWS_AT_ONCE = 4096


def check_same_tokens(teacher: Any, student: Any) -> dict[int, str]:
    """The further tokens of the larger vocabulary, by id: rows must hold none of them (`check_rows`).

    Raises InputError unless every token of the smaller vocabulary has the same id in the larger one; the first that differs is named.
    """
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    smaller, larger = sorted((ours, theirs), key=len)
    if different := [(id_, token) for token, id_ in smaller.items() if larger.get(token) != id_]:
        token_id, token = min(different)
        raise InputError(
            f"teacher and student tokenizers differ, first at token {token!r} (id {token_id}): teacher id {ours.get(token)}, student id "
            f"{theirs.get(token)}; their logits can't be compared, use a student with the teacher's tokenizer"
        )
    return {id_: token for token, id_ in larger.items() if token not in smaller}


def check_rows(rows: Dataset, further: Mapping[int, str], source: str) -> None:
    """Raise InputError where tokenized rows hold a token that teacher and student do not share; `source`: the rows', for the sentence."""
    if not further:
        return
    is_further = np.zeros(max(further) + 1, dtype=bool)
    is_further[list(further)] = True
    for column in (name for name in TOKEN_COLUMNS if name in rows.column_names):
        start = 0
        tables: Any = rows.select_columns(column).with_format("arrow").iter(ROWS_AT_ONCE)
        for part in tables:
            ids = part[column].combine_chunks().flatten().to_numpy()
            if is_further[np.minimum(ids, max(further))].any() and np.isin(ids, list(further)).any():
                for number, row in enumerate(part[column], start=start):
                    check_ids(row.values.to_numpy(), further, f"row {number} of {source}")
            start += len(part)


def check_ids(ids: Iterable[int], further: Mapping[int, str], where: str) -> None:
    """As `check_rows`, for the ids of one text."""
    tokens = np.fromiter(ids, dtype=np.int64)
    if (places := np.isin(tokens, list(further))).any():
        token_id = int(tokens[places][0])
        raise InputError(
            f"{where}: token {further[token_id]!r} (id {token_id}) is in only one of the teacher's and the student's vocabularies, so the "
            "two can't be compared on it; leave such texts out (a chat template may write the token), or use a student with the "
            "teacher's tokenizer"
        )
