"""Held-out rows as prompts with the answers that are known to be right, and prompts as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkd.data import records
from llmkd.data.rows import load_rows
from llmkd.data.tokens import FORMATS, leading, rendered
from llmkd.errors import InputError

Item = dict[str, Any]
"""prompt (a text) or messages (the turns before the answer); references; of the built-in task also its record."""


def held_out(
    source: str, *, name: str | None, split: str, rows: int, format: str = "auto", records_seed: int = 0
) -> list[Item]:
    """The first rows of a source as items. Raises InputError for rows that hold no prompt."""
    if source == "records":
        made = records.examples(split, records_seed, 0, rows)
        return [{key: example[key] for key in ("prompt", "references", "record")} for example in made]
    found = load_rows(source, name=name, split=split, rows=rows)
    columns = found.column_names
    if format == "auto":
        format = next((f for f in ("prompt_completion", "messages") if set(FORMATS[f]) <= set(columns)), "text")
    missing = [column for column in FORMATS[format] if column not in columns]
    if format == "text" or missing:
        raise InputError(
            f"evaluation.generation: rows of {source!r} hold {', '.join(columns)}, which is no prompt to continue; give rows of prompt "
            "and completion, or of messages, as evaluation.generation.source, or leave evaluation.generation out"
        )
    item = _of_chat if format == "messages" else _of_prompt
    return [item(dict(row), f"evaluation.generation: row {number} of {source!r}") for number, row in enumerate(found)]


def _of_prompt(row: dict[str, Any], where: str) -> Item:
    """The prompt, and the row's `references` where it has such a column, else its completion."""
    references = row.get("references") or [row["completion"]]
    texts = [row["prompt"], *(references if isinstance(references, list) else [references])]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: prompt and completion must be texts, and references a list of texts; mend the row")
    return {"prompt": texts[0], "references": [text.strip() for text in texts[1:]]}


def _of_chat(row: dict[str, Any], where: str) -> Item:
    """All before the assistant's last turn, and what it says there."""
    turns = row["messages"]
    if not (
        isinstance(turns, list) and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns)
    ):
        raise InputError(f'{where}: messages must be turns; write [{{"role": "user", "content": "..."}}, ...]')
    last = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last == 0:
        raise InputError(f"{where}: no turn of the assistant follows another; add one, or leave the row out")
    return {"messages": turns[:last], "references": [turns[last]["content"].strip()]}


def encoded(items: Sequence[Item], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """(text, token ids) of each item's prompt, as training begins such a row: a chat up to where the assistant speaks."""
    found = []
    for item in items:
        if "messages" in item:
            if not tokenizer.chat_template:
                raise InputError(
                    "the tokenizer has no chat template; give prompt and completion, or give the tokenizer one"
                )
            text = rendered(item["messages"], tokenizer, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text, ids = item["prompt"], leading(tokenizer, [item["prompt"]])[0]
        found.append((text, ids))
    return found


def sources(items: Sequence[Item], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """(text, token ids) of each item's prompt as an encoder-decoder's encoder reads it, with the tokenizer's own closing token."""
    if any("messages" in item for item in items):
        raise InputError(
            "evaluation.generation: an encoder-decoder answers prompts, not chats; give rows of prompt and completion"
        )
    return [(item["prompt"], tokenizer(item["prompt"])["input_ids"]) for item in items]
