"""A process that ends with the one that started it, and a folder in which only one works."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmkd.errors import InputError
from llmkd.processes import LOCK, Holder, holder, only_one_in

PARENT = """
import os, subprocess, sys
from llmkd.processes import parent_variable
child = "import sys, time; from llmkd.processes import end_with_parent; end_with_parent(); print('ready', flush=True); time.sleep(600)"
started = subprocess.Popen([sys.executable, "-c", child], env={**os.environ, **parent_variable()}, stdout=subprocess.PIPE, text=True)
started.stdout.readline()
print(started.pid, flush=True)
sys.stdin.read()
"""
HOLDER = """
import sys
from pathlib import Path
from llmkd.processes import only_one_in
with only_one_in(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""


def _start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_ends_with_its_parent_however_that_ends() -> None:
    parent = _start(PARENT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert _is_alive(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while _is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_process_is_refused_and_a_killed_one_holds_nobody_up(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = _start(HOLDER, str(folder))
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    sentence = rf"{folder}: process {process.pid} on .* \(since 2.*\) works in this folder; wait for it, stop it, or choose another folder"
    with pytest.raises(InputError, match=sentence), only_one_in(folder, patience_seconds=0.2):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / LOCK).is_file()  # what the killed one left
    with only_one_in(folder):
        assert str(os.getpid()) in (folder / LOCK).read_text()
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_who_works_in_a_folder_is_told_and_a_killed_one_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert holder(folder) is None
    process = _start(HOLDER, str(folder))
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    found = holder(folder)
    assert found is not None and found.is_certain and found.name.startswith(f"process {process.pid} on ")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (folder / LOCK).open() as other:  # who asks at the same time is not taken for a holder
        fcntl.flock(other, fcntl.LOCK_SH)
        assert holder(folder) is None
    with only_one_in(folder, patience_seconds=0):
        found = holder(folder)
        assert found is not None and found.is_certain and str(os.getpid()) in found.name
    assert holder(folder) is None and list(folder.iterdir()) == []


@pytest.mark.parametrize("locks", [True, False])
def test_what_another_machine_left_can_not_be_told(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its locks are not seen here, or the file system has none."""
    about = {"process": 7, "host": "elsewhere", "since": "2031-01-01T00:00:00+00:00"}
    (tmp_path / LOCK).write_text(json.dumps(about))
    if not locks:

        def flock(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("fcntl.flock", flock)
    left = Holder("process 7 on elsewhere (since 2031-01-01T00:00:00+00:00)", is_certain=False)
    assert holder(tmp_path) == left and json.loads((tmp_path / LOCK).read_text()) == about


def test_a_folder_in_which_nothing_was_written_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="refused"), only_one_in(tmp_path / "runs" / "a" / "run"):
        raise InputError("refused")
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_when_the_holder_leaves(tmp_path: Path) -> None:
    process = _start(HOLDER, str(tmp_path / "run"))
    assert process.stdout is not None and process.stdin is not None and process.stdout.readline() == "inside\n"
    process.stdin.close()
    with only_one_in(tmp_path / "run", patience_seconds=60):
        assert process.wait() == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """ENOSYS is what Lustre gives where it is mounted without flock."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with only_one_in(tmp_path / "run"):
        assert "this file system has no locks" in caplog.text
