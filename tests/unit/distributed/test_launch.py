"""Launches beside each other: how many, on which GPUs, and what becomes of the others when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmkd.distributed import launch as module
from llmkd.distributed.launch import Ending, Launch, launch_each


class Started:
    """In place of ranks: processes that run a line of Python each."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.variables: list[Mapping[str, str]] = []
        self.most = 0

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        *,
        name: str,
        files: tuple[int, int, int],
    ) -> Any:
        command = [sys.executable, "-c", arguments[0]]
        environment = {**os.environ, **variables}
        self.processes.append(
            subprocess.Popen(command, env=environment, stdin=files[0], stdout=files[1], stderr=files[2])
        )
        self.variables.append(variables)
        self.most = max(self.most, sum(process.poll() is None for process in self.processes))
        return self.processes[-1]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    fake = Started()
    monkeypatch.setattr(module.starting, "get_ready", lambda: None)
    monkeypatch.setattr(module.starting, "running", lambda: None)
    monkeypatch.setattr(module.starting, "start", fake.start)
    return fake


WAIT = "import time; time.sleep(0.3)"


def test_so_many_at_a_time_each_with_gpus_of_its_own(started: Started, tmp_path: Path) -> None:
    launches = [Launch(2, [f"{WAIT}; print('here {n}')"], tmp_path / "logs" / f"{n}.log") for n in range(3)]
    assert launch_each(launches, 2, ["0", "1", "4", "5"]) == [Ending(0, False)] * 3
    assert len(started.processes) == 6 and started.most == 4
    cards = [variables["CUDA_VISIBLE_DEVICES"] for variables in started.variables]
    assert cards[:4] == ["0,1", "0,1", "4,5", "4,5"] and cards[4] == cards[5] in ("0,1", "4,5")
    ports = {variables["MASTER_PORT"] for variables in started.variables}
    assert len(ports) == 3
    assert [variables["RANK"] for variables in started.variables] == ["0", "1"] * 3
    assert {variables["LLMKD_RUNS"] for variables in started.variables} == {"2"}
    assert (tmp_path / "logs" / "2.log").read_text() == "here 2\nhere 2\n"


def test_one_that_fails_costs_the_others_nothing(started: Started) -> None:
    launches = [Launch(1, ["raise SystemExit(2)"]), Launch(1, [WAIT]), Launch(1, [WAIT])]
    assert launch_each(launches, 2) == [Ending(2, False), Ending(0, False), Ending(0, False)]
    assert "CUDA_VISIBLE_DEVICES" not in started.variables[0]


def test_one_that_fails_and_does_not_end_holds_no_other_up(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    real_time, began = time.monotonic, time.monotonic()

    def others_ended() -> bool:
        assert real_time() < began + 60, "the others were not started beside it"
        return len(started.processes) == 5 and all(process.poll() == 0 for process in started.processes[2:])

    monkeypatch.setattr(module.time, "monotonic", lambda: real_time() + 1000 if others_ended() else began)
    deaf = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "sys.exit(3) if os.environ['RANK'] == '0' else time.sleep(600)"
    )
    endings = launch_each([Launch(2, [deaf]), *[Launch(1, [WAIT])] * 3], 2)
    assert endings == [Ending(3, False), *[Ending(0, False)] * 3]
    assert started.processes[1].poll() in (-signal.SIGTERM, -signal.SIGKILL)


def test_a_signal_that_comes_while_ranks_are_started_reaches_them(started: Started) -> None:
    real = started.start

    def start(*given: Any, **options: Any) -> Any:
        process = real(*given, **options)
        signal.raise_signal(signal.SIGTERM)  # before the launch knows of it
        return process

    module.starting.start = start  # type: ignore[assignment]  # the fixture puts the real one back
    (ending, other) = launch_each([Launch(1, ["import time; time.sleep(60)"])] * 2)
    assert ending == Ending(128 + signal.SIGTERM, True) and other is None


def test_a_signal_goes_to_all_and_no_other_begins(started: Started) -> None:
    ends = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(60)"
    real = started.start

    def start(*given: Any, **options: Any) -> Any:
        process = real(*given, **options)
        if len(started.processes) == 2:
            signal.setitimer(signal.ITIMER_REAL, 1.0)
        return process

    module.starting.start = start  # type: ignore[assignment]  # the fixture puts the real one back
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        assert launch_each([Launch(1, [ends])] * 3, 2) == [Ending(0, True), Ending(0, True), None]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_nothing_is_launched_for_nothing(started: Started) -> None:
    assert launch_each([]) == [] and not started.processes
