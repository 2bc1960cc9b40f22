"""Each divergence as its paper defines it, in float64 and by loops over positions: what the package's own are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(
    name: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float, **parameters: float
) -> Tensor:
    """`[N, V]` x 2 -> `[N]` in float64, differentiable; the default parameters are those of the papers' own code."""
    rows = zip(student_logits.double().flatten(0, -2), teacher_logits.double().flatten(0, -2), strict=True)
    values = [
        DEFINITIONS[name]((t / temperature).softmax(-1), (s / temperature).softmax(-1), **parameters) for s, t in rows
    ]
    return temperature**2 * torch.stack(values)


def kl(p: Tensor, q: Tensor) -> Tensor:
    positive = p > 0
    return (p[positive] * (p[positive] / q[positive]).log()).sum()


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return kl(p, q)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return kl(q, p)


def jsd(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def skew_kl(p: Tensor, q: Tensor, skew: float = 0.1) -> Tensor:
    return kl(p, skew * p + (1 - skew) * q)


def skew_reverse_kl(p: Tensor, q: Tensor, skew: float = 0.1) -> Tensor:
    return kl(q, (1 - skew) * p + skew * q)


def tvd(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum() / 2


def akl(p: Tensor, q: Tensor, akl_mu: float = 0.5) -> Tensor:
    gaps = {"head": 0.0, "tail": 0.0}
    total = 0.0
    for rank, v in enumerate(sorted(range(len(p)), key=lambda v: -p[v].item())):
        total += p[v].item()
        gaps["head" if rank == 0 or total <= akl_mu else "tail"] += abs(p[v].item() - q[v].item())
    total_gap = gaps["head"] + gaps["tail"]
    if total_gap == 0:
        return 0 * kl(p, q)
    return gaps["head"] / total_gap * kl(p, q) + gaps["tail"] / total_gap * kl(q, p)


def top_k(p: Tensor, q: Tensor, top_k: int = 64) -> Tensor:
    likeliest = sorted(range(len(p)), key=lambda v: -p[v].item())
    kept, bucket = likeliest[:top_k], likeliest[top_k:]
    sides = [torch.cat([side[kept], side[bucket].sum()[None]]) for side in (p, q)]
    return kl(*sides)


def top_k_kl(student_logits: Tensor, ids: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """`[N, V]`, `[N, K]`, `[N, K]` -> `[N]`: KL over K + 1 buckets, the last one for all other tokens."""
    values = []
    for logits, chosen, teacher in zip(student_logits.double(), ids, log_probabilities.double(), strict=True):
        p, q = teacher.exp(), (logits / temperature).softmax(-1)[chosen]
        if len(chosen) < len(logits):
            p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
        p = p ** (1 / temperature)
        values.append(kl(p / p.sum(), q))
    return temperature**2 * torch.stack(values)


DEFINITIONS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "akl": akl,
    "top_k": top_k,
}
