"""Matching where the state is born: only a sum stays, the teacher's state is let go, masked positions and second runs do not count."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from llmkd.data.batches import IGNORE, Batch, collate
from llmkd.losses.distance_sum import distance_sum
from llmkd.losses.distances import DISTANCES
from llmkd.models import load, make, parts
from llmkd.student.distiller import make_projectors
from llmkd.teachers.base import Demand, Signal
from llmkd.teachers.resident import OffloadedStates, ResidentTeacher
from tests.passes import distiller, step_settings
from tests.tensor_bytes import TensorBytes
from tests.tiny import BLOCKS


@pytest.fixture
def teacher(tiny: Path) -> Any:
    return load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")


def _batch(lengths: tuple[int, ...] = (9, 4, 6), packed: bool = False) -> Batch:
    torch.manual_seed(1)
    rows = [
        {"input_ids": torch.randint(2, 300, (n,)).tolist(), "trained": [False] * (n // 2) + [True] * (n - n // 2)}
        for n in lengths
    ]
    return collate(rows, pad_id=0, packed=packed)


def _at(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().flatten()


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_distance_sum_is_the_sum_over_the_mask(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, dtype=dtype, requires_grad=True), torch.randn(2, 5, 7, dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    expected = DISTANCES[name](student.double(), teacher.double())[mask].sum()
    (grad,) = torch.autograd.grad(expected, student)
    found = distance_sum(student, teacher, _at(mask), DISTANCES[name])
    (found_grad,) = torch.autograd.grad(2 * found, student)
    rough = dtype == torch.bfloat16
    assert found.item() == pytest.approx(expected.item(), rel=1e-5 if rough else 1e-12)
    assert found_grad.dtype == dtype
    torch.testing.assert_close(found_grad, 2 * grad, rtol=0.02 if rough else 1e-10, atol=1e-2 if rough else 1e-12)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("distance", [DISTANCES["normalized_mse"], lambda s, t: (s - t).abs().sum(-1)])
def test_distance_sum_a_few_rows_at_a_time(rows: int, distance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a distance that has no closed form, and of no position at all."""
    monkeypatch.setattr("llmkd.losses.distance_sum.rows_at_once", lambda *_: rows)
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 7).double()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    for keep in (mask, mask & False):
        expected = distance(student[keep], teacher[keep]).sum()
        found = distance_sum(student, teacher, _at(keep), distance)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        grads = [torch.autograd.grad(total, student)[0] for total in (found, expected)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_nan_in_padding_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()

    def run(s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = s.clone().requires_grad_()
        total = distance_sum(s, t, _at(mask), DISTANCES[name])
        return total.detach(), torch.autograd.grad(total, s)[0]

    clean = run(student, teacher)
    student[~mask], teacher[~mask] = torch.nan, torch.inf
    dirty = run(student, teacher)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_padding_changes_nothing_in_the_whole_loss(teacher: Any, tiny: Path) -> None:
    """One row alone, and the same row beside a longer one: the sums over its positions agree."""
    pairs = ((0, 1), (5, 5))
    student = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    module = distiller(student, pairs)
    settings = step_settings(pairs, kl_positions="attended")
    source = ResidentTeacher(teacher, [1, 5], normed_last=False, ds_config=None)
    sums = {}
    for name, batch in (("both", _batch((9, 4))), ("long", _batch((9,))), ("packed", _batch((9, 4), packed=True))):
        sums[name] = module(batch, source.signals(batch), settings).sums
    rows = [{"input_ids": _batch((9, 4)).input_ids[1, :4].tolist(), "trained": [False, False, True, True]}]
    short = collate(rows, pad_id=0, packed=False)
    sums["short"] = module(short, source.signals(short), settings).sums
    torch.testing.assert_close(sums["both"], sums["long"] + sums["short"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums["both"], sums["packed"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normed", [False, True])
def test_student_that_is_its_teacher_has_nothing_to_learn(teacher: Any, tiny: Path, normed: bool) -> None:
    student = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")
    pairs = tuple((b, b) for b in range(BLOCKS))
    module = distiller(student, pairs, normed_last=normed)
    batch = _batch()
    source = ResidentTeacher(teacher, [t for _, t in pairs], normed_last=normed, ds_config=None)
    settings = step_settings(pairs, (0.0, 1.0, 1.0), kl_positions="attended")
    loss, sums, *_ = module(batch, source.signals(batch), settings)
    loss.backward()
    assert sums[1:].abs().max() == 0
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-6


def test_only_mapped_blocks_are_captured_and_none_outlives_its_pairs(
    teacher: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")
    pairs = ((0, 4), (2, 1), (5, 4))
    module = distiller(student, pairs)
    source = ResidentTeacher(teacher, [4, 1, 4], normed_last=False, ds_config=None)
    batch = _batch()
    signal = source.signals(batch)
    assert signal.held == 2
    refs = {block: weakref.ref(signal._states[block]) for block in (1, 4)}
    seen: list[tuple[int, bool, bool]] = []
    take = Signal.take

    def watched(self: Signal, block: int) -> torch.Tensor:
        seen.append((block, refs[1]() is not None, refs[4]() is not None))
        return take(self, block)

    monkeypatch.setattr(Signal, "take", watched)
    loss = module(batch, signal, step_settings(pairs)).loss
    assert seen == [(4, True, True), (1, True, True), (4, False, True)]  # block 1 was freed before the last pair
    assert refs[1]() is None and refs[4]() is None and signal.held == 0
    loss.backward()


def test_a_pass_for_other_blocks_keeps_these_alone_and_the_next_its_own(teacher: Any) -> None:
    source = ResidentTeacher(teacher, [0, 1, 4], normed_last=False, ds_config=None)
    whole, part, again = source.signals(_batch()), source.signals(_batch(), [4, 4]), source.signals(_batch())
    assert (whole.held, part.held, again.held) == (3, 1, 3)
    first, second = part.take(4), part.take(4)
    assert part.held == 0 and torch.equal(first, second) and torch.equal(first, again.take(4))


def test_teacher_asks_for_no_hidden_states(teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ResidentTeacher(teacher, [2], normed_last=False, ds_config=None)
    outputs = []
    teacher.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    signal = source.signals(_batch())
    assert outputs[0].hidden_states is None and signal.held == 1
    final = signal.take_final()
    assert final is not None and not final.requires_grad


@pytest.mark.parametrize(("width", "projected"), [(32, False), (32, True), (24, True)])
def test_checkpointed_is_not_checkpointed(
    teacher: Any, tiny: Path, tmp_path: Path, width: int, projected: bool
) -> None:
    shape = {} if width == 32 else {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}
    make.random_student(tiny / "teacher", 3, shape, tmp_path / "student", seed=0, dtype=torch.float32)
    pairs = ((0, 4), (1, 1), (2, 4), (2, 5))
    results = []
    for checkpointing in (False, True):
        student = load.load_causal_lm(tmp_path / "student", dtype=torch.float32, ds_config=None, attention="sdpa")
        projectors = make_projectors(4 if projected else 0, width, 32, bias=True, seed=0)
        module = distiller(student, pairs, projectors=projectors)
        runs = []
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.model.layers[0].self_attn.register_forward_hook(lambda *a, runs=runs: runs.append(1))
        batch = _batch()
        source = ResidentTeacher(teacher, [t for _, t in pairs], normed_last=False, ds_config=None)
        loss, sums, *_ = module(batch, source.signals(batch), step_settings(pairs, (1.0, 1.0, 3.0)))
        loss.backward()
        assert len(runs) == (2 if checkpointing else 1)
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        results.append((sums, grads))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[0][1].keys() >= {f"projectors.{i}.weight" for i in range(4)}) == projected


def test_projectors_of_equal_width_start_as_none(teacher: Any) -> None:
    """At the first step the loss is that without projectors; they learn all the same."""
    batch, pairs, student = _batch(), ((0, 1), (2, 5)), copy.deepcopy(teacher)
    source = ResidentTeacher(teacher, [t for _, t in pairs], normed_last=False, ds_config=None)
    losses = []
    for count in (0, len(pairs)):
        module = distiller(student, pairs, projectors=make_projectors(count, 32, 32, bias=True, seed=0))
        loss, sums, *_ = module(batch, source.signals(batch), step_settings(pairs, (1.0, 1.0, 3.0)))
        losses.append((loss.detach(), sums))
    torch.testing.assert_close(losses[0], losses[1])
    loss.backward()
    for projector in cast(Any, module.projectors):
        assert projector.weight.grad.norm() > 0 and projector.bias.grad.norm() > 0


def test_loss_is_the_weighted_sum_and_cross_entropy_is_transformers(teacher: Any, tiny: Path) -> None:
    student = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")
    module = distiller(student, ((1, 3),))
    batch = _batch()
    source = ResidentTeacher(teacher, [3], normed_last=False, ds_config=None)
    loss, sums, *_ = module(batch, source.signals(batch), step_settings(((1, 3),), (0.5, 0.25, 2.0)))
    assert loss.item() == pytest.approx((0.5 * sums[0] + 0.25 * sums[1] + 2 * sums[2]).item(), rel=1e-6)
    labels = torch.nn.functional.pad(batch.targets, (1, 0), value=IGNORE)[:, :-1]
    theirs = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    assert sums[0].item() / batch.trained_at.numel() == pytest.approx(theirs.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What waits, in bytes, and what is not run at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["spread", "one student block", "one teacher block"])
def test_a_pair_adds_one_state_of_the_compared_positions_to_what_waits_for_the_backward_pass(
    teacher: Any, tiny: Path, dtype: torch.dtype, strategy: str
) -> None:
    batch = _batch()
    pairs = {
        "spread": ((0, 1), (2, 3), (4, 5)),
        "one student block": ((2, 1), (2, 3), (2, 5)),
        "one teacher block": ((0, 3), (2, 3), (4, 3)),
    }[strategy]
    waiting = []
    for count in range(len(pairs) + 1):
        student = load.load_causal_lm(tiny / "teacher", dtype=dtype, ds_config=None, attention="sdpa")
        module = distiller(student, pairs[:count])
        source = ResidentTeacher(teacher.to(dtype), [t for _, t in pairs[:count]], normed_last=False, ds_config=None)
        signal = source.signals(batch)
        with TensorBytes() as made:
            loss, sums, *_ = module(batch, signal, step_settings(pairs[:count]))
            waiting.append(made.live)
        assert signal.held == 0 and signal.take_final() is None
        loss.backward()
    state = batch.attended_at.numel() * 32 * dtype.itemsize  # of the compared positions alone
    scalars = 64
    for fewer, more in zip(waiting, waiting[1:], strict=False):
        assert state <= more - fewer <= state + scalars


def test_the_final_state_of_the_teacher_is_gone_before_the_backward_pass(teacher: Any, tiny: Path) -> None:
    student = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")
    module = distiller(student, ((5, 5),), normed_last=True)
    signal = ResidentTeacher(teacher, [5], normed_last=True, ds_config=None).signals(_batch())
    gone = weakref.ref(signal._states[5])  # a normed last state is the final state itself
    loss = module(_batch(), signal, step_settings(((5, 5),))).loss
    assert gone() is None
    loss.backward()


def test_no_tensor_of_tokens_by_vocabulary_ever_exists(teacher: Any, tiny: Path) -> None:
    """The whole step: teacher, student, losses, backward pass. The tiny vocabulary is 320; the head's weight has it too.

    There are more tokens than the states are wide, so that weights are smaller than whole logits, whatever shape these have.
    """
    student = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")
    pairs = ((0, 4), (2, 1))
    module = distiller(student, pairs)
    source = ResidentTeacher(teacher, [4, 1], normed_last=False, ds_config=None)
    batch = _batch((20, 9, 14))
    with TensorBytes() as made:
        loss = module(batch, source.signals(batch), step_settings(pairs, kl_positions="attended")).loss
        loss.backward()
    weight = parts.head(student).weight.shape
    assert weight == (320, 32) and batch.attended_at.numel() == 43
    logits = [shape for shape in made.shapes if 320 in shape and set(shape) != set(weight)]
    assert max(shape.numel() for shape in logits) == 4 * 320  # the chunk of 4 tokens
    assert all(shape.numel() < 43 * 320 for shape in made.shapes)


@pytest.mark.parametrize("scales", [(0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_a_part_without_weight_is_not_run(teacher: Any, tiny: Path, scales: tuple[float, float, float]) -> None:
    student = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    module = distiller(student, ((1, 3),))
    lent, runs = [], []
    module.loss_head.register_forward_hook(lambda *a: runs.append(1))
    source = ResidentTeacher(teacher, [3], normed_last=False, ds_config=None)
    source.head = lambda head=source.head: (lent.append(1), head())[1]  # type: ignore[method-assign]
    loss, sums, *_ = module(_batch(), source.signals(_batch()), step_settings(((1, 3),), scales))
    loss.backward()
    assert (len(runs), len(lent)) == (int(scales[:2] != (0.0, 0.0)), int(scales[1] != 0))
    assert (sums[1] != 0) == (scales[1] != 0) and sums[2] > 0
    assert (parts.head(student).weight.grad is not None) == bool(runs)


def test_a_divergence_of_a_signal_that_has_no_logits_is_no_zero(teacher: Any, tiny: Path) -> None:
    student = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")
    source = ResidentTeacher(teacher, [3], normed_last=False, ds_config=None, logits=False)
    module = distiller(student, ((1, 3),))
    with pytest.raises(AssertionError, match="neither a head nor a top k"):
        module(_batch(), source.signals(_batch()), step_settings(((1, 3),)))
    loss, sums, *_ = module(_batch(), source.signals(_batch()), step_settings(((1, 3),), (1.0, 0.0, 1.0)))
    assert loss > 0 and sums[1] == 0


@pytest.mark.parametrize(
    ("uses", "logits", "normed_last", "needed"),
    [
        ([0, 2], False, False, 3),
        ([2, 2, 2], False, True, 3),
        ([0, 5], False, False, 6),
        ([0, 5], False, True, 6),
        ([0, 2], True, False, 6),
        ([-1, 0], False, False, 1),
        ([], True, False, 6),
    ],
)
def test_blocks_needed(uses: list[int], logits: bool, normed_last: bool, needed: int) -> None:
    assert Demand(tuple(uses), logits, normed_last).first_blocks(6) == needed


@pytest.mark.parametrize("uses", [[2], [0, 2], [-1, 1]])
def test_a_teacher_cut_short_gives_the_whole_teachers_states(
    teacher: Any, tiny: Path, uses: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    part = load.load_causal_lm(
        tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa", first_blocks=max(uses) + 1
    )
    assert "UNEXPECTED" not in caplog.text
    cut = ResidentTeacher(load.without_head(part), uses, normed_last=False, ds_config=None, logits=False)
    runs: list[nn.Module] = []
    for block in parts.blocks(teacher):
        block.register_forward_hook(lambda module, *a: runs.append(module))
    for block in parts.blocks(part):
        block.register_forward_hook(lambda module, *a: runs.append(module))
    batch = _batch()
    short = cut.signals(batch)
    assert len(runs) == max(uses) + 1
    assert short.head is None and short.take_final() is None
    whole = ResidentTeacher(teacher, uses, normed_last=False, ds_config=None).signals(batch)
    for block in uses:
        torch.testing.assert_close(short.take(block), whole.take(block), rtol=0, atol=0)


def test_a_teacher_without_logits_holds_no_head(tiny: Path) -> None:
    model = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa", first_blocks=2)
    head_weight = weakref.ref(parts.head(model).weight)
    source = ResidentTeacher(load.without_head(model), [1], normed_last=False, ds_config=None, logits=False)
    del model
    gc.collect()
    assert head_weight() is None and source.signals(_batch()).held == 1


# ---------------------------------------------------------------------------------------------------------------------
# States that wait elsewhere


@pytest.mark.parametrize("order", [[5, 3, 1], [3, 3, 3], [4, 1, 4], [0, 1, 2, 3]])
def test_offloaded_states_come_back_as_they_were_one_ahead(order: list[int]) -> None:
    """On a CPU the copies are made at once; what is sent where, and when it is let go, is the same."""
    states = {block: torch.randn(2, 3, 4) for block in sorted(set(order))}
    away = OffloadedStates(order, None)
    for block, state in states.items():
        away[block] = state
    assert not away._here and away._away.keys() == states.keys()
    signal = Signal(away, order, None, None)
    for number, block in enumerate(order):
        state = signal.take(block)
        assert torch.equal(state, states[block]) and state is not states[block]
        coming = set(order[number + 1 : number + 2])
        assert coming <= away._here.keys() <= {block, *order[: number + 2]}
    assert signal.held == 0


def test_a_teacher_gives_the_same_signals_from_host_memory(
    teacher: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")
    pairs = ((0, 5), (2, 3), (5, 0))
    module = distiller(student, pairs)
    source = ResidentTeacher(teacher, [t for _, t in pairs], normed_last=False, ds_config=None)
    here = module(_batch(), source.signals(_batch()), step_settings(pairs)).sums
    source._capture._new = lambda: OffloadedStates([t for _, t in pairs], None)
    source._capture.collect()
    away = module(_batch(), source.signals(_batch()), step_settings(pairs)).sums
    torch.testing.assert_close(here, away, rtol=0, atol=0)
