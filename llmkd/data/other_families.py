"""Rows and batches of the families other than decoders: classified texts for encoders, source and target for encoder-decoders.

A run calls `tokenize_for(family, ...)` and `collate_for(family)`, for decoders too (llmkd.data.batches). An encoder's row has one trained
position, its class. An encoder-decoder's encoder reads the prompt, and its decoder writes the completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset

from llmkd.data.batches import IGNORE, Batch, Family, TokenRow, collate, padded, padded_batch
from llmkd.data.formats import RowFormat, check_columns, format_of, texts_of
from llmkd.data.token_files import Columns, Encode, mapped_rows
from llmkd.data.tokens import check_end_token, encoder
from llmkd.errors import InputError

FORMATS = {
    "decoder": ("auto", "prompt_completion", "messages", "sharegpt", "alpaca", "text", "prompts"),
    "encoder": ("auto", "classification"),
    "encoder_decoder": ("auto", "prompt_completion", "alpaca"),
}
"""By kind of model, the formats of rows (data.format) that it can be trained on."""


def check_format(family: Family, row_format: RowFormat) -> None:
    """Raise InputError for rows that this kind of model can't be trained on."""
    format = row_format.format
    kind = family.kind.replace("_", "-")
    article = "a" if family.kind == "decoder" else "an"
    if row_format.template_options and family.kind != "decoder":
        raise InputError(
            f"data.template_options: {article} {kind} reads no chats, whose template takes them; leave them out"
        )
    if format not in FORMATS[family.kind]:
        raise InputError(
            f"data.format: {article} {kind} is not trained on {format}; write {' or '.join(FORMATS[family.kind])}"
        )


def tokenize_for(
    family: Family, rows: Dataset, tokenizer: Any, *, row_format: RowFormat, max_length: int, too_long: str
) -> Dataset:
    """Rows as tokens for a model of this family, in memory. Raises InputError for a row that lacks its columns, or when no row is left."""
    how = {"row_format": row_format, "max_length": max_length, "too_long": too_long}
    encode = encoder_for(family, rows.column_names, tokenizer, **how)
    return mapped_rows(rows, encode, max_length=max_length, too_long=too_long)


def encoder_for(
    family: Family,
    columns: Sequence[str],
    tokenizer: Any,
    *,
    row_format: RowFormat,
    max_length: int,
    too_long: str,
) -> Encode:
    """What makes tokens for a model of this family from rows with these columns. Raises InputError where one is missing."""
    check_format(family, row_format)
    if family.kind == "encoder":
        return classified_encoder(columns, tokenizer, family.labels, max_length=max_length, too_long=too_long)
    if family.kind == "encoder_decoder":
        format = format_of(columns, row_format.format, FORMATS[family.kind][1:])
        lengths: Any = {"max_length": max_length, "too_long": too_long}
        return source_encoder(columns, tokenizer, family.start, format=format, **lengths)
    return encoder(columns, tokenizer, row_format=row_format, max_length=max_length, too_long=too_long)


def collate_for(family: Family) -> Callable[..., Batch]:
    """The function that makes a batch of rows from `tokenize_for`."""
    return {"decoder": collate, "encoder": collate_classified, "encoder_decoder": collate_sources}[family.kind]


# ---------------------------------------------------------------------------------------------------------------------
# Encoders: texts and their classes


def label_names(rows: Dataset) -> tuple[str, ...]:
    """The classes of labelled rows in the order of an encoder's logits: texts in alphabetical order, numbers from 0 to the largest."""
    check_columns(rows.column_names, ("label",), "classification")
    values = set(rows["label"])
    if all(isinstance(value, str) for value in values):
        names = sorted(values)
    elif all(isinstance(value, int) and value >= 0 for value in values):
        names = [str(number) for number in range(max(values) + 1)]
    else:
        odd = next(v for v in values if not isinstance(v, str | int) or (isinstance(v, int) and v < 0))
        raise InputError(f"data: the label {odd!r} is not a class; write texts, or whole numbers from 0 up")
    if len(names) < 2:
        raise InputError(f"data: all rows have the label {names[0]!r}; give rows of two classes or more")
    return tuple(names)


def label_number(label: object, names: Sequence[str], number: int) -> int:
    """The index of a row's class, by its name, else by its number. Raises InputError for a label that is none of the classes."""
    if str(label) in names:  # names first: classes may be named by numbers that do not start at 0
        return list(names).index(str(label))
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise InputError(
            f"data row {number}: the label {label!r} is none of the model's classes ({', '.join(names)}); fix the row, or leave it out"
        )
    return label


def classified_encoder(
    columns: Sequence[str], tokenizer: Any, labels: Sequence[str], *, max_length: int, too_long: str
) -> Encode:
    """From text (or text_a and text_b) and label to {input_ids, segments, class, length, row}, by the tokenizer's own template."""
    pair = "text" not in columns
    check_columns(columns, ("text_a", "text_b", "label") if pair else ("text", "label"), "classification")
    cut = {"truncation": True, "max_length": max_length} if too_long == "truncate" else {}

    def encoded(columns: Columns, numbers: list[int]) -> Columns:
        texts = [columns["text_a"], columns["text_b"]] if pair else [columns["text"]]
        for number, *parts in zip(numbers, *texts, strict=True):
            _check_texts(parts, number)
        tokens = tokenizer(*texts, **cut)
        ids = tokens["input_ids"]
        segments = tokens["token_type_ids"] if "token_type_ids" in tokens else [[0] * len(row) for row in ids]
        classes = [label_number(v, labels, n) for v, n in zip(columns["label"], numbers, strict=True)]
        length = [len(row) for row in ids]
        whole = length if not cut else [len(row) for row in tokenizer(*texts)["input_ids"]]
        counted = dict(length=length, whole=whole, useful=[True] * len(ids), row=numbers)
        return {"input_ids": ids, "segments": segments, "class": classes, **counted}

    return encoded


def collate_classified(
    rows: Sequence[TokenRow], *, pad_id: int, packed: bool = False, numbers: Sequence[int] = ()
) -> Batch:
    """Rows of `classified_encoder` -> one Batch, padded on the right; targets [B, 1] are the classes."""
    assert not packed, "families.check_usable refuses it"
    ids, attended = padded([row["input_ids"] for row in rows], pad_id)
    segments, _ = padded([row["segments"] for row in rows], 0)
    classes = torch.tensor([[row["class"]] for row in rows])
    more = {"segments": segments} if segments.any() else {}
    return padded_batch(ids, attended, classes, numbers, **more)


# ---------------------------------------------------------------------------------------------------------------------
# Encoder-decoders: source and target


def source_encoder(
    columns: Sequence[str], tokenizer: Any, start: int, *, format: str, max_length: int, too_long: str
) -> Encode:
    """From a prompt and a completion to {source_ids, target_ids, length, row}; both with the tokenizer's own leading and closing tokens.

    `format`: prompt_completion or alpaca. `target_ids` begin with `start`, which the decoder reads first and never writes, and end with an
    end of sequence. `max_length` bounds each of the two.
    """
    format_of(columns, format)
    eos = check_end_token(tokenizer)

    def encoded(columns: Columns, numbers: list[int]) -> Columns:
        prompts, completions = _prompts_and_completions(columns, numbers, format)
        sources = tokenizer(prompts)["input_ids"]
        written = tokenizer(text_target=completions)["input_ids"]
        targets = [[start, *ids] if ids[-1:] == [eos] else [start, *ids, eos] for ids in written]
        whole = [max(len(s), len(t) - 1) for s, t in zip(sources, targets, strict=True)]
        # an encoder needs at least one token, and an empty answer would teach to stop at once
        useful = [bool(s) and bool(t.strip()) for s, t in zip(sources, completions, strict=True)]
        if too_long == "truncate":
            # the tokenizer's own truncation keeps the token that closes a text
            sources = tokenizer(prompts, truncation=True, max_length=max_length)["input_ids"]
            targets = [t[: max_length + 1] for t in targets]
        length = [len(s) + len(t) - 1 for s, t in zip(sources, targets, strict=True)]
        return dict(source_ids=sources, target_ids=targets, length=length, whole=whole, useful=useful, row=numbers)

    return encoded


def _prompts_and_completions(columns: Columns, numbers: list[int], format: str) -> tuple[list[str], list[str]]:
    pairs = []
    for place, number in enumerate(numbers):
        try:
            pairs.append(texts_of({name: values[place] for name, values in columns.items()}, format))
        except InputError as error:
            raise InputError(f"data row {number}: {error}") from error
    return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]


def collate_sources(
    rows: Sequence[TokenRow], *, pad_id: int, packed: bool = False, numbers: Sequence[int] = ()
) -> Batch:
    """Rows of `source_encoder` -> one Batch, both sides padded on the right."""
    assert not packed, "families.check_usable refuses it"
    source, source_attended = padded([row["source_ids"] for row in rows], pad_id)
    ids, attended = padded([row["target_ids"][:-1] for row in rows], pad_id)
    targets, _ = padded([row["target_ids"][1:] for row in rows], IGNORE)
    return padded_batch(
        ids,
        attended,
        targets,
        numbers,
        source_ids=source,
        source_attended=source_attended,
        source_at=source_attended.flatten().nonzero().flatten(),
    )


# ---------------------------------------------------------------------------------------------------------------------


def _check_texts(values: Sequence[Any], number: int) -> None:
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"data row {number}: a text is {type(value).__name__}; make it a text")
