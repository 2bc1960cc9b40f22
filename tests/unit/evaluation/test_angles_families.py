"""Angles of encoders and of both stacks of encoder-decoders, against `output_hidden_states` of the plain models in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch, collate
from llmkd.data.other_families import collate_classified, collate_sources
from llmkd.errors import InputError
from llmkd.evaluation.angles.results import StudentView
from llmkd.evaluation.angles.states import StudentObserver, TeacherStates, observe
from llmkd.models.families import depths
from tests.family_models import DECODERS, ENCODER_DECODERS, ENCODERS, new, run
from tests.tensor_bytes import TensorBytes
from tests.unit.evaluation.test_angle_cosines import check, code_of
from tests.unit.models.test_families import decoder_rows, encoder_decoder_pair, encoder_pair, encoder_rows, source_rows

CPU = torch.device("cpu")


def pair_of(name: str) -> tuple[Any, Any]:
    """Teacher and student in float64."""
    return encoder_pair(name) if name in ENCODERS else encoder_decoder_pair(name)


def naive(student: Tensor, teacher: Sequence[Tensor]) -> dict[tuple[int, int], list[float]]:
    """[N, H] and L x [N, H] -> every pair's cosine at each token, as it is defined."""
    towards = [state - student for state in teacher]
    pairs = [(i, j) for i in range(len(teacher)) for j in range(i + 1, len(teacher))]
    return {(i, j): torch.cosine_similarity(towards[i], towards[j], eps=0.0).tolist() for i, j in pairs}


def batches_of(name: str, size: int = 2) -> list[Batch]:
    encoder = name in ENCODERS
    rows = encoder_rows(segments=name == "bert") if encoder else source_rows()
    make = collate_classified if encoder else collate_sources
    return [make(rows[start : start + size], pad_id=0) for start in range(0, len(rows), size)]


def seen_from(teacher: Any, student: Any, batches: Sequence[Batch], **settings: Any) -> list[StudentView]:
    """Stack by stack what a student sees."""
    states = TeacherStates(copy.deepcopy(teacher))
    observer = StudentObserver(copy.deepcopy(student), states, **settings)
    observe(states, [observer], batches, CPU)
    return observer.views()


@torch.no_grad()
def plain_states(model: Any, batches: Sequence[Batch], normed: bool) -> list[list[Tensor]]:
    """By stack, each block's states at the tokens of all batches [N, H], from `output_hidden_states`."""
    first = 0
    found = []
    for number, depth in enumerate(depths(model.config)):
        parts: list[list[Tensor]] = [[] for _ in range(depth)]
        for batch in batches:
            states = run(model, batch, normed)[1]
            source = batch.source_attended is not None and number == 0
            where = batch.source_attended if source else batch.attended
            for place in range(depth):
                parts[place].append(states[first + place][where])
        found.append([torch.cat(part) for part in parts])
        first += depth
    return found


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", [*ENCODERS, *ENCODER_DECODERS])
def test_angles_are_those_of_hidden_states(name: str, normed: bool) -> None:
    """Every student block and every pair of the same stack's teacher blocks; the paper code's own line too."""
    teacher, student = pair_of(name)
    batches = batches_of(name)
    found = seen_from(teacher, student, batches, normed_last=normed)
    ours, theirs = (plain_states(model, batches, normed) for model in (student, teacher))
    shown = [plain_states(model, batches, True) for model in (student, teacher)]  # as hidden_states are
    assert len(found) == len(ours) == (1 if name in ENCODERS else 2)
    for number, stack in enumerate(found):
        assert [block.block for block in stack.blocks] == list(range(len(ours[number])))
        for block, state in zip(stack.blocks, ours[number], strict=True):
            check(block, naive(state, theirs[number]), tolerance=1e-12)
        s1, t1, last = shown[0][number][0], shown[1][number][0], shown[1][number][-1]
        u, v = t1 - s1, last - s1
        code = (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1) + 1e-6)
        tokens, padded = (code_of(stack).tokens, code_of(stack).with_padding)
        assert tokens.mean == pytest.approx(code.mean().item(), abs=1e-12) and tokens.counted == len(code)
        positions = [b.attended if number or b.source_attended is None else b.source_attended for b in batches]
        if len(found) == 2 and number == 0:
            assert len(code) == sum(batch.counts.source for batch in batches)
        assert padded.counted == sum(mask.numel() for mask in positions) > tokens.counted


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_padding_and_batches_change_nothing(name: str) -> None:
    teacher, student = pair_of(name)
    many, one = (seen_from(teacher, student, batches_of(name, size), normed_last=False) for size in (1, 3))
    for ours, theirs in zip(many, one, strict=True):
        for block, other in zip(ours.blocks, theirs.blocks, strict=True):
            assert block.counted == other.counted and block.histogram == other.histogram
            torch.testing.assert_close(torch.tensor(block.mean), torch.tensor(other.mean), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_a_teacher_seen_from_itself_lacks_its_own_direction(name: str) -> None:
    teacher = pair_of(name)[0]
    for stack, depth in zip(
        seen_from(teacher, teacher, batches_of(name), normed_last=False), depths(teacher.config), strict=True
    ):
        for number, block in enumerate(stack.blocks):
            assert [missing > 0 for missing in block.without_direction] == [n == number for n in range(depth)]
        assert code_of(stack).tokens.mean == 0  # T_1 is S_1, which the paper's code counts as 0


def test_a_stack_whose_blocks_have_no_projector_sees_nothing() -> None:
    teacher, shape = pair_of("t5")[0], ENCODER_DECODERS["t5"](2, 3)
    shape.d_model = 24
    student = new(shape, "encoder_decoder", 1).double()
    with pytest.raises(InputError, match="24 wide and the teacher's 32, and no projector"):
        seen_from(teacher, student, batches_of("t5"), normed_last=False)
    torch.manual_seed(0)
    project = nn.Linear(24, 32, bias=False).double().requires_grad_(False)
    encoder, decoder = seen_from(teacher, student, batches_of("t5"), normed_last=False, projectors={3: project})
    assert (encoder.blocks, encoder.paper_code, decoder.paper_code) == ([], None, None)
    ours, theirs = (plain_states(model, batches_of("t5"), False)[1] for model in (student, teacher))
    (block,) = decoder.blocks
    assert block.block == 1
    check(block, naive(project(ours[1]), theirs), tolerance=1e-12)


def test_no_more_than_one_batch_is_held() -> None:
    """Four batches of the same shape make the same peak as one, to the byte, with the states of two stacks."""
    teacher, student = pair_of("t5")
    (batch,) = batches_of("t5", 3)
    states = TeacherStates(teacher)
    observer = StudentObserver(student, states, normed_last=False)
    observe(states, [observer], [batch], CPU)
    peaks, left = [], []
    for count in (1, 4):
        with TensorBytes() as made:
            observe(states, [observer], [batch] * count, CPU)
            peaks.append(made.peak)
            left.append(made.live)
    state = batch.attended.numel() * 32 * 8
    assert peaks[0] == peaks[1] and 7 * state < peaks[0]
    assert left[0] == left[1] < state


def test_final_states_of_another_width_have_no_paper_code() -> None:
    """OPT-350m's, whose last of `hidden_states` is narrower than the others."""
    teacher, student = (
        new(DECODERS["opt_narrow"](depth), "decoder", seed).double() for depth, seed in ((4, 0), (2, 1))
    )
    batch = collate(decoder_rows(), pad_id=0, packed=False)
    (stack,) = seen_from(teacher, student, [batch], normed_last=False)
    assert stack.paper_code is None and len(stack.blocks) == 2
    check(stack.blocks[1], naive(*_last_and_all(student, teacher, batch)), tolerance=1e-12)


@torch.no_grad()
def _last_and_all(student: Any, teacher: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    ours, theirs = (run(model, batch)[1] for model in (student, teacher))
    return ours[1][batch.attended], [theirs[block][batch.attended] for block in range(4)]
