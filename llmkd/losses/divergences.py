"""How far the student's distribution is from the teacher's, token by token. The caller masks, weights and sums.

`DIVERGENCES["forward_kl"](student_logits, teacher_logits, 1.0)` takes two `[N, V]` of any float dtype and gives `[N]`,
in float32 (float64 when either is float64), times temperature² so that the gradient keeps its size. Below, p is the
teacher's softmax and q the student's, both at the temperature. A column at -inf on both sides is outside the vocabulary:
it adds 0 and gets no gradient. Equal logits give exactly 0. Every function raises InputError on unequal shapes, on a
temperature of 0 or less, and on a parameter out of its range.

These are the definitions, differentiable by autograd. `llmkd.losses.closed_forms` has the gradients that training uses.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from llmkd.errors import InputError

Divergence = Callable[[Tensor, Tensor, float], Tensor]


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`temperature² · Σ_v p log(p/q)`, `[N, V]` x 2 -> `[N]`: the student must cover what the teacher finds likely.

    Hinton et al., arXiv 1503.02531; `torch.nn.functional.kl_div(log q, log p, log_target=True)` summed over V, times
    temperature². Infinite where the teacher gives weight to a column that is -inf for the student alone.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl(teacher, student) * temperature**2


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`temperature² · Σ_v q log(q/p)`, `[N, V]` x 2 -> `[N]`: the student must keep to what the teacher finds likely.

    The token-level form of arXiv 2306.08543. Infinite where the student gives weight to a column that is -inf for the
    teacher alone.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl(student, teacher) * temperature**2


def jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, beta: float) -> Tensor:
    """`temperature² · (β KL(p ‖ m) + (1-β) KL(q ‖ m))`, m = βp + (1-β)q, `[N, V]` x 2 -> `[N]`; symmetric at β = 1/2.

    The generalised Jensen-Shannon divergence of GKD, arXiv 2306.13649. The formula itself is 0 at both ends; as in that
    paper's implementations, β = 0 is forward KL and β = 1 reverse KL.
    """
    _check_share("beta", beta)
    if beta in (0.0, 1.0):
        return (reverse_kl if beta else forward_kl)(student_logits, teacher_logits, temperature)
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    mixture = _log_mixture(teacher, student, beta)
    return (beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)) * temperature**2


def logit_lens(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Symmetric Jensen-Shannon divergence of what two heads read from states within the models, `[..., V]` x 2 -> `[...]`.

    DistillLens (arXiv 2602.13567) compares such readings by a symmetric divergence.
    """
    return jsd(student_logits, teacher_logits, 1.0, beta=0.5)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, skew: float) -> Tensor:
    """`temperature² · KL(p ‖ λp + (1-λ)q)`, `[N, V]` x 2 -> `[N]`: forward KL with bounded gradients; λ = 0 is forward KL.

    DistiLLM, arXiv 2402.03898, with the teacher's entropy, which its code drops.
    """
    _check_share("skew", skew)
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    mixture = student if skew == 0 else _log_mixture(teacher, student, skew)
    return _kl(teacher, mixture) * temperature**2


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, skew: float) -> Tensor:
    """`temperature² · KL(q ‖ (1-λ)p + λq)`, `[N, V]` x 2 -> `[N]`: reverse KL with bounded gradients; λ = 0 is reverse KL.

    DistiLLM, arXiv 2402.03898. The mixture's q carries gradient too (DistiLLM-2, arXiv 2503.07067, detaches it).
    """
    _check_share("skew", skew)
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    mixture = teacher if skew == 0 else _log_mixture(student, teacher, skew)
    return _kl(student, mixture) * temperature**2


def tvd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`temperature² · ½ Σ_v |p - q|`, `[N, V]` x 2 -> `[N]`, from 0 to temperature²: the total variation distance.

    f-distill, arXiv 2307.15190. Its gradient is bounded, and 0 where a probability is equal on both sides.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return (teacher.exp() - student.exp()).abs().sum(-1) / 2 * temperature**2


def akl(student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, akl_mu: float) -> Tensor:
    """`temperature² · (w KL(p ‖ q) + (1-w) KL(q ‖ p))`, `[N, V]` x 2 -> `[N]`, w from `head_share`, which carries no gradient.

    Adaptive KL of Wu et al., COLING 2025 (arXiv 2404.02657; code wutaiqiang/LLM_KD_AKL): forward KL where the two differ
    in what the teacher finds likely, reverse KL where they differ in the rest.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    share = head_share(teacher.detach().exp(), student.detach().exp(), akl_mu)
    return (share * _kl(teacher, student) + (1 - share) * _kl(student, teacher)) * temperature**2


def head_share(p: Tensor, q: Tensor, akl_mu: float) -> Tensor:
    """akl's weight of forward KL: the part of Σ_v |p - q| that lies in the teacher's head, `[N, V]` x 2 -> `[N]`.

    The head is the likeliest tokens whose probabilities, added from the likeliest down, come to at most μ, and always the
    first; the token that crosses μ is in the tail. 0 for equal distributions.
    """
    _check_share("akl_mu", akl_mu)
    likeliest, order = p.sort(dim=-1, descending=True, stable=True)  # of equals, the lower id is the likelier
    in_head = likeliest.cumsum(-1) <= akl_mu
    in_head[..., 0] = True
    gap = (p - q).abs()
    head = gap.gather(-1, order).mul_(in_head).sum(-1)
    whole = gap.sum(-1)
    return (head / whole.masked_fill(whole == 0, 1.0)).clamp(max=1.0)  # the two sums are rounded in different orders


def top_k(student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, top_k: int) -> Tensor:
    """`temperature² · (Σ_k p_k log(p_k/q_k) + p_rest log(p_rest/q_rest))`, `[N, V]` x 2 -> `[N]`: k the teacher's likeliest tokens.

    Forward KL with all other tokens in one bucket, whose inner shape nobody has to copy; both sides' masses are exact at
    the temperature. At k = V it is `forward_kl`.
    """
    if top_k < 1:
        raise InputError(f"top_k {top_k!r}: write a whole number from 1 up")
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    count = min(top_k, teacher.shape[-1])
    ids = teacher.topk(count, dim=-1).indices
    ours, theirs = student.gather(-1, ids), teacher.gather(-1, ids)
    if count < teacher.shape[-1]:
        masses = (side.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) for side in (student, teacher))
        ours, theirs = (torch.cat(parts, -1) for parts in zip((ours, theirs), masses, strict=True))
    return _kl(theirs, ours) * temperature**2


def top_k_masses(log_probabilities: Tensor, vocabulary: int, temperature: float) -> tuple[Tensor, Tensor]:
    """A teacher of which only the top k is stored, at the temperature: `[N, K]` -> log-masses of the K `[N, K]` and of the rest `[N]`.

    The log-probabilities are those at temperature 1. At another, p_k^(1/temperature) and the rest's mass to the same power are normalised:
    exact for K = V, and for K < V an approximation, since the rest is taken for one token. DistillKit's sparse KL with
    SYMMETRIC_UNIFORM. -inf where no mass is left for the rest.
    """
    whole = log_probabilities.shape[-1] == vocabulary
    rest = torch.full_like(log_probabilities[..., :1], -torch.inf) if whole else _log_rest(log_probabilities)
    masses = (torch.cat([log_probabilities, rest], -1) / temperature).log_softmax(-1)
    return masses[..., :-1], masses[..., -1]


def stored_top_k_kl(student_logits: Tensor, ids: Tensor, log_probabilities: Tensor) -> Tensor:
    """`Σ_k p_k log(p_k/q_k) + p_rest log(p_rest/q_rest)` for a teacher of which only the top k is stored, `[N, V]`, `[N, K]` x 2 -> `[N]`.

    `top_k` at temperature 1, from what `top_k_masses` is given.
    """
    log_q = student_logits.log_softmax(-1)
    log_p, log_rest = top_k_masses(log_probabilities.to(log_q.dtype), log_q.shape[-1], 1.0)
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return _kl(torch.cat([log_p, log_rest[:, None]], -1), torch.cat([log_q.gather(-1, ids), rest], -1))


def mixed(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    *,
    parts: tuple[tuple[Divergence, float], ...],
) -> Tensor:
    """`Σ_i weight_i · divergence_i`, `[N, V]` x 2 -> `[N]`."""
    return torch.stack([d(student_logits, teacher_logits, temperature) * weight for d, weight in parts]).sum(0)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": partial(jsd, beta=0.5),
    "skew_kl": partial(skew_kl, skew=0.1),
    "skew_reverse_kl": partial(skew_reverse_kl, skew=0.1),
    "tvd": tvd,
    "akl": partial(akl, akl_mu=0.5),
    "top_k": partial(top_k, top_k=64),
}
"""By the recipe's `loss.divergence`, with the papers' usual parameter where there is one."""


def parts_of(divergence: Divergence) -> tuple[tuple[Divergence, float], ...]:
    """The divergences of a weighted sum and their weights; none for one that is no sum."""
    return divergence.keywords["parts"] if isinstance(divergence, partial) and divergence.func is mixed else ()


def parameters(divergence: Divergence) -> dict[str, float]:
    """What a divergence reads besides logits and temperature, and its value: the recipe's keys under `loss`."""
    return dict(divergence.keywords) if isinstance(divergence, partial) else {}


PARAMETERS = tuple(dict.fromkeys(name for divergence in DIVERGENCES.values() for name in parameters(divergence)))
"""The keys that any divergence reads."""


Mix = str | Mapping[str, float]
"""The name of a divergence, or several with their weights."""


def with_parameters(mix: Mix, values: Mapping[str, float | None], beside: Mix = MappingProxyType({})) -> Divergence:
    """The divergence of that name, or the sum of several by their weights, with these parameters; None stands for the usual value.

    beside: what else may read the parameters. Raises InputError for one that nothing reads.
    """
    weights = {mix: 1.0} if isinstance(mix, str) else mix
    values = {key: value for key, value in values.items() if value is not None}
    for key in values:
        names = dict.fromkeys([*weights, *([beside] if isinstance(beside, str) else beside)])
        if not any(key in parameters(DIVERGENCES[name]) for name in names):
            readers = [other for other in DIVERGENCES if key in parameters(DIVERGENCES[other])]
            raise InputError(
                f"loss.{key}: {' and '.join(names)} does not read it; leave it out, or write divergence: {' or '.join(readers)}"
            )
    parts = []
    for name, weight in weights.items():
        read = {key: value for key, value in values.items() if key in parameters(DIVERGENCES[name])}
        parts.append((partial(DIVERGENCES[name], **read) if read else DIVERGENCES[name], weight))
    return parts[0][0] if isinstance(mix, str) else partial(mixed, parts=tuple(parts))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) from log-probabilities `[N, V]` -> `[N]`."""
    # Where p = 0 the term is 0 (its limit), but 0 * (-inf - log q) is NaN. Filling the difference, before the product,
    # keeps the gradient clean too: a subtraction passes on the 0 it gets, a product would make 0 * inf of it.
    gap = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    return (log_p.exp() * gap).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight · a + (1 - weight) · b), `[N, V]` x 2 -> `[N, V]`; for a = b it is log a to the bit.

    logsumexp would be off by a rounding error there, and equal logits would not give exactly 0. Taken from the larger of
    the two, so that the exponential can't overflow.
    """
    gap = (log_b - log_a).masked_fill(log_a.isneginf() & log_b.isneginf(), 0.0)
    from_b = gap > 0
    other = torch.full_like(gap, 1 - weight).masked_fill(from_b, weight)
    return torch.where(from_b, log_b, log_a) + torch.log1p(other * torch.expm1(torch.where(from_b, -gap, gap)))


def _log_rest(log_probabilities: Tensor) -> Tensor:
    """log(1 - Σ_k p_k), `[N, K]` -> `[N, 1]`: the mass outside the top k; rounding may leave none, which is -inf."""
    return (1 - log_probabilities.double().exp().sum(-1, keepdim=True)).clamp(min=0.0).log().to(log_probabilities.dtype)


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"student logits are {list(student_logits.shape)} and teacher logits {list(teacher_logits.shape)}: "
            "a divergence compares logits of one shape; where the heads differ in width, compare their shared columns"
        )
    _check_temperature(temperature)
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(
            f"temperature {temperature!r}: write a finite number above 0 (1.0 leaves the logits as they are)"
        )


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name} {value!r}: write a number from 0 to 1")
