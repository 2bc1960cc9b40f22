"""A student taught from a cache is the student its teacher would have made, whatever the map, ranks, batching and shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.runner import run_on_ranks
from tests.tiny import assert_same_weights, logged_part, quick

STRATEGIES = ("forward", "reverse", "all_to_one", "random", "in_order_random", "none")
STUDY = {"study.strategies": list(STRATEGIES), "study.seeds": [0, 1], "matching.embedding": True}
NORMED = {
    "matching.strategy": "reverse",
    "matching.final_state": "normed",
    "matching.positions": "trained",
    "loss.kl_positions": "attended",
    "loss.temperature": 2.0,
}
PACKED = {"data.batching": "packed", "train.micro_batch_size": 2}
IN_ZERO2 = ("reverse-s0", "all_to_one-s0", "random-s0", "none-s0")

# What is computed, by a replicated teacher and from the cache of that name. (cache, recipe changes)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}-s0": ("study", {**STUDY, "matching.strategy": name}) for name in STRATEGIES},
    "random-s1": ("study", {**STUDY, "matching.strategy": "random", "seed": 1}),
    "packed": ("study", {**STUDY, **PACKED, "matching.strategy": "reverse", "train.activation_checkpointing": True}),
    "normed": ("normed", NORMED),
    "top_k": ("top_k", NORMED),
}
ON_ONE_RANK = ("random-s1", "packed")
CACHES: dict[str, dict[str, Any]] = {
    "study": {**STUDY, "cache.dtype": "float32", "cache.shard_mib": 0.08},
    "normed": {**NORMED, "cache.dtype": "float32", "cache.shard_mib": 0.02, "cache.teacher_placement": "zero3"},
    "top_k": {**NORMED, "cache.dtype": "float32", "cache.top_k": 320, "cache.teacher_placement": "pipeline"},
}


def _reading(folder: Path, cache: str) -> dict[str, Any]:
    """The changes by which a recipe reads a cache of `CACHES`."""
    kept = {key: value for key, value in CACHES[cache].items() if key in ("cache.dtype", "cache.top_k")}
    return {**kept, "teacher.placement": "cache", "cache.path": str(folder / f"cache-{cache}"), "cache.verify": "start"}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cache written on 2 ranks and on 1; every run from the cache, and on 1 rank with a replicated teacher."""
    output = tmp_path_factory.mktemp("cached")
    for ranks, names in ((2, tuple(RUNS)), (1, ON_ONE_RANK)):
        folder = output / str(ranks)
        tasks = {
            f"cache-{name}": {"only": "cache", **changes, "cache.path": str(folder / f"cache-{name}")}
            for name, changes in CACHES.items()
        }
        tasks |= {name: {**RUNS[name][1], **_reading(folder, RUNS[name][0])} for name in names}
        for name in IN_ZERO2:
            if name in tasks:
                tasks[name]["train.deepspeed"] = str(tiny / "zero2.json")
        if ranks == 1:
            online = {name: changes for name, (_, changes) in RUNS.items() if name != "top_k"}
            tasks |= {f"{name}-replicated": {**changes, **quick(tiny)} for name, changes in online.items()}
        assert run_on_ranks(ranks, tiny / "recipe.yaml", tasks, folder) == {}
    return output


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("ranks", "name"), [(2, name) for name in RUNS] + [(1, name) for name in ON_ONE_RANK])
def test_cached_equals_replicated(runs: Path, ranks: int, name: str) -> None:
    online = runs / "1" / f"{'normed' if name == 'top_k' else name}-replicated"  # k = V knows the whole distribution
    cached = runs / str(ranks) / name
    for ours, theirs in zip(_lines(cached), _lines(online), strict=True):
        for part in ("loss", "ce", "kl", "hidden"):
            one, other = logged_part(ours, part), logged_part(theirs, part)
            assert one is None if other is None else one == pytest.approx(other, rel=2e-5, abs=1e-6), part
    expected, found = (load_file(run / "model" / "model.safetensors") for run in (online, cached))
    assert_same_weights(found, expected, 1e-6)


def test_the_runs_differ_from_one_another(runs: Path) -> None:
    names = [name for name in RUNS if name != "top_k"]
    weights = [load_file(runs / "2" / name / "model" / "model.safetensors")["model.norm.weight"] for name in names]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i] if len(a) == len(b))


def test_the_ranks_change_no_byte_of_a_cache(runs: Path) -> None:
    for name in CACHES:
        one, two = (json.loads((runs / ranks / f"cache-{name}" / "manifest.json").read_text()) for ranks in "12")
        assert one == two
        assert len(one["shards"]) % 2 == (0 if name == "study" else 1)  # so that a rank was without work
        files = sorted(p.name for p in (runs / "1" / f"cache-{name}").iterdir())
        assert files == ["manifest.json", *(shard["file"] for shard in one["shards"])]  # nothing is left over


def test_a_study_s_cache_holds_the_union_of_its_maps(runs: Path) -> None:
    contents = json.loads((runs / "1" / "cache-study" / "manifest.json").read_text())["contents"]
    used = set()
    for name in RUNS:
        if name.startswith(STRATEGIES):
            used |= {t for _, t in json.loads((runs / "2" / name / "summary.json").read_text())["pairs"]}
    assert used <= set(contents["blocks"]) and {-1, 1, 2, 3, 5} <= used  # in_order_random may draw any
    assert contents["final"] and contents["top_k"] is None
    normed = json.loads((runs / "1" / "cache-normed" / "manifest.json").read_text())["contents"]
    assert normed["blocks"] == [1, 3] and normed["final"]  # the last pair reads the final state
    top_k = json.loads((runs / "1" / "cache-top_k" / "manifest.json").read_text())["contents"]
    assert (top_k["final"], top_k["top_k"], top_k["columns"]) == (True, 320, 320)
