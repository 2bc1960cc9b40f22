"""Result files: written whole or not at all, and known by a fingerprint of all that they are made of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

NOT_OF_THE_MODEL = ("llmkd.json", "README.md")  # in an exported folder, but without influence on its outputs


def publish(file: Path, text: str) -> None:
    """Write a file so that at any moment it is the old one or the new one, whole."""
    tmp = file.with_name(file.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, file)


def up_to_date(file: Path, fingerprint: str) -> bool:
    """Whether the file is the result of exactly this, and no failure."""
    return written(file, fingerprint) and json.loads(file.read_text())["error"] is None


def written(file: Path, fingerprint: str) -> bool:
    """Whether the file is the result of exactly this, be it a failure."""
    try:
        return json.loads(file.read_text())["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):  # none, or not whole
        return False


def digest(parts: Sequence[str]) -> str:
    """One hash of several texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def contents(root: Path, files: Iterable[Path]) -> list[str]:
    """Each file's name under `root`, and the hash of its content."""
    named = []
    for file in files:
        with file.open("rb") as stream:
            named.append(f"{os.path.relpath(file, root)} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    return named


def model_contents(model: Path) -> list[str]:
    """The same for all files of a model's folder that have a say in its outputs."""
    found = (file for file in model.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    kept = sorted(file for file in found if not file.name.startswith(".") and file.name not in NOT_OF_THE_MODEL)
    return contents(model, kept)
