"""A learned map in a student's pass: loss and gradients by plain PyTorch in float64, and where it is a map of single blocks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd.layer_map import EMBEDDING, MIXED, compared, forward, layer_map
from llmkd.losses.distance_sum import terms_of
from llmkd.student.distiller import make_projectors
from llmkd.student.mixtures import Mixtures, first_scores
from llmkd.teachers.resident import ResidentTeacher
from tests.passes import distiller, step_settings
from tests.unit.losses.test_distance_sum import plain
from tests.unit.student.test_matching import _batch, _load, _with_states

CANDIDATES = {0: (0, 2, 5), 1: (1, 3, 4, 5), 2: (0, 1, 2, 3, 4, 5)}
PAIRS = tuple((student, MIXED) for student in CANDIDATES)


def _mixtures(scores: torch.Tensor, *, temperature: float = 0.5, entropy: float = 0.0) -> Mixtures:
    return Mixtures(CANDIDATES, scores.clone(), temperature=temperature, entropy=entropy)


def _scores() -> torch.Tensor:
    return torch.randn(13, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def _run(tiny: Path, folder: Path, mix: dict[str, float], mixtures: Mixtures | None, **changes: Any) -> Any:
    """(loss, sums, gradients, squared norms, the signal) of a pass in float64."""
    student = _load(folder).double()
    if changes.pop("checkpointing", False):
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pairs, scales = changes.pop("pairs", PAIRS), changes.pop("scales", (0.0, 0.0, 3.0))
    uses = changes.pop("uses", [block for blocks in CANDIDATES.values() for block in blocks])
    structure = {k: changes.pop(k) for k in ("projectors", "tokens", "normed_last") if k in changes}
    module = distiller(student, pairs, mixtures=mixtures, **structure)
    settings = step_settings(pairs, scales, distance=terms_of(mix), sample_seeds=(3,), **changes)
    normed = bool(structure.get("normed_last"))
    teacher = ResidentTeacher(_load(tiny / "teacher").double(), uses, normed_last=normed, ds_config=None)
    batch = _batch()
    signal = teacher.signals(batch)
    loss, sums, squares, *_ = module(batch, signal, settings)
    loss.backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), sums, grads, squares, signal


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("entropy", [0.0, 0.3, -0.2])
def test_loss_and_gradients_are_those_of_plain_autograd(
    tiny: Path, narrow: Path, checkpointing: bool, entropy: float
) -> None:
    """Through projectors, with pair weights; the scores' gradient is that of the mixtures' weights through the softmax."""
    mix, weights, temperature = {"mse": 0.7, "normalized_mse": 1.0, "gram": 0.5}, (1.0, 0.5, 2.0), 0.5
    made = make_projectors(3, 24, 32, bias=True, seed=0)
    assert made is not None
    projectors = made.double()
    mixtures = _mixtures(_scores(), temperature=temperature, entropy=entropy)
    settings: dict[str, Any] = dict(projectors=projectors, pair_weights=weights, checkpointing=checkpointing)
    loss, sums, grads, squares, signal = _run(tiny, narrow, mix, mixtures, report_norms=True, **settings)
    assert signal.held == 0  # no state of the teacher is left

    batch = _batch()
    student, ours = _with_states(narrow, batch)
    _, theirs = _with_states(tiny / "teacher", batch)
    projectors.zero_grad()
    scores, at = _scores().requires_grad_(), batch.attended_at
    values, of_pairs = [], []
    for number, (block, part) in enumerate(zip(CANDIDATES, scores.split([3, 4, 6]), strict=True)):
        shares = (part / temperature).softmax(0)
        blended = sum(w * theirs[i].detach() for w, i in zip(shares, CANDIDATES[block], strict=True))
        assert isinstance(blended, torch.Tensor)
        target, state = blended.flatten(0, 1)[at], ours[block].flatten(0, 1)[at]
        projected = projectors[number](ours[block]).flatten(0, 1)[at]
        tokenwise = {name: weight for name, weight in mix.items() if name != "gram"}
        distance = plain(tokenwise, projected, target) + plain({"gram": 0.5}, state, target)
        values.append(distance + entropy * len(at) * -(shares * shares.log()).sum())
        (slope,) = torch.autograd.grad(3.0 * weights[number] * distance, ours[block], retain_graph=True)
        of_pairs.append(slope.square().sum())
    expected = 3.0 * sum(weight * value for weight, value in zip(weights, values, strict=True))
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    torch.testing.assert_close(sums[2:], torch.stack(values).detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
    plainly = {f"model.{name}": p.grad for name, p in student.named_parameters() if p.grad is not None}
    plainly |= {f"projectors.{name}": p.grad for name, p in projectors.named_parameters()}
    plainly["mixtures.scores"] = scores.grad
    zeros = grads.pop("model.model.norm.weight")  # which ZeRO-3 needs where the head is not run
    assert not zeros.any()
    torch.testing.assert_close(grads, plainly, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(squares[2:5], torch.stack(of_pairs), rtol=1e-7, atol=0)


@pytest.mark.parametrize("normed", [False, True])
def test_of_one_block_each_it_is_the_map_of_these(tiny: Path, copied: Path, normed: bool) -> None:
    """At so low a temperature a mixture is its likeliest block: loss and gradients are those of `forward`, the embeddings' pair beside."""
    pairs = ((EMBEDDING, EMBEDDING), *forward(3, 6))
    every = layer_map("learned", 3, 6)
    of_all = {student: tuple(range(6)) for student in range(3)}
    mixtures = Mixtures(of_all, first_scores(of_all, forward(3, 6)).double(), temperature=0.001, entropy=0.1)
    options: dict[str, Any] = dict(normed_last=normed, scales=(1.0, 1.0, 3.0), tokens=7)
    uses = [EMBEDDING, *(teacher for _, teacher in every)]
    mixed = compared("learned", ((EMBEDDING, EMBEDDING), *every))
    assert mixed == ((EMBEDDING, EMBEDDING), (0, MIXED), (1, MIXED), (2, MIXED))
    loss, sums, grads, _, _ = _run(tiny, copied, {"normalized_mse": 1.0}, mixtures, pairs=mixed, uses=uses, **options)
    uses = [teacher for _, teacher in pairs]
    expected = _run(tiny, copied, {"normalized_mse": 1.0}, None, pairs=pairs, uses=uses, **options)
    assert not grads.pop("mixtures.scores").any()  # nothing can move it
    torch.testing.assert_close((loss, sums, grads), expected[:3], rtol=1e-9, atol=1e-12)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny: Path) -> None:
    own = {block: tuple(range(6)) for block in range(6)}
    scores = first_scores(own, tuple((block, block) for block in range(6))).double()
    mixtures = Mixtures(own, scores, temperature=0.001, entropy=0.0)
    pairs = tuple((block, MIXED) for block in range(6))
    options: dict[str, Any] = dict(pairs=pairs, uses=[*range(6)] * 6, scales=(0.0, 0.0, 1.0))
    _, sums, grads, _, _ = _run(tiny, tiny / "teacher", {"mse": 1.0, "cosine": 1.0}, mixtures, **options)
    assert not sums[2:].any() and not any(gradient.any() for gradient in grads.values())


def test_each_state_is_held_to_the_last_student_block_that_takes_it(tiny: Path, copied: Path) -> None:
    """Block 0 is a candidate of the last student block too, block 5 of all; nothing is held twice, nor longer."""
    held: list[int] = []
    module = distiller(_load(copied), PAIRS, mixtures=_mixtures(_scores()))
    uses = [block for blocks in CANDIDATES.values() for block in blocks]
    teacher = ResidentTeacher(_load(tiny / "teacher"), uses, normed_last=False, ds_config=None)
    batch = _batch()
    signal = teacher.signals(batch)
    assert signal.held == 6
    for block in module.model.model.layers:
        block.register_forward_hook(lambda *_: held.append(signal.held))  # after the one that compares
    module(batch, signal, step_settings(PAIRS))
    assert held == [6, 6, 0]


def test_the_first_scores_prefer_the_nearest_candidate() -> None:
    pairs = layer_map("learned", 3, 12, candidates=4)
    candidates = {j: [i for s, i in pairs if s == j] for j in range(3)}
    assert candidates == {j: [2, 5, 8, 11] for j in range(3)}  # those of `forward` for 4 blocks
    assert forward(3, 12) == ((0, 3), (1, 7), (2, 11))
    assert first_scores(candidates, forward(3, 12)).view(3, 4).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert not first_scores(candidates, None).any()
    weights = Mixtures(candidates, first_scores(candidates, forward(3, 12)), temperature=0.2, entropy=0.0).weights()
    assert weights[1][8] == pytest.approx(math.exp(5) / (math.exp(5) + 3), rel=1e-6)
    assert all(sum(of_block.values()) == pytest.approx(1, rel=1e-6) for of_block in weights.values())
