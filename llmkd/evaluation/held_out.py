"""Held-out rows as batches of tokens, and models ready to run over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from llmkd.data.batches import Batch, Kind
from llmkd.data.other_families import collate_for, tokenize_for
from llmkd.data.rows import load_rows
from llmkd.errors import InputError
from llmkd.files import file_hashes
from llmkd.models.families import family
from llmkd.models.load import DTYPES, load_config, load_model, load_tokenizer
from llmkd.recipe.recipe import Data, Evaluation

ROWS = 8  # at once, where the recipe's evaluation.batch_size is auto


def held_out_section(kind: Kind) -> Literal["generation", "classification"]:
    """The section of `evaluation` that names the held-out rows of models of this kind."""
    return "classification" if kind == "encoder" else "generation"


def generation_source(settings: Evaluation, data: Data) -> tuple[str, str | None]:
    """(source, the hub data set's configuration) of the generation step's rows: its own, or else the training data's."""
    generation = settings.generation
    assert generation is not None
    if generation.source is not None:
        return generation.source, generation.name
    return data.source, generation.name or data.name


def generation_rows(settings: Evaluation, data: Data, rows: int) -> tuple[Dataset, str]:
    """The first `rows` rows of the generation step's source, and their format."""
    generation = settings.generation
    assert generation is not None
    source, name = generation_source(settings, data)
    table = load_rows(source, name=name, split=generation.split, rows=rows, records_seed=data.records_seed)
    return table, data.format if generation.source is None else "auto"


def batches_of(
    table: Dataset, format: str, teacher: Path, settings: Evaluation, data: Data, trust_remote_code: bool
) -> tuple[list[int], list[Batch]]:
    """The rows' numbers in their table, and the rows in batches: tokens and trained positions as in training.

    A row that data.too_long drops is in neither. `teacher`: the folder whose tokenizer and kind decide.
    """
    model = family(load_config(teacher, trust_remote_code=trust_remote_code))
    tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    rows = tokenize_for(model, table, tokenizer, format=format, max_length=data.max_length, too_long=data.too_long)
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
    model: Any = load_model(
        folder, dtype=DTYPES[dtype], ds_config=None, attention="auto", trust_remote_code=trust_remote_code
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def check_model_folder(folder: Path) -> None:
    """Raise InputError where a folder holds no model."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (no config.json)")


def local_hashes(source: str) -> list[str]:
    """Names and hashes of the files of a local source of rows; none of a hub data set."""
    local = Path(source).expanduser()
    return file_hashes(local, sorted(file for file in (local, *local.rglob("*")) if file.is_file()))


def pad_of(tokenizer: object) -> int:
    """The token id that fills a batch's rows up."""
    pad: int | None = getattr(tokenizer, "pad_token_id", None)
    return pad if pad is not None else tokenizer.eos_token_id  # type: ignore[attr-defined]
