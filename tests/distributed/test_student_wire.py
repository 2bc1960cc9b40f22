"""What `llmkd plan` says that a rank sends for a student is what it sends, whatever the stage of ZeRO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd.distributed.ds_configs import load_ds_config
from llmkd.files import ROOT
from llmkd.planning.shapes import initial_student_config, shapes, teacher_config, trained_part
from llmkd.planning.wire import student_wire, wire_text
from llmkd.recipe.recipe import load_recipe
from tests.distributed.runner import start_ranks
from tests.tiny import zero_stages

SHARDED = {"stage3_param_persistence_threshold": 0, "use_multi_rank_bucket_allreduce": False}
AGAIN = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
FILES: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"stage{stage}": (stage, SHARDED) for stage in range(4)},
    "all_reduced": (2, {**SHARDED, "use_multi_rank_bucket_allreduce": True}),
    "gathered_again": (3, {**SHARDED, **AGAIN}),
}
"""DeepSpeed configurations by name: a stage and its options. All weights are sharded, however few."""
LORA = {"rank": 8, "alpha": 8}
IN_BF16 = ("all_reduced", "gathered_again")


def _scenarios(folder: Path) -> dict[str, dict[str, Any]]:
    """A run for each configuration, of two micro-batches a step on two ranks; the files are written."""
    zero_stages(folder)
    scenarios = {}
    for name, (stage, options) in FILES.items():
        config = json.loads((folder / f"zero{stage}.json").read_text())
        config["zero_optimization"] |= options
        (folder / f"{name}.json").write_text(json.dumps(config))
        dtype = "bfloat16" if name in IN_BF16 else "float32"
        batch = {"train.batch_size": 8, "train.micro_batch_size": 2}
        scenarios[name] = {"train.deepspeed": str(folder / f"{name}.json"), "train.dtype": dtype, **batch}
    scenarios |= {
        f"adapters_{n}": {**scenarios[n], "student.lora": LORA} for n in ("stage1", "stage3", "gathered_again")
    }
    scenarios["shipped"] = {**scenarios["stage2"], "train.deepspeed": "zero2"}
    return scenarios


def test_the_planned_bytes_are_sent(tiny: Path, tmp_path: Path) -> None:
    scenarios, tasks = _scenarios(tmp_path), tmp_path / "tasks.json"
    work = {"recipe": str(tiny / "recipe.yaml"), "scenarios": scenarios, "output": str(tmp_path)}
    tasks.write_text(json.dumps(work))
    codes = [rank.wait(timeout=600) for rank in start_ranks(2, "tests.distributed.student_wire", tasks, tmp_path)]
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text()[-3000:]
    found = json.loads((tmp_path / "rank0.json").read_text())
    assert found["shipped"] == found["stage2"]
    for name, changes in scenarios.items():
        recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
        config = initial_student_config(recipe, teacher_config(recipe))
        part = trained_part(recipe, config, shapes(config))
        trained, beside = part.parameters, {"frozen": part.frozen, "forward_only": part.forward_only}
        zero = load_ds_config(recipe.train.deepspeed, ROOT / "ds_configs")
        sent = {part.what: part.bytes for part in student_wire(recipe, trained, zero, 2, **beside)}
        planned = sent["student gradients"], sent.get("student weights", 0)
        assert (found[name]["reduced"], found[name]["gathered"]) == pytest.approx(planned, rel=0.03), name
        assert student_wire(recipe, trained, zero, 1) == []
        table = wire_text(student_wire(recipe, trained, zero, 2), recipe, 2)
        assert "for 4 rows of up to 64 tokens" in table.splitlines()[-1]
