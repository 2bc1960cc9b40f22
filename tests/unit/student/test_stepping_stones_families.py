"""Stones of every family against the plain models in float64, with the temperature of a step and the norms of the parts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkd.data.batches import IGNORE, Batch, collate
from llmkd.data.other_families import collate_classified
from llmkd.losses.objective import Divisors
from llmkd.models import families, load
from llmkd.models import parts as model_parts
from llmkd.models.parts import output_state
from llmkd.student.connectors import fit_connectors, make_connectors
from llmkd.student.passes import PassResult, StepSettings, StoneSettings, StoneWeights
from llmkd.student.stepping_stones import SteppingStones, drawn, factors, shares
from llmkd.teachers.resident import ResidentTeacher
from llmkd.training.metrics import StoneMeter
from tests import definitions
from tests.family_models import DECODERS, ENCODERS, new
from tests.passes import distiller, step_settings
from tests.unit.models.test_families import decoder_rows, encoder_rows

PAIRS = ((0, 1), (1, 3))
WEIGHTS = StoneWeights(ce=0.7, kl=1.3, cross=0.4)
WARM = 2.5
NARROW = {"hidden_size": 24, "num_attention_heads": 3}
KINDS = {**dict.fromkeys(DECODERS, "decoder"), **dict.fromkeys(ENCODERS, "encoder")}


def pair(name: str) -> tuple[Any, Any]:
    """A teacher of four blocks and a narrower student of two."""
    config = {**DECODERS, **ENCODERS}[name](4)
    narrow = {**NARROW, **({"num_key_value_heads": 1} if hasattr(config, "num_key_value_heads") else {})}
    shapes = (config, load.student_config(config, (0, 2), narrow))
    return tuple(new(shape, KINDS[name], seed).double() for seed, shape in enumerate(shapes))  # type: ignore[return-value]


def batch_of(name: str) -> Batch:
    if KINDS[name] == "decoder":
        return collate(decoder_rows(), pad_id=0, packed=False)
    return collate_classified(encoder_rows(segments=name == "bert"), pad_id=0)


def stones_of(student: Any, teacher: Any) -> SteppingStones:
    torch.manual_seed(5)
    connectors = make_connectors(len(PAIRS), student.config.hidden_size, teacher.config.hidden_size)
    for connector in connectors:
        nn.init.normal_(connector.weight, std=0.3)  # type: ignore[arg-type]
    return SteppingStones(PAIRS, connectors, chunk=4).double()


def source_of(teacher: Any) -> ResidentTeacher:
    return ResidentTeacher(teacher, [], normed_last=False, ds_config=None, stones=[t for _, t in PAIRS])


def logits_of(model: Any, batch: Batch) -> Tensor:
    """[B, T, V], or of an encoder [B, 1, classes]: by the whole model's own forward."""
    if families.kind(model.config) == "encoder":
        segments = {} if batch.segments is None else {"token_type_ids": batch.segments}
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **segments).logits[:, None]
    where = dict(attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    return model(input_ids=batch.input_ids, use_cache=False, **where).logits


def plain(
    student: Any, teacher: Any, connectors: Any, batch: Batch, temperature: float
) -> tuple[dict[tuple[int, str], Tensor], dict[int, Tensor]]:
    """(each stone's weighted and shared parts and the student's cross term, number 2; the student's states by block), by hooks alone."""
    kept: dict[int, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda m, a, o, n=number: kept.update({n: output_state(o)}))
        for number, block in enumerate(model_parts.blocks(student))
    ]
    ours = logits_of(student, batch)
    with torch.no_grad():
        theirs = logits_of(teacher, batch)
    logits = []
    for (s, t), connector in zip(PAIRS, connectors, strict=True):
        state = kept[s] @ connector.weight.T
        hooks.append(model_parts.blocks(teacher)[t].register_forward_hook(lambda m, a, o, state=state: state))
        logits.append(logits_of(teacher, batch))
        hooks[-1].remove()
    for hook in hooks:
        hook.remove()
    where = batch.targets != IGNORE
    mean = lambda p, q: definitions.divergence("forward_kl", q[where], p[where], temperature).mean()  # noqa: E731
    ensemble = torch.stack(logits).mean(0).detach()
    parts = {(2, "cross"): WEIGHTS.cross * mean(ensemble, ours)}
    for number, its in enumerate(logits):
        share = 2.0 ** (number - 1)
        parts[number, "ce"] = share * WEIGHTS.ce * F.cross_entropy(its[where], batch.targets[where])
        parts[number, "kl"] = share * WEIGHTS.kl * mean(theirs, its)
        parts[number, "cross"] = share * WEIGHTS.cross * mean(ensemble, its)
    return parts, kept


def settings_of(
    batch: Batch,
    scales: tuple[float, float, float] = (0.0, 0.0, 0.0),
    *,
    weights: StoneWeights = WEIGHTS,
    one: bool = False,
    step: int = 0,
    **others: Any,
) -> StepSettings:
    """Of a step (from 0) whose batch is all there is."""
    trained = batch.counts[0]
    laid = factors(len(PAIRS), sampled=one, seed=0, step=step)
    stones = StoneSettings(weights, laid, scales=(1 / trained, 1 / trained), sampled=one)
    return replace(step_settings((), scales, stones=stones, **others), divisors=Divisors(trained, trained, 1))


def metered(world: Any, settings: StepSettings, *results: PassResult) -> StoneMeter:
    """What the stones of a step's passes have measured."""
    meter = StoneMeter(world, PAIRS)
    assert settings.stones is not None
    meter.add(settings.stones, settings.divisors, [result.stones for result in results])
    return meter


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_those_of_the_plain_models(name: str, world: Any) -> None:
    """Sums are made in float32 where a family's norms are; so is the tolerance."""
    (teacher, student), batch = pair(name), batch_of(name)
    stones = stones_of(student, teacher)
    module, settings = distiller(student, (), stones=stones), settings_of(batch, temperature=WARM)
    result = module(batch, source_of(teacher).signals(batch), settings)
    loss = result.loss
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    parts, _ = plain(student, teacher, stones.connectors, batch, WARM)
    total = torch.stack([*parts.values()]).sum()
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    moved = 0
    for ours, theirs in zip(found, expected, strict=True):
        theirs = None if theirs is None or not theirs.any() else theirs
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            assert ours is not None
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
            moved += bool(theirs.abs().max() > 1e-6)
    assert moved > 10
    logged, parts_logged = metered(world, settings, result).means()
    assert logged == pytest.approx(total.item(), rel=1e-6)
    for (s, t), number in zip(PAIRS, range(2), strict=True):
        assert parts_logged[f"stones/{s}<{t}/ce"] == pytest.approx(
            parts[number, "ce"].item() / 2.0 ** (number - 1) / WEIGHTS.ce
        )


def test_stones_follow_the_temperature_of_the_step(world: Any) -> None:
    (teacher, student), batch = pair("qwen2"), batch_of("qwen2")
    stones = stones_of(student, teacher)
    module = distiller(student, (), stones=stones)

    def loss(temperature: float) -> float:
        return module(batch, source_of(teacher).signals(batch), settings_of(batch, temperature=temperature)).loss.item()

    assert loss(1.0) == loss(1.0) != loss(2.0)
    # hot enough, tau^2 KL tends to a bound above 0, where KL alone would vanish
    parts, _ = plain(student, teacher, stones.connectors, batch, 1e3)
    assert loss(1e3) == pytest.approx(torch.stack([*parts.values()]).sum().item(), rel=1e-6)
    assert sum(value.item() for (_, part), value in parts.items() if part == "kl") > 0.1


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_reported_norms_are_those_of_each_parts_own_gradient(name: str, world: Any) -> None:
    """At the student block's output, by autograd on the plain models, shares and weights in them; the step itself is as without."""
    (teacher, student), batch = pair(name), batch_of(name)
    results = []
    for report in (False, True):
        stones = stones_of(student, teacher)
        module, source = distiller(student, (), stones=stones), source_of(teacher)
        settings = settings_of(batch, (1.0, 1.0, 0.0), temperature=WARM, report_norms=report)
        result = module(batch, source.signals(batch), settings)
        results.append((result.loss, torch.autograd.grad(result.loss, list(module.parameters()))))
        norms = metered(world, settings, result).norms()
        assert bool(norms) == report
    torch.testing.assert_close(*results, rtol=0, atol=0)
    parts, states = plain(student, teacher, stones.connectors, batch, WARM)
    names = {0: "0<1", 1: "1<3", 2: "student"}
    places = {0: states[0], 1: states[1], 2: states[1]}
    assert {(k, p) for k, of_stone in norms.items() for p in of_stone} == {(names[n], p) for n, p in parts}
    for (number, part), value in parts.items():
        (gradient,) = torch.autograd.grad(value, places[number], retain_graph=True)
        assert norms[names[number]][part] == pytest.approx(gradient.norm().item(), rel=1e-4)
        assert gradient.norm() > 1e-4


def test_norms_of_parts_of_a_batch_add_up_in_squares_and_a_sampled_stone_is_reported_alone(world: Any) -> None:
    (teacher, student), batch = pair("llama"), batch_of("llama")
    found = []
    rows = [collate([row], pad_id=0, packed=False) for row in decoder_rows()]
    step = next(s for s in range(100) if drawn(2, 0, s) == 1)
    for batches in ([batch], rows):
        module, source = distiller(student, (), stones=stones_of(student, teacher)), source_of(teacher)
        weights = StoneWeights(ce=1.0, kl=0.5, cross=0.0)
        settings = settings_of(batch, weights=weights, one=True, step=step, report_norms=True)
        results = [module(part, source.signals(part), settings) for part in batches]
        found.append(metered(world, settings, *results).norms())
    assert found[0].keys() == {"1<3"} and found[0]["1<3"].keys() == {"ce", "kl"} and sum(shares(2)) == 1.5
    assert found[0]["1<3"] == pytest.approx(found[1]["1<3"], rel=1e-5)


class AsAnEngine(nn.Module):
    """A module under another, as an engine has it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.mark.parametrize("name", ENCODERS)
def test_connectors_of_an_encoder_are_fitted_over_the_tokens_that_are_not_padding(name: str, world: Any) -> None:
    (teacher, student), batch = pair(name), batch_of(name)
    stones = stones_of(student, teacher)
    module = distiller(student, (), stones=stones)
    states: list[dict[int, Tensor]] = [{}, {}]
    for model, kept in zip((student, teacher), states, strict=True):
        plain_model = copy.deepcopy(model)
        for number, block in enumerate(model_parts.blocks(plain_model)):
            block.register_forward_hook(lambda m, a, o, n=number, kept=kept: kept.update({n: output_state(o).detach()}))
        logits_of(plain_model, batch)
    blocks = model_parts.blocks(student), model_parts.blocks(teacher)
    fit_connectors(world, AsAnEngine(module), stones.connectors, PAIRS, *blocks, source_of(teacher), [[batch]])
    for (s, t), connector in zip(PAIRS, stones.connectors, strict=True):
        ours, theirs = states[0][s][batch.attended], states[1][t][batch.attended]
        assert len(ours) == 19  # fewer than the width: an exact fit
        torch.testing.assert_close(ours @ connector.weight.T, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kl", [0.0, 1.0])
@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_the_teachers_cross_entropy_is_measured_where_stones_alone_are_compared(name: str, kl: float) -> None:
    """A dynamic temperature goes by it; a step that measures it is the same step."""
    (teacher, student), batch = pair(name), batch_of(name)
    results = []
    for teacher_ce in (False, True):
        module = distiller(student, (), stones=stones_of(student, teacher))
        settings = settings_of(batch, (1.0, kl, 0.0), teacher_ce=teacher_ce)
        result = module(batch, source_of(teacher).signals(batch), settings)
        results.append((result.loss.item(), result.sums[0].item()))
        assert (result.teacher_ce is not None) == teacher_ce
    assert results[0] == results[1]
    where = batch.targets != IGNORE
    expected = F.cross_entropy(logits_of(teacher, batch)[where], batch.targets[where], reduction="sum")
    torch.testing.assert_close(result.teacher_ce, expected.to(result.teacher_ce), rtol=1e-6, atol=0)
