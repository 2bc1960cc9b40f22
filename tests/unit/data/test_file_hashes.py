"""Hashes of files on disk: a file that looks as it did is not read again, one that does not is."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkd.data import file_hashes
from llmkd.data.file_hashes import file_hash, keep
from llmkd.files import sha256

LATER = 3 * 10**9


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A new start of a run, a while after the files were written: it knows nothing, and lists what it reads."""
    now = time.time_ns

    def start() -> list[str]:
        hashed: list[str] = []
        monkeypatch.setattr(file_hashes, "_known", {})
        monkeypatch.setattr(file_hashes, "sha256", lambda file: hashed.append(file.name) or sha256(file))
        monkeypatch.setattr(file_hashes.time, "time_ns", lambda: now() + LATER)
        return hashed

    return start


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    return file


def test_a_later_start_does_not_read_the_file(file: Path, tmp_path: Path, start: Callable[[], list[str]]) -> None:
    hashed, kept = start(), tmp_path / "runs" / "hashes"
    whole = sha256(file)
    assert file_hash(file, kept) == file_hash(file, kept) == whole and hashed == ["rows.jsonl"]
    assert not kept.exists(), "looking writes nothing"
    keep([file], kept)
    hashed = start()
    assert file_hash(file, kept) == whole and hashed == []
    assert file_hash(file) == whole and hashed == [], "nor does the rest of that start"


def replaced(file: Path) -> None:
    """By another file, with its time and size."""
    other = file.with_name("other")
    other.write_text("two")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(other, file)


def overwritten(file: Path) -> None:
    """In place, with its size, and its time of change set back."""
    before = file.stat()
    time.sleep(0.02)  # longer than the file system's clock stands still
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [lambda file: file.write_text("three"), replaced, overwritten])
def test_a_changed_file_is_noticed(
    file: Path, tmp_path: Path, start: Callable[[], list[str]], change: Callable[[Path], object]
) -> None:
    start()
    before = file_hash(file)
    keep([file], tmp_path / "hashes")
    change(file)
    for _ in range(2):
        hashed = start()
        assert file_hash(file, tmp_path / "hashes") == sha256(file) != before and hashed == ["rows.jsonl"]
    keep([file], tmp_path / "hashes")
    hashed = start()
    assert file_hash(file, tmp_path / "hashes") == sha256(file) and hashed == []


def test_the_hash_of_a_file_changed_a_moment_ago_is_not_kept(
    file: Path, tmp_path: Path, start: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again within what the file system's clock tells apart."""
    hashed, kept = start(), tmp_path / "hashes"
    state = file.stat()
    monkeypatch.setattr(file_hashes.time, "time_ns", lambda: state.st_ctime_ns + 2 * 10**9)
    assert file_hash(file, kept) == file_hash(file, kept) and hashed == ["rows.jsonl"] * 2
    keep([file], kept)
    assert not kept.exists()
    os.utime(file, ns=(0, 0))  # its owner's time says nothing
    assert file_hash(file, kept) and hashed == ["rows.jsonl"] * 3
    monkeypatch.setattr(file_hashes.time, "time_ns", lambda: file.stat().st_ctime_ns + 2 * 10**9 + 1)
    assert file_hash(file, kept) == file_hash(file, kept) and hashed == ["rows.jsonl"] * 4


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"sha256": "0"}', None])
def test_a_damaged_record_is_not_believed(
    file: Path, tmp_path: Path, start: Callable[[], list[str]], damage: str | None
) -> None:
    """None: another digit in the hash, which would make the rows look like others."""
    start()
    whole = file_hash(file)
    keep([file], tmp_path / "hashes")
    (record,) = (tmp_path / "hashes").iterdir()
    assert json.loads(record.read_text())["path"] == str(file)
    record.write_text(record.read_text().replace(whole, whole[:-1] + "x") if damage is None else damage)
    hashed = start()
    assert file_hash(file, tmp_path / "hashes") == whole and hashed == ["rows.jsonl"]
    keep([file], tmp_path / "hashes")
    hashed = start()
    assert file_hash(file, tmp_path / "hashes") == whole and hashed == []


def test_a_folder_that_can_t_be_written_costs_a_reading(
    file: Path, tmp_path: Path, start: Callable[[], list[str]]
) -> None:
    start()
    (tmp_path / "hashes").write_text("no folder")
    assert file_hash(file, tmp_path / "hashes") == sha256(file)
    keep([file], tmp_path / "hashes")
    assert stat.S_ISREG((tmp_path / "hashes").stat().st_mode)
