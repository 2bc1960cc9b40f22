"""Held-out rows as prompts with their right answers, and prompts as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd.data import records
from llmkd.data.rows import load_rows
from llmkd.data.tokens import FORMATS, leading
from llmkd.data.turns import Tools, Turn, read_tools, read_turns, rendered
from llmkd.errors import InputError
from llmkd.recipe.evaluation import Generation
from llmkd.recipe.recipe import Data, Evaluation

KEY = "evaluation.generation"

Encoded = list[tuple[str, list[int]]]
"""(text, token ids) of each prompt."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked to continue, and the answers that are right."""

    references: list[str]
    text: str = ""
    turns: list[Turn] | None = None
    """Of a chat, in place of `text`: the turns before the answer."""
    tools: Tools | None = None
    """Of a chat: what the assistant may call."""
    record: dict[str, str] | None = None
    """What the built-in task's sentence must tell: slot -> value."""


def section(settings: Evaluation) -> Generation:
    """The recipe's section on generated texts. Raises InputError where it has none."""
    if settings.generation is None:
        raise InputError(f"{KEY}: the recipe asks for no texts; add that section, e.g. {KEY}.items: 200")
    return settings.generation


def held_out_prompts(generation: Generation, data: Data) -> list[Prompt]:
    """The held-out prompts that a recipe asks for. Raises InputError for rows that the students are trained on."""
    own_source = generation.source is None
    source = data.source if generation.source is None else generation.source
    if own_source and generation.split == data.split:
        raise InputError(
            f"{KEY}.split: the students are trained on the split {data.split!r} of {source!r}; write a split that is held out"
        )
    path = Path(source).expanduser()
    if own_source and (
        path.is_file() or (path.is_dir() and not any(generation.split in f.name.lower() for f in path.iterdir()))
    ):
        raise InputError(
            f"{KEY}.source: the students are trained on all of {source!r}; name a file of held-out rows, or a folder with one file "
            "named after each split"
        )
    return read_prompts(
        source,
        name=data.name if own_source else generation.name,
        split=generation.split,
        rows=generation.items,
        format=data.format if own_source else "auto",
        records_seed=data.records_seed,
    )


def read_prompts(
    source: str, *, name: str | None, split: str, rows: int, format: str = "auto", records_seed: int = 0
) -> list[Prompt]:
    """The first rows of a source. Raises InputError for rows that hold no prompt."""
    if source == "records":
        examples = records.examples(split, records_seed, 0, rows)
        return [
            Prompt(text=example["prompt"], references=example["references"], record=example["record"])
            for example in examples
        ]
    table = load_rows(source, name=name, split=split, rows=rows)
    columns = table.column_names
    if format == "auto":
        format = next((f for f in ("prompt_completion", "messages") if set(FORMATS[f]) <= set(columns)), "text")
    missing = [column for column in FORMATS[format] if column not in columns]
    if format == "text" or missing:
        raise InputError(
            f"{KEY}: rows of {source!r} hold {', '.join(columns)}, which is no prompt to continue; give rows of prompt "
            f"and completion, or of messages, as {KEY}.source, or leave {KEY} out"
        )
    read = _of_chat if format == "messages" else _of_prompt
    return [read(dict(row), f"{KEY}: row {number} of {source!r}") for number, row in enumerate(table)]


def _of_prompt(row: Mapping[str, Any], where: str) -> Prompt:
    """The prompt, and the row's `references` where it has such a column, else its completion."""
    if isinstance(row["prompt"], list):
        return _of_chat({**row, "messages": [*row["prompt"], *_listed(row["completion"])]}, where)
    references = row.get("references") or [row["completion"]]
    texts = [row["prompt"], *(references if isinstance(references, list) else [references])]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: prompt and completion must be texts, and references a list of texts; fix the row")
    return Prompt(text=texts[0], references=[text.strip() for text in texts[1:]])


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _of_chat(row: Mapping[str, Any], where: str) -> Prompt:
    """The turns before the assistant's last one, which is the reference."""
    try:
        turns, tools = read_turns(row["messages"]), read_tools(row.get("tools"))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    last = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last == 0:
        raise InputError(f"{where}: no turn of the assistant follows another; add one, or leave the row out")
    answer = turns[last]["content"].strip()
    if not answer:
        what = "calls a tool" if turns[last].get("tool_calls") else "is empty"
        raise InputError(
            f"{where}: the assistant's last turn {what}, so there is no text to compare with; end with a turn of text, or leave the row out"
        )
    return Prompt(turns=turns[:last], tools=tools, references=[answer])


def encoded(prompts: Sequence[Prompt], tokenizer: Any) -> Encoded:
    """Each prompt as training begins such a row: a chat up to where the assistant speaks."""
    result = []
    for prompt in prompts:
        if prompt.turns is not None:
            if not tokenizer.chat_template:
                raise InputError(
                    "the tokenizer has no chat template; give prompt and completion, or give the tokenizer one"
                )
            text = rendered(prompt.turns, tokenizer, prompt.tools, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text, ids = prompt.text, leading(tokenizer, [prompt.text])[0]
        result.append((text, ids))
    return result


def encoded_sources(prompts: Sequence[Prompt], tokenizer: Any) -> Encoded:
    """Each prompt as an encoder-decoder's encoder reads it, with the tokenizer's own closing token."""
    if any(prompt.turns is not None for prompt in prompts):
        raise InputError(f"{KEY}: an encoder-decoder answers prompts, not chats; give rows of prompt and completion")
    return [(prompt.text, tokenizer(prompt.text)["input_ids"]) for prompt in prompts]
