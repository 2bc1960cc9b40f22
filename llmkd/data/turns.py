"""Chats and tools as users' files hold them, made into what a chat template reads."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmkd.errors import InputError, first_line

Turn = dict[str, Any]
"""`role`, `content` (a text) and whatever else the template reads, e.g. `tool_calls`."""
Tools = list[Turn]
"""What the assistant may call, each as a JSON object."""
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHTS, THOUGHTS_END = "<think>", "</think>"
"""What a model writes around its thoughts, before its answer (Qwen3, DeepSeek-R1 and most others)."""
TEMPLATE_SECONDS = 20
"""A chat template is a program that came with the model; one that runs longer is taken for endless."""


def read_turns(value: object) -> list[Turn]:
    """A row's chat: contents are texts, and keys without a value, which Parquet and Arrow fill in, are left out.

    Raises InputError for what is no chat, and for contents other than text.
    """
    if not isinstance(value, list) or not all(isinstance(turn, dict) and turn.get("role") for turn in value):
        raise InputError('messages must be a list of turns; write [{"role": "user", "content": "..."}, ...]')
    turns = [_without_nothing(turn) for turn in value]
    for number, turn in enumerate(turns):
        if "content" not in turn and "tool_calls" not in turn:
            raise InputError(
                f'turn {number} has no content; messages must be a list of turns, {{"role": ..., "content": "..."}}'
            )
        turn["content"] = _text_of(turn.get("content", ""), number)
    return turns


def read_tools(value: object) -> Tools | None:
    """The tools that a row offers to the assistant, as JSON or as JSON text; None where there are none."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise InputError(f"tools are a text that is no JSON ({first_line(error)}); write a list of tools") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError('tools must be a list; write [{"type": "function", "function": {"name": ..., ...}}, ...]')
    return [_without_nothing(tool) for tool in tools]


def has_answer(turn: Turn) -> bool:
    """Whether the assistant writes something in its turn; an empty one would teach to stop at once."""
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def rendered(
    turns: Sequence[Turn],
    tokenizer: Any,
    tools: Tools | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The chat as its template writes it; `options`: what the template is told beside it.

    Raises InputError where the template refuses the chat or does not end.
    """
    try:
        with _time_limit(TEMPLATE_SECONDS):
            return tokenizer.apply_chat_template(
                list(turns), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **(options or {})
            )
    except TimeoutError as error:
        raise InputError(
            f"the tokenizer's chat template does not end within {TEMPLATE_SECONDS} s; give the tokenizer another template"
        ) from error
    except Exception as error:  # a template may raise anything
        reason = first_line(error)
        raise InputError(
            f"the tokenizer's chat template refuses the messages ({reason}); fix one of the two"
        ) from error


def check_options(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Raise InputError for options that the tokenizer's chat template does not read."""
    if options and not tokenizer.chat_template:
        raise InputError(
            "data.template_options: the tokenizer has no chat template that would read them; leave them out, or give it one"
        )
    for name in options:
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise InputError(
                f"data.template_options: the tokenizer's chat template does not read {name!r}; look for its options in the template, or "
                "leave it out"
            )


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Inside, TimeoutError after so long; in the main thread, which alone can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(number: int, frame: object) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, expired)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, handler)


def _text_of(content: object, turn: int) -> str:
    """A turn's content as one text; OpenAI's files may hold it in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"turn {turn}: its content is {type(content).__name__}; make it text")
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
            part = part["text"]
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InputError(
                f"turn {turn}: its content has a part of the type {kind!r}, and only text is trained; leave the row out"
            )
        texts.append(part)
    return "".join(texts)


def _without_nothing(value: Any) -> Any:
    """The same without keys whose value is None, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nothing(part) for key, part in value.items() if part is not None}
    return [_without_nothing(part) for part in value] if isinstance(value, list) else value
