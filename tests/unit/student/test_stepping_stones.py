"""Stepping stones against plain autograd in float64: values, gradients, sampling, and what the teacher keeps."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from llmkd.data.batches import IGNORE, Batch, collate
from llmkd.errors import InputError
from llmkd.losses.distance_sum import terms_of
from llmkd.losses.objective import Divisors
from llmkd.models import load
from llmkd.recipe.recipe import load_recipe
from llmkd.student.connectors import least_squares, make_connectors
from llmkd.student.passes import PassResult, StepSettings, StoneSettings, StoneWeights
from llmkd.student.stepping_stones import SteppingStones, drawn, factors, shares
from llmkd.teachers.resident import ResidentTeacher
from llmkd.training import build, initial, jobs
from llmkd.training.metrics import StoneMeter
from llmkd.training.pairs import pairs_of, stones_of
from tests import definitions
from tests.passes import distiller, step_settings
from tests.unit.models.test_load_and_make import new

PAIRS = ((0, 1), (1, 2), (2, 5))
CE, KL, CROSS = 0.7, 1.3, 0.4


@pytest.fixture
def teacher(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In float64 throughout: transformers' norm would compute in float32."""

    def norm(self: Any, states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(states, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(Qwen3RMSNorm, "forward", norm)
    model: Any = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")
    return model.double()


@pytest.fixture
def student(tiny: Path) -> Any:
    """Narrower than the teacher, three blocks."""
    width = dict(hidden_size=24, num_attention_heads=3, num_key_value_heads=1)
    config = load.student_config(load.load_config(tiny / "teacher"), (0, 2, 5), width)
    return new(config).double()


def _rows(lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    draw = random.Random(1)
    return [
        {"input_ids": draw.choices(range(2, 300), k=n), "trained": [i >= n // 2 for i in range(n)]} for n in lengths
    ]


def _batch(lengths: tuple[int, ...] = (9, 4, 6), packed: bool = False) -> Batch:
    return collate(_rows(lengths), pad_id=0, packed=packed)


def _stones(student: Any, teacher: Any, pairs: Any = PAIRS, chunk: int = 4) -> SteppingStones:
    torch.manual_seed(5)
    connectors = make_connectors(len(pairs), student.config.hidden_size, teacher.config.hidden_size)
    for connector in connectors:
        nn.init.normal_(connector.weight, std=0.3)  # type: ignore[arg-type]
    return SteppingStones(pairs, connectors, chunk=chunk).double()


def _settings(
    batch: Batch,
    scales: tuple[float, float, float] = (0.0, 0.0, 0.0),
    *,
    count: int = len(PAIRS),
    cross: float = 0.0,
    one: bool = False,
    step: int = 0,
    weight: float = 1.0,
    positions: str = "trained",
    **others: Any,
) -> StepSettings:
    """Of a step (from 0) whose batch is all there is."""
    trained, attended, _ = batch.counts
    compared = attended if positions == "attended" else trained
    stones = StoneSettings(
        weights=StoneWeights(CE, KL, cross),
        factors=factors(count, sampled=one, seed=0, step=step) if weight else {},
        weight=weight,
        scales=(weight / trained, weight / compared),
        sampled=one,
    )
    settings = step_settings((), scales, kl_positions=positions, stones=stones, **others)
    return replace(settings, divisors=Divisors(trained, compared, 1))


def _logged(world: Any, *steps: tuple[StepSettings, PassResult], pairs: Any = PAIRS) -> dict[str, float]:
    """What these steps' stones are logged as."""
    meter = StoneMeter(world, pairs)
    for settings, result in steps:
        assert settings.stones is not None
        meter.add(settings.stones, settings.divisors, [result.stones])
    loss, parts = meter.means()
    return {"stones": loss, **parts}


def _source(teacher: Any, pairs: Any = PAIRS, *, checkpointed: bool = True) -> ResidentTeacher:
    where: dict[str, Any] = dict(stones=[t for _, t in pairs], checkpointed=checkpointed)
    return ResidentTeacher(teacher, [], normed_last=False, ds_config=None, **where)


def plain_stones(
    student: Any,
    teacher: Any,
    connectors: Any,
    pairs: Any,
    batch: Batch,
    *,
    weights: tuple[float, float] = (CE, KL),
    cross: float = 0.0,
    temperature: float = 1.0,
    positions: str = "trained",
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """(loss, each stone's means): whole logits, and the teacher's own forward with a hook that puts the stone's state in place."""
    inputs: dict[str, Any] = dict(attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
    kept: dict[int, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda m, a, o, n=number: kept.update({n: o}))
        for number, block in enumerate(student.model.layers)
    ]
    ours = student(input_ids=batch.input_ids, **inputs).logits
    with torch.no_grad():
        theirs = teacher(input_ids=batch.input_ids, **inputs).logits
    logits = []
    for (s, t), connector in zip(pairs, connectors, strict=True):
        state = kept[s] @ connector.weight.T
        hooks.append(teacher.model.layers[t].register_forward_hook(lambda m, a, o, state=state: state))
        logits.append(teacher(input_ids=batch.input_ids, **inputs).logits)
        hooks[-1].remove()
    for hook in hooks:
        hook.remove()
    where = batch.attended if positions == "attended" else batch.targets != IGNORE
    mean = lambda p, q: definitions.divergence("forward_kl", q[where], p[where], temperature).mean()  # noqa: E731
    ensemble = torch.stack(logits).mean(0).detach()
    loss = cross * mean(ensemble, ours) if cross else torch.zeros((), dtype=torch.float64)
    parts = []
    for number, its in enumerate(logits):
        found = {
            "ce": F.cross_entropy(its.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE),
            "kl": mean(theirs, its),
            "cross": mean(ensemble, its),
        }
        share = 2.0 ** -(len(logits) - 1 - number)
        loss = loss + share * (weights[0] * found["ce"] + weights[1] * found["kl"] + cross * found["cross"])
        parts.append(found)
    return loss, parts


OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cross": {"cross": CROSS},
    "attended_warm": {"cross": CROSS, "temperature": 2.0, "positions": "attended"},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_are_those_of_plain_autograd(
    teacher: Any, student: Any, name: str, checkpointed: bool, packed: bool, world: Any
) -> None:
    options, batch = OBJECTIVES[name], _batch(packed=packed)
    stones = _stones(student, teacher)
    module, settings = distiller(student, (), stones=stones), _settings(batch, **options)
    signal = _source(teacher, checkpointed=checkpointed).signals(batch)
    result = module(batch, signal, settings)
    loss, sums = result.loss, result.sums
    parameters = [*student.parameters(), *stones.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected_loss, parts = plain_stones(student, teacher, stones.connectors, PAIRS, batch, **options)
    expected = torch.autograd.grad(expected_loss, parameters, allow_unused=True)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-10)
    assert sums.tolist() == [0, 0]
    moved = 0
    for ours, theirs in zip(found, expected, strict=True):
        if (
            theirs is None
        ):  # above the stones only the gradient of zeros comes that ZeRO-3 needs where the head is not run
            assert ours is None or not ours.any()
            continue
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)
        moved += bool(theirs.abs().max() > 1e-6)
    assert moved > 10
    logged = _logged(world, (settings, result))
    assert logged["stones"] == pytest.approx(expected_loss.item(), rel=1e-10)
    for (s, t), part in zip(PAIRS, parts, strict=True):
        for key in ("ce", "kl", *(["cross"] if options.get("cross") else [])):
            assert logged[f"stones/{s}<{t}/{key}"] == pytest.approx(part[key].item(), rel=1e-10)


def test_stones_stand_beside_the_students_own_loss(teacher: Any, student: Any) -> None:
    """The sum of both, and of their gradients; the own sums are as they are without stones."""
    batch, scales = _batch(), (0.5, 0.25, 0.0)
    stones, none = _stones(student, teacher), (0.0, 0.0, 0.0)
    source, parameters = _source(teacher), list(student.parameters())
    results = {}
    for name, used, which in (("own", None, scales), ("stones", stones, none), ("both", stones, scales)):
        module = distiller(student, (), stones=used)
        loss, sums, *_ = module(batch, source.signals(batch), _settings(batch, which, cross=CROSS))
        results[name] = loss, sums, torch.autograd.grad(loss, parameters)
    (own, own_sums, own_grads), (_, _, grads), (both, both_sums, both_grads) = results.values()
    assert both.item() == pytest.approx(own.item() + results["stones"][0].item(), rel=1e-12)
    assert torch.equal(own_sums, both_sums)
    for one, other, whole in zip(own_grads, grads, both_grads, strict=True):
        torch.testing.assert_close(one + other, whole, rtol=1e-9, atol=1e-12)


def test_a_checkpointed_student_gets_the_same_gradients_and_keeps_no_state(teacher: Any, student: Any) -> None:
    batch, stones = _batch(), _stones(student, teacher)
    found = []
    for again in (False, True):
        if again:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = distiller(student, (), stones=stones)
        before = set(vars(stones))
        loss = module(batch, _source(teacher).signals(batch), _settings(batch, (1.0, 1.0, 0.0))).loss
        found.append(torch.autograd.grad(loss, list(module.parameters())))
        assert set(vars(stones)) == before and module._matching is None
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-10, atol=1e-13)


def test_what_padding_holds_changes_nothing(teacher: Any, student: Any) -> None:
    batch, stones = _batch((9, 4)), _stones(student, teacher)
    module = distiller(student, (), stones=stones)
    losses = []
    for token in (0, 7):
        other = copy.copy(batch)
        ids = torch.where(batch.attended, batch.input_ids, token)
        object.__setattr__(other, "input_ids", ids)
        losses.append(module(other, _source(teacher).signals(other), _settings(other)).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The teacher


def test_the_teachers_first_blocks_under_its_upper_ones_are_the_teacher(tiny: Path, teacher: Any, world: Any) -> None:
    """A student of the teacher's first blocks and identity connectors: every stone says what the teacher says."""
    student: Any = load.load_causal_lm(
        tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa", first_blocks=3
    ).double()
    pairs = ((0, 0), (1, 1), (2, 2))
    stones = _stones(student, teacher, pairs)
    stones.connectors = make_connectors(3, teacher.config.hidden_size, teacher.config.hidden_size).double()
    source, batch = _source(teacher, pairs), _batch()
    signal = source.signals(batch)
    assert signal.upper is not None and signal.final is not None
    captured: dict[int, torch.Tensor] = {}
    for number, block in enumerate(student.model.layers):
        block.register_forward_hook(lambda m, a, o, n=number: captured.update({n: o.detach()}))
    module, settings = distiller(student, (), stones=stones), _settings(batch)
    result = module(batch, signal, settings)
    loss = result.loss
    for (s, t), connector in zip(pairs, stones.connectors, strict=True):
        assert torch.equal(signal.upper(t, connector(captured[s]), batch)[batch.attended], signal.final[batch.attended])
    logged = _logged(world, (settings, result), pairs=pairs)
    for s, t in pairs:
        assert logged[f"stones/{s}<{t}/kl"] == pytest.approx(0, abs=1e-14)
    gradients = torch.autograd.grad(loss, list(stones.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_the_teachers_weights_get_no_gradient_and_its_states_are_its_own(teacher: Any, student: Any) -> None:
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    where: dict[str, Any] = dict(stones=[1, 2, 5])
    source = ResidentTeacher(teacher, [3, 5], normed_last=False, ds_config=None, **where)
    batch, stones = _batch(), _stones(student, teacher)
    module = distiller(student, (), stones=stones)
    signal = source.signals(batch)
    taken = {block: signal.take(block).clone() for block in (3, 5)}
    module(batch, signal, _settings(batch)).loss.backward()
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert all(not p.requires_grad for p in teacher.parameters())
    assert len(source._capture._states) == 0  # a stone's pass is not taken for the teacher's own
    again = source.signals(batch)
    assert all(torch.equal(again.take(block), state) for block, state in taken.items())
    owned = {id(p) for p in module.parameters()}
    assert not owned & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize("ours", ["float32", "bfloat16"])
def test_half_precision_is_near(tiny: Path, world: Any, ours: str) -> None:
    """A bfloat16 teacher, whatever the student's dtype: near float32, and the state's gradient is of the student's dtype."""
    losses, batch = [], _batch((40, 30, 50))
    for teachers, students in (("float32", "float32"), ("bfloat16", ours)):
        where: dict[str, Any] = dict(ds_config=None, attention="sdpa")
        teacher, student = (
            load.load_causal_lm(tiny / "teacher", dtype=load.DTYPES[name], first_blocks=blocks, **where)
            for name, blocks in ((teachers, None), (students, 3))
        )
        stones = _stones(student, teacher, chunk=16).to(load.DTYPES[students])
        module = distiller(student, (), stones=stones)
        loss = module(batch, _source(teacher).signals(batch), _settings(batch)).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in stones.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[0] != losses[1]


def test_pairs_are_the_maps_or_the_recipes_own_by_student_block(tiny: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml", ["stones.kl=1"])
    assert stones_of(recipe, 3, 6) == pairs_of(recipe, 3, 6) == ((0, 1), (1, 3), (2, 5))
    assert stones_of(recipe.changed({"loss.hidden": 0.0}), 3, 6) == ((0, 1), (1, 3), (2, 5))
    assert stones_of(recipe.changed({"matching.strategy": "reverse"}), 3, 6) == ((0, 5), (1, 3), (2, 1))
    assert stones_of(recipe.changed({"matching.strategy": "nearest"}), 3, 6) == ((0, 1), (1, 3), (2, 5))  # to plan by
    assert stones_of(recipe.changed({"stones.pairs": [[2, 4], [0, 0]]}), 3, 6) == ((0, 0), (2, 4))
    assert stones_of(recipe.changed({"stones": None}), 3, 6) == ()
    for changes, sentence in (
        ({"matching.strategy": "none"}, "the layer map of strategy 'none' has no pairs; write them, e.g. "),
        (
            {"matching.strategy": "nearest", "matching.target_block": 3},
            "strategy 'nearest' does not read this option; leave it",
        ),
        ({"stones.pairs": [[3, 4]]}, r"stones.pairs: 3 is not a block of the student \(0 to 2\)"),
        ({"stones.pairs": [[1, 6]]}, r"stones.pairs: 6 is not a block of the teacher \(0 to 5\)"),
    ):
        with pytest.raises(InputError, match=sentence):
            stones_of(recipe.changed(changes), 3, 6)


def test_a_narrow_students_stones_beside_a_distance_that_needs_no_projector(
    tiny: Path, world: Any, tmp_path: Path
) -> None:
    """The connectors alone lead to the teacher's width."""
    changes = {
        "student.init": "random",
        "student.hidden_size": 24,
        "student.num_attention_heads": 3,
        "student.num_key_value_heads": 1,
        "matching.distance": "procrustes",
        "stones": {"kl": 0.5},
        "train.deepspeed": "zero2",
    }
    recipe = load_recipe(tiny / "recipe.yaml").changed(changes)
    job = jobs.distil_job(world, recipe, tmp_path / "run")
    initial.initial_student(recipe, tiny / "teacher", job.initial)
    module = build.load_student(job, {"zero_optimization": {"stage": 2}}, build.teacher_width(job))
    assert module.projectors is None and module.stones is not None and len(module.stones.connectors) == 3
    assert {tuple(p.shape) for p in module.stones.parameters()} == {(32, 24)}
    for connector in module.stones.connectors:
        nn.init.normal_(connector.weight, std=0.3)  # type: ignore[arg-type]
    batch, source = _batch(), build.load_teacher(world, job)
    settings = _settings(batch, (0.0, 0.0, 0.1), count=3)
    settings = replace(settings, pairs=job.pairs, terms=(terms_of({"procrustes": 1.0}),) * 3)
    loss, sums, *_ = module(batch, source.signals(batch), settings)
    assert len(sums) == 5 and bool((sums[2:] > 0).all())
    loss.backward()
    gradients = [p.grad for name, p in module.named_parameters() if name.startswith(("stones", "model.model.layers"))]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_shares_halve_from_the_deepest_up() -> None:
    assert shares(4) == (0.125, 0.25, 0.5, 1.0)


def test_a_sampled_stone_is_unbiased_over_many_draws() -> None:
    count, draws = 3, 20000
    seen = [0.0] * count
    for step in range(draws):
        seen[drawn(count, 7, step)] += sum(shares(count)) / draws
    for found, share in zip(seen, shares(count), strict=True):
        error = (share * (sum(shares(count)) - share) / draws) ** 0.5  # of a Bernoulli mean times the total
        assert abs(found - share) < 4 * error
    assert [drawn(count, 7, s) for s in range(50)] == [drawn(count, 7, s) for s in range(50)]
    assert [drawn(count, 7, s) for s in range(50)] != [drawn(count, 8, s) for s in range(50)]


def test_the_expected_gradient_of_a_sampled_stone_is_that_of_all(teacher: Any, student: Any, world: Any) -> None:
    """Each draw's gradient times its probability; what a draw does not reach gets zeros, not nothing."""
    batch, source = _batch(), _source(teacher)
    stones = _stones(student, teacher)
    module = distiller(student, (), stones=stones)
    parameters = [p for n, p in student.named_parameters() if n != "lm_head.weight"]
    steps_run = []

    def gradients(settings: StepSettings) -> list[torch.Tensor | None]:
        result = module(batch, source.signals(batch), settings)
        steps_run.append((settings, result))
        return list(torch.autograd.grad(result.loss, [*parameters, *stones.parameters()], allow_unused=True))

    expected = gradients(_settings(batch))
    steps = {drawn(len(PAIRS), 0, step): step for step in range(100)}
    assert steps.keys() == {0, 1, 2}
    mean: list[Any] = [0.0] * len(expected)
    for number, step in steps.items():
        found = gradients(_settings(batch, one=True, step=step))
        assert all(g is not None for g in found)
        mean = [m + shares(3)[number] / sum(shares(3)) * g for m, g in zip(mean, found, strict=True)]
    for found, theirs in zip(mean, expected, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if theirs is None else theirs, rtol=1e-9, atol=1e-12)
    assert {f"stones/{s}<{t}/kl" for s, t in PAIRS} <= _logged(world, *steps_run[1:]).keys()


@pytest.mark.parametrize("one", [False, True])
def test_a_weight_of_all_stones_scales_their_loss_and_at_0_leaves_zeros(
    teacher: Any, student: Any, world: Any, one: bool
) -> None:
    batch, source = _batch(), _source(teacher)
    parameters = [p for n, p in student.named_parameters() if n != "lm_head.weight"]
    found = {}
    for weight in (1.0, 0.25, 0.0):
        stones = _stones(student, teacher)
        settings = _settings(batch, one=one, cross=0.0 if one else CROSS, weight=weight)
        result = distiller(student, (), stones=stones)(batch, source.signals(batch), settings)
        grads = torch.autograd.grad(result.loss, [*parameters, *stones.parameters()], allow_unused=True)
        found[weight] = result.loss.item(), grads, _logged(world, (settings, result))
    whole, (loss, grads, told) = found[1.0], found[0.25]
    assert loss == pytest.approx(whole[0] / 4, rel=1e-12) and told["stones"] == pytest.approx(loss, rel=1e-12)
    assert {key: value for key, value in told.items() if key != "stones"} == pytest.approx(
        {key: value for key, value in whole[2].items() if key != "stones"}
    )
    for ours, theirs in zip(grads, whole[1], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs / 4, rtol=1e-9, atol=1e-14)
    loss, grads, told = found[0.0]
    assert loss == 0 and told == {"stones": 0.0}
    assert all(g is not None and not g.any() for g in grads)


def test_stones_that_cease_are_logged_by_their_steps(teacher: Any, student: Any, world: Any) -> None:
    """The loss over all steps of the interval, each part over those in which it was run."""
    batch, source = _batch(), _source(teacher)
    module = distiller(student, (), stones=_stones(student, teacher))

    def run(step: int, weight: float) -> tuple[StepSettings, PassResult]:
        settings = _settings(batch, cross=CROSS, step=step, weight=weight)
        return settings, module(batch, source.signals(batch), settings)

    ceasing = [run(step, weight) for step, weight in enumerate((1.0, 0.5, 0.0))]
    told = _logged(world, *ceasing)
    assert told["stones"] == pytest.approx(sum(result.loss.item() for _, result in ceasing) / 3, rel=1e-10)
    alone = _logged(world, run(3, 1.0))
    assert {**told, "stones": 0} == pytest.approx({**alone, "stones": 0}, rel=1e-10)


def test_a_stone_that_was_not_drawn_is_not_logged(teacher: Any, student: Any, world: Any) -> None:
    batch = _batch()
    module = distiller(student, (), stones=_stones(student, teacher))
    step = next(s for s in range(100) if drawn(3, 0, s) == 1)
    settings = _settings(batch, one=True, step=step)
    result = module(batch, _source(teacher).signals(batch), settings)
    loss, told = result.loss, _logged(world, (settings, result))
    assert told.keys() == {"stones", "stones/1<2/ce", "stones/1<2/kl"}
    assert told["stones"] == pytest.approx(loss.item(), rel=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Connectors


def test_connectors_are_fitted_by_least_squares() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(200, 5, dtype=torch.float64), torch.randn(200, 7, dtype=torch.float64)
    expected = torch.linalg.lstsq(student, teacher).solution.T
    torch.testing.assert_close(least_squares(student.T @ student, teacher.T @ student), expected, rtol=1e-6, atol=1e-7)


def test_equal_states_give_the_identity_to_the_bit_and_unseen_directions_stay() -> None:
    torch.manual_seed(0)
    states = torch.randn(3, 6, dtype=torch.float64)  # fewer tokens than width
    assert torch.equal(least_squares(states.T @ states, states.T @ states), torch.eye(6, dtype=torch.float64))
    found = least_squares(states.T @ states, (2 * states).T @ states)
    torch.testing.assert_close(states @ found.T, 2 * states, rtol=1e-5, atol=1e-6)
    unseen = torch.linalg.svd(states).Vh[3:]
    torch.testing.assert_close(unseen @ found.T, unseen, rtol=1e-6, atol=1e-6)


def test_the_papers_recipe_lays_stones() -> None:
    recipe = load_recipe("papers/block_logit")
    laid = {name: stones_of(recipe.changed(recipe.study.changes(name)), 3, 12) for name in recipe.study.students}
    every = ((0, 3), (1, 7), (2, 11))
    with_stones = ("block_logit", "block_logit_no_ce", "one_stone", "block_logit_same_steps")
    without = ("kl", "mse", "mse_10", "normalized_mse")
    assert laid == {**dict.fromkeys(without, ()), **dict.fromkeys(with_stones, every)}
