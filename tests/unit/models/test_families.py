"""Every family against the plain transformers model: what is found in it, losses and gradients in float64, padding, parts of a batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkd.data.batches import Batch, Counts, collate
from llmkd.data.other_families import collate_classified, collate_sources
from llmkd.errors import InputError
from llmkd.layer_map import DECODER_EMBEDDING, EMBEDDING
from llmkd.losses.distance_sum import sampled, terms_of
from llmkd.losses.set_distances import SET_DISTANCES
from llmkd.models import families, parts
from llmkd.teachers.resident import ResidentTeacher
from tests.family_models import DECODERS, ENCODER_DECODERS, ENCODERS, VOCABULARY, new, plain_losses, run
from tests.passes import distiller, step_settings

CE, KL, HIDDEN = 0.7, 1.3, 2.0


def ids(draw: torch.Generator, count: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=draw).tolist()


def decoder_rows(lengths: Sequence[int] = (9, 4, 6)) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": ids(draw, n), "trained": [False] * (n // 2) + [True] * (n - n // 2)} for n in lengths]


def ours(
    teacher: Any, student: Any, pairs: Any, batches: Sequence[Batch], *, normed: bool = False, temperature: float = 1.0
) -> tuple[list[float], dict[str, Tensor]]:
    """(CE, KL and each pair's distance as means, the student's gradients) of micro-batches as one step takes them."""
    student = copy.deepcopy(student)
    module = distiller(student, pairs, normed_last=normed)
    source = ResidentTeacher(copy.deepcopy(teacher), [t for _, t in pairs], normed_last=normed, ds_config=None)
    counts = Counts(*map(sum, zip(*(b.counts for b in batches), strict=True)))
    trained, attended, _ = counts
    total = torch.zeros(2 + len(pairs), dtype=torch.float64)
    for batch in batches:
        signal = source.signals(batch)
        scales = (CE / trained, KL / trained, HIDDEN / (attended * max(len(pairs), 1)))
        settings = step_settings(pairs, scales, temperature=temperature, counts=counts)
        loss, sums, *_ = module(batch, signal, settings)
        loss.backward()
        total += sums.double()
        assert signal.held == 0
    by = torch.tensor([trained, trained, *[attended] * len(pairs)])
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return (total / by).tolist(), gradients


def check_against_the_plain_model(
    teacher: Any, student: Any, pairs: Any, batch: Batch, **options: Any
) -> dict[str, Tensor]:
    values, gradients = ours(teacher, student, pairs, [batch], **options)
    plain = copy.deepcopy(student)
    ce, kl, distances = plain_losses(teacher, plain, pairs, batch, **options)
    assert values == pytest.approx([ce.item(), kl.item(), *(d.item() for d in distances)], rel=1e-6)  # sums are fp32
    (CE * ce + KL * kl + HIDDEN * sum(distances) / max(len(pairs), 1)).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert {n for n, g in expected.items() if g.any()} <= gradients.keys() <= expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    return gradients


# ---------------------------------------------------------------------------------------------------------------------
# Decoders


CASES = [(name, normed) for name in DECODERS for normed in (False, True) if (name, normed) != ("opt_narrow", True)]


@pytest.mark.parametrize(("name", "normed"), CASES)
def test_decoder_gives_the_losses_and_gradients_of_the_plain_model(name: str, normed: bool) -> None:
    teacher, student = (new(DECODERS[name](depth), "decoder", seed).double() for depth, seed in ((4, 0), (2, 1)))
    batch = collate(decoder_rows(), pad_id=0, packed=False)
    check_against_the_plain_model(teacher, student, ((0, 1), (1, 3)), batch, normed=normed, temperature=2.0)


def test_opt_with_narrow_embeddings_says_what_can_be_matched() -> None:
    config = DECODERS["opt_narrow"](2)
    families.check_states(config, normed=False, embedding=False)
    families.check_states(DECODERS["opt"](2), normed=True, embedding=True)
    with pytest.raises(InputError, match=r"matching\.final_state: this 'opt' model's .* 16 numbers.* 32; write raw"):
        families.check_states(config, normed=True, embedding=False)
    with pytest.raises(InputError, match=r"matching\.embedding: .*; write false"):
        families.check_states(config, normed=False, embedding=True)


def test_models_that_leave_out_blocks_are_refused() -> None:
    config = DECODERS["opt"](2)
    config.layerdrop = 0.1
    with pytest.raises(InputError, match=r"leaves out blocks in training \(layerdrop\).*write layerdrop: 0\.0 into"):
        families.check_blocks(config)


# ---------------------------------------------------------------------------------------------------------------------
# Encoders


ENCODER_PAIRS = ((EMBEDDING, EMBEDDING), (0, 1), (1, 3))


def encoder_rows(segments: bool = True) -> list[dict[str, Any]]:
    """Rows of which the last half belongs to the second text; row n has class n."""
    draw = torch.Generator().manual_seed(2)
    return [
        {"input_ids": ids(draw, n), "segments": [int(segments and i >= n // 2) for i in range(n)], "class": k}
        for k, n in enumerate((9, 4, 6))
    ]


def encoder_pair(name: str) -> tuple[Any, Any]:
    return tuple(new(ENCODERS[name](depth), "encoder", seed).double() for depth, seed in ((4, 0), (2, 1)))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_gives_the_losses_and_gradients_of_the_plain_model(name: str) -> None:
    teacher, student = encoder_pair(name)
    batch = collate_classified(encoder_rows(segments=name == "bert"), pad_id=0)
    gradients = check_against_the_plain_model(teacher, student, ENCODER_PAIRS, batch, temperature=2.0)
    assert len(gradients) == len(list(student.parameters()))
    assert batch.counts == (3, 19, 0)


@pytest.mark.parametrize("name", [*ENCODERS, *ENCODER_DECODERS])
def test_padding_and_accumulation_change_nothing(name: str) -> None:
    """All rows at once, one by one without the others' padding, and with other tokens in the padding."""
    if name in ENCODERS:
        teacher, student = encoder_pair(name)
        pairs, make, rows = ENCODER_PAIRS, collate_classified, encoder_rows(segments=name == "bert")
    else:
        teacher, student = encoder_decoder_pair(name)
        pairs, make, rows = SEQUENCE_PAIRS, collate_sources, source_rows()
    whole = ours(teacher, student, pairs, [make(rows, pad_id=0)])
    alone = ours(teacher, student, pairs, [make([row], pad_id=0) for row in rows])
    parts = [whole, alone]
    if name != "roberta":  # which counts positions by the padding's id
        parts.append(ours(teacher, student, pairs, [make(rows, pad_id=7)]))
    for values, gradients in parts[1:]:
        assert values == pytest.approx(whole[0], rel=1e-6)
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[1][key], rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Encoder-decoders


SEQUENCE_PAIRS = (
    (EMBEDDING, EMBEDDING), (0, 1), (1, 3),  # the encoder's 2 of 4 blocks
    (DECODER_EMBEDDING, DECODER_EMBEDDING), (2, 5), (3, 4), (4, 6),  # the decoder's 3 of 3
)  # fmt: skip


def source_rows() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(3)
    return [
        {"source_ids": ids(draw, source), "target_ids": [0, *ids(draw, target), 1]}
        for source, target in ((9, 3), (2, 12), (5, 1))
    ]


def encoder_decoder_pair(name: str) -> tuple[Any, Any]:
    shapes = ((4, 3, 0), (2, 3, 1))
    made = [new(ENCODER_DECODERS[name](e, d), "encoder_decoder", seed).double() for e, d, seed in shapes]
    return made[0], made[1]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_gives_the_losses_and_gradients_of_the_plain_model(name: str, normed: bool) -> None:
    teacher, student = encoder_decoder_pair(name)
    batch = collate_sources(source_rows(), pad_id=0)
    gradients = check_against_the_plain_model(teacher, student, SEQUENCE_PAIRS, batch, normed=normed, temperature=2.0)
    assert len(gradients) == len(list(student.parameters()))
    assert batch.counts == (19, 19, 16)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@torch.no_grad()
def test_head_of_an_encoder_decoder_gives_the_models_own_loss(name: str) -> None:
    """Labels are what transformers shifts by itself, T5's scale and BART's bias included."""
    model = encoder_decoder_pair(name)[0]
    batch = collate_sources(source_rows(), pad_id=0)
    assert batch.source_ids is not None and batch.source_attended is not None
    model.config.decoder_start_token_id = 0
    theirs = model(input_ids=batch.source_ids, attention_mask=batch.source_attended.long(), labels=batch.targets)
    states = parts.final_state(model, batch)
    logits = torch.nn.functional.linear(states, parts.head(model).weight, parts.head_bias(model))
    kept = batch.targets != -100
    torch.testing.assert_close(logits[kept], theirs.logits[kept], rtol=1e-10, atol=1e-10)
    own = torch.nn.functional.cross_entropy(logits[kept], batch.targets[kept])
    torch.testing.assert_close(own, theirs.loss, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_sampled_sets_and_weights_of_pairs_know_the_two_stacks(name: str) -> None:
    """CKA of five tokens of each pair's own stack, from the plain models' states; the source counts 1.5."""
    teacher, student = encoder_decoder_pair(name)
    batch = collate_sources(source_rows(), pad_id=0)
    assert batch.source_at is not None
    pairs, weights, seed = ((0, 1), (3, 5)), (2.0, 0.5), 3
    module = distiller(copy.deepcopy(student), pairs, tokens=5)
    settings = step_settings(
        pairs,
        (0.0, 0.0, HIDDEN),
        distance=terms_of({"cka": 1.0}),
        pair_weights=weights,
        counts=Counts(0, attended=3, source=2),
        sample_seeds=(seed,),
    )
    signal = ResidentTeacher(copy.deepcopy(teacher), [t for _, t in pairs], normed_last=False, ds_config=None).signals(
        batch
    )
    loss, sums, *_ = module(batch, signal, settings)
    loss.backward()
    ours, theirs = run(student, batch)[1], run(teacher, batch)[1]
    expected = []
    for (block, target), places, counts in zip(pairs, (batch.source_at, batch.attended_at), (1.5, 1.0), strict=True):
        at, factor = sampled(places, 5, seed)
        assert len(at) == 5 < len(places)
        rows = (ours[block].flatten(0, 1)[at], theirs[target].flatten(0, 1)[at].detach())
        expected.append(SET_DISTANCES["cka"](*rows) * 5 * factor * counts)
    torch.testing.assert_close(sums[2:].double(), torch.stack(expected).detach(), rtol=1e-6, atol=0.0)
    (HIDDEN * torch.stack([w * d for w, d in zip(weights, expected, strict=True)]).sum()).backward()
    for (key, found), plain in zip(module.model.named_parameters(), student.parameters(), strict=True):
        if plain.grad is not None:
            torch.testing.assert_close(found.grad, plain.grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")
