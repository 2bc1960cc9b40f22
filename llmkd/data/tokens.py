"""Rows of text as tokens, each with the positions that are trained."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from llmkd.data.formats import RowFormat, format_of
from llmkd.data.turns import Tools, Turn, check_options, has_answer, read_tools, read_turns, rendered
from llmkd.errors import InputError

log = logging.getLogger("llmkd")
PLACEHOLDER = "llmkd0message0here"
"""Stands for an assistant's message in order to find what a chat template writes around it."""

Columns = Mapping[str, list[Any]]
"""Some rows, column by column."""
Row = Mapping[str, Any]
Options = Mapping[str, Any]
"""What a chat template is told beside the chat."""
Encoded = tuple[list[list[int]], list[list[bool]]]
"""Each row's token ids, and which of them are trained."""


def tokenize(rows: Dataset, tokenizer: Any, *, row_format: RowFormat, max_length: int, too_long: str) -> Dataset:
    """Rows -> {input_ids, trained (per token), length, row}. Completions and the assistant's messages of a chat are trained, not prompts.

    `row` is the row's number. Prompt and completion are tokenized apart, as they are when the model later continues the
    prompt. Raises InputError for a row that lacks its columns, or when no row is left.
    """
    format = format_of(rows.column_names, row_format.format)
    check_end_token(tokenizer)
    options = row_format.template_options
    check_options(tokenizer, options)
    encode = {"prompt_completion": _prompt_completion, "messages": _messages, "text": _text}[format]

    def encoded(columns: Columns, numbers: list[int]) -> Columns:
        ids, trained = encode(columns, tokenizer, numbers, options)
        whole = [len(i) for i in ids]
        if too_long == "truncate":
            ids, trained = [i[:max_length] for i in ids], [t[:max_length] for t in trained]
        length, useful = [len(i) for i in ids], [any(t[1:]) for t in trained]
        return dict(input_ids=ids, trained=trained, length=length, whole=whole, useful=useful, row=numbers)

    return mapped_rows(rows, encoded, max_length=max_length, too_long=too_long)


def check_end_token(tokenizer: Any) -> int:
    """The id of the tokenizer's end-of-sequence token. Raises InputError if it has none."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token, from which a student learns to stop; set its eos_token"
        )
    return int(tokenizer.eos_token_id)


def mapped_rows(
    rows: Dataset, encode: Callable[[Columns, list[int]], Columns], *, max_length: int, too_long: str
) -> Dataset:
    """The rows that are trained on, as tokens.

    `encode` makes token columns of a batch of rows and their numbers; two of them decide whether a row is kept and are then removed,
    `whole` (its tokens before any truncation) and `useful` (whether it has a token to train). Raises InputError when no row is left.
    """
    encoded = rows.map(
        encode, batched=True, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
    )
    long, useful = np.array(encoded["whole"]) > max_length, np.array(encoded["useful"])
    kept = np.flatnonzero(useful & (~long | (too_long == "truncate")))
    if long.any() or not useful.all():
        fate = "truncated" if too_long == "truncate" else "dropped"
        log.info(
            "data: %d of %d rows are used; %d longer than %d tokens (%s), %d with nothing to train (dropped)",
            len(kept), len(useful), long.sum(), max_length, fate, (~useful).sum(),
        )  # fmt: skip
    if len(kept) == 0:
        raise InputError(
            f"data.max_length: no row has a token to train within {max_length} tokens; write a larger max_length, or "
            "look at the data"
        )
    return encoded.select(kept).remove_columns(["whole", "useful"])


def _prompt_completion(columns: Columns, tokenizer: Any, numbers: list[int], options: Options) -> Encoded:
    if any(isinstance(value, list) for value in [*columns["prompt"], *columns["completion"]]):
        return _chats(columns, tokenizer, numbers, options, _prompt_and_completion_turns)
    _check_text(columns, ("prompt", "completion"), numbers)
    prompts = leading(tokenizer, columns["prompt"])
    completions = _closed(tokenizer(columns["completion"], add_special_tokens=False)["input_ids"], tokenizer)
    written = [bool(text.strip()) for text in columns["completion"]]  # an empty one would teach to stop at once
    rows = list(zip(prompts, completions, written, strict=True))
    return [p + c for p, c, _ in rows], [[False] * len(p) + [some] * len(c) for p, c, some in rows]


def _prompt_and_completion_turns(row: Row) -> tuple[list[Turn], list[Turn]]:
    return read_turns(row["prompt"]), read_turns(row["completion"])


def _check_text(columns: Columns, names: Sequence[str], numbers: list[int]) -> None:
    for name in names:
        for number, value in zip(numbers, columns[name], strict=True):
            if not isinstance(value, str):
                raise InputError(f"data row {number}: {name} must be text, it is {type(value).__name__}; make it text")


def leading(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts that start a sequence: with the tokenizer's leading tokens, without the end token that some add."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = tokenizer("a", add_special_tokens=True)["input_ids"]
    opens, closes = bos is not None and added[:1] == [bos], added[-1:] == [eos]
    encoded = [ids[:-1] if closes else ids for ids in tokenizer(texts, add_special_tokens=True)["input_ids"]]
    return [ids[1:] if opens and ids[:2] == [bos, bos] else ids for ids in encoded]  # the text already has it


def _closed(encoded: list[list[int]], tokenizer: Any) -> list[list[int]]:
    """The ids with exactly one end-of-sequence token, also where the text already has it."""
    eos = tokenizer.eos_token_id
    return [ids if ids[-1:] == [eos] else [*ids, eos] for ids in encoded]


def _text(columns: Columns, tokenizer: Any, numbers: list[int], options: Options) -> Encoded:
    _check_text(columns, ("text",), numbers)
    texts = _closed(leading(tokenizer, columns["text"]), tokenizer)
    # An empty line is not a document: training on it would teach to stop at once.
    return texts, [[bool(text.strip())] * len(ids) for text, ids in zip(columns["text"], texts, strict=True)]


def _messages(columns: Columns, tokenizer: Any, numbers: list[int], options: Options) -> Encoded:
    return _chats(columns, tokenizer, numbers, options, lambda row: ([], read_turns(row["messages"])))


def _chats(
    columns: Columns,
    tokenizer: Any,
    numbers: list[int],
    options: Options,
    parts: Callable[[Row], tuple[list[Turn], list[Turn]]],
) -> Encoded:
    """Each row's chat, of which `parts` gives the turns that are only read and those of which the assistant's are trained."""
    encoded = []
    for place, number in enumerate(numbers):
        row = {name: values[place] for name, values in columns.items()}
        try:
            before, trained = parts(row)
            encoded.append(conversation(trained, tokenizer, read_tools(row.get("tools")), options, before=before))
        except InputError as error:
            raise InputError(f"data row {number}: {error}") from error
    return [ids for ids, _ in encoded], [trained for _, trained in encoded]


def conversation(
    messages: list[Turn],
    tokenizer: Any,
    tools: Tools | None = None,
    options: Options | None = None,
    *,
    before: Sequence[Turn] = (),
) -> tuple[list[int], list[bool]]:
    """A chat through the tokenizer's template: (ids, trained). The assistant's messages are trained, with their end of turn.

    `options`: what the template is told beside the chat. An empty message and the turns `before` are not trained. Raises InputError where
    the messages can't be found in the rendered text.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; give prompt and completion, or give the tokenizer one")
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InputError("the conversation has no turn of the role assistant; add one, there is nothing to train on")
    whole = [*before, *messages]
    write = partial(rendered, tokenizer=tokenizer, tools=tools, options=options)
    text = write(whole)
    answers = [len(before) + turn for turn in turns if has_answer(messages[turn])]
    spans = [_trained_span(whole, turn, text, write) for turn in answers]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # Some tokenizers leave white space out of a token's offsets, so that (a, b) may be (b, b).
    trained = [any(start <= a and start < b <= end for start, end in spans) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], trained


def _trained_span(messages: list[Turn], turn: int, whole: str, write: Callable[..., str]) -> tuple[int, int]:
    """An assistant's turn in the rendered chat, (start, end): from the end of the generation prompt to its end of turn.

    A template may write a turn differently once others follow (Qwen3 leaves out the thoughts), so the place is found from the text
    around a placeholder, in the whole chat and in the chat that ends with this turn.
    """
    upto = [*messages[:turn], {**messages[turn], "content": PLACEHOLDER}]
    opening, _, closing = write(upto).partition(PLACEHOLDER)
    after = write([*upto, *messages[turn + 1 :]]).partition(PLACEHOLDER)[2] if messages[turn + 1 :] else closing
    if not after.startswith(closing):  # Phi-3 ends a whole chat with one more token
        closing = re.sub(r"\s\S*$", "", os.path.commonprefix([closing, after]))
    end = len(whole) - len(after) + len(closing.rstrip() or closing)
    before = write(messages[:turn], add_generation_prompt=True) if turn else opening
    start = len(os.path.commonprefix([whole, before]))
    prefix = len(os.path.commonprefix([before, write(messages[:turn])])) if turn else 0
    if PLACEHOLDER in whole or not whole.endswith(after) or not prefix <= start <= end:
        raise InputError(
            f"the chat template changes the text before turn {turn} once that turn is there, so the assistant's tokens can't be "
            "located; give prompt and completion instead"
        )
    return start, end
