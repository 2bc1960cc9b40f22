"""A child that is killed is gone with all that it has started, or it is said what is left."""

from __future__ import annotations

import logging
import subprocess
import time
from pathlib import Path

import pytest

from llmkd import processes
from llmkd.inference.child import Child


def started(folder: Path) -> tuple[Child, int]:
    """A child, and the number of a process that it has started."""
    child, said = Child("tests.unit.inference.with_another", {}, folder / "log"), list[str]()
    assert child.do(300, said.append, lambda share: None) is None
    return child, int(said[0])


def lives(number: int) -> bool:
    file = Path(f"/proc/{number}/stat")
    return file.exists() and file.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_a_killed_child_has_started_has_ended_too(tmp_path: Path) -> None:
    child, number = started(tmp_path)
    assert lives(number)
    child.kill()
    assert not lives(number)


def test_what_does_not_end_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    child, number = started(tmp_path)
    asked: list[tuple[int, float]] = []
    monkeypatch.setattr(processes, "wait_for_group", lambda *given: asked.append(given) or [number])
    with caplog.at_level(logging.WARNING, "llmkd"):
        child.kill()
    assert len(asked) == 1 and asked[0][1] == 60
    assert (
        f"processes {number} have not ended 60 s after they were killed; what they hold of a GPU's memory"
        in caplog.text
    )


def test_a_group_is_waited_for_until_it_has_ended_or_for_so_long() -> None:
    process = subprocess.Popen(["sleep", "1"], process_group=0)
    assert processes.wait_for_group(process.pid, 0.1) == [process.pid]
    began = time.monotonic()
    assert processes.wait_for_group(process.pid, 30) == []  # it has ended, and nobody has asked how
    assert time.monotonic() - began < 20 and process.wait() == 0
