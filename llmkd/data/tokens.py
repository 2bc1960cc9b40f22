"""Rows of text as tokens, each with the positions that are trained."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from llmkd.data.formats import RowFormat, format_of, is_chat, texts_of, turns_of
from llmkd.data.token_files import Columns, Encode, mapped_rows
from llmkd.data.turns import THOUGHTS_END, Tools, Turn, check_options, has_answer, read_tools, read_turns, rendered
from llmkd.errors import InputError

PLACEHOLDER = "llmkd0message0here"
"""Stands for an assistant's message in order to find what a chat template writes around it."""

WRITTEN_OTHERWISE = ("assistant", "tool", "function", "ipython", "observation")
"""The roles whose contents a chat template may change: thoughts are cut, results of tools are written as JSON."""

Options = Mapping[str, Any]
"""What a chat template is told beside the chat."""
Encoded = tuple[list[list[int]], list[list[bool]]]
"""Each row's token ids, and which of them are trained."""


def tokenize(rows: Dataset, tokenizer: Any, *, row_format: RowFormat, max_length: int, too_long: str) -> Dataset:
    """Rows -> {input_ids, trained (per token), length, row}, in memory.

    Raises InputError for a row that lacks its columns, or when no row is left.
    """
    encode = encoder(rows.column_names, tokenizer, row_format=row_format, max_length=max_length, too_long=too_long)
    return mapped_rows(rows, encode, max_length=max_length, too_long=too_long)


def encoder(columns: Sequence[str], tokenizer: Any, *, row_format: RowFormat, max_length: int, too_long: str) -> Encode:
    """What makes tokens of rows with these columns. Completions and the assistant's messages of a chat are trained, not prompts.

    Prompt and completion are tokenized apart, as they are when the model later continues the prompt. Raises InputError where a column is
    missing, and itself for a row that can't be tokenized.
    """
    format = format_of(columns, row_format.format)
    check_end_token(tokenizer)
    options = row_format.template_options
    check_options(tokenizer, options)
    if format == "prompts":
        return _prompt_encoder(tokenizer, options, too_long)

    def tokens(columns: Columns, numbers: list[int]) -> Columns:
        ids, trained = encoded(columns, tokenizer, numbers, format, options)
        whole = [len(i) for i in ids]
        if too_long == "truncate":
            ids, trained = [i[:max_length] for i in ids], [t[:max_length] for t in trained]
        length, useful = [len(i) for i in ids], [any(t[1:]) for t in trained]
        return dict(input_ids=ids, trained=trained, length=length, whole=whole, useful=useful, row=numbers)

    return tokens


def _prompt_encoder(tokenizer: Any, options: Options, too_long: str) -> Encode:
    """What makes tokens of prompts alone, up to where a model goes on. Raises InputError for prompts that are to be cut."""
    if too_long == "truncate":
        raise InputError("data.too_long: a prompt whose end is cut off asks for something else; write drop")

    def tokens(columns: Columns, numbers: list[int]) -> Columns:
        ids = []
        for place, number in enumerate(numbers):
            try:
                prompt, tools = columns["prompt"][place], columns["tools"][place] if "tools" in columns else None
                ids.append(_prompt(prompt, tools, tokenizer, options))
            except InputError as error:
                raise InputError(f"data row {number}: {error}") from error
        length = [len(row) for row in ids]
        return {
            "input_ids": ids,
            "trained": [[False] * len(row) for row in ids],
            "length": length,
            "whole": [count + 1 for count in length],  # at least one token is to be written
            "useful": [bool(row) for row in ids],
            "row": numbers,
        }

    return tokens


def _prompt(prompt: object, tools: object, tokenizer: Any, options: Options) -> list[int]:
    """The tokens of a text, or of a chat up to where the assistant is to answer."""
    if isinstance(prompt, str):
        return leading(tokenizer, [prompt])[0]
    if not tokenizer.chat_template:
        raise InputError("prompt is a list of turns, and the tokenizer has no chat template; give texts")
    text = rendered(
        read_turns(prompt), tokenizer=tokenizer, tools=read_tools(tools), options=options, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_end_token(tokenizer: Any) -> int:
    """The id of the tokenizer's end-of-sequence token. Raises InputError if it has none."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token, from which a student learns to stop; set its eos_token"
        )
    return int(tokenizer.eos_token_id)


def encoded(columns: Columns, tokenizer: Any, numbers: list[int], format: str, options: Options) -> Encoded:
    """Rows of one format as tokens, each on its own: a chat by the tokenizer's template, else a prompt with its completion, or a text.

    Raises InputError that names the row by its number.
    """
    if format == "text":
        return _texts(columns["text"], tokenizer, numbers)
    template = bool(tokenizer.chat_template)
    chats: dict[int, tuple[list[int], list[bool]]] = {}
    pairs: dict[int, tuple[str, str]] = {}
    for place, number in enumerate(numbers):
        row = {name: values[place] for name, values in columns.items()}
        try:
            if is_chat(row, format, template):
                before, trained = turns_of(row, format)
                tools = read_tools(row.get("tools"))
                chats[place] = conversation(trained, tokenizer, tools, options, before=before)
            else:
                pairs[place] = texts_of(row, format)
        except InputError as error:
            raise InputError(f"data row {number}: {error}") from error
    found = chats | dict(zip(pairs, _pairs(list(pairs.values()), tokenizer), strict=True))
    return [found[place][0] for place in range(len(numbers))], [found[place][1] for place in range(len(numbers))]


def _pairs(texts: list[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids, trained) of each prompt and completion, tokenized apart."""
    if not texts:
        return
    prompts = leading(tokenizer, [prompt for prompt, _ in texts])
    completions = _closed(_ids([written for _, written in texts], tokenizer, special=False), tokenizer)
    for (_, written), p, c in zip(texts, prompts, completions, strict=True):
        yield p + c, [False] * len(p) + [bool(written.strip())] * len(c)  # an empty one would teach to stop at once


def leading(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts that start a sequence: with the tokenizer's leading tokens, without the end token that some add."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = tokenizer("a", add_special_tokens=True)["input_ids"]
    opens, closes = bos is not None and added[:1] == [bos], added[-1:] == [eos]
    encoded = [ids[:-1] if closes else ids for ids in _ids(texts, tokenizer, special=True)]
    return [ids[1:] if opens and ids[:2] == [bos, bos] else ids for ids in encoded]  # the text already has it


def _ids(texts: list[str], tokenizer: Any, *, special: bool) -> list[list[int]]:
    """Texts as token ids, with the tokenizer's special tokens or without. (Masks, which nobody reads, would take time.)"""
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]


def _closed(encoded: list[list[int]], tokenizer: Any) -> list[list[int]]:
    """The ids with exactly one end-of-sequence token, also where the text already has it."""
    eos = tokenizer.eos_token_id
    return [ids if ids[-1:] == [eos] else [*ids, eos] for ids in encoded]


def _texts(texts: list[str], tokenizer: Any, numbers: list[int]) -> Encoded:
    for number, text in zip(numbers, texts, strict=True):
        if not isinstance(text, str):
            raise InputError(f"data row {number}: text must be text, it is {type(text).__name__}; make it text")
    ids = _closed(leading(tokenizer, texts), tokenizer)
    # An empty line is not a document: training on it would teach to stop at once.
    return ids, [[bool(text.strip())] * len(row) for text, row in zip(texts, ids, strict=True)]


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
    _check_written(whole, text)
    answers = [len(before) + turn for turn in turns if has_answer(messages[turn])]
    spans = [_trained_span(whole, turn, text, write) for turn in answers]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # Some tokenizers leave white space out of a token's offsets, so that (a, b) may be (b, b).
    trained = [any(start <= a and start < b <= end for start, end in spans) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], trained


def _check_written(turns: Sequence[Turn], text: str) -> None:
    """Raise InputError for a turn that the chat template leaves out, as many templates do with roles they don't know."""
    for number, turn in enumerate(turns):
        if turn["role"] not in WRITTEN_OTHERWISE and turn["content"].strip() not in text:
            raise InputError(
                f"the chat template does not write turn {number}, of the role {turn['role']!r}; write a role that it knows, or leave "
                "the turn out"
            )


def _trained_span(messages: list[Turn], turn: int, whole: str, write: Callable[..., str]) -> tuple[int, int]:
    """An assistant's turn in the rendered chat, (start, end): from the end of the generation prompt to its end of turn.

    A template may write a turn differently once others follow (Qwen3 leaves out the thoughts), so the place is found from the text
    around a placeholder, in the whole chat and in the chat that ends with this turn.
    """
    upto = [*messages[:turn], {**messages[turn], "content": PLACEHOLDER}]
    opening, written, closing = write(upto).partition(PLACEHOLDER)
    opens, after = opening, closing
    if messages[turn + 1 :]:
        opens, _, after = write([*upto, *messages[turn + 1 :]]).partition(PLACEHOLDER)
    if not after.startswith(closing):  # Phi-3 ends a whole chat with one more token
        closing = re.sub(r"\s\S*$", "", os.path.commonprefix([closing, after]))
    end = len(whole) - len(after) + len(closing.rstrip() or closing)
    before = write(messages[:turn], add_generation_prompt=True) if turn else opening
    # Qwen3 with thoughts switched off asks with empty ones and leaves them out of earlier turns, which begin with their content.
    common = len(os.path.commonprefix([whole, before]))
    start = min(common, len(opens))
    prefix = len(os.path.commonprefix([before, write(messages[:turn])])) if turn else 0
    if not written or PLACEHOLDER in whole or not whole.endswith(after) or not prefix <= start <= end:
        raise InputError(
            f"the chat template changes the text before turn {turn} once that turn is there, so the assistant's tokens can't be "
            "located; give prompt and completion instead"
        )
    if start < len(opens) and THOUGHTS_END in before[common:]:
        raise InputError(
            f"turn {turn} has thoughts, and the chat template asks for an answer without any (data.template_options); leave the thoughts "
            "or the option out"
        )
    return start, end
