"""How a source's rows are read: their format, what their columns are called, and what the chat template is told."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from llmkd.errors import InputError

FORMATS = {"prompt_completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
"""By format, the columns that each row must have."""
COLUMNS = ("prompt", "completion", "messages", "tools", "text", "text_a", "text_b", "label", "references")
"""Every column that some format reads: what a user's column can be renamed to."""


OWN_ARGUMENTS = (
    *(
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
    ),
    *(
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ),
)
"""What the writing of a chat is told by llmkd itself, and no option of a template can be called."""


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one source are read: all that decides their tokens beside the rows, the tokenizer and the model's kind.

    `dataclasses.asdict` of it is JSON.
    """

    format: str = "auto"
    """What a row holds (recipe key `data.format`)."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The user's column -> the format's column."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is told beside the chat, as JSON values."""


def format_of(columns: Sequence[str], format: str = "auto") -> str:
    """The format of rows with these columns: the one named, or by `auto` the one that they fit.

    Raises InputError where a column is missing.
    """
    if format != "auto":
        check_columns(columns, FORMATS[format], format)
        return format
    for name, needed in FORMATS.items():
        if all(column in columns for column in needed):
            return name
    raise InputError(
        f"data.format: columns {', '.join(columns)} are none of prompt + completion, messages, text; rename them, or "
        "choose a format"
    )


def check_columns(columns: Sequence[str], needed: Sequence[str], format: str) -> None:
    """Raise InputError where a column of the format is missing."""
    missing = [column for column in needed if column not in columns]
    if missing:
        raise InputError(
            f"data.format: {format} needs the column {missing[0]!r}, the data has {', '.join(columns)}; "
            "rename the column (data.columns), or choose another format"
        )


def check_names(columns: Mapping[str, str]) -> None:
    """Raise InputError for new names of columns that no format reads, and for one given twice."""
    for theirs, ours in columns.items():
        if ours not in COLUMNS:
            near = difflib.get_close_matches(ours, COLUMNS, n=1)
            cure = f"did you mean {near[0]}?" if near else f"write one of {', '.join(COLUMNS)}"
            turned = f"; the data's own name comes first, {{{ours}: {theirs}}}" if theirs in COLUMNS else f"; {cure}"
            raise InputError(f"data.columns: no format has a column {ours!r}{turned}")
        if list(columns.values()).count(ours) > 1:
            raise InputError(f"data.columns: two columns become {ours!r}; name the one that is meant")


def check_option_names(options: Mapping[str, Any]) -> None:
    """Raise InputError for an option of the chat template with a name that means something else."""
    for name in options:
        if name in OWN_ARGUMENTS:
            raise InputError(
                f"data.template_options: {name!r} is set by llmkd itself; write only what the template reads, e.g. enable_thinking"
            )


def renamed(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    """The rows with the user's columns called as the format calls them.

    Raises InputError for a column that is not there, and for a new name that another column has already.
    """
    for theirs, ours in columns.items():
        if theirs not in rows.column_names:
            raise InputError(
                f"data.columns: the data has no column {theirs!r}, it has {', '.join(rows.column_names)}; write one of these"
            )
        if ours in rows.column_names and ours not in columns:
            raise InputError(
                f"data.columns: {theirs} is to be {ours}, and the data has a column {ours} too; take one of them out of the data"
            )
    return rows.rename_columns(dict(columns)) if columns else rows
