"""What students in turn take of a rank's device."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from llmkd.errors import InputError
from llmkd.planning import in_turn, memory, plan
from llmkd.planning.in_turn import Member, costs, in_turn_text, member, needed, settled
from llmkd.planning.rows import PHASES
from llmkd.planning.run_checks import check_beside, runs_at_once
from llmkd.planning.shapes import teacher_config
from llmkd.recipe.options import Part
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.recipe.study_entries import entry_recipe, groups, study_entries
from llmkd.study import study


def test_the_heaviest_is_at_work_and_the_others_wait() -> None:
    deep = Member("deep", alone=100, at_work=106, held=30, host=7, teacher=20, blocks=frozenset({1, 2}), state=3)
    others = [
        Member("hidden", alone=80, at_work=89, held=30, host=5, teacher=25, blocks=frozenset({2, 3, 4}), state=3),
        Member("ce_only", alone=50, at_work=50, held=31, host=0, teacher=0, blocks=frozenset(), state=3),
    ]
    assert needed([deep]) == (100, 7)
    assert needed([deep, *others]) == (106 + (30 + 31) + (25 - 20) + 2 * 3, 12)


def test_in_turn_the_teachers_signals_stay_through_a_students_turn(tiny: Path) -> None:
    """Alone they go as the student compares them; what is offloaded to the host adds up there."""
    sets = ["study.strategies=[forward]", "loss.kl=0", f"train.deepspeed={tiny / 'zero2.json'}"]
    recipe = load_recipe(tiny / "recipe.yaml", sets)
    (entry,) = (entry for entry in study_entries(recipe) if entry.name == "forward-s0")
    config = teacher_config(recipe)
    rows = memory.plan(entry_recipe(recipe, entry), 1, config)
    waiting = sum(row.bytes for row in rows if row.what.startswith("teacher state"))
    one = member(recipe, entry, 1, config)
    totals = {
        phase: sum(r.bytes for r in rows if {"always", phase} & {*r.phases} and r.place == "device") for phase in PHASES
    }
    assert waiting > 0 and one.at_work >= totals["backward"] + waiting and one.alone == max(totals.values())
    offloaded = member(recipe.changed({"train.deepspeed": "zero3_offload_cpu"}), entry, 1, config)
    assert one.host == 0 and offloaded.host > 0
    text = in_turn_text(recipe.changed({"train.deepspeed": "zero3_offload_cpu"}), 1, config, 80)
    assert f"+ {offloaded.host / 2**30:.3f} of the host" in text.splitlines()[1]


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


@pytest.fixture
def five(tiny: Path) -> Recipe:
    """Four strategies and ce_only, of two seeds, as many in turn as fit."""
    sets = ["study.strategies=[forward, reverse, all_to_one, none]", "study.seeds=[0, 1]", "study.together=auto"]
    return load_recipe(tiny / "recipe.yaml", sets)


def _machine(patch: pytest.MonkeyPatch, card: float | None, memory: float) -> None:
    patch.setattr(in_turn, "card_bytes", lambda: None if card is None else round(card))
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": round(memory)}
    patch.setattr(in_turn.os, "sysconf", sizes.__getitem__)


@pytest.mark.parametrize("on", ["gpu", "cpu"])
def test_auto_is_the_most_that_fit(
    five: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on: str
) -> None:
    (steps,) = costs(five, 2, teacher_config(five))
    assert len(steps) == 5 and steps == sorted(steps, key=lambda step: step.needed.device)
    for most in (1, 3, 5):
        bytes_ = steps[most - 1].needed.device / 0.9 * 1.001
        _machine(monkeypatch, *((bytes_, 2**60) if on == "gpu" else (None, 2 * bytes_)))
        chosen = settled(five, 2)
        assert chosen.study.together == most and len(groups(chosen, study_entries(chosen))) == {1: 10, 3: 4, 5: 2}[most]
        caplog.clear()
        assert settled(five.changed({"study.together": 4}), 2).study.together == 4
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(told) == (most < 4) and all(f"{most} students in turn fit" in text for text in told)
    _machine(monkeypatch, steps[-1].needed.device * 9, 2**60)
    assert settled(five.changed({"study.together": 9}), 2).study.together == 9
    _machine(monkeypatch, 1, 1)
    assert settled(five, 2).study.together == 1  # the most of those that are possible at all


def test_auto_of_students_whose_rows_differ_is_one(five: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    writes = {"rollouts": {"max_new_tokens": 4, "backend": "hf"}, "loss.ce": 0.0, "study.baselines": []}
    with caplog.at_level(logging.INFO):
        assert settled(five.changed(writes), 1).study.together == 1
    assert (
        "auto is 1: another: rollouts: the student writes texts" in caplog.text or "auto is 1: one: roll" in caplog.text
    )


def test_parts_of_a_study_need_a_number(five: Recipe) -> None:
    with pytest.raises(InputError, match=r"study\.together: the parts of a study need one number; .* in place of auto"):
        study(five, 1, Part(1, 2))


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


@pytest.mark.parametrize(("card", "gib"), [(None, "80"), (141 * 2**30, "141")])
def test_a_plan_recommends_by_the_gpus_that_are_here(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, card: int | None, gib: str
) -> None:
    recipe = load_recipe(tiny / "recipe.yaml", ["study.strategies=[forward, none]"])
    monkeypatch.setattr(plan, "card_bytes", lambda: card)
    assert plan.whole_plan(recipe, 1).count(f"a device of {gib} GiB") == 2
    assert plan.whole_plan(recipe, 1, 24).count("a device of 24 GiB") == 2
