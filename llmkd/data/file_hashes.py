"""Hashes of files that are too large to be read at every start: kept on disk, and believed while a file looks as it did.

    <folder>/<hash of the path>.json      a file's look, and the hash of what it held

As git's index does it: a file with the size, the times of change and the inode that it had is taken to hold what it held. A file that was
changed less than `RACY` before it was hashed may change again and look the same, so that its hash is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from llmkd.files import read_checked, sha256, write_checked

RACY = 2 * 10**9
"""Nanoseconds: the coarsest times of change that a file system in use keeps."""


@dataclass(frozen=True)
class Look:
    """What tells whether a file is the one that was hashed."""

    path: str
    size: int
    modified: int
    """Nanoseconds, as its owner may set it."""
    changed: int
    """Nanoseconds, as the file system sets it with each change of content, name or time."""
    inode: int

    @classmethod
    def of(cls, file: Path) -> Look:
        """A file's look now."""
        state = file.stat()
        return cls(str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)

    @property
    def name(self) -> str:
        """Of the file in which its hash is kept."""
        return f"{hashlib.sha256(self.path.encode()).hexdigest()[:16]}.json"


_known: dict[Look, str] = {}
"""What this process has hashed or found."""


def file_hash(file: Path, kept: Path | None = None) -> str:
    """The SHA-256 of a file, from the folder of hashes `kept` where it is there. Nothing is written."""
    look = Look.of(file)
    if look in _known:
        return _known[look]
    found = None if kept is None else read_checked(kept / look.name)
    if found is not None and found == {**asdict(look), "sha256": found.get("sha256")}:
        return _known.setdefault(look, str(found["sha256"]))
    began = time.time_ns()
    value = sha256(file)
    if began - max(look.modified, look.changed) > RACY:
        _known[look] = value
    return value


def keep(files: Iterable[Path], folder: Path) -> None:
    """Write what this process knows of these files into the folder of hashes; where that can't be done, they are hashed again."""
    with contextlib.suppress(OSError):
        for look in map(Look.of, files):
            value = {**asdict(look), "sha256": _known.get(look)}
            if look in _known and read_checked(folder / look.name) != value:
                folder.mkdir(parents=True, exist_ok=True)
                write_checked(folder / look.name, value)
