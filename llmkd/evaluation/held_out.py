"""Held-out rows: which they are, as batches of tokens and as prompts with their right answers; and models ready to run over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from llmkd.data import records
from llmkd.data.batches import Batch, Kind
from llmkd.data.formats import FORMATS
from llmkd.data.other_families import collate_for, tokenize_for
from llmkd.data.rows import load_rows
from llmkd.data.tokens import leading
from llmkd.data.turns import Tools, Turn, check_options, read_tools, read_turns, rendered
from llmkd.errors import InputError
from llmkd.files import file_hashes
from llmkd.models.families import KIND_NAMES, family
from llmkd.models.load import DTYPES, load_config, load_model, load_tokenizer
from llmkd.recipe.evaluation import Classification, Generation
from llmkd.recipe.recipe import Data, Evaluation, Recipe

ROWS = 8  # at once, where the recipe's evaluation.batch_size is auto
KEY = "evaluation.generation"

Encoded = list[tuple[str, list[int]]]
"""(text, token ids) of each prompt."""


# --- Which rows


def held_out_section(kind: Kind) -> Literal["generation", "classification"]:
    """The section of `evaluation` that names the held-out rows of models of this kind."""
    return "classification" if kind == "encoder" else "generation"


def held_out_data(section: Generation | Classification, data: Data, rows: int | None) -> Data:
    """A section's held-out rows as a data section; all else is as in the students' `data`."""
    own = section.source is not None
    place = {"source": section.source, "name": section.name, "format": "auto"} if own else {}
    name = {} if own or section.name is None else {"name": section.name}
    return data.model_copy(update={**place, **name, "split": section.split, "rows": rows})


def classification_data(recipe: Recipe) -> Data:
    """The rows to classify: tokenized as the students' own rows are, and none is dropped."""
    section = recipe.evaluation.classification
    assert section is not None
    return held_out_data(section, recipe.data, section.rows).model_copy(update={"too_long": "truncate"})


def read_rows(data: Data) -> Dataset:
    """The rows of a data section. Raises InputError where there are none."""
    which = {"name": data.name, "split": data.split, "rows": data.rows, "records_seed": data.records_seed}
    return load_rows(data.source, **which, columns=data.columns)


def check_evaluation(recipe: Recipe, kind: Kind) -> None:
    """Raise InputError for an evaluation that models of this kind can't have, and for rows that the students are trained on."""
    settings, kind_name = recipe.evaluation, KIND_NAMES[kind]
    generation, classification = settings.generation, settings.classification
    if kind != "decoder" and settings.tasks:
        raise InputError(
            f"evaluation.tasks: lm-eval is run on decoders, and this is {kind_name}; leave tasks out and write "
            f"evaluation.{held_out_section(kind)}"
        )
    if kind == "encoder" and generation is not None:
        raise InputError(f"{KEY}: an encoder writes no texts; leave it out and write evaluation.classification")
    if kind == "encoder_decoder" and generation is not None and generation.backend == "vllm":
        raise InputError(f"{KEY}.backend: vLLM does not run {kind_name} here; write hf")
    if classification is not None:
        if kind != "encoder":
            raise InputError(f"evaluation.classification: only an encoder has classes, not {kind_name}; leave it out")
        check_held_out("evaluation.classification", classification, recipe.data)


def check_held_out(key: str, section: Generation | Classification, data: Data) -> None:
    """Raise InputError if a section's rows are those that the students are trained on; a source that it names is meant so."""
    if section.source is not None:
        return
    if section.split == data.split:
        raise InputError(
            f"{key}.split: the students are trained on the split {data.split!r} of {data.source!r}; write a split that is held out"
        )
    path = Path(data.source).expanduser()
    if path.is_file() or (path.is_dir() and not any(section.split in file.name.lower() for file in path.iterdir())):
        raise InputError(
            f"{key}.source: the students are trained on all of {data.source!r}; name a file of held-out rows, or a folder with one "
            "file named after each split"
        )


def local_hashes(source: str) -> list[str]:
    """Names and hashes of the files of a local source of rows; none of a hub data set."""
    local = Path(source).expanduser()
    return file_hashes(local, sorted(file for file in (local, *local.rglob("*")) if file.is_file()))


# --- Batches and models


def batches_of(
    data: Data, teacher: Path, settings: Evaluation, trust_remote_code: bool
) -> tuple[list[int], list[Batch]]:
    """The rows' numbers in their source, and the rows in batches: tokens and trained positions as in training.

    A row that data.too_long drops is in neither. `teacher`: the folder whose tokenizer and kind decide.
    """
    model = family(load_config(teacher, trust_remote_code=trust_remote_code))
    tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    how = {"row_format": data.row_format, "max_length": data.max_length, "too_long": data.too_long}
    rows = tokenize_for(model, read_rows(data), tokenizer, **how)
    size = settings.batch_size if isinstance(settings.batch_size, int) else ROWS
    collate, pad_id = collate_for(model), pad_of(tokenizer)
    batches = [
        collate([rows[number] for number in range(start, min(start + size, len(rows)))], pad_id=pad_id, packed=False)
        for start in range(0, len(rows), size)
    ]
    return list(rows["row"]), batches


def load_to_run(folder: Path, dtype: str, *, trust_remote_code: bool = False) -> Any:
    """A folder's model for inference, on this process's GPU if it has one. Raises InputError where the folder holds none."""
    check_model_folder(folder)
    options: Any = {"ds_config": None, "attention": "auto", "trust_remote_code": trust_remote_code}
    model: Any = load_model(folder, dtype=DTYPES[dtype], **options)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def check_model_folder(folder: Path) -> None:
    """Raise InputError where a folder holds no model."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (no config.json)")


def pad_of(tokenizer: Any) -> int:
    """The token id that fills a batch's rows up."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


# --- Prompts


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked to continue, and the answers that are right."""

    references: list[str]
    text: str = ""
    turns: list[Turn] | None = None
    """Of a chat, in place of `text`: the turns before the answer."""
    tools: Tools | None = None
    """Of a chat: what the assistant may call."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """Of a chat: what the template is told beside it."""
    record: dict[str, str] | None = None
    """What the built-in task's sentence must tell: slot -> value."""


def held_out_prompts(generation: Generation, data: Data) -> list[Prompt]:
    """The held-out prompts that a recipe asks for. Raises InputError for rows that the students are trained on."""
    check_held_out(KEY, generation, data)
    return read_prompts(held_out_data(generation, data, generation.items))


def read_prompts(data: Data) -> list[Prompt]:
    """The rows of a data section as prompts. Raises InputError for rows that hold none."""
    if data.source == "records":
        assert data.rows is not None
        examples = records.examples(data.split, data.records_seed, 0, data.rows)
        return [Prompt(text=e["prompt"], references=e["references"], record=e["record"]) for e in examples]
    table, format = read_rows(data), data.format
    columns = table.column_names
    if format == "auto":
        format = next((f for f in ("prompt_completion", "messages") if set(FORMATS[f]) <= set(columns)), "text")
    if format == "text" or not set(FORMATS[format]) <= set(columns):
        raise InputError(
            f"{KEY}: rows of {data.source!r} hold {', '.join(columns)}, which is no prompt to continue; give rows of prompt "
            f"and completion, or of messages, as {KEY}.source, or leave {KEY} out"
        )
    read = _of_chat if format == "messages" else _of_prompt
    prompts = [read(dict(row), f"{KEY}: row {number} of {data.source!r}") for number, row in enumerate(table)]
    return [replace(prompt, template_options=data.template_options) for prompt in prompts]


def _of_prompt(row: Mapping[str, Any], where: str) -> Prompt:
    """The prompt, and the row's `references` where it has such a column, else its completion."""
    if isinstance(row["prompt"], list):
        return _of_chat({**row, "messages": [*row["prompt"], *_listed(row["completion"])]}, where)
    texts = [row["prompt"], *_listed(row.get("references") or row["completion"])]
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


def encoded(prompts: Sequence[Prompt], tokenizer: Any, kind: Kind = "decoder") -> Encoded:
    """Each prompt as training begins such a row: a chat up to where the assistant speaks.

    An encoder-decoder's encoder reads it with the tokenizer's own closing token, and no chat.
    """
    result = []
    for prompt in prompts:
        if prompt.turns is None:
            text = prompt.text
            ids = tokenizer(text)["input_ids"] if kind == "encoder_decoder" else leading(tokenizer, [text])[0]
        elif kind == "encoder_decoder":
            raise InputError(f"{KEY}: an encoder-decoder answers no chats; give rows of prompt and completion")
        elif not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; give it one, or rows of prompt and completion")
        else:
            check_options(tokenizer, prompt.template_options)
            text = rendered(prompt.turns, tokenizer, prompt.tools, prompt.template_options, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        result.append((text, ids))
    return result
