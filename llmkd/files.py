"""Result files: written completely or not at all, and identified by a fingerprint of everything that decided their content."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).resolve().parent
"""The folder of the package llmkd."""
ROOT = PACKAGE.parent if (PACKAGE.parent / "ds_configs").is_dir() else PACKAGE / "_shipped"
"""The folder of recipes/, ds_configs/ and eval/: the repository, or what a wheel carries."""


def fetched_by(path: str) -> str:
    """The end of a sentence about a missing path of a shipped recipe: which script fetches it; nothing for any other path.

    `scripts/fetch_X.py` fetches `runs/X`.
    """
    folders = Path(path).parts
    script = ROOT / "scripts" / f"fetch_{folders[1]}.py" if len(folders) > 1 and folders[0] == "runs" else None
    return f"; python scripts/{script.name} fetches it" if script is not None and script.is_file() else ""


def write_text(file: Path, text: str, *, durable: bool = False) -> None:
    """Write a file completely or not at all, even if the process is killed; if `durable`, even if the machine stops."""
    tmp = file.with_name(file.name + ".tmp")
    tmp.write_text(text)
    if durable:
        sync(tmp)
    os.replace(tmp, file)


def write_json(file: Path, value: Any) -> None:
    """Publish strict JSON: a NaN raises ValueError."""
    write_text(file, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False))


def digest(parts: Sequence[str]) -> str:
    """A hash of texts, 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def file_hashes(root: Path, files: Iterable[Path]) -> list[str]:
    """Each file's name under `root`, and the hash of its content."""
    return [f"{os.path.relpath(file, root)} {sha256(file)}" for file in files]


def sources(*modules: ModuleType) -> list[str]:
    """Each module's name without its packages, and the hash of its source; where the module's file lies does not matter."""
    hashes = [hashlib.sha256(inspect.getsource(module).encode()).hexdigest() for module in modules]
    return [f"{module.__name__.rpartition('.')[2]} {value}" for module, value in zip(modules, hashes, strict=True)]


def read(file: Path) -> Any:
    """A JSON file's value, or None if it is not there or not whole."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def read_lines(file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file's first `limit` lines; a line that a killed process left half-written is left out."""
    try:
        with file.open(errors="replace") as lines:
            values = map(_object, islice(lines, limit))
            return [value for value in values if value is not None]
    except OSError:
        return []


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object that a line holds; None where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def forget_after(file: Path, step: int) -> None:
    """Drop a JSONL file's lines of steps that a resumed run will do again, and a last line that a killed run left half-written."""
    if not file.is_file():
        return
    kept = []
    for text in file.read_text(errors="replace").splitlines():
        done = (_object(text) or {}).get("step")
        if isinstance(done, int) and done <= step:
            kept.append(text)
    tmp = file.with_suffix(".tmp")
    tmp.write_text("".join(text + "\n" for text in kept))
    os.replace(tmp, file)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, then put it in place by one rename."""
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    write(tmp)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(tmp, folder)


def write_json_durably(file: Path, values: Any) -> None:
    """Publish a small file, written out to the disk before it gets its name."""
    write_text(file, json.dumps(values, indent=1), durable=True)


def write_checked(file: Path, values: Mapping[str, Any]) -> None:
    """As `write_json_durably`, with a checksum among the values."""
    write_json_durably(file, {**values, "checksum": checksum(values)})


def read_checked(file: Path) -> dict[str, Any] | None:
    """The values of `write_checked`; None where the file is not there, or not what was written."""
    values = read(file)
    return values if isinstance(values, dict) and values.pop("checksum", None) == checksum(values) else None


def checksum(values: Any) -> str:
    """A hash of what JSON can hold, to stand beside it in a file."""
    as_read = json.loads(json.dumps(values))  # keys are text there
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def sync(file: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sha256(file: Path) -> str:
    """The hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_record(file: Path) -> dict[str, Any]:
    """What `is_as_recorded` knows a file by: its size, its time of change in nanoseconds, and the hash of its bytes."""
    state = file.stat()
    return {"bytes": state.st_size, "changed": state.st_mtime_ns, "sha256": sha256(file)}


def is_as_recorded(file: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file is there and as it was recorded, by a record that is whole. Its bytes are read only where its time of change is
    another."""
    try:
        state = file.stat()
        if state.st_size != record["bytes"]:
            return False
        return state.st_mtime_ns == record["changed"] or sha256(file) == record["sha256"]
    except (OSError, KeyError, TypeError):
        return False
