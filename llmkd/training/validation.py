"""The validation of a student while it is trained: on the same held-out rows each time, without a gradient, leaving no trace in training.

Every rank has as many micro-batches as every other, so that sharded weights are gathered and a pipeline's stages run in step; no row is in
two of them. What is measured is added up on the device and reduced once.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch

from llmkd.data.batches import Counts
from llmkd.distributed.ranks import World, sum_counts, sum_tensor, wait_for_device
from llmkd.training.metrics import Values
from llmkd.training.prepare import PreparedRun
from llmkd.training.steps import Steps


@dataclass(frozen=True)
class Validated:
    """What a validation has measured: means over the rows' trained tokens, of pairs over the tokens that are compared in training."""

    ce: float
    perplexity: float | None
    """exp of the cross-entropy per token; None of classes."""
    kl: float | None
    """Forward KL at temperature 1 from the teacher to the student; None, as the agreement, where the loss reads no logits of a teacher."""
    agreement: float | None
    """The share of tokens where student and teacher find the same one likeliest."""
    pairs: dict[str, float]
    """The recipe's distance of each pair."""
    seconds: float
    """How long it took."""

    def values(self) -> Values:
        """The names and numbers as they are logged; what is None is left out."""
        values = {name: getattr(self, name) for name in ("ce", "perplexity", "kl", "agreement")}
        known: Values = {name: value for name, value in values.items() if value is not None}
        return {**known, **({"pairs": {**self.pairs}} if self.pairs else {}), "seconds": self.seconds}


class Validator:
    """Validates a run after any of its steps."""

    def __init__(self, world: World, run: PreparedRun, steps: Steps) -> None:
        """All ranks take part."""
        self._world, self._run, self._steps = world, run, steps
        batches = run.validation
        counts = [sum(numbers) for numbers in zip(*(batch.counts for batch in batches), strict=True)] or [0, 0, 0]
        self._counts = Counts(*sum_counts(world, counts))
        self.seconds = 0.0
        """That all validations so far have taken."""

    @torch.no_grad()
    def validate(self, step: int) -> Generator[int, None, Validated]:
        """Measure the student as it is after this step (all ranks take part); as a training, stops after each micro-batch."""
        world, run, batches = self._world, self._run, self._run.validation
        wait_for_device(world)  # for the step, whose time this is not
        began = run.clock.now()
        settings = self._steps.of_validation(step, self._counts, len(batches))
        run.engine.eval()
        if run.teacher is not None:
            run.teacher.expect(batches)
        sums, agreed = [], []
        for number, batch in enumerate(here.to(world.device) for here in batches):
            result = run.engine(batch, run.signal(batch, settings), settings, number)
            sums.append(result.sums.double())
            agreed.append(result.agreement)
            yield from run.others_turn(step - 1)
        run.engine.train()
        compared = all(count is not None for count in agreed)
        agreement = torch.stack(agreed).sum() if compared else torch.zeros((), device=world.device)
        total = torch.cat([torch.stack(sums).sum(0), agreement.double()[None]])
        ce, kl, *distances, same = sum_tensor(world, total).tolist()
        seconds = run.clock.now() - began
        self.seconds += seconds
        return self._means(ce, kl if compared else None, same, distances, seconds)

    def _means(self, ce: float, kl: float | None, same: float, distances: list[float], seconds: float) -> Validated:
        job, counts = self._run.job, self._counts
        trained = max(counts.trained, 1)
        states = max(counts.trained if job.weights.hidden_positions == "trained" else counts.attended, 1)
        names = job.names
        return Validated(
            ce=ce / trained,
            perplexity=None if job.family.kind == "encoder" else _exp(ce / trained),
            kl=None if kl is None else kl / trained,
            agreement=None if kl is None else same / trained,
            pairs={name: distance / states for name, distance in zip(names, distances, strict=True)},
            seconds=seconds,
        )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
