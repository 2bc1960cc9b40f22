"""Held-out rows: which they are, as batches of tokens and as prompts with their right answers; and models ready to run over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from llmkd.data import records
from llmkd.data.batches import Batch, Kind
from llmkd.data.formats import FORMATS, format_of, is_chat, texts_of, turns_of
from llmkd.data.other_families import collate_for, tokenize_for
from llmkd.data.rows import load_rows
from llmkd.data.tokens import leading
from llmkd.data.turns import Tools, Turn, check_options, read_tools, rendered
from llmkd.errors import InputError
from llmkd.files import file_hashes
from llmkd.models.families import KIND_NAMES, family
from llmkd.models.load import DTYPES, load_config, load_model, load_tokenizer
from llmkd.models.spread import all_devices, placed
from llmkd.recipe.evaluation import Classification, Generation
from llmkd.recipe.recipe import Data, Evaluation, Recipe

ROWS = 8  # at once, where the recipe's evaluation.batch_size is auto
KEY = "evaluation.generation"
PROMPTS = ("prompt_completion", "messages", "sharegpt", "alpaca")
"""The formats whose rows have a prompt to continue."""

Encoded = list[tuple[str, list[int]]]
"""(text, token ids) of each prompt."""


# --- Which rows


def held_out_section(kind: Kind) -> Literal["generation", "classification"]:
    """The section of `evaluation` that names the held-out rows of models of this kind."""
    return "classification" if kind == "encoder" else "generation"


def held_out_data(section: Generation | Classification, data: Data, rows: int | None) -> Data:
    """A section's held-out rows as a data section; all else is as in the students' `data`."""
    changes: dict[str, Any] = {"split": section.split, "rows": rows}
    if section.name is not None or section.source is not None:
        changes["name"] = section.name
    if section.source is not None:
        like = next((part for part in data.sources if part.source == section.source), data)
        changes |= {"source": section.source, "sources": (), "template_options": like.template_options}
        changes["columns"] = like.columns if section.columns is None else section.columns
        own = section.format if isinstance(section, Generation) else None
        changes["format"] = own or ("auto" if like.format in ("text", "prompts") else like.format)
    return data.model_copy(update=changes)


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
    """A folder's model for inference, on all GPUs of this process if it has any. Raises InputError where the folder holds none."""
    check_model_folder(folder)
    options: Any = {"ds_config": None, "attention": "auto", "trust_remote_code": trust_remote_code}
    model: Any = load_model(folder, dtype=DTYPES[dtype], **options)
    return placed(model, all_devices())


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
    text: str | None = None
    turns: list[Turn] | None = None
    """Of a chat: the turns before the answer. With `text` too, an alpaca row's, the chat is for tokenizers that have a template."""
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
    try:
        table = read_rows(data)
    except InputError as error:
        raise InputError(f"{KEY}: {error}") from error
    columns = table.column_names
    if data.format == "text" or (
        data.format == "auto" and not any(set(FORMATS[name]) <= set(columns) for name in PROMPTS)
    ):
        raise InputError(
            f"{KEY}: rows of {data.source!r} hold {', '.join(columns)}, which is no prompt to continue; give rows of prompt "
            f"and completion, or of chats, as {KEY}.source, or leave {KEY} out"
        )
    try:
        format = format_of(columns, data.format, PROMPTS)
    except InputError as error:
        raise InputError(f"{KEY}: rows of {data.source!r}: {error}") from error
    prompts = []
    for number, row in enumerate(table):
        try:
            prompts.append(replace(_prompt(dict(row), format), template_options=data.template_options))
        except InputError as error:
            raise InputError(f"{KEY}: row {number} of {data.source!r}: {error}") from error
    return prompts


def _prompt(row: Mapping[str, Any], format: str) -> Prompt:
    """A row as a prompt: as texts, as a chat, or as both where it depends on the tokenizer. Raises InputError for one without an answer."""
    plain = None if is_chat(row, format, template=False) else texts_of(row, format)
    chat = turns_of(row, format) if is_chat(row, format, template=True) else None
    prompt = Prompt(references=[])
    if chat is not None:
        turns, answer = _asked([*chat[0], *chat[1]])
        prompt = replace(prompt, turns=turns, tools=read_tools(row.get("tools")), references=[answer])
    if plain is not None:
        prompt = replace(prompt, text=plain[0], references=[plain[1].strip()])
    if row.get("references"):
        prompt = replace(prompt, references=_references(row["references"]))
    return prompt


def _references(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise InputError("references must be a list of texts; fix the row")
    return [text.strip() for text in texts]


def _asked(turns: list[Turn]) -> tuple[list[Turn], str]:
    """The turns before the assistant's last one, and what that one says."""
    last = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last == 0:
        raise InputError("no turn of the assistant follows another; add one, or leave the row out")
    answer = turns[last]["content"].strip()
    if not answer:
        what = "calls a tool" if turns[last].get("tool_calls") else "is empty"
        raise InputError(
            f"the assistant's last turn {what}, so there is no text to compare with; end with a turn of text, or leave the row out"
        )
    return turns[:last], answer


def encoded(prompts: Sequence[Prompt], tokenizer: Any, kind: Kind = "decoder") -> Encoded:
    """Each prompt as training begins such a row: a chat up to where the assistant speaks.

    An encoder-decoder's encoder reads it with the tokenizer's own closing token, and no chat.
    """
    result = []
    for prompt in prompts:
        written_plainly = prompt.turns is None or kind == "encoder_decoder" or not tokenizer.chat_template
        if prompt.text is not None and written_plainly:
            text = prompt.text
            ids = tokenizer(text)["input_ids"] if kind == "encoder_decoder" else leading(tokenizer, [text])[0]
        elif prompt.turns is None or kind == "encoder_decoder":
            raise InputError(f"{KEY}: an encoder-decoder answers no chats; give rows of prompt and completion")
        elif not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; give it one, or rows of prompt and completion")
        else:
            check_options(tokenizer, prompt.template_options)
            text = rendered(prompt.turns, tokenizer, prompt.tools, prompt.template_options, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        result.append((text, ids))
    return result
