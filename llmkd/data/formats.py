"""How a source's rows are read: their format, what their columns are called, what the chat template is told; and rows as chats or texts.

Pure: a row is a mapping of columns, and nothing here knows a tokenizer or a file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkd.data.turns import Turn, read_turns
from llmkd.errors import InputError, first_line

FORMATS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "prompts": ("prompt",),
}
"""By format, the columns that each row must have."""
GUESSED = tuple(name for name in FORMATS if name != "prompts")
"""The formats that `auto` knows by their columns: rows of prompt and completion would be prompts, too."""
PROMPTS = "; for prompts alone, which are continued during training (section rollouts), write format: prompts"
"""The end of a sentence about the formats that `auto` knows."""
FURTHER = {
    "prompt_completion": ("tools",),
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input",),
    "text": (),
    "prompts": ("tools",),
}
"""By format, the columns that are read where they are there."""
COLUMNS = tuple(
    dict.fromkeys(
        [name for names in (*FORMATS.values(), *FURTHER.values()) for name in names]
        + ["text_a", "text_b", "label", "references"]
    )
)
"""Every column that some format, a classification or a text's scores read: what a user's column can be renamed to."""
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}
"""Who speaks in a sharegpt turn (`from`) -> a chat template's role. `function_call`: its value is the JSON of a call, or of several."""
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

Row = Mapping[str, Any]


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


def format_of(columns: Sequence[str], format: str = "auto", among: Sequence[str] = GUESSED) -> str:
    """The format of rows with these columns: the one named, or by `auto` the one of `among` that they fit.

    Raises InputError where a column is missing, and where the columns fit several formats.
    """
    if format != "auto":
        check_columns(columns, FORMATS[format], format)
        return format
    fitting = [name for name in among if set(FORMATS[name]) <= set(columns)]
    if not fitting:
        known = ", ".join(f"{' + '.join(FORMATS[name])} ({name})" for name in among)
        raise InputError(
            f"data.format: the columns {', '.join(columns)} are none of {known}; say by data.columns which is which, e.g. "
            f"{{question: prompt, answer: completion}}{PROMPTS if tuple(among) == GUESSED else ''}"
        )
    if len(fitting) > 1:
        raise InputError(
            f"data.format: the columns {', '.join(columns)} fit {' and '.join(fitting)} alike; write which is meant, or give rows of "
            "several formats a file each"
        )
    return fitting[0]


def check_columns(columns: Sequence[str], needed: Sequence[str], format: str) -> None:
    """Raise InputError where a column of the format is missing."""
    missing = [column for column in needed if column not in columns]
    if missing:
        raise InputError(
            f"data.format: {format} needs the column {missing[0]!r}, the data has {', '.join(columns)}; "
            "rename the column that it is (data.columns), or choose another format"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def is_chat(row: Row, format: str, template: bool) -> bool:
    """Whether the row is written by a chat template; `template`: whether there is one, without which alpaca's rows are plain texts."""
    if format == "prompt_completion":
        return isinstance(row["prompt"], list) or isinstance(row["completion"], list)
    if format == "prompts":
        return isinstance(row["prompt"], list)
    return format in ("messages", "sharegpt") or (format == "alpaca" and template)


def turns_of(row: Row, format: str) -> tuple[list[Turn], list[Turn]]:
    """A row as a chat: the turns that are only read, and those of which the assistant's are trained.

    Raises InputError, which does not name the row, for what is no chat.
    """
    if format == "messages":
        turns = row["messages"]
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and {"from", "value"} <= turns[0].keys():
            raise InputError(
                "messages holds turns of from and value, as sharegpt does; write data.columns: {messages: conversations}"
            )
        return [], read_turns(turns)
    if format == "sharegpt":
        return [], _sharegpt_turns(row)
    if format == "alpaca":
        asked, output = _instruction(row), _text_in(row, "output")
        return [{"role": "user", "content": asked}], [{"role": "assistant", "content": output}]
    kinds = [isinstance(row[name], list) for name in ("prompt", "completion")]
    if not all(kinds):
        turns, text = ("prompt", "completion") if kinds[0] else ("completion", "prompt")
        raise InputError(
            f"{turns} is a list of turns and {text} is none; write both as texts, or both as lists of turns"
        )
    return read_turns(row["prompt"]), read_turns(row["completion"])


def texts_of(row: Row, format: str) -> tuple[str, str]:
    """(prompt, completion) of a row of `prompt_completion` or `alpaca`, without a chat template.

    Of alpaca instruction, input and output, with an empty line between. Raises InputError, which does not name the row, for what is no
    text.
    """
    if format == "alpaca":
        return f"{_instruction(row)}\n\n", _text_in(row, "output")
    return _text_in(row, "prompt"), _text_in(row, "completion")


def _instruction(row: Row) -> str:
    """An alpaca row's instruction, and below an empty line its input, if it has one."""
    given = "" if row.get("input") is None else _text_in(row, "input")
    return "\n\n".join(text for text in (_text_in(row, "instruction"), given) if text.strip())


def _text_in(row: Row, name: str) -> str:
    value = row[name]
    if isinstance(value, str):
        return value
    raise InputError(f"{name} must be text, it is {type(value).__name__}; make it text")


def _sharegpt_turns(row: Row) -> list[Turn]:
    """The turns of a sharegpt row; a column `system` comes first. Turns of role and content are read as those of messages."""
    value = row["conversations"]
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise InputError('conversations must be a list of turns; write [{"from": "human", "value": "..."}, ...]')
    chat = all(turn.get("role") is not None and turn.get("from") is None for turn in value)
    turns = read_turns(value if chat else [_sharegpt_turn(turn, number) for number, turn in enumerate(value)])
    system = "" if row.get("system") is None else _text_in(row, "system")
    if not system.strip():
        return turns
    if turns[0]["role"] == "system":
        raise InputError("there is a column system and a first turn of that role; keep one of them")
    return [{"role": "system", "content": system}, *turns]


def _sharegpt_turn(turn: Mapping[str, Any], number: int) -> Turn:
    who, value = turn.get("from"), turn.get("value")
    if who not in ROLES:
        raise InputError(
            f"turn {number}: {who!r} in from is none of {', '.join(ROLES)}; write the one that is meant, or leave the row out"
        )
    if not isinstance(value, str):
        raise InputError(f"turn {number}: its value is {type(value).__name__}; make it text")
    if who != "function_call":
        return {"role": ROLES[who], "content": value}
    try:
        calls = json.loads(value)
    except ValueError as error:
        raise InputError(
            f"turn {number}: a function_call is JSON, this is not ({first_line(error)}); "
            'write {"name": ..., "arguments": ...}'
        ) from error
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": ROLES[who], "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


# ---------------------------------------------------------------------------------------------------------------------
# What a recipe may say


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
