"""Scores of the head against whole logits: no chunk, no wider head and no missing target changes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkd.losses.divergences import DIVERGENCES, top_k
from llmkd.losses.head_inputs import TeacherHead, TopK
from llmkd.losses.head_scores import head_scores


@pytest.fixture
def sides() -> tuple[Tensor, Tensor, Tensor, TeacherHead, Tensor]:
    """(states, weight, bias, teacher, targets): 13 positions, 30 columns and the teacher's 24, one position without a target."""
    draw = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((13, 6), (30, 6), (30,)))
    other = weight[:24] + torch.randn(24, 6, generator=draw)
    teacher = TeacherHead(states + 0.1, other, None)
    targets = torch.randint(24, (13,), generator=draw)
    targets[4] = -100
    return states, weight, bias, teacher, targets


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
def test_they_are_those_of_whole_logits(sides: tuple[Tensor, Tensor, Tensor, TeacherHead, Tensor], chunk: int) -> None:
    states, weight, bias, teacher, targets = sides
    ours, theirs = states @ weight.T + bias, teacher.states @ teacher.weight.T
    scores = head_scores(*sides, chunk)
    assert scores.kl is not None and scores.agrees is not None
    torch.testing.assert_close(scores.ce, F.cross_entropy(ours, targets, reduction="none"))
    assert scores.ce[4] == 0 and (scores.ce > 0).sum() == 12
    torch.testing.assert_close(scores.kl, DIVERGENCES["forward_kl"](ours[:, :24], theirs, 1.0))
    assert scores.agrees.tolist() == [
        float(a == b) for a, b in zip(ours[:, :24].argmax(1), theirs.argmax(1), strict=True)
    ]
    assert 0 < scores.agrees.sum() < 13


@pytest.mark.parametrize("k", [1, 5, 24])
def test_a_stored_top_k_is_compared_as_the_whole_teacher_s(
    sides: tuple[Tensor, Tensor, Tensor, TeacherHead, Tensor], k: int
) -> None:
    states, weight, bias, teacher, targets = sides
    ours, theirs = (states @ weight.T + bias)[:, :24], teacher.states @ teacher.weight.T
    likeliest = theirs.log_softmax(-1).topk(k)
    stored = TopK(likeliest.indices.int(), likeliest.values, 24)
    scores, whole = head_scores(states, weight, bias, stored, targets, 4), head_scores(*sides, 4)
    assert scores.kl is not None and scores.agrees is not None and whole.agrees is not None
    torch.testing.assert_close(scores.kl, top_k(ours, theirs, 1.0, top_k=k), rtol=1e-4, atol=1e-6)
    assert scores.agrees.tolist() == whole.agrees.tolist()


def test_without_a_teacher_and_without_a_position(sides: tuple[Tensor, Tensor, Tensor, TeacherHead, Tensor]) -> None:
    states, weight, bias, teacher, targets = sides
    alone = head_scores(states, weight, bias, None, targets, 5)
    assert alone.kl is None and alone.agrees is None and len(alone.ce) == 13
    nothing = TeacherHead(teacher.states[:0], teacher.weight, None)
    empty = head_scores(states[:0], weight, bias, nothing, targets[:0], 5)
    assert empty.kl is not None and len(empty.ce) == len(empty.kl) == 0


def test_weights_that_learn_get_no_gradient(sides: tuple[Tensor, Tensor, Tensor, TeacherHead, Tensor]) -> None:
    states, weight, bias, teacher, targets = sides
    assert not head_scores(states, weight.requires_grad_(), bias, teacher, targets, 5).ce.requires_grad
