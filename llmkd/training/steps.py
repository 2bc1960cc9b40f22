"""What changes from step to step of a run: the loss's weights, the temperature, which tokens are sampled; and the steps that report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkd.distributed.ranks import World, on_main, sum_tensor
from llmkd.losses.distance_sum import draw_seed, terms_of
from llmkd.losses.divergences import with_parameters
from llmkd.losses.objective import PARTS, Change, Divisors, Weights, weights_of_step
from llmkd.losses.schedules import dynamic_temperature
from llmkd.recipe.objective import Schedule
from llmkd.student.distiller import Distiller
from llmkd.training.jobs import Job
from llmkd.training.metrics import forget_after
from llmkd.training.pairs import pair_names

TEMPERATURES = "temperature.jsonl"
"""In the run's folder: each change of a dynamic temperature with the two cross-entropies it was made from, from which a resumed run
takes up the temperature's state."""


class Steering:
    """The settings of each step, a function of its number; a dynamic temperature alone has a state, which stands in a file."""

    def __init__(self, world: World, job: Job, steps: int, *, start_step: int) -> None:
        loss = job.recipe.loss
        schedules = None if job.makes_teacher else loss.schedules
        self._world, self._job, self._steps = world, job, steps
        self._report_every = 0 if job.makes_teacher else loss.report_norms_every
        self._changes = (
            {} if schedules is None else {part: c for part in PARTS if (c := schedules.change(part)) is not None}
        )
        self._of_stones = None if schedules is None else schedules.change("stones")
        self._distances = {} if schedules is None else moving(schedules.distances)
        self._divergences = {} if schedules is None else moving(schedules.divergences)
        self._temperature: Change | None = None
        self._dynamic: DynamicTemperature | None = None
        settings = None if schedules is None else schedules.temperature
        if settings is not None and settings.shape == "dynamic":
            low, high = settings.minimum or loss.temperature / 2, settings.maximum or loss.temperature
            self._dynamic = DynamicTemperature(
                world, job.folder / TEMPERATURES, loss.temperature, (low, high), settings.every, start_step
            )
        elif settings is not None:
            self._temperature = settings.change
        self._initial = loss.temperature
        self._step = start_step
        self._squares: Tensor | None = None
        self._heard: Tensor | None = None

    def begin(self, step: int) -> Weights:
        """The weights of the loss at this step (from 1)."""
        self._step, self._squares, self._heard = step, None, None
        return weights_of_step(self._job.weights, self._changes, step - 1, self._steps)

    @property
    def weight_of_stones(self) -> float:
        """The factor on all stones' weights in this step."""
        return 1.0 if self._of_stones is None else self._of_stones.at(self._step - 1, self._steps, 1.0)

    def reweigh(self, module: Distiller) -> None:
        """Tell the student this step's weights within its sums of distances and of divergences, where these move."""
        terms = [terms_of(mix) for mix in self._mixes()] if self._distances else None
        divergence = None
        if self._divergences:
            loss = self._job.recipe.loss
            divergence = with_parameters(self._moved(loss.divergences, self._divergences), loss.parameters)
        module.reweigh(terms, divergence)

    def _mixes(self) -> list[dict[str, float]]:
        """The weights of each pair's distances in this step."""
        mixes = self._job.recipe.matching.mixes_of(len(self._job.pairs))
        return [self._moved(mix, self._distances) for mix in mixes]

    def _moved(self, mix: Mapping[str, float], changes: Mapping[str, Change]) -> dict[str, float]:
        """The weights of a sum in this step, each from the recipe's on."""
        return {
            name: changes[name].at(self._step - 1, self._steps, weight) if name in changes else weight
            for name, weight in mix.items()
        }

    def options(self, micro_batch: int) -> dict[str, Any]:
        """What the student is told beside a micro-batch of this step."""
        draw = 0
        if self._job.recipe.matching.tokens is not None:
            draw = draw_seed(self._job.seed, self._step, micro_batch, self._world.rank)
        return {
            "temperature": self.temperature,
            "draw": draw,
            "report": self.reports,
            "hear_teacher": self._changes_temperature,
        }

    @property
    def temperature(self) -> float:
        """Of this step."""
        if self._dynamic is not None:
            return self._dynamic.value
        change = self._temperature
        return self._initial if change is None else change.at(self._step - 1, self._steps, self._initial)

    @property
    def reports(self) -> bool:
        """Whether this step reports the norm of each part's gradient."""
        return self._report_every > 0 and self._step % self._report_every == 0

    @property
    def _changes_temperature(self) -> bool:
        return self._dynamic is not None and self._step % self._dynamic.every == 0

    def heard(self, module: Distiller, sums: Tensor) -> None:
        """A micro-batch is done; nothing is read from the device."""
        if self.reports:
            assert module.squares is not None
            self._squares = module.squares if self._squares is None else self._squares + module.squares
        teacher = module.loss_head.teacher_ce
        # None once loss.kl has come to weigh nothing, and no stone goes on
        if self._changes_temperature and teacher is not None:
            both = torch.stack([sums[0], teacher]).double()
            self._heard = both if self._heard is None else self._heard + both

    def end(self, by: Divisors) -> dict[str, Any]:
        """What this step reports, if anything; at a dynamic temperature's steps it is set for the next ones (all ranks take part)."""
        said: dict[str, Any] = {}
        if self._squares is not None:
            # each rank's scales hold its share of the mean gradient, `world.size` times
            squares = sum_tensor(self._world, self._squares.double()).div(self._world.size**2).tolist()
            said["norms"] = self._norms(squares)
        if self._heard is not None and self._dynamic is not None:
            student, teacher = (total / by.ce for total in sum_tensor(self._world, self._heard).tolist())
            self._dynamic.change(self._step, self._steps, student, teacher)
        return said

    def _norms(self, squares: Sequence[float]) -> dict[str, Any]:
        """The reported norms by name; of distances and divergences where there are several."""
        recipe = self._job.recipe
        pairs = pair_names(self._job.pairs, self._job.encoders, redraws=self._job.redraws)
        several = {
            "distances": list(recipe.matching.distances) if pairs else [],
            "divergences": list(recipe.loss.divergences),
        }
        named = {"pairs": pairs, **{kind: names for kind, names in several.items() if len(names) > 1}}
        norms = iter([square**0.5 for square in squares])
        ce, kl = next(norms), next(norms)
        of_names = {kind: {name: next(norms) for name in names} for kind, names in named.items()}
        assert next(norms, None) is None
        return {"ce": ce, "kl": kl, "hidden": sum(squares[2 : 2 + len(pairs)]) ** 0.5, **of_names}

    def values(self) -> dict[str, Any]:
        """The changing settings of this step, as they are logged. Called before `end`, which may set the next steps'."""
        said: dict[str, Any] = {}
        if self._temperature is not None or self._dynamic is not None:
            said["temperature"] = self.temperature
        if weights := self._weights_now():
            said["weights"] = weights
        return said

    def _weights_now(self) -> dict[str, float]:
        """The weights that move, by name; a distance's by pair where the pairs' differ."""
        found: dict[str, float] = {}
        if self._changes:
            now = weights_of_step(self._job.weights, self._changes, self._step - 1, self._steps)
            found |= {part: getattr(now, part) for part in self._changes}
        if self._of_stones is not None:
            found["stones"] = self.weight_of_stones
        pairs = pair_names(self._job.pairs, self._job.encoders, redraws=self._job.redraws)
        for name in self._distances:
            of_pairs = {pair: mix[name] for pair, mix in zip(pairs, self._mixes(), strict=True) if name in mix}
            alike = len(set(of_pairs.values())) == 1
            found |= {name if alike else f"{name} of {pair}": weight for pair, weight in of_pairs.items()}
        divergences = self._moved(self._job.recipe.loss.divergences, self._divergences)
        return found | {name: divergences[name] for name in self._divergences}


def moving(schedules: Mapping[str, Schedule] | None) -> dict[str, Change]:
    """Those of the schedules by which anything changes."""
    return {name: one.change for name, one in (schedules or {}).items() if one.change is not None}


class DynamicTemperature:
    """A temperature that follows the gap between the two cross-entropies, at every `every`-th step from that step's own means.

    Its state is its value, a function of what stands in its file.
    """

    def __init__(
        self, world: World, file: Path, initial: float, bounds: tuple[float, float], every: int, start_step: int
    ) -> None:
        self.every = every
        self._main, self._file, self._initial, self._bounds = world.is_main, file, initial, bounds
        self.value = on_main(world, lambda: self._taken_up(start_step))

    def _taken_up(self, start_step: int) -> float:
        forget_after(self._file, start_step)
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        return json.loads(lines[-1])["temperature"] if lines else self._initial

    def change(self, step: int, steps: int, student_ce: float, teacher_ce: float) -> None:
        """Set the temperature of the steps to come, the same on every rank."""
        low, high = self._bounds
        heard = {"student_ce": student_ce, "teacher_ce": teacher_ce}
        self.value = dynamic_temperature(
            self.value, step, steps, initial=self._initial, minimum=low, maximum=high, **heard
        )
        if self._main:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": step, **heard, "temperature": self.value}) + "\n")
