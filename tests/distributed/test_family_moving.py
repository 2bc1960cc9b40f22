"""Maps that are measured or drawn again, and reported norms, on an encoder and on both stacks of an encoder-decoder.

Two ranks are one rank, resumed is uninterrupted to the bit, and the measured map is that of the plain models.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkd.data.batches import Batch
from llmkd.data.formats import RowFormat
from llmkd.data.other_families import collate_for, tokenize_for
from llmkd.files import ROOT
from llmkd.layer_map import DECODER_EMBEDDING, EMBEDDING, in_order_random
from llmkd.losses.set_distances import cka
from llmkd.models import load
from llmkd.models.families import depths, family
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.student import distiller
from llmkd.train import train
from llmkd.training import initial, jobs
from llmkd.training import pairs as recipe_map
from tests.distributed.runner import run_on_ranks
from tests.family_models import CLASSES, ENCODER_DECODERS, ENCODERS, family_recipe, new, run
from tests.tiny import rows_of_step

TEACHERS: dict[str, Any] = {
    "bert": ("encoder", lambda: ENCODERS["bert"](5)),
    "t5": ("encoder_decoder", lambda: ENCODER_DECODERS["t5"](5, 4)),
    "bart": ("encoder_decoder", lambda: ENCODER_DECODERS["bart"](5, 4)),
}
COMMON = {"train.steps": 4, "train.save_every": 2, "train.keep_checkpoints": 9, "loss.report_norms_every": 2}
SCENARIOS: dict[str, dict[str, Any]] = {
    "nearest": {**COMMON, "matching.strategy": "nearest", "teacher.placement": "zero3"},
    "redrawn": {
        **COMMON,
        "matching.strategy": "in_order_random",
        "matching.redraw_every": 1,
        "train.activation_checkpointing": True,
    },
    "learned": {
        **COMMON,
        "matching.strategy": "learned",
        "matching.candidates": 3,
        "matching.embedding": True,
        "matching.learning_rate": 0.2,
    },
}
BESIDE = ("metrics.jsonl", "map.json")
FIRST = [pytest.param(name, marks=[] if name == "t5" else [pytest.mark.slow]) for name in TEACHERS]


def scenarios(folder: Path) -> dict[str, dict[str, Any]]:
    """The scenarios; every weight of a redrawn run's student is sharded, the pooler's and the norms' too."""
    cpu = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    zero = {**cpu["zero_optimization"], "stage3_param_persistence_threshold": 0}
    (folder / "sharded.json").write_text(json.dumps({**cpu, "zero_optimization": zero}))
    sharded = {"train.deepspeed": str(folder / "sharded.json")}
    return {**SCENARIOS, "redrawn": {**SCENARIOS["redrawn"], **sharded}}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By model type the folder in which every scenario ran through on two ranks."""

    @functools.cache
    def ran(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        kind, shape = TEACHERS[name]
        family_recipe(folder, kind, new(shape(), kind), **{"data.max_length": 30})
        assert run_on_ranks(2, folder / "recipe.yaml", scenarios(folder), folder / "two") == {}
        return folder

    return ran


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "seconds_per_step", "seconds_by_part", "memory_gib")
    return [{key: value for key, value in line.items() if key not in timed} for line in found]


def numbers(line: dict[str, Any]) -> list[float]:
    norms = line.get("norms", {"pairs": {}})
    parts = [norms[part] for part in ("ce", "kl", "hidden") if part in norms]
    return [
        *(line[key] for key in ("loss", "ce", "kl", "hidden") if key in line),
        *line["pairs"].values(),
        *parts,
        *norms["pairs"].values(),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", TEACHERS)
def test_resumed_is_uninterrupted_and_one_rank_is_two(
    two: Callable[[str], Path], world: Any, tmp_path: Path, name: str, scenario: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = two(name)
    recipe = load_recipe(folder / "recipe.yaml").changed(scenarios(folder)[scenario])
    whole, resumed = tmp_path / scenario, tmp_path / "again" / scenario
    assert train(world, jobs.distil_job(world, recipe, whole))
    shutil.copytree(whole / "checkpoints" / "step-00000002", resumed / "checkpoints" / "step-00000002")
    for file in BESIDE:
        if (whole / file).is_file():
            shutil.copy(whole / file, resumed / file)
    with caplog.at_level("INFO"):
        assert train(world, jobs.distil_job(world, recipe, resumed))
    assert "resumed from" in caplog.text
    assert lines(whole) == lines(resumed) and len(lines(whole)) == 4
    ours, again, spread = (
        load_file(run / "model" / "model.safetensors") for run in (whole, resumed, folder / "two" / scenario)
    )
    for key, expected in ours.items():
        assert torch.equal(again[key], expected), key
        assert (spread[key] - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max())), key
    for one, other in zip(lines(whole), lines(folder / "two" / scenario), strict=True):
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-4, abs=1e-6)
    norms = lines(whole)[1]["norms"]
    assert norms["ce"] > 0 < norms["kl"] and set(norms["pairs"]) == set(lines(whole)[1]["pairs"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_nearest_is_the_highest_cka_of_the_plain_models(
    two: Callable[[str], Path], world: Any, tmp_path: Path, name: str
) -> None:
    """Each stack by itself, over its own tokens of the first step's rows, by `output_hidden_states` in float64."""
    folder, kind = two(name), TEACHERS[name][0]
    recipe = load_recipe(folder / "recipe.yaml").changed(scenarios(folder)["nearest"])
    initial.initial_student(recipe, folder / "teacher", tmp_path / "student")
    teacher, student = (
        CLASSES[kind].from_pretrained(path).double().eval() for path in (folder / "teacher", tmp_path / "student")
    )
    batch = first_batch(recipe, folder / "teacher")
    with torch.no_grad():
        theirs, ours = run(teacher, batch)[1], run(student, batch)[1]
    found = json.loads((folder / "two" / "nearest" / "map.json").read_text())
    pairs, (first_student, first_teacher) = [], (0, 0)
    for stack, s_depth, t_depth in zip(found["cka"], depths(student.config), depths(teacher.config), strict=True):
        where = batch.source_attended if stack == "enc" else batch.attended
        expected = torch.tensor(
            [
                [
                    1 - cka(ours[first_student + s][where], theirs[first_teacher + t][where]).item()
                    for t in range(t_depth)
                ]
                for s in range(s_depth)
            ]
        )
        torch.testing.assert_close(torch.tensor(found["cka"][stack]), expected, rtol=1e-3, atol=1e-4)
        pairs += [[DECODER_EMBEDDING if stack == "dec" else EMBEDDING] * 2]
        pairs += [[first_student + s, first_teacher + int(row.argmax())] for s, row in enumerate(expected)]
        first_student, first_teacher = first_student + s_depth, first_teacher + t_depth
    assert list(found["cka"]) == (["blocks"] if kind == "encoder" else ["enc", "dec"])
    assert found["pairs"] == pairs and json.loads((folder / "two/nearest/summary.json").read_text())["pairs"] == pairs
    said = "0<" if kind == "encoder" else "enc 0<"
    assert f"nearest: nearest by linear CKA: {found['names'][0]}, {said}" in (folder / "two" / "rank0.log").read_text()


def first_batch(recipe: Recipe, teacher: Path) -> Batch:
    """The rows of the first step."""
    of, tokenizer = family(load.load_config(teacher)), load.load_tokenizer(teacher)
    lengths: dict[str, Any] = dict(max_length=recipe.data.max_length, too_long=recipe.data.too_long)
    data = tokenize_for(of, jobs.read_rows(recipe.data), tokenizer, row_format=RowFormat(), **lengths)
    return collate_for(of)(rows_of_step(data, recipe), pad_id=0)


@pytest.mark.parametrize("name", FIRST)
def test_a_learned_map_mixes_within_each_stack(world: Any, tmp_path: Path, name: str) -> None:
    """The first step's distances, by `output_hidden_states` and the weights that the scores begin with."""
    kind, shape = TEACHERS[name]
    changes = {**SCENARIOS["learned"], "matching.learning_rate": 1e-30, "data.max_length": 30}
    changes["matching.candidates"] = 3 if name == "bert" else {"encoder": 3, "decoder": 2}
    recipe = family_recipe(tmp_path, kind, new(shape(), kind), **changes)
    initial.initial_student(recipe, tmp_path / "teacher", tmp_path / "student")
    teacher, student = (
        CLASSES[kind].from_pretrained(path).eval() for path in (tmp_path / "teacher", tmp_path / "student")
    )
    batch = first_batch(recipe, tmp_path / "teacher")
    with torch.no_grad():
        theirs, ours = run(teacher, batch)[1], run(student, batch)[1]
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    line = lines(tmp_path / "run")[0]
    # by student block, its candidates and which of them is nearest to the block of `forward`; all through both stacks
    mixes = {0: ([1, 3, 4], 0), 1: ([1, 3, 4], 2)}
    mixes |= {} if name == "bert" else {2: ([6, 8], 0), 3: ([6, 8], 1)}
    stack = [""] * 2 if name == "bert" else ["enc "] * 2 + ["dec "] * 2
    for student_block, (blocks, likeliest) in mixes.items():
        in_decoder = student_block >= 2
        where = batch.attended if name == "bert" or in_decoder else batch.source_attended
        weights = torch.tensor([5.0 * (place == likeliest) for place in range(len(blocks))]).softmax(0)
        target = sum(w * theirs[block][where] for w, block in zip(weights, blocks, strict=True))
        assert isinstance(target, torch.Tensor)
        unit = torch.nn.functional.normalize
        apart = (unit(ours[student_block][where], dim=-1) - unit(target, dim=-1)).square().sum(-1).mean()
        named = f"{stack[student_block]}{student_block % 2}"
        assert line["pairs"][f"{named}<mix"] == pytest.approx(float(apart), rel=1e-4), named
        numbers = [str(block - 5 * in_decoder) for block in blocks]
        assert line["learned_map"][named] == pytest.approx(dict(zip(numbers, weights.tolist(), strict=True)), rel=1e-5)


@pytest.mark.parametrize("name", FIRST)
def test_each_redraw_is_the_pure_functions(
    world: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, shape = TEACHERS[name]
    changes = {**SCENARIOS["redrawn"], "matching.redraw_every": 2, "matching.embedding": False, "data.max_length": 30}
    recipe = family_recipe(tmp_path, kind, new(shape(), kind), **changes)
    seen = []
    forward = distiller.Distiller.forward

    def running(self: Any, batch: Any, signal: Any, settings: Any, number: int) -> Any:
        if number == 0:
            seen.append(settings.pairs)
        return forward(self, batch, signal, settings, number)

    monkeypatch.setattr(distiller.Distiller, "forward", running)
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    expected = []
    for draw in (0, 0, 1, 1):
        pairs = in_order_random(2, 5, recipe.seed, draw)
        if name != "bert":
            second = in_order_random(2, 4, recipe.seed + recipe_map.DECODER_SEED, draw)
            pairs += tuple((s + 2, t + 5) for s, t in second)
        expected.append(pairs)
    assert seen == expected and seen[1] != seen[2]
    names = ["0<*", "1<*"] if name == "bert" else ["enc 0<*", "enc 1<*", "dec 0<*", "dec 1<*"]
    assert list(lines(tmp_path / "run")[0]["pairs"]) == list(lines(tmp_path / "run")[1]["norms"]["pairs"]) == names
