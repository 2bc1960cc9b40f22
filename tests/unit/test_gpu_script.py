"""benchmarks/gpu.sh: its parts, their limits and logs, with a machine of pretended GPUs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from llmkd.files import ROOT

PYTHON = """#!/usr/bin/env bash
echo "python3 $*"
case "$*" in *pip*) exit 0 ;; *test_head*) exit 3 ;; *benchmarks.head*) sleep 60 ;; esac
"""
NVIDIA = """#!/usr/bin/env bash
case "$*" in *-L*) echo "GPU 0: pretended" ;; *noheader*) echo 143771 ;; *) echo "pretended, 143771 MiB" ;; esac
"""


def test_each_part_has_a_limit_and_a_log_and_leaves_the_others(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("python3", PYTHON), ("nvidia-smi", NVIDIA)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    script = (ROOT / "benchmarks" / "gpu.sh").read_text().replace("part head 120", "part head-alone 1")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu.sh").write_text(script)
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "LLMKD_WHEELS": str(tmp_path), "LLMKD_LOGS": str(tmp_path)}
    command = ["bash", str(tmp_path / "benchmarks" / "gpu.sh"), "imports", "tests-head-o", "head-a", "large"]
    said = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    parts = [line.split(" after ")[0] for line in said.stdout.splitlines() if line.startswith("== ")]
    assert parts == [
        "== imports: exit 0",
        "== tests-head-others: exit 3",
        "== head-alone: exit 124",
        "== large: exit 0",
    ]
    assert "--deepspeed zero2" in (tmp_path / "large.log").read_text()
    assert not (tmp_path / "trl.log").exists()


def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/usr/bin/env bash\necho none >&2\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    logs = tmp_path / "logs"
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LLMKD_LOGS": str(logs)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    said = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)
    assert said.returncode == 2 and not logs.exists()
    assert said.stderr == "[gpu] error: nvidia-smi finds no GPU on this machine; nothing was run\n" and not said.stdout
