"""The settings of each step of a run: the loss's weights, the temperature, the pairs, the samples of tokens, and what is reported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llmkd.data.batches import Counts
from llmkd.distributed.ranks import World, on_main, sum_tensor
from llmkd.files import forget_after
from llmkd.layer_map import Pairs
from llmkd.losses.distance_sum import draw_seed, terms_of
from llmkd.losses.divergences import forward_kl
from llmkd.losses.objective import PARTS, Change, Divisors, divisors, scales, weights_of_step
from llmkd.losses.schedules import dynamic_temperature
from llmkd.recipe.objective import Schedule, Schedules
from llmkd.student.passes import PassResult, StepSettings, StoneSettings, StoneWeights
from llmkd.student.stepping_stones import factors
from llmkd.training.checkpoint import TEMPERATURES
from llmkd.training.jobs import Job
from llmkd.training.metrics import Moving
from llmkd.training.pairs import maps_of


class Steps:
    """The settings of each step, a function of its number; only a dynamic temperature has a state, kept in a file."""

    def __init__(self, world: World, job: Job, total: int, *, start_step: int) -> None:
        self._world, self._job, self._total = world, job, total
        loss = job.recipe.loss
        schedules = Schedules() if job.makes_teacher or loss.schedules is None else loss.schedules
        changes = {part: schedules.change(part) for part in PARTS}
        self._changes = {part: change for part, change in changes.items() if change is not None}
        self._of_stones = schedules.change("stones")
        self._distances = _changing(schedules.distances)
        self._divergences = _changing(schedules.divergences)
        self._temperature: Change | None = None
        self._dynamic: DynamicTemperature | None = None
        settings = schedules.temperature
        if settings is not None and settings.shape == "dynamic":
            bounds = settings.minimum or loss.temperature / 2, settings.maximum or loss.temperature
            file = job.folder / TEMPERATURES
            self._dynamic = DynamicTemperature(world, file, loss.temperature, bounds, settings.every, start_step)
        elif settings is not None:
            self._temperature = settings.change
        self._report_every = 0 if job.makes_teacher else loss.report_norms_every
        self._terms = tuple(terms_of(mix) for mix in job.recipe.matching.mixes_of(len(job.compared)))
        self._divergence = loss.divergence_of(loss.divergence)
        self._own_divergence = None if loss.own_divergence is None else loss.divergence_of(loss.own_divergence)

    def settings(self, step: int, counts: Counts, micro_batches: int) -> StepSettings:
        """Of this step (from 1), whose batch has so many tokens and, on each rank, micro-batches."""
        job, world = self._job, self._world
        weights = weights_of_step(job.weights, self._changes, step - 1, self._total)
        by = divisors(weights, trained=counts.trained, attended=counts.attended, pairs=len(job.compared))
        terms, divergence = self._terms, self._divergence
        if self._distances:
            terms = tuple(terms_of(mix) for mix in self._mixes(step))
        if self._divergences:
            mix = self._moved(job.recipe.loss.divergences, self._divergences, step)
            divergence = job.recipe.loss.divergence_of(mix)
        samples = range(micro_batches if job.recipe.matching.tokens is not None else 0)
        return StepSettings(
            weights=weights,
            divisors=by,
            scales=scales(weights, by, world.size),
            pairs=self._pairs(step),
            terms=terms,
            divergence=divergence,
            own_divergence=self._own_divergence,
            temperature=self._temperature_of(step),
            sample_seeds=tuple(draw_seed(job.seed, step, number, world.rank) for number in samples),
            router_scale=weights.router * world.size / max(counts.attended, 1),
            stones=self._stones(step, trained=by.ce, compared=by.kl),
            keeps_head=job.weights.ce > 0 or job.weights.kl > 0,
            report_norms=self._report_every > 0 and step % self._report_every == 0,
            teacher_ce=self._dynamic is not None and step % self._dynamic.every == 0,
            step=step,
            counts=counts,
        )

    def of_validation(self, step: int, counts: Counts, micro_batches: int) -> StepSettings:
        """Of a validation after this step, over so many tokens and, on each rank, micro-batches.

        The distances and their weights are the recipe's, unmoved by schedules, and the samples of tokens are the same each time.
        """
        samples = range(micro_batches if self._job.recipe.matching.tokens is not None else 0)
        return StepSettings(
            weights=replace(self._job.weights, ce=0.0, kl=0.0, hidden=0.0),
            divisors=Divisors(1, 1, 1),
            scales=(0.0, 0.0, 0.0),
            pairs=self._pairs(step),
            terms=self._terms,
            divergence=forward_kl,
            temperature=1.0,
            sample_seeds=tuple(draw_seed(0, 0, number, self._world.rank) for number in samples),
            validates=True,
            step=step,
            counts=counts,
        )

    def _pairs(self, step: int) -> Pairs:
        """The job's, or of a map that is drawn again the draw of this step: a function of (seed, draw), the same on every rank."""
        job = self._job
        if not job.redraws:
            return job.compared
        draw = (step - 1) // job.recipe.matching.redraw_every
        return maps_of(job.recipe, job.student_depths, job.teacher_depths, draw)

    def _stones(self, step: int, *, trained: int, compared: int) -> StoneSettings | None:
        """The stones of a step; the numbers of positions of the whole batch divide the sums."""
        settings, count = self._job.recipe.stones, len(self._job.stones)
        if settings is None or not count:
            return None
        weight = self._weight_of_stones(step)
        sampled = settings.sample == "one"
        return StoneSettings(
            weights=StoneWeights(settings.ce, settings.kl, settings.cross),
            factors=factors(count, sampled=sampled, seed=self._job.seed, step=step - 1) if weight else {},
            weight=weight,
            scales=(self._world.size * weight / trained, self._world.size * weight / compared),
            sampled=sampled,
        )

    def _weight_of_stones(self, step: int) -> float:
        return 1.0 if self._of_stones is None else self._of_stones.at(step - 1, self._total, 1.0)

    def _mixes(self, step: int) -> list[dict[str, float]]:
        """The weights of each pair's distances."""
        mixes = self._job.recipe.matching.mixes_of(len(self._job.compared))
        return [self._moved(mix, self._distances, step) for mix in mixes]

    def _moved(self, mix: Mapping[str, float], changes: Mapping[str, Change], step: int) -> dict[str, float]:
        """The weights of a sum, each moved from the recipe's."""
        return {
            name: changes[name].at(step - 1, self._total, weight) if name in changes else weight
            for name, weight in mix.items()
        }

    def _temperature_of(self, step: int) -> float:
        if self._dynamic is not None:
            return self._dynamic.value
        initial = self._job.recipe.loss.temperature
        return initial if self._temperature is None else self._temperature.at(step - 1, self._total, initial)

    def follow(self, settings: StepSettings, results: Sequence[PassResult]) -> None:
        """Set a dynamic temperature for the next steps from the results of this rank's micro-batches (all ranks take part)."""
        # None once loss.kl weighs nothing any more, and there is no stone
        if self._dynamic is None or not settings.teacher_ce or results[0].teacher_ce is None:
            return
        total = None
        for result in results:
            assert result.teacher_ce is not None
            pair = torch.stack([result.sums[0], result.teacher_ce]).double()
            total = pair if total is None else total + pair
        assert total is not None
        student, teacher = (ce / settings.divisors.ce for ce in sum_tensor(self._world, total).tolist())
        self._dynamic.change(settings.step, self._total, student, teacher)

    def moving(self, settings: StepSettings) -> Moving:
        """The step's settings that change during the run, as they are logged; a distance's weight by pair where pairs differ."""
        step, job = settings.step, self._job
        weights = {part: getattr(settings.weights, part) for part in self._changes}
        if self._of_stones is not None:
            weights["stones"] = self._weight_of_stones(step)
        pairs = job.names
        for name in self._distances:
            of_pairs = {pair: mix[name] for pair, mix in zip(pairs, self._mixes(step), strict=True) if name in mix}
            alike = len(set(of_pairs.values())) == 1
            weights |= {name if alike else f"{name} of {pair}": weight for pair, weight in of_pairs.items()}
        divergences = self._moved(job.recipe.loss.divergences, self._divergences, step)
        weights |= {name: divergences[name] for name in self._divergences}
        is_moving = self._temperature is not None or self._dynamic is not None
        return Moving(settings.temperature if is_moving else None, weights or None)


def _changing(schedules: Mapping[str, Schedule] | None) -> dict[str, Change]:
    """The schedules that are not constant."""
    changes = {name: schedule.change for name, schedule in (schedules or {}).items()}
    return {name: change for name, change in changes.items() if change is not None}


class DynamicTemperature:
    """A temperature that follows the gap between the two cross-entropies, at every `every`-th step from that step's own means.

    Its state is its value, which the last line of its file holds.
    """

    def __init__(
        self, world: World, file: Path, initial: float, bounds: tuple[float, float], every: int, start_step: int
    ) -> None:
        self.every = every
        self._main, self._file, self._initial, self._bounds = world.is_main, file, initial, bounds
        self.value = on_main(world, lambda: self._value_at(start_step))

    def _value_at(self, start_step: int) -> float:
        forget_after(self._file, start_step)
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        return json.loads(lines[-1])["temperature"] if lines else self._initial

    def change(self, step: int, steps: int, student_ce: float, teacher_ce: float) -> None:
        """Set the temperature of the steps to come, the same on every rank."""
        low, high = self._bounds
        gap = {"student_ce": student_ce, "teacher_ce": teacher_ce}
        self.value = dynamic_temperature(
            self.value, step, steps, initial=self._initial, minimum=low, maximum=high, **gap
        )
        if self._main:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": step, **gap, "temperature": self.value}) + "\n")
