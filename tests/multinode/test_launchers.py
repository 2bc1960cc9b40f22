"""What operators type, on two nodes: the deepspeed launcher without and with ssh, torchrun with both of its ways to meet."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import jobs
from tests.distributed.test_resume import lines
from tests.multinode.nodes import PORT, Node, two_nodes
from tests.tiny import assert_same_weights, quick

COMMANDS = Path(sys.executable).parent
Nodes = tuple[Node, Node]
PATIENCE = 900
WHOLE: dict[str, Any] = {"matching.strategy": "reverse", "train.micro_batch_size": 2}
PIPELINE = {"teacher.placement": "pipeline", "teacher.stages": 4}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with two_nodes(tmp_path_factory.mktemp("launchers")) as both:
        yield both


def trains(tiny: Path, folder: Path, changes: dict[str, Any]) -> list[str]:
    """The program and its arguments, for any launcher."""
    sets = [part for key, value in {**WHOLE, **changes}.items() for part in ("--set", f"{key}={value}")]
    return ["llmkd/train.py", "--recipe", str(tiny / "recipe.yaml"), "--output", str(folder / "run"), *sets]


def deepspeed(number: int, folder: Path, *more: str) -> list[str]:
    """The launcher on one of the nodes, without ssh."""
    (folder / "hostfile").write_text("node0 slots=2\nnode1 slots=2\n")
    place = f"--no_ssh --node_rank {number} --master_addr 10.77.0.1 --master_port {PORT}"
    return [str(COMMANDS / "deepspeed"), "--hostfile", str(folder / "hostfile"), *place.split(), *more]


def torchrun(number: int, *more: str, backend: str = "c10d") -> list[str]:
    """The launcher on one of the nodes."""
    meeting = {
        "c10d": f"--rdzv-backend c10d --rdzv-endpoint node0:{PORT} --rdzv-id tests",
        "static": f"--node-rank {number} --master-addr node0 --master-port {PORT}",
    }
    return [str(COMMANDS / "torchrun"), "--nnodes", "2", "--nproc-per-node", "2", *meeting[backend].split(), *more]


def start(nodes: Nodes, commands: Sequence[Sequence[str]], folder: Path) -> list[subprocess.Popen[bytes]]:
    """A command on each node."""
    return [node.start(command, folder / f"{node.name}.log") for node, command in zip(nodes, commands, strict=True)]


def said(folder: Path) -> str:
    """What the launchers and their ranks say."""
    return "\n".join(log.read_text()[-6000:] for log in sorted(folder.glob("node*.log")))


def check(tiny: Path, world: Any, folder: Path, changes: dict[str, Any], nodes: Nodes) -> None:
    """The student is that of one rank with a whole teacher, and nothing runs any more."""
    whole = {**WHOLE, **quick(tiny), "teacher.placement": "replicated"}
    whole |= {key: value for key, value in changes.items() if key.startswith("train.") and key not in whole}
    recipe = load_recipe(tiny / "recipe.yaml").changed(whole)
    assert train(world, jobs.distil_job(world, recipe, folder / "alone"))
    ours, theirs = (load_file(folder / run / "model" / "model.safetensors") for run in ("run", "alone"))
    assert_same_weights(ours, theirs, 1e-6)
    losses = [[line["loss"] for line in lines(folder / run)] for run in ("run", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert [node.processes("train.py") for node in nodes] == [[], []]


def test_deepspeed_with_a_host_file(nodes: Nodes, tiny: Path, world: Any, tmp_path: Path) -> None:
    program = trains(tiny, tmp_path, PIPELINE)
    launchers = start(nodes, [deepspeed(number, tmp_path, *program) for number in (0, 1)], tmp_path)
    assert [launcher.wait(PATIENCE) for launcher in launchers] == [0, 0], said(tmp_path)
    check(tiny, world, tmp_path, PIPELINE, nodes)


@pytest.mark.parametrize(
    ("backend", "changes"),
    [pytest.param("c10d", PIPELINE, marks=pytest.mark.slow), ("static", {"teacher.placement": "zero3"})],
    ids=["c10d", "static"],
)
def test_torchrun(backend: str, changes: dict[str, Any], nodes: Nodes, tiny: Path, world: Any, tmp_path: Path) -> None:
    """The documented line, which `scripts/slurm.sh` has too, is tried in every run of the tests: a minute on two busy cores."""
    program = trains(tiny, tmp_path, changes)
    launchers = start(nodes, [torchrun(number, *program, backend=backend) for number in (0, 1)], tmp_path)
    assert [launcher.wait(PATIENCE) for launcher in launchers] == [0, 0], said(tmp_path)
    check(tiny, world, tmp_path, changes, nodes)


@pytest.mark.slow
@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("sshd", "ssh", "ssh-keygen", "pdsh")),
    reason="needs sshd, ssh and pdsh (Debian: openssh-server openssh-client pdsh)",
)
def test_deepspeed_by_ssh(nodes: Nodes, tiny: Path, world: Any, tmp_path: Path) -> None:
    """One command on one node, a file `.deepspeed_env` for what the other is to have."""
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    serves = {
        "HostKey": keys / "host",
        "AuthorizedKeysFile": keys / "user.pub",
        "StrictModes": "no",
        "PermitRootLogin": "prohibit-password",
        "PidFile": "none",
    }
    Path("/run/sshd").mkdir(exist_ok=True)  # where it confines what it does not trust yet
    options = [f"-o{key}={value}" for key, value in serves.items()]
    for node in nodes:
        node.start([str(shutil.which("sshd")), "-D", "-e", *options], tmp_path / f"sshd-{node.name}.log")
    (tmp_path / "hostfile").write_text("node0 slots=2\nnode1 slots=2\n")
    (tmp_path / "sends").write_text("HF_HUB_OFFLINE=1\nTORCH_CPP_LOG_LEVEL=ERROR\nLLMKD_TEST_SENT=by-file\n")
    asks = f"-i {keys / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    variables = {"PDSH_SSH_ARGS_APPEND": asks, "DS_ENV_FILE": str(tmp_path / "sends")}
    command = (
        f"deepspeed --hostfile {tmp_path / 'hostfile'} --no_ssh_check --master_addr 10.77.0.1 --master_port {PORT}"
    )
    program = trains(tiny, tmp_path, PIPELINE)
    try:
        launcher = nodes[0].start(
            [str(COMMANDS / "deepspeed"), *command.split()[1:], *program], tmp_path / "node0.log", variables
        )
        deadline = time.monotonic() + PATIENCE
        while not all(len(rank_processes(node)) == 2 for node in nodes):
            assert time.monotonic() < deadline and launcher.poll() is None, said(tmp_path) + said(tmp_path / "sshd")
            time.sleep(0.02)
        for number in [number for node in nodes for number in rank_processes(node)]:
            have = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
            assert {b"LLMKD_TEST_SENT=by-file", b"HF_HUB_OFFLINE=1"} <= set(have), "of `.deepspeed_env`"
        assert launcher.wait(PATIENCE) == 0, said(tmp_path) + said(tmp_path / "sshd")
    finally:
        for node in nodes:
            node.kill("sshd")
    check(tiny, world, tmp_path, PIPELINE, nodes)


def await_step(step: int, launchers: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until so many steps are logged."""
    deadline = time.monotonic() + PATIENCE
    while not any(int(str(line["step"])) >= step for line in lines(folder / "run")):
        assert time.monotonic() < deadline and all(launcher.poll() is None for launcher in launchers), said(folder)
        time.sleep(0.02)


@pytest.mark.slow
def test_torchrun_starts_again_after_a_rank_is_killed(nodes: Nodes, tiny: Path, world: Any, tmp_path: Path) -> None:
    """Its store outlives the ranks, and holds what the killed ones have said."""
    changes = {**PIPELINE, "train.steps": 30, "train.save_every": 2, "train.timeout_seconds": 30}
    program = trains(tiny, tmp_path, changes)
    launchers = start(nodes, [torchrun(number, "--max-restarts", "3", *program) for number in (0, 1)], tmp_path)
    await_step(5, launchers, tmp_path)
    os.kill(rank_processes(nodes[1])[-1], signal.SIGKILL)
    assert [launcher.wait(PATIENCE) for launcher in launchers] == [0, 0], said(tmp_path)
    assert "resumed from" in said(tmp_path)
    check(tiny, world, tmp_path, changes, nodes)


def rank_processes(node: Node) -> list[int]:
    """The ranks on a node, without the launcher that has the same words in its command line."""
    found = node.processes("llmkd/train.py")
    return [number for number in found if b"\0-u\0llmkd/train.py" in Path(f"/proc/{number}/cmdline").read_bytes()]


@pytest.mark.slow
def test_torchrun_that_is_told_to_stop_has_its_ranks_save(nodes: Nodes, tiny: Path, world: Any, tmp_path: Path) -> None:
    """As Slurm and Kubernetes stop it, on all nodes; the same command goes on."""
    changes = {**PIPELINE, "train.steps": 30, "train.timeout_seconds": 60}
    commands = [
        torchrun(number, "--shutdown-timeout", "300", *trains(tiny, tmp_path, changes), backend="static")
        for number in (0, 1)
    ]
    launchers = start(nodes, commands, tmp_path)
    await_step(5, launchers, tmp_path)
    for node in nodes:
        for number in node.processes("bin/torchrun"):
            if b"nsenter" not in Path(f"/proc/{number}/cmdline").read_bytes():
                os.kill(number, signal.SIGTERM)
    codes = [launcher.wait(PATIENCE) for launcher in launchers]
    assert 0 not in codes and "stopped by SIGTERM after step" in said(tmp_path), said(tmp_path)
    launchers = start(nodes, commands, tmp_path)
    assert [launcher.wait(PATIENCE) for launcher in launchers] == [0, 0] and "resumed from" in said(tmp_path), said(
        tmp_path
    )
    check(tiny, world, tmp_path, changes, nodes)
