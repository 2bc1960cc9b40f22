"""The prompts that texts are written after: a row's own, and a few fixed ones, whose texts show how the student changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc

from llmkd.data.batches import TokenRow
from llmkd.data.tokenized import Tokens
from llmkd.errors import InputError
from llmkd.rollouts.texts import Text

FIXED = 3
"""How many prompts stay the same through a run."""
_LOOKED_AT = 100
"""Among so many rows they are looked for."""
_LONGEST = 400
"""Characters that are kept of a prompt and of a text."""


def prompt_of(row: TokenRow) -> np.ndarray:
    """A row's tokens before the last of its stretches that are trained; all of a row without any."""
    ids, trained = np.asarray(row["input_ids"]), np.asarray(row["trained"], dtype=bool)
    if not trained.any():
        return ids
    begins = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]]))
    return ids[: begins[-1]]


def check_prompts(tokens: Tokens) -> None:
    """Raise InputError for a row that begins with what is trained and so asks nothing."""
    for source, part in zip(tokens.sources, _first_trained(tokens), strict=True):
        for place in np.flatnonzero(part):
            row = tokens.row(source.first + int(place))
            if not len(prompt_of(row)):
                raise InputError(
                    f"rollouts: row {row['row']} has no prompt, all of it is trained; give rows of prompt and completion, or chats"
                )


def _first_trained(tokens: Tokens) -> list[np.ndarray]:
    """By source, [rows] whether a row's first token is trained."""
    column = pc.call_function("list_element", [tokens.rows.data.column("trained"), 0]).to_numpy()
    return [column[source.first : source.first + source.rows] for source in tokens.sources]


def fixed_prompts(tokens: Tokens, longest: int) -> list[np.ndarray]:
    """The first different prompts of rows that are trained on, each shorter than `longest` tokens."""
    found: dict[bytes, np.ndarray] = {}
    for number in np.setdiff1d(np.arange(min(_LOOKED_AT, len(tokens.rows))), tokens.held_out):
        prompt = prompt_of(tokens.row(number))
        if 0 < len(prompt) < longest:
            found.setdefault(prompt.tobytes(), prompt)
        if len(found) == FIXED:
            break
    return list(found.values())


def in_words(text: Text, tokenizer: Any) -> dict[str, str]:
    """A prompt and what was written after it, as people read them: a long prompt's end, a long text's beginning."""
    prompt, written = (tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in (text.prompt, text.text))
    return {
        "prompt": prompt if len(prompt) <= _LONGEST else f"… {prompt[-_LONGEST:]}",
        "text": written if len(written) <= _LONGEST else f"{written[:_LONGEST]} …",
    }
