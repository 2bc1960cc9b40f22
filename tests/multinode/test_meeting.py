"""Nodes that do not meet, or that do not share what they must: one sentence from every rank that can say it, and an end in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multinode.nodes import PORT, Node, two_nodes
from tests.multinode.on_node import start_ranks

JOIN_SECONDS = 6
IN_TIME = 120
"""Room for a busy machine on top of it."""
Nodes = tuple[Node, Node]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with two_nodes(tmp_path_factory.mktemp("meeting")) as both:
        yield both


def said_by(
    nodes: Nodes,
    tiny: Path,
    folder: Path,
    *more: str,
    only: tuple[int, ...] = (0, 1, 2, 3),
    code: int = 1,
    **variables: str,
) -> dict[int, list[str]]:
    """What the ranks that are started (two on each node) say, line by line; all must end by this code, and in time."""
    arguments = [
        "--recipe",
        str(tiny / "recipe.yaml"),
        "--set",
        "train.micro_batch_size=2",
        "--output",
        str(folder / "run"),
        *more,
    ]
    places = [node for node in nodes for _ in range(2)]
    variables = {"LLMKD_JOIN_SECONDS": str(JOIN_SECONDS), **variables}
    ranks = start_ranks(places, "llmkd.train", arguments, folder, only, **variables)
    began = time.monotonic()
    codes = [rank.wait(timeout=600) for rank in ranks]
    said = {rank: (folder / f"rank{rank}.log").read_text().splitlines() for rank in only}
    assert codes == [code] * len(ranks), said
    assert time.monotonic() - began < JOIN_SECONDS + IN_TIME
    assert [node.processes() for node in nodes] == [[], []]
    return said


def did_not_meet(rank: int, node: str, address: str, reason: str, there: str = "") -> str:
    """The sentence of a rank."""
    return (
        f"Error: rank {rank} on {node}: the 4 ranks did not meet at {address}:{PORT} within {JOIN_SECONDS} s ({reason}): start a rank for "
        "each, see that every node reaches that address, and where nodes start that far apart set LLMKD_JOIN_SECONDS to more "
        f"seconds{there}. The same command resumes from the last checkpoint."
    )


def test_a_node_that_never_joins_is_told_by_both_ranks_of_the_other(nodes: Nodes, tiny: Path, tmp_path: Path) -> None:
    said = said_by(nodes, tiny, tmp_path, only=(0, 1))
    about = nodes[0].address, "missing: 2-3", " (there: 0-1 on node0)"
    assert said == {rank: [did_not_meet(rank, "node0", *about)] for rank in (0, 1)}


@pytest.mark.parametrize(
    ("address", "reason"),
    [("node0", "Connection refused"), ("10.77.0.9", "timed out"), ("nodeX", "Temporary failure in name resolution")],
)
def test_a_node_whose_first_one_is_not_there_or_elsewhere(
    address: str, reason: str, nodes: Nodes, tiny: Path, tmp_path: Path
) -> None:
    said = said_by(nodes, tiny, tmp_path, only=(2, 3), MASTER_ADDR=address)
    assert said == {rank: [did_not_meet(rank, "node1", address, f"no answer there: {reason}")] for rank in (2, 3)}


def test_a_port_in_use_is_told_by_the_rank_that_needs_it(nodes: Nodes, tiny: Path, tmp_path: Path) -> None:
    taken = nodes[0].start(["python3", "-m", "http.server", str(PORT)], tmp_path / "server.log")
    while nodes[0].do("ss", "-Hltn", f"sport = {PORT}") == "":
        assert taken.poll() is None, (tmp_path / "server.log").read_text()
        time.sleep(0.1)
    try:
        arguments = ["--recipe", str(tiny / "recipe.yaml"), "--output", str(tmp_path / "run")]
        [rank] = start_ranks([nodes[0], nodes[1]], "llmkd.train", arguments, tmp_path, only=[0])
        assert rank.wait(timeout=300) == 1
        said = (tmp_path / "rank0.log").read_text()
    finally:
        nodes[0].kill("http.server")
        taken.wait()
    assert said.startswith(
        f"Error: rank 0 on node0: another process of this machine uses port {PORT}: give the launcher another"
    ), said


def test_hosts_whose_names_lead_to_the_loopback_find_the_way(nodes: Nodes, tiny: Path, tmp_path: Path) -> None:
    """Debian writes it so into /etc/hosts, and gloo would take the loopback for the address of both."""
    before = nodes[0].hosts.read_text()
    nodes[0].hosts.write_text("127.0.0.1 localhost\n127.0.1.1 node0 node1\n")
    try:
        said_by(nodes, tiny, tmp_path, "--set", "train.timeout_seconds=60", code=0)
    finally:
        nodes[0].hosts.write_text(before)


@pytest.mark.slow
def test_an_interface_that_leads_nowhere_is_a_sentence(nodes: Nodes, tiny: Path, tmp_path: Path) -> None:
    """gloo itself waits for five times the timeout."""
    said = said_by(nodes, tiny, tmp_path, "--set", "train.timeout_seconds=10", GLOO_SOCKET_IFNAME="lo")
    for rank, lines in said.items():
        [error] = [line for line in lines if line.startswith("Error: ")]
        assert error.startswith(f"Error: rank {rank} on node{rank // 2}: the ranks have met and can't reach each other")
        assert "set GLOO_SOCKET_IFNAME on every node" in error


def test_a_folder_that_one_node_does_not_see(nodes: Nodes, tiny: Path, tmp_path: Path) -> None:
    """Nothing is left in it; on a folder that both see the same command trains."""
    shared = tmp_path / "shared"
    shared.mkdir()
    nodes[1].hide(shared)
    said = said_by(nodes, tiny, tmp_path, "--output", str(shared / "run"), "--set", "train.timeout_seconds=60", code=2)
    [sentence] = [line for lines in said.values() for line in lines]
    assert sentence.startswith(
        f"Error: {shared}/run: rank 0 has this folder, and node node1 does not; all nodes must share it: choose one on a network file"
    )
    assert list(shared.iterdir()) == [] and nodes[1].do("ls", "-A", str(shared)) == ""


def test_a_folder_in_which_one_node_may_not_write(nodes: Nodes, tiny: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    nodes[1].do("mount", "--bind", str(shared), str(shared))
    nodes[1].do("mount", "-o", "remount,bind,ro", str(shared))
    said = said_by(nodes, tiny, tmp_path, "--output", str(shared / "run"), code=2)
    [sentence] = [line for lines in said.values() for line in lines]
    assert "and node node1 may not write in it; all nodes must share it" in sentence
    assert list(shared.iterdir()) == []


def test_a_recipe_that_one_node_does_not_have(nodes: Nodes, tiny: Path, tmp_path: Path) -> None:
    """The node says it once, the others that its ranks are missing."""
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.write_text((tiny / "recipe.yaml").read_text())
    nodes[1].hide(recipe.parent)
    logs = tmp_path
    places = [node for node in nodes for _ in range(2)]
    arguments = ["--recipe", str(recipe), "--output", str(tmp_path / "run")]
    ranks = start_ranks(places, "llmkd.train", arguments, logs, LLMKD_JOIN_SECONDS=str(JOIN_SECONDS))
    codes = [rank.wait(timeout=600) for rank in ranks]
    said = [(logs / f"rank{rank}.log").read_text() for rank in range(4)]
    assert codes == [1, 1, 2, 2], said
    assert said[0].startswith("Error: rank 0 on node0: the 4 ranks did not meet") and "(missing: 2-3)" in said[1]
    assert said[2].startswith("Error: ") and "mine.yaml" in said[2] and said[2].count("\n") == 1 and said[3] == ""


def test_a_teacher_that_one_node_does_not_have(nodes: Nodes, tiny: Path, tmp_path: Path) -> None:
    """Its ranks are named in their sentence."""
    teacher = tmp_path / "models"
    teacher.mkdir()
    for file in (tiny / "teacher").iterdir():
        (teacher / file.name).write_bytes(file.read_bytes())
    nodes[1].hide(teacher)
    places = [node for node in nodes for _ in range(2)]
    arguments = [
        "--recipe",
        str(tiny / "recipe.yaml"),
        "--set",
        "train.micro_batch_size=2",
        "--output",
        str(tmp_path / "run"),
    ]
    ranks = start_ranks(places, "llmkd.train", [*arguments, "--set", f"teacher.path={teacher}"], tmp_path)
    codes = [rank.wait(timeout=600) for rank in ranks]
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(4)]
    assert 0 not in codes and codes[2] == codes[3] == 2, said
    for rank in (2, 3):
        assert f"Error: rank {rank} on node1: {teacher}" in said[rank], said
