"""What students in turn take of a rank's device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmkd.errors import InputError
from llmkd.planning import memory
from llmkd.planning.in_turn import Member, in_turn_text, needed
from llmkd.planning.run_checks import check_beside, runs_at_once
from llmkd.planning.shapes import teacher_config
from llmkd.recipe.recipe import load_recipe
from llmkd.recipe.study_entries import entry_recipe, study_entries


def test_the_heaviest_is_at_work_and_the_others_wait() -> None:
    deep = Member("deep", alone=100, held=30, teacher=20, blocks=frozenset({1, 2}), state=3)
    others = [
        Member("hidden", alone=80, held=30, teacher=25, blocks=frozenset({2, 3, 4}), state=3),
        Member("ce_only", alone=50, held=31, teacher=0, blocks=frozenset(), state=3),
    ]
    assert needed([deep]) == 100
    assert needed([deep, *others]) == 100 + (30 + 31) + (25 - 20) + 2 * 3


def test_a_plan_says_how_many_fit(tiny: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml", ["study.strategies=[forward, none]", "study.seeds=[0, 1]"])
    teacher = teacher_config(recipe)
    text = in_turn_text(recipe, 1, teacher, 80)
    assert [line.split()[-1] for line in text.splitlines()[1:4]] == ["forward-s0", "none-s0", "ce_only-s0"]
    assert text.splitlines()[3].startswith("*") and "a device of 80 GiB" in text
    (forward,) = (entry for entry in study_entries(recipe) if entry.name == "forward-s0")
    alone = memory.peak(memory.plan(entry_recipe(recipe, forward), 1, teacher))[0]
    fits_one = in_turn_text(recipe, 1, teacher, alone / 2**30 / 0.9 * 1.0001)
    assert fits_one.splitlines()[1].startswith("*")
    assert in_turn_text(recipe, 1, teacher, 1e-9).endswith("not even one fits a device of 1e-09 GiB, a tenth left free")
    assert in_turn_text(recipe.changed({"study.strategies": []}), 1, teacher, 80) == ""


def test_runs_beside_each_other_have_gpus_of_their_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(tiny / "recipe.yaml", ["study.parallel=auto"])
    assert runs_at_once(recipe, 2) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [runs_at_once(recipe, ranks) for ranks in (1, 2, 3, 16)] == [8, 4, 2, 1]
    check_beside(recipe, 2)
    asked = recipe.changed({"study.parallel": 5})
    check_beside(asked, 1)
    with pytest.raises(
        InputError, match=r"5 runs of 2 ranks take 10 GPUs, and there are 8; write study.parallel: 4, or"
    ):
        check_beside(asked, 2)
    writes = {"rollouts": {"backend": "vllm", "devices": [6, 7], "max_new_tokens": 4}, "loss.ce": 0.0}
    with pytest.raises(InputError, match=r"rollouts.devices names GPUs for one run"):
        check_beside(recipe.changed(writes), 2)
