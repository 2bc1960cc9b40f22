"""The pairs of a student's pass: with checkpointing, projectors and pair weights, and the gradient norms that it reports."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd.data.batches import Batch, collate
from llmkd.errors import InputError
from llmkd.losses.distance_sum import sampled, terms_of
from llmkd.losses.divergences import DIVERGENCES, with_parameters
from llmkd.losses.set_distances import WIDTH_FREE
from llmkd.models import parts
from llmkd.models.load import load_causal_lm
from llmkd.student.distiller import make_projectors
from llmkd.teachers.resident import ResidentTeacher
from tests import definitions
from tests.passes import distiller, step_settings
from tests.unit.losses.test_distance_sum import plain


def _rows() -> list[Any]:
    torch.manual_seed(1)
    return [
        {"input_ids": torch.randint(2, 300, (n,)).tolist(), "trained": [False] * (n // 2) + [True] * (n - n // 2)}
        for n in (9, 4, 6)
    ]


def _batch() -> Batch:
    return collate(_rows(), pad_id=0, packed=False)


def _load(folder: Path) -> Any:
    return load_causal_lm(folder, dtype=torch.float32, ds_config=None, attention="sdpa")


def _run(tiny: Path, folder: Path, mix: Any, report: bool = False, **changes: Any) -> Any:
    dtype = changes.pop("dtype", torch.float32)
    student = _load(folder).to(dtype)
    if changes.pop("checkpointing", False):
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pairs = changes.pop("pairs", ((0, 4), (1, 1), (2, 5)))
    scales = changes.pop("scales", (1.0, 1.0, 3.0))
    structure = {
        key: changes.pop(key)
        for key in ("projectors", "tokens", "all_rows", "normed_last", "differences")
        if key in changes
    }
    module = distiller(student, pairs, **structure)
    distance = terms_of(mix) if isinstance(mix, dict) else mix
    settings = step_settings(pairs, scales, distance=distance, sample_seeds=(3,), report_norms=report, **changes)
    normed = bool(structure.get("normed_last"))
    teacher = _load(tiny / "teacher").to(dtype)
    source = ResidentTeacher(teacher, [t for _, t in pairs], normed_last=normed, ds_config=None, stones=[5])
    batch = _batch()
    loss, sums, squares, *_ = module(batch, source.signals(batch), settings)
    loss.backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), sums, grads, squares


@pytest.mark.parametrize("tokens", [None, 7])
def test_checkpointed_is_not_checkpointed(tiny: Path, narrow: Path, tokens: int | None) -> None:
    """Also with an SVD within the block, a projector beside it, and a sample of the tokens."""
    mix = {"procrustes": 1.0, "gram": 2.0, "mse": 0.1}
    results = [
        _run(
            tiny, narrow, mix, checkpointing=on, tokens=tokens, projectors=make_projectors(3, 24, 32, bias=True, seed=0)
        )[:3]
        for on in (False, True)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_re_entrant_checkpointing_is_refused(tiny: Path, copied: Path) -> None:
    """It would run the blocks without gradients, and the pairs would teach nothing."""
    student = _load(copied)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    module, batch = distiller(student, ((0, 4),)), _batch()
    source = ResidentTeacher(_load(tiny / "teacher"), [4], normed_last=False, ds_config=None)
    with pytest.raises(InputError, match="re-entrant"):
        module(batch, source.signals(batch), step_settings(((0, 4),)))


def test_width_free_distances_need_no_projector_and_pass_by_one_that_is_there(tiny: Path, narrow: Path) -> None:
    free = {"cka": 1.0, "procrustes": 1.0, "gram": 1.0}
    _, without, grads, _ = _run(tiny, narrow, free)
    assert not any("projectors" in name for name in grads)
    projectors = make_projectors(3, 24, 32, bias=False, seed=0)
    _, both, _, _ = _run(tiny, narrow, {**free, "mse": 1.0}, projectors=projectors)
    _, projected, _, _ = _run(tiny, narrow, {"mse": 1.0}, projectors=projectors)
    torch.testing.assert_close(both[2:], without[2:] + projected[2:], rtol=1e-5, atol=1e-5)


def test_pair_weights_weigh_the_loss_and_not_the_sums(tiny: Path, copied: Path) -> None:
    loss, sums, grads, _ = _run(tiny, copied, {"mse": 1.0}, pair_weights=(2.0, 0.0, 0.5))
    torch.testing.assert_close(loss, sums[0] + sums[1] + 3 * (2 * sums[2] + 0.5 * sums[4]))
    _, plain_sums, _, _ = _run(tiny, copied, {"mse": 1.0})
    torch.testing.assert_close(sums, plain_sums)
    _, _, fewer, _ = _run(tiny, copied, {"mse": 1.0}, pair_weights=(2.0, 0.5), pairs=((0, 4), (2, 5)))
    torch.testing.assert_close(grads, fewer, rtol=1e-5, atol=1e-5)


def _hold(states: dict[int, torch.Tensor], block: int, module: Any, args: Any, output: torch.Tensor) -> None:
    states[block] = output


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("narrower", [False, True])
def test_reported_norms_are_those_of_each_parts_own_gradient(
    tiny: Path, copied: Path, narrow: Path, normed: bool, narrower: bool
) -> None:
    """By autograd on the plain model: CE and KL with respect to the last block's output, a distance with respect to its block's."""
    folder, pairs, scales = narrow if narrower else copied, ((0, 4), (1, 1), (2, 5)), (0.5, 2.0, 3.0)
    projectors = make_projectors(3, 24, 32, bias=True, seed=0) if narrower else None
    projectors = None if projectors is None else projectors.double()
    mix, weights = {"procrustes": 1.0, "mse": 0.3}, (1.0, 0.5, 2.0)
    divergences = {"forward_kl": 0.75, "reverse_kl": 0.5, "tvd": 2.0}
    settings: dict[str, Any] = dict(normed_last=normed, pair_weights=weights, scales=scales, projectors=projectors)
    settings["divergence"] = with_parameters(divergences, {})
    settings["dtype"] = torch.float64
    loss, _, grads, squares = _run(tiny, folder, mix, report=True, **settings)
    silent_loss, _, silent_grads, silent = _run(tiny, folder, mix, **settings)
    assert silent is None  # and a report changes nothing of the step
    torch.testing.assert_close((loss, grads), (silent_loss, silent_grads), rtol=0, atol=0)

    batch, student, teacher = _batch(), _load(folder).double(), _load(tiny / "teacher").double()
    states: dict[str, dict[int, torch.Tensor]] = {"student": {}, "teacher": {}}
    for name, model in (("student", student), ("teacher", teacher)):
        for number, block in enumerate(parts.blocks(model)):
            block.register_forward_hook(functools.partial(_hold, states[name], number))
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    s, t = student(**inputs), teacher(**inputs)
    at, targets = batch.trained_at, batch.targets.flatten()[batch.trained_at]
    ours, theirs = (output.logits.flatten(0, 1)[at] for output in (s, t))
    ce = scales[0] * torch.nn.functional.cross_entropy(ours, targets, reduction="sum")
    kls = [
        scales[1] * weight * DIVERGENCES[name](ours, theirs.detach(), 1.0).sum() for name, weight in divergences.items()
    ]
    last = states["student"][2]
    ce_square, kl_square, *of_divergences = [
        torch.autograd.grad(part, last, retain_graph=True)[0].square().sum()
        for part in (ce, torch.stack(kls).sum(), *kls)
    ]
    of_pairs, of_distances = [], dict.fromkeys(mix, torch.zeros(()))
    for number, (i, j) in enumerate(pairs):
        leaf = states["student"][i].detach().requires_grad_()
        seen, target = leaf, states["teacher"][j].detach()
        if normed and i == 2:
            seen, target = student.model.norm(leaf), teacher.model.norm(target)
        projected = seen if projectors is None else projectors[number](seen)
        seen, projected, target = (side.flatten(0, 1)[batch.attended_at] for side in (seen, projected, target))
        values = {"procrustes": plain({"procrustes": 1.0}, seen, target), "mse": plain({"mse": 0.3}, projected, target)}
        own = {
            name: torch.autograd.grad(scales[2] * weights[number] * value, leaf, retain_graph=True)[0]
            for name, value in values.items()
        }
        of_pairs.append((own["procrustes"] + own["mse"]).square().sum())
        of_distances = {name: square + own[name].square().sum() for name, square in of_distances.items()}
    expected = [ce_square, kl_square, *of_pairs, *of_distances.values(), *of_divergences]
    torch.testing.assert_close(squares, torch.stack(expected), rtol=1e-6, atol=1e-12)


LISTED = ({"gram": 1.0, "cka": 0.5}, {"mse": 1.0}, {"procrustes": 2.0, "mse": 0.3})
"""A sum for each of three pairs; the first needs no projector."""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_distance_of_its_own_for_each_pair(tiny: Path, narrow: Path, checkpointing: bool) -> None:
    """Values, gradients and norms by autograd on the plain model; no parameter is there without a gradient."""
    pairs, scales, weights = ((0, 4), (1, 1), (2, 5)), (0.0, 0.0, 3.0), (1.0, 0.5, 2.0)
    made = make_projectors(3, 24, 32, bias=True, seed=0, without=(0,))
    assert made is not None
    projectors = made.double()
    settings: dict[str, Any] = dict(pair_weights=weights, scales=scales, projectors=projectors, dtype=torch.float64)
    settings["checkpointing"] = checkpointing
    distance = [terms_of(mix) for mix in LISTED]
    loss, sums, grads, reported = _run(tiny, narrow, distance, report=True, **settings)
    assert not grads.pop("model.model.norm.weight").any()  # zeros, which ZeRO-3 needs where the head is not run
    assert {name for name in grads if "projectors" in name} == {
        f"projectors.{number}.{part}" for number in (1, 2) for part in ("weight", "bias")
    }

    batch, student, teacher = _batch(), _load(narrow).double(), _load(tiny / "teacher").double()
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    states: dict[str, dict[int, torch.Tensor]] = {"student": {}, "teacher": {}}
    for name, model in (("student", student), ("teacher", teacher)):
        for number, block in enumerate(parts.blocks(model)):
            block.register_forward_hook(functools.partial(_hold, states[name], number))
        model(**inputs)
    projectors.zero_grad()
    values: list[torch.Tensor] = []
    squares: dict[str, torch.Tensor] = {name: torch.zeros(()) for name in ("gram", "cka", "mse", "procrustes")}
    for (i, j), mix, projector, weight in zip(pairs, LISTED, projectors, weights, strict=True):
        state, target = states["student"][i], states["teacher"][j].detach().flatten(0, 1)[batch.attended_at]
        seen = {name: state if name in WIDTH_FREE else projector(state) for name in mix}
        values_of = {
            name: plain({name: mix[name]}, seen[name].flatten(0, 1)[batch.attended_at], target) for name in mix
        }
        for name, part in values_of.items():
            (gradient,) = torch.autograd.grad(3.0 * weight * part, state, retain_graph=True)
            squares[name] = squares[name] + gradient.square().sum()
        values.append(torch.stack([*values_of.values()]).sum())
    expected = 3.0 * sum(weight * value for weight, value in zip(weights, values, strict=True))
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    plainly = {f"projectors.{name}": p.grad for name, p in projectors.named_parameters()}
    plainly |= {f"model.{name}": p.grad for name, p in student.named_parameters() if p.grad is not None}
    torch.testing.assert_close(sums[2:], torch.stack(values).detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(grads, plainly, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(reported[5:9], torch.stack([*squares.values()]), rtol=1e-7, atol=0)


def test_a_weight_of_0_within_a_sum_leaves_out_its_part(tiny: Path, narrow: Path) -> None:
    """And where all have come to 0 projectors get zeros, not nothing."""

    def run(mix: dict[str, float], divergences: dict[str, float]) -> Any:
        projectors = make_projectors(3, 24, 32, bias=True, seed=0)
        return _run(tiny, narrow, mix, projectors=projectors, divergence=with_parameters(divergences, {}), report=True)

    mix, kls = {"procrustes": 0.0, "mse": 0.7, "cosine": 0.1}, {"forward_kl": 0.0, "reverse_kl": 2.0}
    loss, sums, grads, squares = run(mix, kls)
    without_zeros = {name: weight for name, weight in mix.items() if weight}
    expected_loss, expected_sums, expected_grads, expected = run(without_zeros, {"reverse_kl": 2.0})
    torch.testing.assert_close((loss, sums, grads), (expected_loss, expected_sums, expected_grads))
    assert squares[5] == squares[8] == 0  # procrustes and forward KL
    torch.testing.assert_close(squares[6:8], expected[5:7])

    _, sums, grads, _ = run(dict.fromkeys(mix, 0.0), dict.fromkeys(kls, 0.0))
    assert not sums[1:].any()
    projectors = [grads[f"projectors.{n}.{part}"] for n in range(3) for part in ("weight", "bias")]
    assert not any(gradient.any() for gradient in projectors)


def test_the_teachers_cross_entropy_is_measured_when_asked_for(tiny: Path, copied: Path) -> None:
    student, teacher = _load(copied), _load(tiny / "teacher")
    batch = _batch()
    labels = batch.targets.flatten()[batch.trained_at]
    module = distiller(student, ())
    source = ResidentTeacher(teacher, [], normed_last=False, ds_config=None)
    with torch.no_grad():
        logits = teacher(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch.trained_at], labels, reduction="sum")
    for kl_positions in ("trained", "attended"):
        settings = step_settings((), kl_positions=kl_positions, temperature=3.0, teacher_ce=True)
        torch.testing.assert_close(module(batch, source.signals(batch), settings).teacher_ce, expected)
        assert module(batch, source.signals(batch), step_settings()).teacher_ce is None


def _with_states(folder: Path, batch: Batch) -> tuple[Any, dict[int, torch.Tensor]]:
    """(a model in float64, each block's state of the batch)."""
    model, states = _load(folder).double(), dict[int, torch.Tensor]()
    for number, block in enumerate(parts.blocks(model)):
        block.register_forward_hook(functools.partial(_hold, states, number))
    model(input_ids=batch.input_ids, position_ids=batch.position_ids)
    return model, states


@pytest.mark.parametrize("mix", [{"mse": 1.0}, {"cosine": 1.0, "cka": 0.5}])
def test_differences_are_what_lies_between_two_pairs(tiny: Path, copied: Path, mix: dict[str, float]) -> None:
    """Against whole states in float64: sums, every gradient, and the norms, which are those of what is compared."""
    pairs, scales = ((0, 4), (1, 1), (2, 5)), (0.0, 0.0, 1.0)
    options: dict[str, Any] = dict(pairs=pairs, scales=scales, dtype=torch.float64, differences=True)
    _, sums, grads, squares = _run(tiny, copied, mix, report=True, **options)

    batch = _batch()
    student, states_of_student = _with_states(copied, batch)
    teacher, states_of_teacher = _with_states(tiny / "teacher", batch)
    ours = [states_of_student[0], *(states_of_student[j] - states_of_student[j - 1] for j in (1, 2))]
    theirs = [states_of_teacher[4], *(states_of_teacher[i] - states_of_teacher[h] for h, i in ((4, 1), (1, 5)))]
    at = batch.attended_at
    values = [plain(mix, o.flatten(0, 1)[at], t.detach().flatten(0, 1)[at]) for o, t in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(sums[2:], torch.stack(values).detach())
    total = torch.stack(values).sum()
    named = dict(student.named_parameters())
    expected = torch.autograd.grad(total, [*named.values()], retain_graph=True, allow_unused=True)
    for name, gradient in zip(named, expected, strict=True):
        if gradient is not None and "lm_head" not in name:
            torch.testing.assert_close(grads[f"model.{name}"], gradient)
    for number, difference in enumerate(ours):
        (slope,) = torch.autograd.grad(values[number], difference, retain_graph=True)
        torch.testing.assert_close(squares[2 + number], slope.square().sum())


def test_differences_of_a_model_from_itself_are_none(tiny: Path) -> None:
    pairs = tuple((block, block) for block in range(6))
    options: dict[str, Any] = dict(pairs=pairs, scales=(0.0, 0.0, 1.0), differences=True)
    _, sums, grads, _ = _run(tiny, tiny / "teacher", {"mse": 1.0, "cosine": 1.0}, **options)
    assert sums[2:].abs().max() < 1e-5 and max(g.abs().max() for g in grads.values()) < 1e-5


@pytest.mark.parametrize("tokens", [None, 7])
def test_logit_lens_is_what_both_heads_read(tiny: Path, copied: Path, tokens: int | None) -> None:
    """Against whole logits in float64, beside another distance; the head and the final norm learn too."""
    pairs, scales, mix = ((0, 4), (1, 1), (2, 5)), (0.0, 0.0, 1.0), {"logit_lens": 2.0, "mse": 0.5}
    options: dict[str, Any] = dict(pairs=pairs, scales=scales, dtype=torch.float64, tokens=tokens)
    _, sums, grads, _ = _run(tiny, copied, mix, **options)

    batch = _batch()
    student, states_of_student = _with_states(copied, batch)
    teacher, states_of_teacher = _with_states(tiny / "teacher", batch)
    at, factor = sampled(batch.attended_at, tokens, 3)
    values = []
    for i, j in pairs:
        ours, theirs = states_of_student[i].flatten(0, 1)[at], states_of_teacher[j].detach().flatten(0, 1)[at]
        ours_read, theirs_read = student.lm_head(student.model.norm(ours)), teacher.lm_head(teacher.model.norm(theirs))
        divergence = definitions.divergence("jsd", ours_read, theirs_read, 1.0).sum()
        values.append(factor * (2.0 * divergence + 0.5 * (ours - theirs).square().mean(-1).sum()))
    torch.testing.assert_close(sums[2:], torch.stack(values).detach())
    named = dict(student.named_parameters())
    expected = torch.autograd.grad(torch.stack(values).sum(), [*named.values()])
    for name, gradient in zip(named, expected, strict=True):
        torch.testing.assert_close(grads[f"model.{name}"], gradient, msg=name)


def test_a_model_reads_its_own_states_as_its_teacher_does(tiny: Path) -> None:
    pairs = tuple((block, block) for block in range(6))
    _, sums, grads, _ = _run(tiny, tiny / "teacher", {"logit_lens": 1.0}, pairs=pairs, scales=(0.0, 0.0, 1.0))
    assert sums[2:].abs().max() < 1e-4 and max(g.abs().max() for g in grads.values()) < 1e-4


@pytest.mark.parametrize(
    ("mix", "structure"),
    [({"logit_lens": 1.0}, {}), ({"mse": 1.0}, {"differences": True}), ({"cosine": 1.0, "logit_lens": 0.5}, {})],
    ids=["logit_lens", "differences", "sum"],
)
def test_padding_changes_nothing_in_a_whole_pass(
    tiny: Path, copied: Path, mix: dict[str, float], structure: dict[str, Any]
) -> None:
    """Rows padded together give the sums, and the gradients of all parts of the loss, that they give one by one."""
    pairs = ((0, 4), (1, 1), (2, 5))
    teacher, student = (_load(folder).double() for folder in (tiny / "teacher", copied))
    source = ResidentTeacher(teacher, [t for _, t in pairs], normed_last=False, ds_config=None, stones=[5])
    module = distiller(student, pairs, **structure)

    def run(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        module.zero_grad()
        settings = step_settings(pairs, (1.0, 1.0, 3.0), distance=terms_of(mix))
        loss, sums, *_ = module(batch, source.signals(batch), settings)
        loss.backward()
        return sums.detach().clone(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    rows = _rows()
    whole, alone = run(collate(rows, pad_id=0, packed=False)), [run(_unpadded(row)) for row in rows]
    assert _batch().attention_mask is not None and not _batch().attended.all()
    assert torch.allclose(whole[0], torch.stack([sums for sums, _ in alone]).sum(0), rtol=1e-12)
    for name, found in whole[1].items():
        expected = torch.stack([grads[name] for _, grads in alone]).sum(0)
        assert (found - expected).norm() <= 1e-11 * expected.norm(), name


def _unpadded(row: Any) -> Batch:
    """A row alone, as long as it is."""
    batch = collate([row], pad_id=0, packed=True)
    assert batch.attended.all()
    return batch
