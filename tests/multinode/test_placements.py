"""Two ranks on each of two nodes train the student that four ranks of one node train, wherever the teacher lives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.test_resume import lines
from tests.multinode.nodes import two_nodes
from tests.multinode.on_node import run_on
from tests.tiny import assert_same_weights

CACHED = {"matching.strategy": "reverse", "cache.dtype": "float32"}
RUNS: dict[str, dict[str, Any]] = {
    "replicated": {"teacher.placement": "replicated"},
    "zero3": {"teacher.placement": "zero3"},
    "pipeline within a node": {"teacher.placement": "pipeline", "teacher.stages": 2},
    "pipeline across nodes": {"teacher.placement": "pipeline", "teacher.stages": 4},
    "cache": {"teacher.placement": "cache", **CACHED},
}


def tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs, and the cache that the last one reads."""
    whole: dict[str, Any] = {"matching.strategy": "reverse", "train.micro_batch_size": 2}
    kept = {"cache.path": str(folder / "cached")}
    return {
        "cached": {**whole, **CACHED, **kept, "only": "cache"},
        **{name: {**whole, **changes, **(kept if name == "cache" else {})} for name, changes in RUNS.items()},
    }


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The folders of the runs on two nodes and on one."""
    folder = tmp_path_factory.mktemp("placements")
    with two_nodes(folder) as (first, second):
        for name, places in {"two": [first, first, second, second], "one": [first] * 4}.items():
            assert run_on(places, tiny / "recipe.yaml", tasks(folder / name), folder / name) == {}
    yield folder / "two", folder / "one"


@pytest.mark.parametrize("name", RUNS)
def test_two_nodes_train_the_student_of_one(name: str, runs: tuple[Path, Path]) -> None:
    two, one = (load_file(folder / name / "model" / "model.safetensors") for folder in runs)
    assert_same_weights(two, one, 1e-6)
    losses = [[line[part] for line in lines(folder / name) for part in ("loss", "hidden", "kl")] for folder in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 9


def test_the_placements_train_one_student(runs: tuple[Path, Path]) -> None:
    students = [load_file(runs[0] / name / "model" / "model.safetensors") for name in RUNS]
    for student in students[1:]:
        assert_same_weights(student, students[0], 1e-6)
