"""What the launcher of one machine says of ranks that can't say it themselves."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from llmkd import processes
from llmkd.distributed import launch
from llmkd.starting import Process


class Rank:
    """A rank that has ended, or runs until it is told to stop."""

    def __init__(self, code: int | None) -> None:
        self._code = code

    def poll(self) -> int | None:
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        raise NotImplementedError

    def send_signal(self, sig: int) -> None:
        self._code = -sig


@pytest.mark.parametrize(
    ("kills", "why"), [(4, ""), (5, ", by the kernel: its memory, or the job's share of it, is used up;")]
)
@pytest.mark.parametrize("log", [None, Path("study/logs/forward-s0.log")])
def test_a_killed_rank_is_told_and_that_the_kernel_did_it(
    kills: int, why: str, log: Path | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "memory_kills", lambda: kills)
    monkeypatch.setattr(launch.time, "monotonic", iter(range(0, 10**6, 3)).__next__)
    ranks: list[Process] = [Rank(0), Rank(-signal.SIGKILL), Rank(None)]
    running = launch._Running(launch.Launch(3, [], log), 0, ranks, kills=4)
    assert next(code for code in iter(running.ended, ()) if code is not None) == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    title = "" if log is None else "forward-s0: "
    assert said.count("Error: ") == 1 and said.startswith(f"Error: {title}rank 1 was killed (SIGKILL){why}"), said


@pytest.mark.skipif(
    not re.search(r"^oom_kill \d+$", (Path("/proc/vmstat").read_text() if sys.platform == "linux" else ""), re.M),
    reason="not counted here",
)
def test_the_kernels_count_is_read() -> None:
    count = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.M)
    assert count is not None and processes.memory_kills() >= int(count[1])
