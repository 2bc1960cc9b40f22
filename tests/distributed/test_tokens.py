"""Tokens are the same whoever makes them: one rank or two, one process or several, a node or another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkd.data import token_files
from llmkd.recipe.recipe import dump_recipe, load_recipe
from llmkd.train import train
from llmkd.training import jobs
from tests.distributed.runner import run_on_ranks, start_ranks
from tests.tiny import assert_same_weights, quick


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def shards(tokens: Path) -> dict[Path, int]:
    """The files of tokens, each with when it was written."""
    return {file: file.stat().st_mtime_ns for file in tokens.rglob("*.arrow")}


def test_who_made_the_tokens_changes_no_student(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by one process, by four, by two ranks; trained on by the other number of ranks."""
    recipe, students = load_recipe(tiny / "recipe.yaml"), tmp_path / "students"

    def tokens(name: str) -> dict[str, Any]:
        return {"data.tokens": str(tmp_path / name)}

    def on_one_rank(name: str, made: str) -> dict[str, torch.Tensor]:
        assert train(world, jobs.distil_job(world, recipe.changed({**quick(tiny), **tokens(made)}), students / name))
        return weights(students / name)

    with monkeypatch.context() as patch:
        patch.setattr(token_files, "SHARD_ROWS", 8)
        patch.setattr(token_files.os, "sched_getaffinity", lambda _: {0})
        plain = on_one_rank("one_process", "one_process")
        patch.setattr(token_files.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
        several = on_one_rank("four_processes", "four_processes")
    before = shards(tmp_path / "four_processes")
    two = {"of_one_rank": tokens("four_processes"), "of_two_ranks": tokens("two_ranks")}
    assert run_on_ranks(2, tiny / "recipe.yaml", two, students) == {}
    made_by_two = shards(tmp_path / "two_ranks")
    of_two_ranks = on_one_rank("of_two_ranks_on_one", "two_ranks")

    assert len(before) == 5 and len(made_by_two) == 1, "differently cut, so that it might matter"
    assert before == shards(tmp_path / "four_processes") and made_by_two == shards(tmp_path / "two_ranks"), "as read"
    ours, theirs = weights(students / "of_one_rank"), weights(students / "of_two_ranks")
    for name, weight in plain.items():
        assert torch.equal(several[name], weight) and torch.equal(of_two_ranks[name], weight), name
        assert torch.equal(ours[name], theirs[name]), name
    assert_same_weights(ours, plain, 1e-6)


@pytest.fixture(scope="module")
def nodes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """How each piece of work ended for each of two nodes that share no folder of tokens."""
    folder = tmp_path_factory.mktemp("nodes")
    rows = (tiny / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace("red", "blue"))
    recipe = load_recipe(tiny / "recipe.yaml")
    tasks: dict[str, list[str]] = {"same": [], "other": []}
    for name, files in tasks.items():
        for node in (0, 1):
            source = folder / "rows.jsonl" if name == "other" and node == 1 else tiny / "rows.jsonl"
            own = {"data.source": str(source), "data.tokens": str(folder / f"node{node}")}
            file = folder / f"{name}{node}.yaml"
            file.write_text(dump_recipe(recipe.changed(own)))
            files.append(str(file))
    for name, places in {"written": ("node0", "node1"), "written_shared": ("shared", "shared")}.items():
        tasks[name] = []
        for node, place in enumerate(places):
            changes = {"rollouts": {"by": "teacher", "max_new_tokens": 8}, "data.tokens": str(folder / place)}
            file = folder / f"{name}{node}.yaml"
            file.write_text(dump_recipe(recipe.changed(changes)))
            tasks[name].append(str(file))
    (folder / "tasks.json").write_text(json.dumps(tasks))
    started = start_ranks(2, "tests.distributed.nodes", folder / "tasks.json", folder, nodes=2)
    assert [process.wait(timeout=300) for process in started] == [0, 0], (folder / "rank0.log").read_text()[-3000:]
    return [json.loads((folder / f"ended{node}.json").read_text()) for node in (0, 1)]


def test_each_node_works_and_all_have_every_result(nodes: list[dict[str, Any]]) -> None:
    for node, ended in enumerate(nodes):
        assert ended["results"] == [[{"rank": 0}, {"rank": 1}], {"rank": node}]


def test_work_that_fails_on_one_node_ends_all_with_its_sentence(nodes: list[dict[str, Any]]) -> None:
    assert [ended["mistake"] for ended in nodes] == ["InputError: data.source: no rows; give some"] * 2
    sentences = [ended["failure"] for ended in nodes]
    assert sentences == ["InputError: rank 1 failed: ValueError: out of range", "ValueError: out of range"]


def test_nodes_make_tokens_of_their_own_which_are_compared(nodes: list[dict[str, Any]]) -> None:
    first, second = (ended["same"] for ended in nodes)
    assert first["digests"] == second["digests"] and first["rows"] == second["rows"] == 40
    assert first["folders"] != second["folders"]
    assert nodes[0]["other"] == nodes[1]["other"]
    (digest,) = first["digests"]
    assert nodes[0]["other"].startswith("InputError: data.source: node 1 made other tokens of it than node 0 (")
    assert f", not {digest}); give all nodes the same files" in nodes[0]["other"]


def test_a_teachers_texts_are_on_every_node_whether_they_share_a_folder_or_not(nodes: list[dict[str, Any]]) -> None:
    apart, shared = ([ended[name] for ended in nodes] for name in ("written", "written_shared"))
    assert len({tuple(of_node["digests"]) for of_node in (*apart, *shared)}) == 1
    assert len({*apart[0]["folders"], *apart[1]["folders"]}) == 2 and shared[0]["folders"] == shared[1]["folders"]
    assert all(of_node["rows"] == 40 for of_node in (*apart, *shared))
    (place,) = shared[0]["folders"]
    assert sorted(file.name for file in Path(place).iterdir() if file.suffix != ".lock") == [
        "00000.arrow", "00000.json", "00000.texts.json", "lengths.npy", "lengths.sha256", "tokens.json",
    ]  # fmt: skip
