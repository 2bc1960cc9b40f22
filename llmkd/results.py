"""Files of results: published whole or not at all, and known again by a fingerprint of all that made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

NOT_OF_THE_MODEL = ("llmkd.json", "README.md")  # in an exported folder, but without influence on its outputs


def publish(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whenever we are stopped."""
    tmp = file.with_name(file.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, file)


def publish_json(file: Path, value: Any) -> None:
    """Publish strict JSON: a NaN raises ValueError."""
    publish(file, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False))


def publish_lines(file: Path, values: Iterable[Any]) -> None:
    """Publish one JSON value a line."""
    publish(file, "".join(json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n" for value in values))


def digest(parts: Sequence[str]) -> str:
    """A hash of texts, 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def contents(root: Path, files: Iterable[Path]) -> list[str]:
    """Each file's name under `root`, and the hash of its content."""
    named = []
    for file in files:
        with file.open("rb") as stream:
            named.append(f"{os.path.relpath(file, root)} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    return named


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
