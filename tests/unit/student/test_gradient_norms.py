"""Reported gradient norms of every family, by autograd on the plain transformers model in float64, dropout included."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkd.data.batches import Batch, Counts, collate
from llmkd.data.other_families import collate_classified, collate_sources
from llmkd.errors import InputError
from llmkd.layer_map import EMBEDDING
from llmkd.losses.distances import DISTANCES
from llmkd.losses.divergences import forward_kl
from llmkd.models.families import depths
from llmkd.models.model_types import MODEL_TYPES, types_with
from llmkd.models.parts import blocks, output_state
from llmkd.student.distiller import make_projectors
from llmkd.student.gradient_norms import Tail
from llmkd.teachers.resident import ResidentTeacher
from tests.family_models import DECODERS, ENCODER_DECODERS, ENCODERS, new, run
from tests.passes import distiller, step_settings
from tests.unit.models.test_families import (
    ENCODER_PAIRS,
    SEQUENCE_PAIRS,
    decoder_rows,
    encoder_decoder_pair,
    encoder_pair,
    encoder_rows,
    source_rows,
)

SCALES = (0.5, 2.0, 3.0)  # of CE, KL and the hidden loss
COUNTS = Counts(0, attended=3, source=2)  # a position of a source counts 1.5
SEED = 5


def _keep(kept: dict[int, Tensor], block: int, module: nn.Module, args: object, output: object) -> None:
    kept[block] = output_state(output)


def reported(
    teacher: Any, student: Any, pairs: Any, batch: Batch, *, normed: bool, projectors: Any, weights: Sequence[float]
) -> Tensor:
    """[2 + pairs], what the student reports of a pass in which its dropout draws from SEED."""
    module = distiller(copy.deepcopy(student), pairs, normed_last=normed, projectors=projectors)
    settings = step_settings(pairs, SCALES, pair_weights=tuple(weights), temperature=2.0, counts=COUNTS)
    source = ResidentTeacher(copy.deepcopy(teacher), [t for _, t in pairs], normed_last=normed, ds_config=None)
    signal = source.signals(batch)
    torch.manual_seed(SEED)
    squares = module(batch, signal, replace(settings, report_norms=True)).squares
    after = torch.rand(())
    assert squares is not None
    signal = source.signals(batch)
    torch.manual_seed(SEED)
    assert module(batch, signal, settings).squares is None
    assert torch.equal(after, torch.rand(()))  # a report draws no random number
    return squares


def expected(
    teacher: Any, student: Any, pairs: Any, batch: Batch, *, normed: bool, projectors: Any, weights: Sequence[float]
) -> Tensor:
    """The same from whole tensors: each part's gradient with respect to the output of the block at which it enters."""
    outputs: dict[int, Tensor] = {}
    plain = copy.deepcopy(student).train()
    for number, block in enumerate(blocks(plain)):
        block.register_forward_hook(functools.partial(_keep, outputs, number))
    with torch.no_grad():
        theirs, their_states = run(copy.deepcopy(teacher), batch, normed)
    torch.manual_seed(SEED)
    ours, states = run(plain, batch, normed)
    at = batch.trained_at
    ours, theirs = ours.flatten(0, 1)[at], theirs.flatten(0, 1)[at]
    ce = SCALES[0] * F.cross_entropy(ours, batch.targets.flatten()[at], reduction="sum")
    kl = SCALES[1] * forward_kl(ours, theirs, 2.0).sum()
    last = outputs[max(outputs)]
    gradients = [torch.autograd.grad(part, last, retain_graph=True)[0] for part in (ce, kl)]
    encoder = depths(plain.config)[0] if batch.source_attended is not None else EMBEDDING
    for number, (block, target) in enumerate(pairs):
        source = EMBEDDING <= block < encoder
        where = batch.source_attended if source else batch.attended
        state = states[block]
        seen = state if projectors is None else projectors[number](state)
        distance = DISTANCES["normalized_mse"](seen, their_states[target])[where].sum()
        weight = SCALES[2] * weights[number] * (1.5 if source else 1.0)
        (gradient,) = torch.autograd.grad(weight * distance, outputs.get(block, state), retain_graph=True)
        gradients.append(gradient)
    return torch.stack([gradient.square().sum() for gradient in gradients])


def check(teacher: Any, student: Any, pairs: Any, batch: Batch, **settings: Any) -> None:
    settings = {"normed": False, "projectors": None, "weights": [1.0 + n / 4 for n in range(len(pairs))], **settings}
    found, wanted = (of(teacher, student, pairs, batch, **settings) for of in (reported, expected))
    assert wanted.gt(0).all()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0.0)


def dropping(model: Any, share: float = 0.3) -> Any:
    """The model with that share of numbers dropped out wherever a module does so."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
    return model


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_norms(name: str) -> None:
    """CE and KL through the pooler, or what stands in its place, with the dropout of that very pass."""
    teacher, student = encoder_pair(name)
    batch = collate_classified(encoder_rows(segments=name == "bert"), pad_id=0)
    check(teacher, student, ENCODER_PAIRS, batch)
    check(teacher, dropping(student), ENCODER_PAIRS, batch)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoders_norms(name: str) -> None:
    """Both stacks', T5's final norms and its scale before a tied head included."""
    teacher, student = encoder_decoder_pair(name)
    batch = collate_sources(source_rows(), pad_id=0)
    check(teacher, student, SEQUENCE_PAIRS, batch, normed=True)
    check(teacher, dropping(student), SEQUENCE_PAIRS, batch)


@pytest.mark.parametrize("name", ["distilbert", "t5"])
def test_norms_before_projectors(name: str) -> None:
    kind, shapes = ("encoder", ENCODERS) if name in ENCODERS else ("encoder_decoder", ENCODER_DECODERS)
    depths = ((4,), (2,)) if kind == "encoder" else ((4, 3), (2, 3))
    teacher, student = (shapes[name](*blocks) for blocks in depths)
    narrow = {"distilbert": {"dim": 24, "n_heads": 3}, "t5": {"d_model": 24}}[name]
    for key, value in narrow.items():
        setattr(student, key, value)
    teacher, student = (new(config, kind, seed).double() for seed, config in enumerate((teacher, student)))
    encoder = kind == "encoder"
    pairs = ENCODER_PAIRS if encoder else SEQUENCE_PAIRS
    rows = encoder_rows(segments=False) if encoder else source_rows()
    projectors = make_projectors(len(pairs), 24, 32, bias=True, seed=0)
    assert projectors is not None
    batch = (collate_classified if encoder else collate_sources)(rows, pad_id=0)
    check(teacher, student, pairs, batch, projectors=projectors.double(), normed=not encoder)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_norms(name: str) -> None:
    """Whatever it does before its head: OPT-350m has a linear map there and no norm."""
    teacher, student = (new(DECODERS[name](depth), "decoder", seed).double() for depth, seed in ((4, 0), (2, 1)))
    batch = collate(decoder_rows(), pad_id=0, packed=False)
    for normed in (False, True):
        if not (normed and name == "opt_narrow"):
            check(teacher, student, ((0, 1), (1, 3)), batch, normed=normed)


def test_every_family_has_a_tail() -> None:
    """An encoder or encoder-decoder that is let in is one whose norms can be reported."""
    assert all((row.kind != "decoder") == (row.tail is not None) for row in MODEL_TYPES.values())
    assert set(types_with(lambda row: row.tail)) == {*ENCODERS, *ENCODER_DECODERS} - {"t5_unscaled"}


def test_a_decoder_that_does_more_before_its_head_is_refused() -> None:
    """Not reported by a wrong number."""
    model = new(DECODERS["llama"](2), "decoder")
    batch = collate(decoder_rows(), pad_id=0, packed=False)
    with Tail(model, normed_last=False).recorded(True) as tail:
        final = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state * 2
    assert tail is not None
    with pytest.raises(InputError, match=r"loss\.report_norms_every: .* what LlamaForCausalLM does .* write 0"):
        tail.before(final, final)


@pytest.mark.parametrize(("name", "kind"), [("llama", "decoder"), ("bert", "encoder"), ("t5", "encoder_decoder")])
def test_hooks_are_there_while_a_report_is_made_and_at_no_other_time(name: str, kind: str) -> None:
    shapes: dict[str, Any] = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
    depths = (2, 2) if kind == "encoder_decoder" else (2,)
    teacher, student = (new(shapes[name](*depths), kind, seed) for seed in (0, 1))
    rows: Any = {
        "decoder": decoder_rows,
        "encoder": lambda: encoder_rows(segments=True),
        "encoder_decoder": source_rows,
    }
    makers: Any = {"decoder": functools.partial(collate, packed=False), "encoder": collate_classified}
    batch = makers.get(kind, collate_sources)(rows[kind](), pad_id=0)
    pairs = ((0, 0),)
    module = distiller(student, pairs)
    hooks = lambda: [list(part._forward_hooks) + list(part._forward_pre_hooks) for part in module.modules()]  # noqa: E731
    before, during = hooks(), []
    blocks(student)[-1].register_forward_pre_hook(lambda *_: during.append(hooks()))
    before = hooks()
    source = ResidentTeacher(teacher, [0], normed_last=False, ds_config=None)
    for report in (False, True, False):
        module(batch, source.signals(batch), step_settings(pairs, report_norms=report))
        assert hooks() == before
    assert [found == before for found in during] == [True, False, True]
