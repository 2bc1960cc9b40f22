"""scripts/slurm.sh: what it starts on each node, and what it does with the signals that Slurm sends; Slurm itself is played."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llmkd.files import ROOT

SRUN = """#!/usr/bin/env bash
# Of srun: the options, then the command on every node; SIGTERM is passed on, as srun does.
echo "srun $*" >> "$PLAYED"
echo "${SRUN_CPUS_PER_TASK-none} cores" >> "$PLAYED.cores"
while [[ $1 == --* ]]; do shift; done
tasks=()
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do
  until wait "$task"; code=$?; ! kill -0 "$task" 2>/dev/null; do :; done
  ((code == 0)) || status=$code
done
exit $status
"""
TORCHRUN = """#!/usr/bin/env bash
# Of torchrun: its own command line, and ranks that train until they are told to stop.
echo "torchrun $*" >> "$PLAYED"
[[ -z ${TRAINS:-} ]] || { trap 'echo "saved on $SLURM_NODEID" >> "$PLAYED"; exit 1' TERM; while :; do sleep 0.05; done; }
exit "${ENDS:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$PLAYED"
[[ $1 != show ]] || printf 'node0\\nnode1\\n'
"""
STARTS = (
    "--nnodes 2 --nproc-per-node 8 --master-addr node0 --master-port 20042 --shutdown-timeout 600 llmkd/train.py "
    "--recipe my recipe.yaml --set data.max_length=64"
)
ARGUMENTS = ["--recipe", "my recipe.yaml", "--set", "data.max_length=64"]


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The variables of a job of two nodes, with played commands in the environment's folder."""
    commands = tmp_path / "venv" / "bin"
    commands.mkdir(parents=True)
    for name, text in {"srun": SRUN, "torchrun": TORCHRUN, "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (commands / "activate").write_text(f"PATH={commands}:$PATH\n")
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PLAYED": str(tmp_path / "played"),
        "LLMKD_VENV": str(tmp_path / "venv"),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def _start(job: dict[str, str], script: Path) -> subprocess.Popen[str]:
    script.write_bytes((ROOT / "scripts" / "slurm.sh").read_bytes())  # Slurm runs a copy from a folder of its own
    command = ["bash", str(script), *ARGUMENTS]
    return subprocess.Popen(command, env=job, cwd=script.parent, stderr=subprocess.PIPE, text=True)


def _played(job: dict[str, str]) -> list[str]:
    return Path(job["PLAYED"]).read_text().splitlines()


@pytest.mark.parametrize("ends", [0, 3])
def test_a_torchrun_is_started_on_each_node_and_its_code_is_the_jobs(
    ends: int, job: dict[str, str], tmp_path: Path
) -> None:
    process = _start({**job, "ENDS": str(ends)}, tmp_path / "copy.sh")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == ends and "2 nodes of 8 ranks meet at node0:20042 (start 0 of job 42)" in said
    played = _played(job)
    assert played[0] == "scontrol show hostnames node[0-1]"
    assert played[1].startswith("srun --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c exec torchrun ")
    assert sorted(played[2:]) == [f"torchrun --node-rank {node} {STARTS}" for node in (0, 1)]


@pytest.mark.parametrize(
    ("given", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "96"}, "96 cores"),
        ({"SLURM_CPUS_PER_TASK": "96", "SRUN_CPUS_PER_TASK": "48"}, "48 cores"),
        ({}, "none cores"),
    ],
)
def test_srun_is_told_of_the_cores_that_sbatch_was_asked_for(
    given: dict[str, str], cores: str, job: dict[str, str], tmp_path: Path
) -> None:
    """It takes SLURM_CPUS_PER_TASK over no longer; without either variable a step has all cores of the job."""
    for name in ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"):
        job.pop(name, None)
    process = _start({**job, **given}, tmp_path / "copy.sh")
    assert process.wait(timeout=60) == 0
    assert Path(f"{job['PLAYED']}.cores").read_text().split("\n")[0] == cores


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_a_signal_has_the_ranks_save_and_only_the_times_end_requeues(
    number: signal.Signals, requeued: bool, job: dict[str, str], tmp_path: Path
) -> None:
    process = _start({**job, "TRAINS": "yes"}, tmp_path / "copy.sh")
    deadline = time.monotonic() + 60
    while not Path(job["PLAYED"]).is_file() or sum(line.startswith("torchrun") for line in _played(job)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # the played torchrun has set its trap
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "the ranks save and end" in said
    assert sorted(line for line in _played(job) if line.startswith("saved")) == ["saved on 0", "saved on 1"]
    assert ("scontrol requeue 42" in _played(job)) == requeued


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"SLURM_JOB_ID": ""}, "this is no Slurm job; start it by: sbatch --nodes 2"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ has no llmkd/train.py; give sbatch's command in the repository's root"),
        ({"LLMKD_VENV": "/nowhere"}, "/nowhere is no Python environment; make it by scripts/environment.sh"),
    ],
)
def test_a_mistake_is_one_sentence(changes: dict[str, str], sentence: str, job: dict[str, str], tmp_path: Path) -> None:
    process = _start({**job, **changes}, tmp_path / "copy.sh")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and said.startswith(f"[slurm.sh] error: {sentence}") and said.count("\n") == 1
    assert not Path(job["PLAYED"]).exists()


def test_what_sbatch_is_told(tmp_path: Path) -> None:
    """One task on each node, a warning before the time is over, and the script alone gets that."""
    lines = (ROOT / "scripts" / "slurm.sh").read_text().splitlines()
    told = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--ntasks-per-node=1", "--requeue", "--signal=B:USR1@600", "--open-mode=append"} <= told
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))
