"""A streamed run that is resumed is the uninterrupted one, to the bit."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from llmkd.errors import InputError
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import jobs
from tests.distributed.runner import run_on_ranks
from tests.distributed.test_resume import lines
from tests.tiny import quick

STREAM = {"data.streaming": True, "data.shuffle_rows": 9}
OPTIONS = {**STREAM, "train.micro_batch_size": 4, "train.steps": 11, "train.save_every": 3, "train.keep_checkpoints": 9}


@pytest.fixture(scope="module")
def sources(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The tiny rows in two files; the changes that stream them."""
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    folder = tmp_path_factory.mktemp("streams")
    for kind in ("gzip", "parquet"):
        (folder / kind).mkdir()
    for number, part in enumerate((rows[:21], rows[21:])):
        with gzip.open(folder / "gzip" / f"{number}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
        Dataset.from_list(part).to_parquet(folder / "parquet" / f"{number}.parquet")
    changes = {kind: {**OPTIONS, "data.source": str(folder / kind)} for kind in ("gzip", "parquet")}
    held_out = {
        "data.validation.source": str(tiny / "rows.jsonl"),
        "data.validation.rows": 6,
        "train.validate_every": 4,
    }
    return {"gzip": {**changes["gzip"], **held_out}, "packed": {**changes["parquet"], "data.batching": "packed"}}


def assert_same(folder: Path, uninterrupted: Path) -> None:
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (folder, uninterrupted))
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    logged = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run)] for run in (folder, uninterrupted)
    ]
    assert logged[0] == logged[1][-len(logged[0]) :] and len(logged[0]) < len(logged[1]) == 11


def resumable(folder: Path, names: Any, target: Path, step: int) -> None:
    """Runs that were stopped after this step."""
    for name in names:
        saved = Path(name) / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(folder / saved, target / saved)


def test_two_ranks_resumed_are_uninterrupted(
    tiny: Path, world: Any, sources: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """In the middle of a window and in the second pass; on one rank what two have saved is refused."""
    whole = tmp_path / "whole"
    assert run_on_ranks(2, tiny / "recipe.yaml", sources, whole) == {}
    places = [json.loads(file.read_text()) for file in whole.rglob("step-00000009/stream-*.json")]
    assert len(places) == 4 and any(place["used"] for place in places) and all(place["passes"] for place in places)
    resumable(whole, sources, tmp_path / "resumed", step=9)
    assert run_on_ranks(2, tiny / "recipe.yaml", sources, tmp_path / "resumed") == {}
    for name in sources:
        assert_same(tmp_path / "resumed" / name, whole / name)
    resumable(whole, ["gzip"], tmp_path / "other", step=9)
    recipe = load_recipe(tiny / "recipe.yaml").changed(sources["gzip"])
    with pytest.raises(InputError, match="was saved by 2 ranks, each at its own place in the stream, and these are 1"):
        train(world, jobs.distil_job(world, recipe, tmp_path / "other" / "gzip"))


@pytest.mark.parametrize("more", [{}, {"matching.strategy": "nearest"}, {"stones": {"pairs": [[0, 3]]}}])
def test_one_rank_resumed_is_uninterrupted(
    tiny: Path, world: Any, sources: dict[str, dict[str, Any]], tmp_path: Path, more: dict[str, Any]
) -> None:
    """Also where the first batches are read once before: by a measured map and by stepping stones."""
    recipe = load_recipe(tiny / "recipe.yaml").changed({**sources["gzip"], **quick(tiny), **more})
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "whole"))
    resumable(tmp_path, ["whole"], tmp_path / "resumed", step=6)
    if (file := tmp_path / "whole" / "map.json").is_file():
        shutil.copy(file, tmp_path / "resumed" / "whole")
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "resumed" / "whole"))
    assert_same(tmp_path / "resumed" / "whole", tmp_path / "whole")


def test_another_source_is_not_gone_on_with(tiny: Path, world: Any, tmp_path: Path) -> None:
    values = yaml.safe_load((tiny / "recipe.yaml").read_text())
    rows = tmp_path / "rows.jsonl"
    shutil.copy(values["data"]["source"], rows)
    recipe = load_recipe(tiny / "recipe.yaml").changed(
        {**quick(tiny), **STREAM, "data.source": str(rows), "train.steps": 2, "train.warmup_steps": 0}
    )
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    rows.write_text(rows.read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match="data.source:contents was"):
        jobs.distil_job(world, recipe, tmp_path / "run")
