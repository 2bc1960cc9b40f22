"""The prompts that texts are written after: a row's own, and a few fixed ones, whose texts show how the student changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmkd.data.batches import TokenRow
from llmkd.data.tokenized import Tokens
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
