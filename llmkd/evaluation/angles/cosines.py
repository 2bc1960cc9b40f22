"""Angles between teacher blocks as a student's state sees them: cos(T_i - S, T_j - S), gathered batch by batch.

A small step of S towards T_i brings it nearer to T_j too where that cosine is above zero (arXiv 2502.04499). What is kept is
one number or one histogram per pair i < j of teacher blocks, never a state.

Cost: for N tokens, a student block and L teacher blocks of width H the differences take N * L * H additions and their Gram
matrices 2 * N * L^2 * H operations; at a time `CHUNK` numbers of differences, and as many of cosines, exist. For a 36-block
teacher of width 4096 seen from 9 blocks that is 0.1 GFLOP a token, where the teacher's own pass takes 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from llmkd.errors import InputError
from llmkd.evaluation.angles.results import BlockAngles, CosineSummary, Matrix, PaperCode, mean_of_known
from llmkd.losses.distances import SMALLEST_NORM

BINS = 64  # of a histogram, on [-1, 1]
CHUNK = 2**22  # numbers of a chunk's largest tensor
CODE_EPSILON = 1e-6  # what the paper's code adds to the product of the norms

Project = Callable[[Tensor], Tensor]


def pairs_of(blocks: int) -> list[tuple[int, int]]:
    """The pairs (i, j) with i < j of so many blocks, in the order of every list of pairs here."""
    return list(combinations(range(blocks), 2))


class PairCosines:
    """The cosines between all pairs of teacher blocks, seen from one student block; batches are added one after another.

    A teacher state no further than rounding from the student's (`SMALLEST_NORM`, times the student state's norm where that is
    above 1) has no direction: its pairs are not counted at that token.
    """

    def __init__(self, blocks: int, device: torch.device | str = "cpu", bins: int = BINS) -> None:
        self._blocks, self._bins = blocks, bins
        self._i, self._j = torch.triu_indices(blocks, blocks, offset=1, device=device)
        pairs = len(self._i)
        self._first_bin = torch.arange(pairs, device=device) * bins
        self._sum = torch.zeros(pairs, dtype=torch.float64, device=device)
        self._counted, self._above = (torch.zeros(pairs, dtype=torch.int64, device=device) for _ in range(2))
        self._histogram = torch.zeros(pairs * bins, dtype=torch.int64, device=device)
        self._no_direction = torch.zeros(blocks, dtype=torch.int64, device=device)
        self._not_finite = torch.zeros((), dtype=torch.int64, device=device)
        self._tokens = 0

    def add(self, student: Tensor, teacher: Sequence[Tensor], at: Tensor, project: Project | None = None) -> None:
        """A batch: student [B, T, H_s], a teacher state [B, T, H] per block, and the flat positions [M] that count.

        What other positions hold, NaN included, changes nothing. `project` takes [n, H_s] to [n, H].
        """
        ours, theirs = student.flatten(0, 1), [state.flatten(0, 1) for state in teacher]
        self._tokens += at.numel()
        for part in at.split(chunk_of(self._blocks, theirs[0].shape[-1])):
            here = projected(ours[part], project)
            self._count(torch.stack([_at_least_float32(state[part]) for state in theirs], 1) - here[:, None], here)

    def _count(self, towards: Tensor, here: Tensor) -> None:
        """towards [n, L, H]: from the student's states here [n, H] to each block's."""
        norms = torch.linalg.vector_norm(towards, dim=-1)
        smallest = SMALLEST_NORM * torch.linalg.vector_norm(here, dim=-1, keepdim=True).clamp(min=1)
        directed = norms > smallest
        unit = towards / norms.masked_fill(~directed, 1.0)[..., None]
        cosines = (unit @ unit.transpose(1, 2))[:, self._i, self._j].clamp(-1, 1)
        both = directed[:, self._i] & directed[:, self._j]
        self._counted += both.sum(0)
        self._above += (both & (cosines > 0)).sum(0)
        self._sum += torch.where(both, cosines, 0.0).sum(0, dtype=torch.float64)
        bins = ((cosines + 1) * (self._bins / 2)).long().clamp(max=self._bins - 1) + self._first_bin
        self._histogram += torch.bincount(bins[both], minlength=self._histogram.numel())
        self._no_direction += (~directed).sum(0)
        self._not_finite += (~torch.isfinite(norms)).sum()

    def result(self, block: int = 0) -> BlockAngles:
        """The angles as student block `block` sees them. Raises InputError if a state held NaN or infinity at a position that counts."""
        if self._not_finite.item():
            raise InputError("the states are not finite: the training has diverged; lower its learning rate")
        counted = self._counted.tolist()
        mean = [total / n if n else None for total, n in zip(self._sum.tolist(), counted, strict=True)]
        above = [tokens / n if n else None for tokens, n in zip(self._above.tolist(), counted, strict=True)]
        no_direction = self._no_direction.tolist()
        directed = [missing < self._tokens for missing in no_direction]
        return BlockAngles(
            block=block,
            mean=self._matrix(mean, directed),
            above_zero=self._matrix(above, directed),
            mean_of_pairs=mean_of_known(mean),
            above_zero_of_pairs=mean_of_known(above),
            counted=counted,
            without_direction=no_direction,
            histogram=self._histogram.view(len(counted), self._bins).tolist(),
        )

    def _matrix(self, values: Sequence[float | None], directed: Sequence[bool]) -> Matrix:
        whole: Matrix = [[None] * self._blocks for _ in range(self._blocks)]
        for (i, j), value in zip(pairs_of(self._blocks), values, strict=True):
            whole[i][j] = whole[j][i] = value
        for i, has_direction in enumerate(directed):
            whole[i][i] = 1.0 if has_direction else None
        return whole


class CodeCosine:
    """The statistic of the paper's own code: one cosine per position, <u, v> / (|u| |v| + 1e-6), u to T_1 and v to T_last.

    Its `classification/dist_utils.py` (class CosineFromStudent) takes every position, padding included, and counts a state that
    equals the student's as 0. Beside it stand the same numbers over the positions that are not padding.
    """

    def __init__(self, bins: int = BINS) -> None:
        self._bins = bins
        self._all, self._tokens = _Sums(bins), _Sums(bins)

    def add(
        self, student: Tensor, first: Tensor, last: Tensor, attended: Tensor, project: Project | None = None
    ) -> None:
        """A batch: student [B, T, H_s], first and last [B, T, H], attended [B, T]."""
        ours, first, last, real = (tensor.flatten(0, 1) for tensor in (student, first, last, attended))
        size = chunk_of(2, first.shape[-1])
        for s, t1, tl, here in zip(
            ours.split(size), first.split(size), last.split(size), real.split(size), strict=True
        ):
            seen = projected(s, project)
            u, v = _at_least_float32(t1) - seen, _at_least_float32(tl) - seen
            norms = torch.linalg.vector_norm(u, dim=-1) * torch.linalg.vector_norm(v, dim=-1)
            cosines = (u * v).sum(-1) / (norms + CODE_EPSILON)
            self._all.add(cosines)
            self._tokens.add(cosines[here])

    def result(self) -> PaperCode:
        """With padding and over tokens alone; cosines that are not finite are counted apart."""
        return PaperCode(with_padding=self._all.result(), tokens=self._tokens.result())


class _Sums:
    """Sums of one stream of cosines; they are moved to the host once per chunk."""

    def __init__(self, bins: int) -> None:
        self._histogram = torch.zeros(bins, dtype=torch.int64)
        self._counts = torch.zeros(3, dtype=torch.float64)  # finite, above zero, not finite
        self._sum = torch.zeros((), dtype=torch.float64)

    def add(self, cosines: Tensor) -> None:
        """cosines [n]"""
        finite = torch.isfinite(cosines)
        known = cosines[finite].clamp(-1, 1)
        counts = torch.stack([finite.sum(), (known > 0).sum(), (~finite).sum()])
        self._counts += counts.cpu()
        self._sum += known.sum(dtype=torch.float64).cpu()
        size = self._histogram.numel()
        bins = ((known + 1) * (size / 2)).long().clamp(max=size - 1)
        self._histogram += torch.bincount(bins, minlength=size).cpu()

    def result(self) -> CosineSummary:
        counted, above, not_finite = (int(n) for n in self._counts.tolist())
        return CosineSummary(
            mean=self._sum.item() / counted if counted else None,
            above_zero=above / counted if counted else None,
            counted=counted,
            not_finite=not_finite,
            histogram=self._histogram.tolist(),
        )


def chunk_of(blocks: int, width: int) -> int:
    """How many tokens are worked on at a time."""
    return max(1, CHUNK // (blocks * max(width, blocks)))


def projected(states: Tensor, project: Project | None) -> Tensor:
    """The states in float32 at least, and in the teacher's width."""
    states = _at_least_float32(states)
    return states if project is None else project(states)


def _at_least_float32(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
