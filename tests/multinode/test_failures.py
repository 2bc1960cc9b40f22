"""Faults in the middle of a run of two nodes: every rank that lives names who is lost, all end in time, and the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmkd.starting import Process
from tests.distributed.test_resume import lines
from tests.multinode.nodes import Node, two_nodes
from tests.multinode.on_node import run_on, start_ranks

TIMEOUT_SECONDS = 12
PATIENCE = TIMEOUT_SECONDS + 3 + 1 + 120
"""The timeout, the roll call, the seconds that rank 0 listens, and room for a busy machine."""
STEPS = 40
OPTIONS: dict[str, Any] = {
    "matching.strategy": "reverse",
    "teacher.placement": "pipeline",
    "teacher.stages": 4,
    "train.steps": STEPS,
    "train.micro_batch_size": 2,
    "train.save_every": 2,
}
Nodes = tuple[Node, Node]
FIRST, SECOND = "0-1 on node0", "2-3 on node1"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with two_nodes(tmp_path_factory.mktemp("failures")) as both:
        yield both


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_on([node for node in nodes for _ in range(2)], tiny / "recipe.yaml", {"run": OPTIONS}, folder) == {}
    return folder / "run"


class Run:
    """A run on two ranks of each node, started as often as it takes."""

    def __init__(self, nodes: Nodes, tiny: Path, folder: Path) -> None:
        self.nodes, self.folder, self._starts = nodes, folder / "run", 0
        sets = [part for key, value in OPTIONS.items() for part in ("--set", f"{key}={value}")]
        timeout = ["--set", f"train.timeout_seconds={TIMEOUT_SECONDS}"]
        self._arguments = ["--recipe", str(tiny / "recipe.yaml"), "--output", str(self.folder), *sets, *timeout]
        self.ranks: list[Process] = []

    def start(self, places: Sequence[Node] | None = None, *more: str) -> None:
        """Start it, or go on with it; `places`: each rank's node."""
        self._starts += 1
        self._logs = self.folder.parent / f"start{self._starts}"
        self._places = places = places or [node for node in self.nodes for _ in range(2)]
        self.ranks = start_ranks(places, "llmkd.train", [*self._arguments, *more], self._logs)

    def said(self) -> list[str]:
        """What each rank says."""
        return [(self._logs / f"rank{rank}.log").read_text() for rank in range(len(self.ranks))]

    def step(self) -> int:
        """The last one that is logged."""
        return max((int(str(line["step"])) for line in lines(self.folder)), default=0)

    def wait_until(self, happens: Callable[[], object]) -> None:
        """Wait, while it trains."""
        deadline = time.monotonic() + 300
        while not happens():
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in self.ranks), self.said()
            time.sleep(0.005)

    def train_on(self, steps: int) -> None:
        """Wait until so many more steps are logged."""
        begin = self.step()
        self.wait_until(lambda: self.step() >= begin + steps)

    def process(self, rank: int) -> int:
        """The number of a rank's process."""
        [number] = [
            n
            for node in self.nodes
            for n in node.processes()
            if Path(f"/proc/{n}/comm").read_text() == f"llmkd rank {rank}\n"
        ]
        return number

    def ended(self, silent: dict[int, str], reason: str = "") -> None:
        """All must have ended in time, and each of these ranks said once which are silent."""
        began = time.monotonic()
        codes = [rank.wait(timeout=PATIENCE) for rank in self.ranks]
        assert time.monotonic() - began < PATIENCE and 0 not in codes and 2 not in codes, (codes, self.said())
        assert [node.processes() for node in self.nodes] == [[], []]
        several = len({node.name for node in self._places}) > 1
        for rank, lost in silent.items():
            who = f"rank {rank} on {self._places[rank].name}" if several else f"rank {rank}"
            said = [line for line in self.said()[rank].splitlines() if line.startswith("Error: ")]
            pattern = rf"Error: {who}: .*{reason}.*; silent ranks: {lost}\. The same command resumes from"
            assert len(said) == 1 and re.match(pattern, said[0]), (rank, lost, self.said())
            assert "Traceback" not in self.said()[rank] and "frame #" not in self.said()[rank], self.said()
        assert not (self.folder / "summary.json").exists()

    def finish(self, undisturbed: Path, *, resumes: bool = True) -> None:
        """Go on to the end; the student and the log must be those of a run that nothing disturbed, to the bit."""
        self.start()
        self.succeeds(undisturbed)
        assert ("resumed from" in self.said()[0]) == resumes

    def succeeds(self, undisturbed: Path) -> None:
        """Wait for the end of this start."""
        self.trained()
        ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (self.folder, undisturbed))
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs)
        keys = ("step", "loss", "grad_norm")
        logged = [[[line[key] for key in keys] for line in lines(folder)] for folder in (self.folder, undisturbed)]
        assert logged[0] == logged[1]

    def trained(self) -> None:
        """Wait for the end of this start, which is the run's; each step is logged once, and nothing is left over."""
        codes = [rank.wait(timeout=600) for rank in self.ranks]
        assert codes == [0] * len(self.ranks), self.said()
        assert [line["step"] for line in lines(self.folder)] == list(range(1, STEPS + 1))
        left = [*self.folder.rglob("*.tmp"), *self.folder.rglob(".lock")]
        assert not left, left


@pytest.fixture
def run(nodes: Nodes, tiny: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(nodes, tiny, tmp_path)
    yield run
    nodes[1].link("up")
    for rank in run.ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGKILL)


CUT = {0: SECOND, 1: SECOND, 2: "0 on node0", 3: "0 on node0"}
"""Whom the ranks miss where the cable is out: those of the second node can't ask any other, as rank 0 has the list."""


def test_a_cable_that_is_out_for_seconds_costs_seconds_and_for_longer_ends_all(run: Run, undisturbed: Path) -> None:
    run.start()
    run.train_on(3)
    run.nodes[1].link("down")
    time.sleep(3)
    reached = run.step()
    assert reached < STEPS and all(rank.poll() is None for rank in run.ranks), run.said()
    run.nodes[1].link("up")
    run.train_on(2)
    run.nodes[1].link("down")
    run.ended(CUT)
    run.nodes[1].link("up")
    run.finish(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["a save", "an export"])
def test_a_cable_that_is_cut_inside(inside: str, run: Run, undisturbed: Path) -> None:
    pattern = "checkpoints/*.tmp" if inside == "a save" else "model.tmp*"
    run.start()
    if inside == "a save":
        run.train_on(3)
    run.wait_until(lambda: list(run.folder.glob(pattern)))
    run.nodes[1].link("down")
    run.ended(CUT)
    said = "".join(run.said())
    assert "Traceback" not in said and said.count("Error: ") == 4, said
    run.nodes[1].link("up")
    run.finish(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped(victim: int, by: signal.Signals, run: Run, undisturbed: Path) -> None:
    run.start()
    run.train_on(3)
    os.kill(number := run.process(victim), by)
    if by == signal.SIGSTOP:  # a launcher kills it once the others of its node have ended
        others = [rank for rank in range(4) if rank != victim]
        for rank in others:
            run.ranks[rank].wait(timeout=PATIENCE)
        os.kill(number, signal.SIGKILL)
    run.ended({rank: f"{victim} on node{victim // 2}" for rank in range(4) if rank != victim})
    run.finish(undisturbed)


@pytest.mark.slow
def test_a_node_without_power(run: Run, undisturbed: Path) -> None:
    """Its ranks end and its connections do not."""
    run.start()
    run.train_on(3)
    lost = [run.process(rank) for rank in (2, 3)]
    run.nodes[1].link("down")
    for number in lost:
        os.kill(number, signal.SIGKILL)
    run.ended({0: SECOND, 1: SECOND})
    run.nodes[1].link("up")
    run.finish(undisturbed)


@pytest.mark.slow
def test_fewer_and_more_nodes_go_on_with_the_run(run: Run, undisturbed: Path) -> None:
    """Two nodes, then one that is left, then both again; a number of ranks that does not divide the batch is refused, and loses nothing."""
    first, second = run.nodes
    run.start()
    run.train_on(5)
    for rank in (2, 3):
        os.kill(run.process(rank), signal.SIGKILL)
    run.ended({0: SECOND, 1: SECOND})
    run.start([first, first, second], "--set", "teacher.stages=3")
    assert [rank.wait(timeout=600) for rank in run.ranks] == [2, 2, 2]
    assert (
        "can't be shared by 3 ranks x micro_batch_size 2; write a multiple of 6, or use 1 or 2 or 4 ranks"
        in run.said()[0]
    )
    run.start([first, first], "--set", "teacher.stages=2")
    run.train_on(5)
    assert "resumed from" in run.said()[0] and "2 ranks x 2 accumulation x 2" in run.said()[0]
    os.kill(run.process(1), signal.SIGKILL)
    run.ended({0: "1"})
    run.start()
    run.trained()
    assert "resumed from" in run.said()[0] and "4 ranks x 1 accumulation x 2" in run.said()[0]
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (run.folder, undisturbed))
    for key, expected in theirs.items():
        assert (ours[key] - expected).abs().max() <= 2e-6 * max(1.0, expected.abs().max()), key


@pytest.mark.slow
def test_a_disk_that_is_full_is_a_sentence_and_goes_on_with_room(
    nodes: Nodes, tiny: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A small file system that both nodes share; what fills it up comes in the middle of the run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], check=True)
    try:
        with two_nodes(tmp_path) as both:  # who see it
            run = Run(both, tiny, disk)
            run.start()
            run.train_on(3)
            room = os.statvfs(disk)
            (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize))
            codes = [rank.wait(timeout=PATIENCE) for rank in run.ranks]
            said = "".join(run.said())
            assert (
                0 not in codes
                and 2 in codes
                and "the disk is full; free some space and give the same command again" in said
            ), said
            assert "Traceback" not in said, said
            (disk / "filler").unlink()
            run.finish(undisturbed)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


MEMORY = Path("/sys/fs/cgroup/memory")
"""Of the first version of control groups."""


@pytest.mark.slow
@pytest.mark.skipif(not os.access(MEMORY / "cgroup.procs", os.W_OK), reason="no control group of memory can be made")
def test_a_rank_without_memory_is_told_by_those_of_its_machine(run: Run, undisturbed: Path) -> None:
    group = MEMORY / f"llmkd-tests-{os.getpid()}"
    run.start()
    run.train_on(3)
    victim = run.process(3)
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(victim))
        (group / "memory.limit_in_bytes").write_text(str(2**20))  # what it asks for from now on is too much
        run.ended(
            {rank: "3 on node1; meanwhile the kernel here has killed a process: its memory, .*" for rank in (0, 1, 2)}
        )
    finally:
        group.rmdir()
    run.finish(undisturbed)
