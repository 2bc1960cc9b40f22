"""A scoring step's results: which are there, and known again by a fingerprint of all that made them."""

from __future__ import annotations

import json
from pathlib import Path

from llmkd.files import contents

NOT_OF_THE_MODEL = ("llmkd.json", "README.md")  # in an exported folder, but without influence on its outputs


def model_contents(folder: Path) -> list[str]:
    """The same of all files that decide what a model folder's model does; none where there is no such folder."""
    found = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    ours = (file for file in found if not file.name.startswith(".") and file.name not in NOT_OF_THE_MODEL)
    return contents(folder, sorted(ours))


def written(file: Path, fingerprint: str) -> bool:
    """Whether the result file is there, whole, and of this fingerprint."""
    try:
        return json.loads(file.read_text())["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):  # none, or not whole
        return False


def up_to_date(file: Path, fingerprint: str) -> bool:
    """Whether the result need not be made again: a noted error is not a result."""
    return written(file, fingerprint) and json.loads(file.read_text())["error"] is None


def one_sentence(error: BaseException) -> str:
    """An exception as a result file notes it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
