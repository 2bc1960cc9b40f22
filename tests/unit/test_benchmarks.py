"""The benchmark's contestants compute the same losses and gradients: a benchmark of different losses would prove nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from benchmarks import attention, block_forms, rollouts, tables, trl_trainers
from benchmarks.check import agrees, expected_losses
from benchmarks.contestants import Terms, make_passes
from benchmarks.data import fewest
from benchmarks.head_counts import Moved
from benchmarks.measure import Memory
from benchmarks.passes import HIDDEN_WEIGHT, Llmkd, Paper, Pass
from benchmarks.shapes import PAD, Row, Size, Work, as_batch, labels, make_model, make_rows, make_work
from llmkd.distributed.ds_configs import complete_ds_config
from llmkd.distributed.ranks import World
from llmkd.layer_map import forward
from llmkd.losses.head_inputs import IGNORED
from llmkd.teachers.resident import ResidentTeacher
from tests.passes import distiller, step_settings

SIZE = Size(32, 48, 4, 2, 8, 4, 2, True, 3, 24, vocabulary=157)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """(student, teacher), sharp enough that every part of the loss counts."""
    made = [
        make_model(SIZE, blocks, torch.float32, CPU, seed=blocks)
        for blocks in (SIZE.student_blocks, SIZE.teacher_blocks)
    ]
    for model in made:
        for parameter in model.parameters():
            parameter.data.mul_(8 if parameter.ndim > 1 else 1)
    made[1].eval().requires_grad_(False)
    return made[0], made[1]


@pytest.fixture(scope="module")
def work() -> Work:
    return make_work(SIZE, rank=0, ranks=1, count=1, device=CPU)[0]


def loss_and_gradients(passing: Pass, student: Any, work: Work) -> tuple[float, dict[str, Tensor]]:
    student.zero_grad()
    student.train()
    passing.start()
    loss = passing(work, passing.ask(work))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in student.named_parameters()}


def test_all_losses_are_what_their_terms_say(world: World, models: tuple[Any, Any], work: Work) -> None:
    passes = make_passes(*models, ranks=1, wanted=lambda name: True)
    terms = {name: terms for name, (terms, _) in passes.items() if terms is not None}
    expected = expected_losses(world, *models, work, list(terms.values()))
    for (name, _), value in zip(terms.items(), expected, strict=True):
        loss, _ = loss_and_gradients(passes[name][1], models[0], work)
        assert agrees(name, loss, value, torch.float32), (name, loss, value)
    assert len({round(value, 4) for value in expected}) > 10, "the losses differ, so that agreement says something"


@pytest.mark.parametrize(("name", "same"), [("unavoidable", "plain none"), ("llmkd/none", "plain none")])
def test_same_terms_have_the_same_gradients(models: tuple[Any, Any], work: Work, name: str, same: str) -> None:
    passes = make_passes(*models, ranks=1, wanted=lambda found: found in (name, same))
    _, ours = loss_and_gradients(passes[name][1], models[0], work)
    _, theirs = loss_and_gradients(passes[same][1], models[0], work)
    assert ours.keys() == theirs.keys()
    for parameter, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


def test_llmkd_with_pairs_has_the_plain_gradients(models: tuple[Any, Any], work: Work) -> None:
    pairs = forward(SIZE.student_blocks, SIZE.teacher_blocks)
    plain = make_passes(*models, ranks=1, wanted=lambda name: name == "plain")["plain"][1]
    loss, gradients = loss_and_gradients(Llmkd(*models, pairs, ranks=1, normed_last=True), models[0], work)
    plain_loss, plain_gradients = loss_and_gradients(plain, models[0], work)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


def test_the_papers_loss_is_ours_where_nothing_is_padded(models: tuple[Any, Any]) -> None:
    """With padding its means run over all positions; without, they are llmkd's with KL over the attended positions."""
    student, teacher = models
    rows = tuple(Row(tuple(range(1, 9)), tuple(range(20 + n, 36 + n))) for n in range(3))
    work = Work(as_batch(rows), rows, trained=48, attended=72)
    assert bool(work.batch.attended.all())
    pairs = forward(SIZE.student_blocks, SIZE.teacher_blocks)
    theirs, _ = loss_and_gradients(Paper(student, teacher, pairs), student, work)
    scales = (1 / 48, 1 / 72, HIDDEN_WEIGHT / (72 * len(pairs)))
    settings = step_settings(pairs, scales, kl_positions="attended")
    signal = ResidentTeacher(teacher, [t for _, t in pairs], normed_last=True, ds_config=None).signals(work.batch)
    ours = distiller(student, pairs, normed_last=True, chunk=7)(work.batch, signal, settings).loss
    assert theirs == pytest.approx(ours.item(), rel=1e-5)


def trl_config() -> dict[str, Any]:
    return complete_ds_config(
        {"zero_optimization": {"stage": 2}},
        world_size=1,
        micro_batch=SIZE.rows,
        accumulation=1,
        clip=1.0,
        dtype="float32",
        nvme_path="/tmp",
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (the extra `bench`)")
@pytest.mark.parametrize("kind", ["trl/gkd", "trl/distillation"])
def test_trls_trainers_compute_the_same_divergence(world: World, work: Work, kind: str) -> None:
    student, teacher = (make_model(SIZE, n, torch.float32, CPU, seed=n) for n in (2, 4))
    teacher.eval().requires_grad_(False)
    (expected,) = expected_losses(world, student, teacher, work, [trl_trainers.KL_ALONE])
    trainer = trl_trainers.TrlStep(kind, world, student, teacher, trl_config(), work)
    with trainer.turn() as step:
        assert float(step(work)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (the extra `bench`)")
def test_trls_on_policy_step_has_the_divergence_of_what_it_wrote(world: World, work: Work) -> None:
    student, teacher = (make_model(SIZE, n, torch.float32, CPU, seed=n) for n in (2, 4))
    teacher.eval().requires_grad_(False)
    rows = tuple(Row(row.prompt, (1,) * 5) for row in work.rows)
    work = Work(as_batch(rows), rows, trained=5 * len(rows), attended=0)
    trainer = trl_trainers.OnPolicy(world, student, teacher, trl_config(), work)
    with trainer.turn() as step:
        loss = float(step(work))
    texts = [tuple(written[-5:].tolist()) for written in trainer.written]
    assert len(set(texts)) == len(rows) and trainer.writing > 0
    wrote = tuple(Row(row.prompt, text) for row, text in zip(rows, texts, strict=True))
    made = Work(as_batch(wrote), wrote, trained=5 * len(rows), attended=0)
    (expected,) = expected_losses(world, student, teacher, made, [Terms(ce=0.0, divergence="jsd")])
    assert loss == pytest.approx(expected, rel=1e-4)


def test_trl_is_given_the_same_tokens(work: Work) -> None:
    inputs = trl_trainers.distillation_inputs(work)
    for number, row in enumerate(work.rows):
        for part, tokens in (("prompt", row.prompt), ("completion", row.completion)):
            mask = inputs[f"{part}_mask"][number].bool()
            assert tuple(inputs[f"{part}_ids"][number][mask].tolist()) == tokens
            assert bool((inputs[f"{part}_ids"][number][~mask] == PAD).all())
    shifted = trl_trainers.gkd_inputs(work)["labels"][:, 1:]
    assert torch.equal(shifted, work.batch.targets[:, :-1])


def test_batches_are_the_rows(work: Work) -> None:
    assert work.trained == work.batch.trained_at.numel() and work.attended == work.batch.attended_at.numel()
    for number, row in enumerate(work.rows):
        own = labels(work.batch)[number]
        assert tuple(own[own != IGNORED].tolist()) == row.completion
    assert make_rows(SIZE, seed=3) == make_rows(SIZE, seed=3) != make_rows(SIZE, seed=4)
    ranks = [make_work(SIZE, rank=rank, ranks=2, count=1, device=CPU)[0] for rank in (0, 1)]
    assert ranks[0].trained == ranks[1].trained == sum(w.batch.trained_at.numel() for w in ranks)


def test_goals_are_judged_by_the_worst() -> None:
    seconds = {name: [1.0, 2.0] for name in ("unavoidable", "plain", "llmkd/none", "llmkd/forward")}
    seconds["llmkd/forward"] = [1.25, 2.5]
    seconds["plain"] = [4.0, 8.0]
    sizes = {name: Memory(10, 10, 1, 1) for name in seconds}
    sizes["plain"] = replace(sizes["plain"], passes=40.0)
    lines = tables.goals(seconds, sizes)
    assert lines == [
        "- **not met**: tokens/s ≥ 0.9 of (a) unavoidable: 0.800 (llmkd/forward)",
        "- met: tokens/s ≥ 2.0 of (c) plain: 3.200 (llmkd/forward)",
        "- met: peak of both passes ≤ 0.35 of (c) plain: 0.250 (llmkd/none)",
        "- **not met**: peak of the whole step ≤ 0.35 of (c) plain: 1.000 (llmkd/none)",
    ]


def test_a_noisy_round_drops_out_of_the_ratios() -> None:
    seconds = {"unavoidable": [1.0, 9.0], "llmkd/none": [2.0, 18.0]}
    assert tables.ratios(seconds, "llmkd/none", "unavoidable") == [0.5, 0.5]


def test_results_replace_their_own_part_alone() -> None:
    text = "# Benchmarks\n\n## Other\n\nkept\n"
    once = tables.put(text, "A training step", "small", "one")
    twice = tables.put(tables.put(once, "A training step", "large", "two"), "A training step", "small", "three")
    expected = "# Benchmarks\n\n## Other\n\nkept\n\n## A training step\n\n### small\n\nthree\n\n### large\n\ntwo\n"
    assert twice == expected
    before = twice.replace("## Other\n\nkept\n\n", "") + "\n## Other\n\nkept\n"
    assert tables.put(before, "A training step", "small", "three") == before


def test_a_benchmarked_run_writes_full_texts_of_the_prompts_that_trl_is_given(world: World, tmp_path: Path) -> None:
    size = replace(SIZE, rows=4, longest=16, vocabulary=400)
    recipe = rollouts.recipe_in(tmp_path, size, 2 * rollouts.STEPS).changed(
        {"rollouts.backend": "hf", "rollouts.every": 5}
    )
    run = rollouts.LlmkdRun(world, recipe, tmp_path / "run")
    turn = run.turn()
    assert 0 < turn.weights < turn.writing < turn.whole and run.rollouts.spent.rounds == 2
    table = pq.read_table(tmp_path / "run" / "rollouts" / "round-00000005.parquet").to_pylist()
    for step in (5, 9):
        written = [tuple(line["prompt"]) for line in table if line["step"] == step]
        assert sorted(written) == sorted(row.prompt for row in run.work(step).rows) and len(set(written)) == size.rows
    assert {len(line["text"]) for line in table} == {rollouts.WRITTEN} and not any(line["ended"] for line in table)


def test_rollouts_are_judged_by_their_own_rounds() -> None:
    trl, ours = [rollouts.Turn(8.0, 9.0, 4.0, 0.0)] * 3, [rollouts.Turn(4.0, 3.0, 1.0, 0.4)] * 3
    said = rollouts.report({rollouts.TRL: trl, "llmkd, Hugging Face, every 10": ours}, tokens=800)
    last = said.splitlines()[3].split("|")
    assert [cell.strip() for cell in last[2:-1]] == [
        "200 (200–200)", "0.400", "2.00 (2.00–2.00)", "3.00 (3.00–3.00)", "25.0%", "10.0%", "75.0%"
    ]  # fmt: skip
    assert "- met: tokens/s ≥ 1.5" in said and "- **not met**: weights ≤ 5 % of the time: 10.0%" in said


@pytest.mark.parametrize(
    ("lengths", "sequences"),
    [
        ([45] * 10, 5),
        ([90, 38] * 4, 4),
        ([60, 60, 34, 34, 34], 2),
        ([100, 30, 30, 30], 2),
        ([65, 65, 65, 63], 3),
        ([128], 1),
    ],
)
def test_no_packing_needs_fewer_sequences(lengths: list[int], sequences: int) -> None:
    """Where tokens alone would need fewer: two rows of 45 leave 38 of 128 tokens empty."""
    assert fewest(np.array(lengths), 128) == sequences


def test_padding_is_what_a_runs_micro_batches_have() -> None:
    """Rows of one length that needs none; of two lengths, which are not mixed within a step."""
    assert attention.padding(np.full(64, 16), batch_size=8, micro_batch_size=4) == 0
    assert attention.padding(np.full(64, 12), batch_size=8, micro_batch_size=4) == pytest.approx(1 - 12 / 16)
    assert attention.padding(np.array([8, 64] * 64), batch_size=8, micro_batch_size=4) == 0


def test_each_form_of_blocks_is_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> Any:
        commands.append(command[3:])
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr(block_forms.subprocess, "run", run)
    arguments = ["--blocks", "plain", "--size", "tiny", "--blocks=liger", "--only", "trl"]
    assert [block_forms.alone(arguments, form) for form in ("plain", "liger")] == [0, 1]
    assert commands == [["--size", "tiny", "--only", "trl", "--blocks", form] for form in ("plain", "liger")]


def test_what_an_operation_moves() -> None:
    """Each tensor that is read or written, once; of an index's target what it picks; products and views are not counted."""
    wide, narrow, ids = torch.zeros(4, 1000), torch.ones(4, 1), torch.zeros(4, 3, dtype=torch.long)
    for work, expected in (
        (lambda: wide + narrow, 4 * (2 * 4000 + 4)),
        (lambda: wide.mul_(narrow), 4 * (2 * 4000 + 4)),
        (lambda: wide.copy_(narrow), 4 * (4000 + 4)),
        (lambda: torch.exp(wide, out=wide), 4 * 2 * 4000),
        (lambda: wide.gather(-1, ids), 4 * 2 * 12 + 8 * 12),
        (lambda: wide[:2].expand(2, 1000), 0),
        (lambda: wide @ wide.T, 0),
    ):
        with Moved() as moved:
            work()
        assert (moved.bytes, moved.launches) == (expected, int(expected > 0))
