"""`scripts/test.sh`: its exit status is that of its steps, with stand-ins for the programs that it calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PROGRAMS = {"lint": "ruff", "imports": "lint-imports", "types": "pyright", "tests": "python"}

# What the real one leaves for the scripts that source it: strict mode, the speaker and what a test needs besides.
ENVIRONMENT = "llmkd_say() { printf '%s\\n' \"$*\" >&2; }\nllmkd_add_triton() { :; }\nset -euo pipefail\n"


def run_with(folder: Path, statuses: dict[str, int]) -> subprocess.CompletedProcess[str]:
    """Runs the script where each named step's program exits with its status, and the others with 0."""
    (folder / "scripts").mkdir()
    shutil.copy(SCRIPTS / "test.sh", folder / "scripts")
    (folder / "scripts" / "environment.sh").write_text(ENVIRONMENT)
    (folder / "bin").mkdir()
    for step, program in PROGRAMS.items():
        stand_in = folder / "bin" / program
        stand_in.write_text(f"#!/bin/sh\nexit {statuses.get(step, 0)}\n")
        stand_in.chmod(0o755)
    return subprocess.run(
        ["bash", folder / "scripts" / "test.sh"],
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("statuses", [{}, *({step: 3} for step in PROGRAMS), {"tests": 5, "types": 4}], ids=str)
def test_the_exit_status_is_that_of_the_first_step_that_failed(tmp_path: Path, statuses: dict[str, int]) -> None:
    done = run_with(tmp_path, statuses)
    assert done.returncode == next(iter(statuses.values()), 0), done.stderr
    assert ("all passed" in done.stderr) == (not statuses)
    for step in statuses:
        assert step in done.stderr.splitlines()[-1]
