"""Where the angles of a study lie, and what their files say."""

from __future__ import annotations

from typing import Any

FOLDER = "angles"  # of a study, where llmkd.evaluation.angles writes
WHEN = ("before", "after")


def tokens_read(one: dict[str, Any]) -> str:
    """How many tokens a student's stacks read: `12 tokens`, or `12 tokens in the encoder and 9 in the decoder`."""
    first, *rest = one["stacks"]
    where = [f" in the {stack['stack']}" if stack["stack"] else "" for stack in one["stacks"]]
    others = [f" and {stack['tokens']:,}{name}" for stack, name in zip(rest, where[1:], strict=True)]
    return f"{first['tokens']:,} tokens{where[0]}{''.join(others)}"
