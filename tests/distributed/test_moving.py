"""What changes while a student learns, or is measured before it does: resumed it is uninterrupted, and ranks change nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmkd.data.batches import collate
from llmkd.distributed.shards import saved_weights
from llmkd.errors import InputError
from llmkd.layer_map import in_order_random
from llmkd.losses.distance_sum import draw_seed, sampled
from llmkd.losses.schedules import dynamic_temperature
from llmkd.losses.set_distances import cka
from llmkd.models import load
from llmkd.models import parts as model_parts
from llmkd.models.parts import output_state
from llmkd.recipe.recipe import load_recipe
from llmkd.student import distiller, matching
from llmkd.train import train
from llmkd.training import initial, jobs, steps
from llmkd.training.tokens import tokens_of
from tests.distributed.runner import run_on_ranks
from tests.tiny import logged_part, quick, rows_of_step

PARTS = ("ce", "kl", "hidden")
COMMON = {"train.steps": 6, "train.save_every": 3, "train.keep_checkpoints": 9, "train.micro_batch_size": 4}
SCENARIOS: dict[str, dict[str, Any]] = {
    "redrawn": {"matching.strategy": "in_order_random", "matching.redraw_every": 2, "matching.embedding": True},
    "nearest_zero3": {
        "matching.strategy": "nearest",
        "matching.embedding": True,
        "teacher.placement": "zero3",
        "data.batching": "packed",
    },
    "nearest_narrow": {
        "matching.strategy": "nearest",
        "student.init": "random",
        "student.hidden_size": 24,
        "student.num_attention_heads": 3,
        "student.num_key_value_heads": 1,
        "matching.distance": ["gram", {"mse": 0.1, "gram": 1.0}, "mse"],
        "loss.report_norms_every": 2,
    },
    "scheduled": {
        "matching.distance": {"procrustes": 1.0, "normalized_mse": 0.5},
        "matching.scope": "batch",
        "matching.pair_weights": [2.0, 0.0, 1.0],
        "loss.divergence": {"forward_kl": 0.5, "reverse_kl": 0.5},
        "loss.schedules": {
            "ce": {"shape": "linear", "final": 0.0, "until": 0.5},
            "kl": {"shape": "cosine", "final": 0.0, "until": 0.7},
            "hidden": {"shape": "linear", "final": 6.0},
            "distances": {"procrustes": {"shape": "linear", "final": 0.0}},
            "divergences": {"reverse_kl": {"shape": "linear", "final": 1.0}},
            "temperature": {"shape": "linear", "final": 3.0},
        },
        "loss.report_norms_every": 2,
    },
    "sampled_sets": {
        "train.micro_batch_size": 2,
        "matching.tokens": 9,
        "matching.distance": {"procrustes": 1.0, "gram": 0.5},
        "matching.scope": "batch",
    },
    "nearest_stones": {
        "matching.strategy": "nearest",
        "loss.hidden": 0.0,
        "loss.kl": 0.0,
        "loss.temperature": 4.0,
        "loss.schedules": {
            "temperature": {"shape": "dynamic", "every": 2, "maximum": 6.0},
            "stones": {"shape": "linear", "final": 0.5},
        },
        "loss.report_norms_every": 4,
        "stones": {"ce": 0.3, "kl": 0.7, "cross": 0.2, "connector_batches": 2},
        "teacher.placement": "zero3",
        "student.blocks": 2,
    },
    "learned": {
        "matching.strategy": "learned",
        "matching.start": "uniform",
        "matching.learning_rate": 0.2,
        "matching.entropy": -0.1,
        "matching.embedding": True,
        "matching.distance": {"procrustes": 1.0, "normalized_mse": 0.5},
        "matching.scope": "batch",
        "loss.report_norms_every": 3,
    },
    "learned_narrow": {
        "matching.strategy": "learned",
        "matching.candidates": 4,
        "matching.pair_weights": [1.0, 0.0, 2.0],
        "student.init": "random",
        "student.hidden_size": 24,
        "student.num_attention_heads": 3,
        "student.num_key_value_heads": 1,
        "teacher.placement": "pipeline",
        "data.batching": "packed",
    },
    "dynamic": {
        "matching.tokens": 5,
        "matching.distance": "cka",
        "loss.temperature": 4.0,
        "loss.schedules": {"temperature": {"shape": "dynamic", "every": 2, "maximum": 6.0}},
        "train.log_every": 100,
    },
}
UNSHARDED = ("scheduled", "nearest_narrow", "learned", "dynamic")
"""What one rank trains without ZeRO-3; on two ranks all have it."""
BESIDE = ("metrics.jsonl", "map.json", "temperature.jsonl")
"""What a run keeps in its folder beside its checkpoints."""


SCENARIOS_OF_RUN = {name: {**COMMON, **changes} for name, changes in SCENARIOS.items()}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole/NAME ran through on two ranks."""
    output = tmp_path_factory.mktemp("moving")
    assert run_on_ranks(2, tiny / "recipe.yaml", SCENARIOS_OF_RUN, output / "whole") == {}
    return output


def _begin_again(begun: Path, folder: Path) -> None:
    """What a run killed after step 3 of 6 leaves, for the same command to go on with."""
    shutil.copytree(begun / "checkpoints" / "step-00000003", folder / "checkpoints" / "step-00000003")
    for file in BESIDE:
        if (begun / file).is_file():
            shutil.copy(begun / file, folder / file)


def _assert_same(resumed: Path, whole: Path) -> None:
    assert _lines(whole) == _lines(resumed)
    assert [line["step"] for line in _lines(whole)] == ([3, 6] if "dynamic" in str(whole) else [1, 2, 3, 4, 5, 6])
    ours, theirs = _weights(resumed), _weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for file in BESIDE[1:]:
        assert not (whole / file).is_file() or (resumed / file).read_text() == (whole / file).read_text()


def _lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "seconds_per_step", "seconds_by_part", "memory_gib")
    return [{key: value for key, value in line.items() if key not in timed} for line in found]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_resumed_is_uninterrupted_on_two_ranks(runs: Path, tiny: Path) -> None:
    for name in SCENARIOS:
        _begin_again(runs / "whole" / name, runs / "resumed" / name)
    assert run_on_ranks(2, tiny / "recipe.yaml", SCENARIOS_OF_RUN, runs / "resumed") == {}
    assert (runs / "resumed" / "rank0.log").read_text().count("resumed from") == len(SCENARIOS)
    for name in SCENARIOS:
        _assert_same(runs / "resumed" / name, runs / "whole" / name)


def _sample_as_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process draws from each half of a micro-batch's rows what the rank that had them would have drawn, by the same numbers."""
    numbers_of: dict[int, tuple[int, ...]] = {}
    first: list[int] = []
    forward = distiller.Distiller.forward

    def drawing(*numbers: int) -> int:
        numbers_of[draw_seed(*numbers)] = numbers
        return draw_seed(*numbers)

    def running(self: Any, batch: Any, *args: Any, **options: Any) -> Any:
        first[:] = [batch.input_ids.numel() // 2]
        return forward(self, batch, *args, **options)

    def both(at: torch.Tensor, count: int | None, seed: int) -> tuple[torch.Tensor, float]:
        *numbers, rank = numbers_of[seed]
        assert rank == 0
        halves = at[at < first[0]], at[at >= first[0]]
        drawn = torch.cat([sampled(half, count, draw_seed(*numbers, rank))[0] for rank, half in enumerate(halves)])
        assert len(drawn) < len(at)
        return drawn, len(at) / len(drawn)

    monkeypatch.setattr(steps, "draw_seed", drawing)
    monkeypatch.setattr(distiller.Distiller, "forward", running)
    monkeypatch.setattr(matching, "sampled", both)


@pytest.mark.parametrize("name", SCENARIOS)
def test_resumed_is_uninterrupted_and_one_rank_is_two(
    runs: Path,
    tiny: Path,
    world: Any,
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = SCENARIOS_OF_RUN[name]
    changes = {**changes, "train.micro_batch_size": 2 * changes["train.micro_batch_size"]}  # as much as both at once
    if name in UNSHARDED:
        changes["train.deepspeed"] = str(tiny / "zero1.json")
    if name == "sampled_sets":
        _sample_as_two_ranks(monkeypatch)
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
    whole, resumed = tmp_path / name, tmp_path / "again" / name
    assert train(world, jobs.distil_job(world, recipe, whole))
    _begin_again(whole, resumed)
    with caplog.at_level("INFO"):
        assert train(world, jobs.distil_job(world, recipe, resumed))
    assert "resumed from" in caplog.text
    _assert_same(resumed, whole)
    if name in ("dynamic", "nearest_narrow"):
        return  # what is compared there is a set of a rank's own tokens, or a sample of them
    ours, theirs = _weights(whole), _weights(runs / "whole" / name)
    for key, expected in theirs.items():
        assert (ours[key] - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max())), key
    logged = [
        [[*(logged_part(line, part) for part in PARTS), *line["pairs"].values()] for line in _lines(folder)]
        for folder in (whole, runs / "whole" / name)
    ]
    numbers = (np.array(lines, dtype=float) for lines in logged)  # NaN where a part was not computed
    np.testing.assert_allclose(*numbers, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Maps


def test_each_redraw_is_the_pure_functions(tiny: Path, world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    changes = {**COMMON, **SCENARIOS["redrawn"], "matching.embedding": False, **quick(tiny)}
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
    seen = []
    forward = distiller.Distiller.forward

    def running(self: Any, batch: Any, signal: Any, settings: Any, number: int) -> Any:
        if number == 0:
            seen.append(settings.pairs)
        return forward(self, batch, signal, settings, number)

    monkeypatch.setattr(distiller.Distiller, "forward", running)
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    assert seen == [in_order_random(3, 6, recipe.seed, step // 2) for step in range(6)]
    assert len(set(seen)) > 1
    assert list(_lines(tmp_path / "run")[0]["pairs"]) == ["0<*", "1<*", "2<*"]


@pytest.mark.parametrize("name", ["nearest_zero3", "nearest_narrow"])
def test_nearest_is_the_highest_cka_of_the_plain_models(
    runs: Path, tiny: Path, world: Any, tmp_path: Path, name: str
) -> None:
    """By `output_hidden_states` and the definition of CKA, over every token of the first step's rows."""
    recipe = load_recipe(tiny / "recipe.yaml").changed({**COMMON, **SCENARIOS[name]})
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "student")
    job = jobs.distil_job(world, recipe, tmp_path / "run")
    data = tokens_of(world, job, load.load_tokenizer(tiny / "teacher"))
    batch = collate(rows_of_step(data.rows, recipe), pad_id=0, packed=False)
    sides = []
    for folder in (tmp_path / "student", tiny / "teacher"):
        model = load.load_causal_lm(folder, dtype=torch.float32, ds_config=None, attention="sdpa").eval()
        states: list[torch.Tensor] = []
        for block in model_parts.blocks(model):
            block.register_forward_hook(
                lambda m, a, output, states=states: states.append(output_state(output)[batch.attended])
            )
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        sides.append(states)
    expected = torch.tensor([[1 - cka(s, t).item() for t in sides[1]] for s in sides[0]])
    found = json.loads((runs / "whole" / name / "map.json").read_text())
    torch.testing.assert_close(torch.tensor(found["cka"]["blocks"]), expected, rtol=1e-3, atol=1e-4)
    pairs = [[j, int(row.argmax())] for j, row in enumerate(expected)]
    assert found["pairs"] == [[-1, -1]] * (name == "nearest_zero3") + pairs
    summary = json.loads((runs / "whole" / name / "summary.json").read_text())
    assert summary["pairs"] == found["pairs"]
    assert f"{name}: nearest by linear CKA: " in (runs / "whole" / "rank0.log").read_text()


def test_a_learned_map_is_logged_kept_and_left_out_of_the_student(runs: Path, tiny: Path) -> None:
    """Its weights move, those of each student block add up to 1, and nothing of them is exported."""
    lines = _lines(runs / "whole" / "learned")
    for line in lines:
        assert list(line["learned_map"]) == ["0", "1", "2"]
        assert all(list(of_block) == list("012345") for of_block in line["learned_map"].values())
        assert all(sum(of_block.values()) == pytest.approx(1, rel=1e-5) for of_block in line["learned_map"].values())
        assert list(line["pairs"]) == ["e<e", "0<mix", "1<mix", "2<mix"]
        assert line["hidden"] == pytest.approx(sum(line["pairs"].values()) / 4, rel=1e-5)
    first, last = (np.array([[*of_block.values()] for of_block in lines[n]["learned_map"].values()]) for n in (0, -1))
    assert np.abs(last - first).max() > 0.05 and np.abs(first - 1 / 6).max() < 0.25
    said = (runs / "whole" / "rank0.log").read_text()
    likeliest = [max(of_block, key=of_block.__getitem__) for of_block in lines[-1]["learned_map"].values()]
    shares = [max(of_block.values()) for of_block in lines[-1]["learned_map"].values()]
    named = " ".join(f"{j}<{i}:{w:.2f}" for j, (i, w) in enumerate(zip(likeliest, shares, strict=True)))
    assert f" map {named}" in said
    saved = saved_weights(runs / "whole" / "learned" / "checkpoints" / "step-00000006" / "shards", "mixtures.")
    table = (saved["scores"].view(3, 6) / 0.2).softmax(1)
    torch.testing.assert_close(table.double(), torch.tensor(last), rtol=1e-5, atol=0)
    assert not any("mixtures" in key or "scores" in key for key in _weights(runs / "whole" / "learned"))
    summary = json.loads((runs / "whole" / "learned_narrow" / "summary.json").read_text())
    assert summary["pairs"] == [[j, i] for j in range(3) for i in (1, 2, 4, 5)]
    card = (runs / "whole" / "learned_narrow" / "model" / "README.md").read_text()
    assert summary["learned_map"] == _lines(runs / "whole" / "learned_narrow")[-1]["learned_map"]
    best = {
        student: max(weights.items(), key=lambda item: item[1]) for student, weights in summary["learned_map"].items()
    }
    assert f"weights: {' '.join(f'{j}<{i}:{w:.2f}' for j, (i, w) in best.items())}\n" in card
    assert "0<mix, 1<mix, 2<mix" in card and "- started from: random weights\n" in card
    assert (
        "- started from: copies of the teacher's blocks\n"
        in (runs / "whole" / "learned" / "model" / "README.md").read_text()
    )


def test_a_map_that_nothing_pulls_at_stays(tiny: Path, world: Any, tmp_path: Path) -> None:
    """Weight decay does not touch it, nor does a validation; without weight in the loss its gradient is 0."""
    changes = {
        **COMMON,
        **SCENARIOS["learned"],
        **quick(tiny),
        "matching.entropy": 0.0,
        "matching.scope": "micro_batch",
    }
    changes |= {"matching.start": "forward", "train.validate_every": 2, "data.validation": {"share": 0.2}}
    changes |= {"matching.distance": "normalized_mse", "matching.pair_weights": [1.0, 0.0, 0.0, 0.0]}
    changes |= {"train.weight_decay": 0.5, "loss.report_norms_every": 0}
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    lines = _lines(tmp_path / "run")
    maps = [line["learned_map"] for line in lines if "validation" not in line]
    assert len(maps) == 6 and all(found == maps[0] for found in maps)
    assert maps[0]["1"]["3"] == pytest.approx(np.exp(5) / (np.exp(5) + 5), rel=1e-5)
    validated = [line["validation"]["pairs"] for line in lines if "validation" in line]
    assert [list(pairs) for pairs in validated] == [["e<e", "0<mix", "1<mix", "2<mix"]] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Weights and temperatures


def test_scheduled_weights_and_temperatures_are_logged(runs: Path) -> None:
    lines = _lines(runs / "whole" / "scheduled")
    assert [line["temperature"] for line in lines] == pytest.approx([1.0, 1.4, 1.8, 2.2, 2.6, 3.0])
    assert [line["weights"]["ce"] for line in lines] == pytest.approx([1.0, 0.5, 0, 0, 0, 0])
    assert [line["weights"]["kl"] for line in lines] == pytest.approx([1.0, 0.75, 0.25, 0, 0, 0])
    assert [line["weights"]["hidden"] for line in lines] == pytest.approx([3.0, 3.6, 4.2, 4.8, 5.4, 6.0])
    assert [line["weights"]["procrustes"] for line in lines] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert [line["weights"]["reverse_kl"] for line in lines] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    for line in lines:
        total = sum(line["weights"][part] * (logged_part(line, part) or 0) for part in PARTS)
        assert line["loss"] == pytest.approx(total)
        pairs = list(line["pairs"].values())
        assert line["hidden"] == pytest.approx((2 * pairs[0] + pairs[2]) / 3)
        assert ("kl" not in line) == (line["weights"]["kl"] == 0)  # it was not computed


def test_stones_of_a_measured_map_follow_a_dynamic_temperature_and_report_their_norms(runs: Path) -> None:
    folder = runs / "whole" / "nearest_stones"
    found, lines = json.loads((folder / "map.json").read_text()), _lines(folder)
    names = [f"{s}<{t}" for s, t in found["pairs"]]
    assert len(names) == 2 and json.loads((folder / "summary.json").read_text())["pairs"] == []
    for line in lines:
        assert logged_part(line, "hidden") is None and logged_part(line, "kl") is None and line["pairs"] == {}
        assert {key.split("/")[1] for key in line if key.startswith("stones/")} == {*names, "student"}
    changes = [json.loads(text) for text in (folder / "temperature.jsonl").read_text().splitlines()]
    assert [change["step"] for change in changes] == [2, 4, 6]
    assert [line["temperature"] for line in lines] == [4.0, 4.0, *[c["temperature"] for c in changes[:2] for _ in "ab"]]
    assert len({change["temperature"] for change in changes}) == 3
    assert [change["student_ce"] for change in changes] == pytest.approx([line["ce"] for line in lines[1::2]])
    assert [line["weights"]["stones"] for line in lines] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    for step, line in enumerate(lines, start=1):
        assert ("norms" in line) == (step == 4)
        if "norms" in line:
            stones = line["norms"]["stones"]
            assert list(stones) == [*names, "student"] and stones["student"].keys() == {"cross"}
            assert all(stones[name].keys() == {"ce", "kl", "cross"} for name in names)
            assert all(0 < norm < 10 for parts in stones.values() for norm in parts.values())
    said = (runs / "whole" / "rank0.log").read_text()
    assert f" {names[0]} ce:" in said and " student cross:" in said


@pytest.mark.parametrize(
    ("name", "file", "sentence"),
    [
        (
            "nearest_narrow",
            "map.json",
            r"map\.json: the map that this run began with is missing or damaged; put it back, or",
        ),
        (
            "dynamic",
            "temperature.jsonl",
            r"temperature\.jsonl: it does not begin with what it held when .*; put it back, or",
        ),
    ],
)
def test_what_a_resumed_run_goes_on_from_beside_its_checkpoint_is_compared(
    runs: Path, tiny: Path, world: Any, tmp_path: Path, name: str, file: str, sentence: str
) -> None:
    _begin_again(runs / "whole" / name, tmp_path / "run")
    written = bytearray((tmp_path / "run" / file).read_bytes())
    place = next(place for place, byte in enumerate(written) if chr(byte).isdigit())
    written[place] ^= 1  # another digit
    (tmp_path / "run" / file).write_bytes(written)
    recipe = load_recipe(tiny / "recipe.yaml").changed(SCENARIOS_OF_RUN[name])
    with pytest.raises(InputError, match=sentence):
        train(world, jobs.distil_job(world, recipe, tmp_path / "run"))


def test_norms_are_reported_at_their_steps(runs: Path) -> None:
    lines = _lines(runs / "whole" / "scheduled")
    assert ["norms" in line for line in lines] == [False, True] * 3
    assert lines[1]["norms"]["ce"] > 0 < lines[1]["norms"]["kl"] and lines[1]["norms"]["pairs"]["1<3"] == 0
    assert lines[5]["norms"]["ce"] == lines[5]["norms"]["kl"] == 0 < lines[5]["norms"]["hidden"]
    for kind, names in (("distances", ["procrustes", "normalized_mse"]), ("divergences", ["forward_kl", "reverse_kl"])):
        assert list(lines[1]["norms"][kind]) == names and all(norm > 0 for norm in lines[1]["norms"][kind].values())
    assert list(lines[5]["norms"]["divergences"].values()) == [0, 0]
    assert lines[5]["norms"]["distances"]["procrustes"] == 0 < lines[5]["norms"]["distances"]["normalized_mse"]
    said = (runs / "whole" / "rank0.log").read_text()
    assert "norms ce:" in said and " procrustes:" in said and " reverse_kl:" in said


def test_a_dynamic_temperature_follows_its_file(runs: Path) -> None:
    folder = runs / "whole" / "dynamic"
    said = [json.loads(line) for line in (folder / "temperature.jsonl").read_text().splitlines()]
    assert [line["step"] for line in said] == [2, 4, 6]
    value = 4.0
    for line in said:
        value = dynamic_temperature(
            value,
            line["step"],
            6,
            initial=4.0,
            minimum=2.0,
            maximum=6.0,
            student_ce=line["student_ce"],
            teacher_ce=line["teacher_ce"],
        )
        assert line["temperature"] == value
    assert [line["temperature"] for line in _lines(folder)] == [said[0]["temperature"], said[1]["temperature"]]
