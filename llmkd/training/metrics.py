"""What a run measures between two log lines: sums stay on the device and are reduced once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from llmkd.distributed.clocks import StepClock
from llmkd.distributed.ranks import World, highest, sum_tensor
from llmkd.losses.objective import PARTS, Divisors, Weights, means
from llmkd.provenance import peak_memory_gib
from llmkd.student.passes import STONE_PARTS, PassResult, StepSettings, StoneSettings, StoneSums
from llmkd.student.stepping_stones import shares
from llmkd.training.jobs import Job

Values: TypeAlias = "dict[str, float | Values]"
"""Numbers by name, as they stand in a line of metrics.jsonl."""


@dataclass(frozen=True)
class Moving:
    """The settings of a step that change during the run; None for those that do not."""

    temperature: float | None = None
    weights: dict[str, float] | None = None


@dataclass(frozen=True)
class Norms:
    """Gradient norms of the parts of a step's loss over all ranks, None without a weight; of distances and divergences if several."""

    ce: float | None
    kl: float | None
    hidden: float | None
    pairs: dict[str, float]
    distances: dict[str, float] | None = None
    divergences: dict[str, float] | None = None
    stones: dict[str, dict[str, float]] | None = None
    """By stone and part, the weights and shares in them."""


@dataclass(frozen=True)
class Interval:
    """The means of the steps between two log lines, over all ranks, and the state at their end. A part that was not computed is None."""

    loss: float
    ce: float | None
    kl: float | None
    hidden: float | None
    pairs: dict[str, float]
    tokens_per_second: float
    seconds_per_step: float
    seconds_by_part: dict[str, float]
    """The same by part of a step (llmkd.distributed.clocks), on this rank."""
    memory_gib: float
    learning_rate: float
    grad_norm: float
    temperature: float | None
    weights: dict[str, float] | None
    norms: Norms | None
    router: float | None
    """The routers' load balance, without its weight."""
    stones: float | None
    """The stones' weighted loss, which is in `loss`."""
    stone_parts: dict[str, float]
    """By `stones/PAIR/PART`."""
    not_in_loss: dict[str, float] | None = None
    """Parts that were computed on the way and have no weight."""

    def values(self) -> Values:
        """The names and numbers of a line of metrics.jsonl; what is None is left out."""
        return {**_present(asdict(replace(self, stone_parts={}))), **self.stone_parts}


def _present(values: Mapping[str, Any]) -> Values:
    """The same without None and without the key of the stones' parts, which are written at the top level."""
    return {
        key: _present(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None and key != "stone_parts"
    }


class Meter:
    """Adds up a run's sums between two log lines. Nothing is read from the device until `flush`."""

    def __init__(
        self,
        world: World,
        weights: Weights,
        pairs: Sequence[str],
        *,
        distances: Sequence[str] = (),
        divergences: Sequence[str] = (),
        stones: StoneMeter | None = None,
        clock: StepClock | None = None,
    ) -> None:
        """`distances` and `divergences`: the names of all distances and divergences in the loss. `clock`: the one of the run."""
        self._world = world
        self._weights = weights
        self._pairs = tuple(pairs)
        self._distances = tuple(distances) if len(distances) > 1 and pairs else ()
        self._divergences = tuple(divergences) if len(divergences) > 1 else ()
        self._stones = stones
        self.clock = clock or StepClock(world.device)
        self._reset()

    @classmethod
    def of_job(cls, world: World, job: Job, clock: StepClock) -> Meter:
        """The meter of a job's run, whose steps this clock times."""
        recipe = job.recipe
        return cls(
            world,
            job.weights,
            job.names,
            distances=recipe.matching.distances,
            divergences=list(recipe.loss.divergences),
            stones=StoneMeter(world, job.stones) if job.stones else None,
            clock=clock,
        )

    def _reset(self) -> None:
        self._sums: Tensor | None = None
        self._weighted: Tensor | None = None
        self._squares: Tensor | None = None
        self._divisors = [0, 0, 0]
        self._router: Tensor | None = None
        self._routed = 0
        self._computed: set[str] = set()
        self._tokens = 0
        self._steps = 0

    def add(self, settings: StepSettings, results: Sequence[PassResult]) -> None:
        """A step is done: the results of this rank's micro-batches."""
        self.clock.end()
        weights, by = settings.weights, settings.divisors
        for result in results:
            sums = result.sums.double()
            pairs = sums[2:].unbind()
            hidden = sum((d * w for d, w in zip(pairs, weights.of_pairs(len(pairs)), strict=True)), 0 * sums[0])
            weighted = torch.stack([sums[0] * weights.ce, sums[1] * weights.kl, hidden * weights.hidden])
            self._sums, self._weighted = _plus(self._sums, sums), _plus(self._weighted, weighted)
            if result.router is not None:
                self._router = _plus(self._router, result.router.double())
        self._routed += settings.counts.attended
        # Not over a step in which the divergence weighs nothing any more: it was not computed.
        counts = (by.ce, by.kl if weights.kl > 0 else 0, by.hidden)
        self._divisors = [total + count for total, count in zip(self._divisors, counts, strict=True)]
        is_computed = {"ce": settings.runs_head, "kl": weights.kl > 0, "hidden": bool(self._pairs)}
        self._computed |= {part for part in PARTS if is_computed[part]}
        self._tokens += settings.counts.tokens
        self._steps += 1
        if settings.report_norms:
            self._squares = _total([result.squares for result in results])
        if self._stones is not None and settings.stones is not None:
            self._stones.add(settings.stones, by, [result.stones for result in results])

    def flush(self, moving: Moving, *, learning_rate: float, grad_norm: float) -> Interval:
        """The means since the last call (all ranks take part); the rest is of the last step."""
        assert self._sums is not None and self._weighted is not None
        totals = sum_tensor(self._world, torch.cat([self._weighted, self._sums])).tolist()
        by = Divisors(*(max(count, 1) for count in self._divisors))
        parts = means(totals[3:], totals[:3], by, self._weights)
        own = {part: parts[part] for part in PARTS if part in self._computed}
        apart = {part: own.pop(part) for part in list(own) if not getattr(self._weights, part)}
        # by.hidden counts positions x pairs; a pair's own mean is over the positions
        pairs = {name: d * len(self._pairs) / by.hidden for name, d in zip(self._pairs, totals[5:], strict=True)}
        norms = None if self._squares is None else self._norms(self._squares)
        stones, stone_parts = (None, {}) if self._stones is None else self._stones.means()
        router = None if self._router is None else sum_tensor(self._world, self._router).item() / max(self._routed, 1)
        seconds, by_part = self.clock.read()
        interval = Interval(
            loss=parts["loss"] + (stones or 0.0) + self._weights.router * (router or 0.0),
            ce=own.get("ce"),
            kl=own.get("kl"),
            hidden=own.get("hidden"),
            pairs=pairs,
            tokens_per_second=self._tokens / seconds,
            seconds_per_step=seconds / self._steps,
            seconds_by_part={part: of_part / self._steps for part, of_part in by_part.items()},
            memory_gib=highest(self._world, peak_memory_gib()),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            temperature=moving.temperature,
            weights=moving.weights,
            norms=norms,
            router=router,
            stones=stones,
            stone_parts=stone_parts,
            not_in_loss=apart or None,
        )
        self._reset()
        return interval

    def _norms(self, squares: Tensor) -> Norms:
        # each rank's scales hold its share of the mean gradient, `world.size` times
        totals = sum_tensor(self._world, squares.double()).div(self._world.size**2).tolist()
        norms = iter([square**0.5 for square in totals])
        ce, kl = next(norms), next(norms)
        pairs, distances, divergences = (
            {name: next(norms) for name in names} for names in (self._pairs, self._distances, self._divergences)
        )
        assert next(norms, None) is None
        weights = self._weights
        return Norms(
            ce=ce if weights.ce else None,
            kl=kl if weights.kl else None,
            hidden=sum(totals[2 : 2 + len(self._pairs)]) ** 0.5 if weights.hidden else None,
            pairs=pairs,
            distances=distances or None,
            divergences=divergences or None,
            stones=None if self._stones is None else self._stones.norms(),
        )


class StoneMeter:
    """Adds up the stepping stones' sums between two log lines, and keeps the squared norms of the step that has reported them."""

    def __init__(self, world: World, pairs: Sequence[tuple[int, int]]) -> None:
        self._world = world
        self._pairs = [f"{student}<{teacher}" for student, teacher in pairs]
        self._reset()

    def _reset(self) -> None:
        self._settings: StoneSettings | None = None  # of the last step
        self._sums: Tensor | None = None  # [2, n + 1, 3], bare and times the step's weight
        self._squares: Tensor | None = None
        self._divisors = [0, 0, 0]
        self._own = [[0, 0, 0] for _ in self._pairs]
        self._crossed = 0

    def add(self, settings: StoneSettings, by: Divisors, results: Sequence[StoneSums | None]) -> None:
        """A step is done, whose sums are divided by these global counts."""
        counts = (by.ce, by.kl, by.kl)
        self._settings = settings
        self._divisors = [total + count for total, count in zip(self._divisors, counts, strict=True)]
        self._crossed += by.kl if settings.factors else 0
        for number in settings.factors:
            self._own[number] = [total + count for total, count in zip(self._own[number], counts, strict=True)]
        for result in results:
            if result is not None:
                self._sums = _plus(self._sums, torch.stack([result.sums, result.sums * settings.weight]))
        squares = [result.squares for result in results if result is not None and result.squares is not None]
        self._squares = _total(squares) if squares else None

    def norms(self) -> dict[str, dict[str, float]]:
        """By stone and part, the norms of the last step's gradients; none where it reported none (all ranks take part)."""
        settings = self._settings
        if settings is None or self._squares is None:
            return {}
        # each rank's scales hold its share of the mean gradient, `world.size` times
        totals = sum_tensor(self._world, self._squares.double()).div(self._world.size**2).tolist()
        given = [part for part in STONE_PARTS if getattr(settings.weights, part)]
        norms = {
            self._pairs[number]: {part: totals[number][STONE_PARTS.index(part)] ** 0.5 for part in given}
            for number in settings.factors
        }
        if settings.weights.cross:
            norms["student"] = {"cross": totals[-1][STONE_PARTS.index("cross")] ** 0.5}
        return norms

    def means(self) -> tuple[float, dict[str, float]]:
        """(the stones' weighted loss, each stone's parts by `stones/PAIR/PART`) since the last call, over all ranks (all take part).

        A stone that was not drawn since is left out; the loss counts it as 0, so that it, too, is unbiased. In the loss each step has its
        weight, elsewhere none.
        """
        settings, sums = self._settings, self._sums
        if settings is None or sums is None:  # the stones weighed nothing
            self._reset()
            return 0.0, {}
        (*rows, own_cross), (*weighted, cross) = sum_tensor(self._world, sums).tolist()
        given = [getattr(settings.weights, part) for part in STONE_PARTS]
        all_shares = shares(len(self._pairs))
        factors = [sum(all_shares)] * len(rows) if settings.sampled else all_shares
        total = given[2] * cross[2] / self._divisors[2]
        parts: dict[str, float] = {}
        for name, bare, counted, factor, own in zip(self._pairs, rows, weighted, factors, self._own, strict=True):
            total += factor * sum(w * s / by for w, s, by in zip(given, counted, self._divisors, strict=True))
            if own[0]:
                read = zip(STONE_PARTS, given, bare, own, strict=True)
                parts |= {f"stones/{name}/{part}": s / by for part, w, s, by in read if w}
        if given[2]:
            parts["stones/student/cross"] = own_cross[2] / self._crossed
        self._reset()
        return total, parts


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value


def _total(values: Sequence[Tensor | None]) -> Tensor:
    """The sum of values that are all there, in their order."""
    assert values and all(value is not None for value in values)
    return sum(values[1:], values[0])  # type: ignore[arg-type,return-value]
