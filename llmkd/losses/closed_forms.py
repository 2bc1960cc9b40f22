"""Value and gradient of each divergence and each distance, written out, in the buffers given: what training uses instead of autograd.

A divergence's form takes q, log q, p and log p (student's and teacher's softmax at the temperature, float32 or float64 `[n, V]`) and gives
(value `[n]`, gradient `[n, V]` with respect to the student's logits over the temperature). It leaves q as it is; the gradient lies in
one of the other three, whose contents are lost. For a divergence D with d_v = ∂D/∂q_v the gradient is q_v (d_v - Σ_u q_u d_u); a
constant added to d changes nothing, and is chosen so that equal distributions give exactly 0. The temperature's factors are the caller's.

A distance's form takes student and teacher states (float32 or float64 `[n, H]`, both lost) and gives (value `[n]`, gradient `[n, H]`
with respect to the student). The definitions are in `llmkd.losses.divergences` and `llmkd.losses.distances`; the tests hold each form to
them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmkd.losses import distances, divergences
from llmkd.losses.distances import SMALLEST_NORM, Distance
from llmkd.losses.divergences import Divergence, head_share

Form = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ClosedDistance = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """d = -p/q: the gradient is q - p."""
    value = log_p.sub_(log_q).mul_(p).sum(-1)
    return value, torch.sub(q, p, out=p)


def reverse_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """d = log(q/p): its mean under q is the value itself."""
    slope = log_q.sub_(log_p).mul_(q)
    value = slope.sum(-1)
    return value, _less_its_mean(slope, q, value)


def jsd(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """d = (1-β) log(q/m), m = βp + (1-β)q: what m's own q adds is constant."""
    if beta in (0.0, 1.0):
        return (reverse_kl if beta else forward_kl)(q, log_q, p, log_p)
    mixture = _mixture(q, p, beta, out=log_p)
    slope = _log_ratio(torch.div(q, mixture, out=log_q)).mul_(q)
    of_student = slope.sum(-1)
    of_teacher = _log_ratio(torch.div(p, mixture, out=mixture)).mul_(p).sum(-1)
    gradient = _less_its_mean(slope, q, of_student).mul_(1 - beta)
    return beta * of_teacher + (1 - beta) * of_student, gradient


def skew_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor, *, skew: float) -> tuple[Tensor, Tensor]:
    """d = -(1-λ)(p/m - 1), m = λp + (1-λ)q."""
    if skew == 0:
        return forward_kl(q, log_q, p, log_p)
    ratio = torch.div(p, _mixture(q, p, skew, out=log_p), out=log_p)
    value = _log_ratio(log_q.copy_(ratio)).mul_(p).sum(-1)
    slope = ratio.sub_(1).mul_(q)
    return value, _less_its_mean(slope, q, slope.sum(-1)).mul_(skew - 1)


def skew_reverse_kl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor, *, skew: float) -> tuple[Tensor, Tensor]:
    """d = log(q/m) - λ(q/m - 1), m = (1-λ)p + λq."""
    if skew == 0:
        return reverse_kl(q, log_q, p, log_p)
    ratio = torch.div(q, _mixture(p, q, skew, out=log_p), out=log_p)
    slope = _log_ratio(log_q.copy_(ratio)).mul_(q)
    value = slope.sum(-1)
    slope.addcmul_(q, ratio.sub_(1), value=-skew)
    return value, _less_its_mean(slope, q, slope.sum(-1))


def tvd(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """d = ½ sign(q - p)."""
    gap = torch.sub(q, p, out=p)
    value = torch.abs(gap, out=log_p).sum(-1) / 2
    slope = gap.sign_().mul_(q).div_(2)
    return value, _less_its_mean(slope, q, slope.sum(-1))


def akl(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor, *, akl_mu: float) -> tuple[Tensor, Tensor]:
    """Both KLs' gradients, shared out; the share itself carries none."""
    share = head_share(p, q, akl_mu)
    gap = log_q.sub_(log_p)
    forward = -torch.mul(p, gap, out=log_p).sum(-1)
    slope = gap.mul_(q)
    reverse = slope.sum(-1)
    gradient = torch.sub(q, p, out=p).mul_(share[:, None])
    gradient.addcmul_(_less_its_mean(slope, q, reverse), (1 - share)[:, None])
    return share * forward + (1 - share) * reverse, gradient


def top_k(q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
    """`buckets` of the teacher's likeliest tokens."""
    count = min(top_k, p.shape[-1])
    ids = p.topk(count, dim=-1).indices
    masses, rest = p.gather(-1, ids), p.scatter_(-1, ids, 0.0).sum(-1)
    return buckets(q, log_q, ids, masses, log_p.gather(-1, ids), rest)


def buckets(q: Tensor, log_q: Tensor, ids: Tensor, p: Tensor, log_p: Tensor, p_rest: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL with all but K tokens in one bucket, from the teacher's masses p, log p `[n, K]` and p_rest `[n]`; log q's buffer is lost.

    With m the student's mass of the rest, the gradient is q - p at the K and q (1 - p_rest/m) elsewhere. Where the student shuts all of the
    rest out, the value is as large as for one such token of `forward_kl`, and the gradient there 0.
    """
    least = torch.finfo(q.dtype).min
    ours = log_q.gather(-1, ids)
    shut_out = log_q.scatter_(-1, ids, least).amax(-1) == least  # a mass of 0 alone may be a small one, rounded
    rest = log_q.copy_(q).scatter_(-1, ids, 0.0)
    ratio = p_rest / rest.sum(-1).clamp_(min=torch.finfo(q.dtype).tiny)
    log_ratio = _log_ratio(ratio.clone()).masked_fill_(shut_out, -least)
    value = ((log_p - ours) * p).sum(-1) + log_ratio * p_rest
    return value, rest.mul_((1 - ratio)[:, None]).scatter_(-1, ids, q.gather(-1, ids) - p)


def mixed(
    q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor, *, parts: tuple[tuple[Divergence, float], ...]
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the parts' values and of their gradients. A part overwrites its buffers, so all but the last get copies."""
    value, gradient = torch.zeros_like(q[:, 0]), torch.zeros_like(q)
    parts = tuple(part for part in parts if part[1])  # a weight of 0: not run
    for number, (divergence, weight) in enumerate(parts):
        form = closed_form(divergence)
        assert form is not None
        last = number == len(parts) - 1
        own = (log_q, p, log_p) if last else (log_q.clone(), p.clone(), log_p.clone())
        part, slope = form(q, *own)
        value += weight * part
        gradient.add_(slope, alpha=weight)
    return value, gradient


CLOSED_FORMS: dict[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]] = {
    divergences.forward_kl: forward_kl,
    divergences.reverse_kl: reverse_kl,
    divergences.jsd: jsd,
    divergences.skew_kl: skew_kl,
    divergences.skew_reverse_kl: skew_reverse_kl,
    divergences.tvd: tvd,
    divergences.akl: akl,
    divergences.top_k: top_k,
    divergences.mixed: mixed,
}


def closed_form(divergence: Divergence) -> Form | None:
    """The form of a divergence, with its parameters; None for a divergence that has none, which goes through autograd."""
    if isinstance(divergence, partial):
        if any(closed_form(part) is None for part, _ in divergence.keywords.get("parts", ())):
            return None
        form = CLOSED_FORMS.get(divergence.func)
        return None if form is None else partial(form, **divergence.keywords)
    return CLOSED_FORMS.get(divergence)


UNREACHED = 1e12
"""No divergence of finite logits comes near it; a probability times the least finite number does."""


def infinite_where_blocked(value: Tensor) -> Tensor:
    """Infinity where one side alone shuts a token out (-inf): there the value has a term of the least finite number's size."""
    return value.masked_fill(value > UNREACHED, torch.inf)


def _less_its_mean(slope: Tensor, q: Tensor, mean: Tensor) -> Tensor:
    """q·d - q Σ q·d in the buffer of q·d: the gradient with respect to logits."""
    return slope.addcmul_(q, mean[:, None], value=-1)


def _mixture(a: Tensor, b: Tensor, weight: float, *, out: Tensor) -> Tensor:
    """a + weight (b - a), which is a to the bit where b equals it; never 0, so that it can divide."""
    return torch.lerp(a, b, weight, out=out).clamp_(min=torch.finfo(a.dtype).tiny)


def _log_ratio(ratio: Tensor) -> Tensor:
    """log in place; a ratio of 0 belongs to a probability of 0, and 0 times any finite number adds nothing."""
    return ratio.clamp_(min=torch.finfo(ratio.dtype).tiny).log_()


# ---------------------------------------------------------------------------------------------------------------------
# Distances


def mse(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient is 2 (s - t) / H."""
    gap = student.sub_(teacher)
    value = torch.linalg.vector_norm(gap, dim=-1).square_() / gap.shape[-1]
    return value, gap.mul_(2 / gap.shape[-1])


def normalized_mse(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """With u = s/‖s‖, v = t/‖t‖ and gap g = u - v: the gradient is 2 (g - (u·g) u) / ‖s‖."""
    unit, norm, without = _unit(student)
    gap, _, teacher_without = _unit(teacher)
    gap = torch.sub(unit, gap, out=gap)
    value = torch.linalg.vector_norm(gap, dim=-1, keepdim=True).square_()
    # u·g from ‖g‖² = ‖u‖² + ‖v‖² - 2 u·v: exactly 0 for equal states, where a dot product would leave rounding.
    along = (value + teacher_without.to(value.dtype) - without.to(value.dtype)) / 2
    gradient = gap.addcmul_(unit, along, value=-1).mul_((2 / norm).masked_fill_(without, 0.0))
    return value.squeeze(-1), gradient


def cosine(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Half of `normalized_mse`."""
    value, gradient = normalized_mse(student, teacher)
    return value / 2, gradient.div_(2)


CLOSED_DISTANCES: dict[Distance, ClosedDistance] = {
    distances.mse: mse,
    distances.normalized_mse: normalized_mse,
    distances.cosine: cosine,
}


def _unit(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(unit vectors in place, norms `[n, 1]`, which have no direction); a state without one becomes zero, its norm 1."""
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    without = norm <= SMALLEST_NORM
    norm = norm.masked_fill_(without, 1.0)
    return states.div_(norm).masked_fill_(without, 0.0), norm, without
