"""The weighted sum of a pair's distances over some positions, with its gradient, at once: nothing of it but [N, H] waits.

A `Term` is a distance and its weight. The values of a token-wise distance (llmkd.losses.distances) are added up; the one value of a
set-level distance (llmkd.losses.set_distances) counts N times for N tokens, so that both are divided by one global count of tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkd.losses.chunked_head import rows_at_once
from llmkd.losses.closed_forms import CLOSED_DISTANCES, ClosedDistance
from llmkd.losses.distances import DISTANCES, Distance
from llmkd.losses.divergences import logit_lens
from llmkd.losses.set_distances import SET_DISTANCES, WIDTH_FREE

AllRows = Callable[[Tensor], tuple[Tensor, int]]
"""[n, H] -> every rank's rows [N, H] under one another, and where this rank's begin."""
READ: dict[str, Distance] = {"logit_lens": logit_lens}
"""Compare what the models' heads read from two states; `llmkd.student.lens` reads."""
KNOWN: dict[str, Distance] = {**DISTANCES, **SET_DISTANCES, **READ}
"""By the recipe's `matching.distance`."""


@dataclass(frozen=True)
class Term:
    """One distance of a pair: [n, H], [n, H] -> [n], or with `of_set` -> []."""

    distance: Distance
    weight: float = 1.0
    of_set: bool = False
    width_free: bool = False
    """It compares states of two widths as they are; no projector stands between."""
    of_readings: bool = False
    """It compares logits that are read from the states."""


class Mixture(NamedTuple):
    """A target that is a weighted sum of the teacher's states."""

    states: Sequence[Tensor]
    """Each [B, T, H_t]."""
    weights: Tensor
    """[k], which the distance's gradient comes to as well."""


def terms_of(weights: Mapping[str, float]) -> tuple[Term, ...]:
    """The terms of distances by name, each with its weight."""
    return tuple(
        Term(
            KNOWN[name],
            weight,
            of_set=name in SET_DISTANCES,
            width_free=name in WIDTH_FREE or name in READ,
            of_readings=name in READ,
        )
        for name, weight in weights.items()
    )


def kinds(terms: Sequence[Sequence[Term]]) -> list[Distance]:
    """The distances that pairs with these terms have, each once, in the order in which they are named."""
    return list(dict.fromkeys(term.distance for of_pair in terms for term in of_pair))


def distance_sum(
    student: Tensor,
    teacher: Tensor | Mixture,
    at: Tensor,
    distance: Distance | Sequence[Term],
    *,
    factor: float = 1.0,
    all_rows: AllRows | None = None,
    together: Tensor | None = None,
) -> Tensor:
    """`factor` times the weighted sum of distances over some positions; what other positions hold, NaN included, changes nothing.

    student [B, T, H_s], teacher [B, T, H_t], at [N] (flat positions, each once); a token-wise distance may be given alone. The
    gradient is computed at once, token-wise a few rows at a time, and all that waits for the backward pass is one [N, H_s] of the
    student's dtype. `factor`: how many positions each of these stands for (`sampled`).

    A set is the N tokens of this call, or with `all_rows` those of all ranks. Then each rank's value is its own N times the
    distance D of the whole set, and its gradient is that of (all ranks' N) x D with respect to its own rows, the others' taken as
    constants: summed over the ranks, just the gradient of the sum of the values, as if one rank held all rows. Where these positions
    stand for others, `together` [] says for how many all ranks' do (`stood_for`), which then takes the place of all ranks' N.

    Of a mixture the gradient with respect to its weights is computed at once too, so that its states need not wait for the backward pass.
    """
    terms = (Term(distance),) if callable(distance) else tuple(distance)
    if isinstance(teacher, Mixture):
        states = tuple(teacher.states)
        return _MixtureSum.apply(student, teacher.weights, states, at, terms, factor, all_rows, together)  # type: ignore[no-any-return, no-untyped-call]
    return _DistanceSum.apply(student, teacher, at, terms, factor, all_rows, together)  # type: ignore[no-any-return, no-untyped-call]


def sampled(at: Tensor, count: int | None, seed: int) -> tuple[Tensor, float]:
    """(`count` of the positions `at` [N], drawn without replacement by the seed and in order; how many each stands for); None takes all.

    For token-wise distances the expected sum is that of all positions. A set's distance is another one for fewer tokens, smaller
    the closer their number is to the width, so this is no unbiased estimate of the larger set's.
    """
    if count is None or at.numel() <= count:
        return at, 1.0
    drawn = torch.randperm(at.numel(), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return at[drawn.to(at.device, non_blocking=True)], at.numel() / count


def stood_for(at: Tensor, all_rows: AllRows) -> Tensor:
    """How many positions [] all ranks have where this one has `at` [N], before any is sampled (all ranks take part)."""
    counts, _ = all_rows(torch.tensor([[at.numel()]], dtype=torch.float64, device=at.device))
    return counts.sum()


def draw_seed(*numbers: int) -> int:
    """A seed for `sampled` that differs wherever one of the numbers does (seed, step, micro-batch, rank), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest())


class _DistanceSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        at: Tensor,
        terms: tuple[Term, ...],
        factor: float,
        all_rows: AllRows | None,
        together: Tensor | None,
    ) -> Tensor:
        ours, theirs = student.flatten(0, 1), teacher.flatten(0, 1)
        wide = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
        gradient = ours.new_empty(at.numel(), ours.shape[1])
        by_token, by_set = ([t for t in terms if t.of_set == whole and t.weight] for whole in (False, True))
        value = gradient.new_zeros((), dtype=wide)
        if by_token:
            value = value + _by_token(ours, theirs, at, by_token, gradient, wide)
        if by_set:
            stand = None if together is None else together / factor  # `factor` comes on top
            of_sets, [slope] = _by_set([ours[at]], theirs[at], by_set, wide, all_rows, stand)
            value = value + of_sets
            gradient = gradient.add_(slope) if by_token else gradient.copy_(slope)
        if not (by_token or by_set):
            # All weights are 0. Without a gradient, an engine would use that of the step before again.
            gradient.zero_()
        # Not save_for_backward: activation checkpointing would drop these and ask for the teacher's state again.
        ctx.gradient, ctx.at, ctx.shape, ctx.factor = gradient, at, student.shape, factor
        return value if factor == 1 else value * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient.mul_(grads[0] if ctx.factor == 1 else grads[0] * ctx.factor), None
        return _in_place(gradient, ctx.at, ctx.shape), *(None,) * 6


class _MixtureSum(torch.autograd.Function):
    """As `_DistanceSum`, by autograd of the definitions, since closed forms have no gradient with respect to the teacher's side."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weights: Tensor,
        states: tuple[Tensor, ...],
        at: Tensor,
        terms: tuple[Term, ...],
        factor: float,
        all_rows: AllRows | None,
        together: Tensor | None,
    ) -> Tensor:
        ours, theirs = student.flatten(0, 1), [state.flatten(0, 1) for state in states]
        wide = torch.promote_types(torch.promote_types(ours.dtype, theirs[0].dtype), torch.float32)
        shares = weights.to(wide)
        gradient, of_weights = ours.new_zeros(at.numel(), ours.shape[1]), torch.zeros_like(shares)
        value = shares.new_zeros(())
        by_token, by_set = ([t for t in terms if t.of_set == whole and t.weight] for whole in (False, True))
        few = rows_at_once(len(gradient), theirs[0].shape[1] * len(theirs), at.device.type)
        for rows, part in zip(at.split(few), gradient.split(few), strict=True) if by_token else ():
            seen = [state.index_select(0, rows).to(wide) for state in theirs]
            leaves = [ours.index_select(0, rows).to(wide).requires_grad_(), _mixed(seen, shares).requires_grad_()]
            with small_pass():
                total = torch.stack([term.distance(*leaves).sum() * term.weight for term in by_token]).sum()
                slope, of_mixture = torch.autograd.grad(total, leaves)
            value = value + total.detach()
            part.copy_(slope)
            of_weights += _products(seen, of_mixture)
        if by_set:
            stand = None if together is None else together / factor  # `factor` comes on top
            mixture = _mixed((state[at] for state in theirs), shares)  # one after another: k of them would be large
            of_sets, [slope, of_mixture] = _by_set([ours[at], mixture], None, by_set, wide, all_rows, stand)
            value = value + of_sets
            gradient.add_(slope)
            of_weights += _products((state[at] for state in theirs), of_mixture)
        # Not save_for_backward, for the reason that `_DistanceSum` names.
        ctx.gradient, ctx.of_weights = gradient, of_weights.to(weights.dtype)
        ctx.at, ctx.shape, ctx.factor = at, student.shape, factor
        return value if factor == 1 else value * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0] if ctx.factor == 1 else grads[0] * ctx.factor
        gradient, ctx.gradient = ctx.gradient.mul_(scale), None
        return _in_place(gradient, ctx.at, ctx.shape), ctx.of_weights * scale, *(None,) * 6


def _mixed(states: Iterable[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of k x [n, H], in the weights' dtype."""
    mixture: Tensor | None = None
    for state, weight in zip(states, weights, strict=True):
        part = state.to(weights.dtype)
        mixture = part * weight if mixture is None else mixture.addcmul_(part, weight)
    assert mixture is not None
    return mixture


def _products(states: Iterable[Tensor], gradient: Tensor) -> Tensor:
    """The gradient [k] of a mixture's weights, from the mixture's [n, H]."""
    return torch.stack([(state * gradient).sum() for state in states])


def _in_place(gradient: Tensor, at: Tensor, shape: torch.Size) -> Tensor:
    """[N, H] at these positions -> the shape of all, zeros elsewhere."""
    if len(gradient) < shape[:-1].numel():
        gradient = gradient.new_zeros(shape).flatten(0, 1).index_copy_(0, at, gradient)
    return gradient.view(shape)


def _by_token(
    ours: Tensor, theirs: Tensor, at: Tensor, terms: Sequence[Term], gradient: Tensor, wide: torch.dtype
) -> Tensor:
    """The token-wise terms' weighted sum; `gradient` [N, H] is filled."""
    forms = [(CLOSED_DISTANCES.get(term.distance) or _by_autograd(term.distance), term.weight) for term in terms]
    few = rows_at_once(len(gradient), gradient.shape[1], at.device.type)
    sums = []
    for rows, part in zip(at.split(few), gradient.split(few), strict=True):
        total = None
        for form, weight in forms:  # each works in place on rows of its own
            value, slope = form(ours.index_select(0, rows).to(wide), theirs.index_select(0, rows).to(wide))
            sums.append(value.sum() if weight == 1 else value.sum() * weight)
            slope = slope if weight == 1 else slope.mul_(weight)
            total = slope if total is None else total.add_(slope)
        assert total is not None
        part.copy_(total)
    return torch.stack(sums).sum()


def _by_set(
    learning: Sequence[Tensor],
    theirs: Tensor | None,
    terms: Sequence[Term],
    wide: torch.dtype,
    all_rows: AllRows | None,
    stand: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """(the set-level terms' weighted sum, its gradients with respect to the rows that learn) of rows [n, H_s], [n, H_t].

    `learning`: the student's rows, before the teacher's (`theirs`), or both sides'. `stand` []: how many positions all ranks' rows
    stand for; None: as many as there are rows.
    """
    count, start = len(learning[0]), 0
    sides = [*learning, *([] if theirs is None else [theirs])]
    if all_rows is not None:
        gathered = [all_rows(side) for side in sides]
        sides, start = [rows for rows, _ in gathered], gathered[0][1]
    sides = [side.to(wide) for side in sides]
    together = len(sides[0])
    value = sides[0].new_zeros(())
    gradients = [side.new_zeros(count, side.shape[1]) for side in sides[: len(learning)]]
    if not together:
        return value, gradients
    leaves = [side[start : start + count].clone().requires_grad_() for side in sides[: len(learning)]]
    with small_pass():
        for number, leaf in enumerate(leaves):
            sides[number] = torch.cat([sides[number][:start], leaf, sides[number][start + count :]])
        for term in terms:
            distance = term.distance(*sides)
            slopes = torch.autograd.grad(distance, leaves, retain_graph=term is not terms[-1])
            value = value + distance.detach() * (term.weight * count)
            for gradient, slope in zip(gradients, slopes, strict=True):
                gradient.add_(slope, alpha=term.weight * together)
            del distance, slopes  # frees their memory for the next term
    return value, gradients if stand is None else [gradient.mul_(stand / together) for gradient in gradients]


def _by_autograd(distance: Distance) -> ClosedDistance:
    """A form of a distance without a closed one."""

    def form(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.requires_grad_()
        with small_pass():
            value = distance(leaf, teacher)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    return form


@contextlib.contextmanager
def small_pass() -> Iterator[None]:
    """Inside, a backward pass may be made in the middle of a forward pass, also within a checkpointed block.

    Activation checkpointing drops the tensors that a block saves for its backward pass; identity hooks keep those of this small pass,
    which ends before the block does.
    """
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield
