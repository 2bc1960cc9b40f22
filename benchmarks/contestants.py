"""Who takes part in the benchmark of a training step, and how each makes one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.passes import Llmkd, Paper, Pass, Passes, Plain, Unavoidable
from benchmarks.shapes import Work
from llmkd.distributed.engines import engine
from llmkd.layer_map import Pairs, layer_map
from llmkd.losses.divergences import DIVERGENCES
from llmkd.models.parts import blocks

STRATEGIES = ("none", "forward", "reverse", "all_to_one", "random")
MATCHED = STRATEGIES[1:]
REFERENCES = {"a": "unavoidable", "c": "plain", "d": "trl/gkd", "d'": "trl/distillation"}
"""What the others are compared with, by the letters of the tables."""


@dataclass(frozen=True)
class Terms:
    """What a contestant's loss is made of: ce * CE + the divergence + HIDDEN_WEIGHT * the distance of the pairs."""

    ce: float = 1.0
    divergence: str = "forward_kl"
    pairs: Pairs = ()
    normed_last: bool = False


class Contestant(Protocol):
    """One way to make a training step."""

    name: str
    terms: Terms | None
    """None where the loss follows a definition of its own."""
    teacher: PreTrainedModel

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine of its student."""
        ...

    @property
    def student(self) -> PreTrainedModel:
        """What it trains."""
        ...

    @contextmanager
    def turn(self) -> Iterator[Callable[[Work], Tensor]]:
        """Inside, the step: it trains on a micro-batch and gives this rank's loss, whose mean over the ranks is the whole one."""
        ...


class SharedEngine:
    """A contestant among those who train one student under one engine."""

    def __init__(self, name: str, terms: Terms | None, passing: Pass, engine: Any, teacher: PreTrainedModel) -> None:
        self.name, self.terms = name, terms
        self.passing, self.engine = passing, engine
        self.teacher = teacher

    @property
    def student(self) -> PreTrainedModel:
        return self.engine.module.student

    @contextmanager
    def turn(self) -> Iterator[Callable[[Work], Tensor]]:
        with hooks_put_back(self.teacher):
            self.passing.start()
            yield self._step

    def loss(self, work: Work) -> Tensor:
        """The forward half of a step."""
        return self.engine(self.name, work, self.passing.ask(work))

    def _step(self, work: Work) -> Tensor:
        loss = self.loss(work)
        self.engine.backward(loss, scale_wrt_gas=False)  # the sums are already divided by the whole batch's count
        self.engine.step()
        return loss.detach()


@contextmanager
def hooks_put_back(model: nn.Module) -> Iterator[None]:
    """At the end, the model's modules have the forward hooks they had before."""
    before = [(module, OrderedDict(module._forward_hooks)) for module in model.modules()]
    try:
        yield
    finally:
        for module, hooks in before:
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


def make_passes(
    student: PreTrainedModel, teacher: PreTrainedModel, *, ranks: int, wanted: Callable[[str], bool]
) -> dict[str, tuple[Terms | None, Pass]]:
    """The wanted passes over one student, by name, with what their losses are made of."""
    depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    maps = {strategy: layer_map(strategy, *depths, seed=0) for strategy in STRATEGIES}
    makers: dict[str, tuple[Terms | None, Callable[[], Pass]]] = {
        "unavoidable": (Terms(), lambda: Unavoidable(student, teacher, ranks=ranks))
    }

    def add(name: str, terms: Terms) -> None:
        def make() -> Pass:
            return Llmkd(student, teacher, terms.pairs, ranks=ranks, divergence=terms.divergence, ce=terms.ce)

        makers[name] = (terms, make)

    for strategy in STRATEGIES:
        add(f"llmkd/{strategy}", Terms(pairs=maps[strategy]))
    for divergence in sorted(set(DIVERGENCES) - {"forward_kl"}):
        add(f"llmkd/none {divergence}", Terms(divergence=divergence))
    add("llmkd/none kl alone", Terms(ce=0.0))  # the logit loss that TRL has
    forward = maps["forward"]
    makers["plain"] = (Terms(pairs=forward, normed_last=True), lambda: Plain(student, teacher, forward, ranks=ranks))
    makers["plain none"] = (Terms(), lambda: Plain(student, teacher, (), ranks=ranks))
    makers["paper"] = (None, lambda: Paper(student, teacher, forward))
    return {name: (terms, make()) for name, (terms, make) in makers.items() if wanted(name)}


def share_engine(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    passes: dict[str, tuple[Terms | None, Pass]],
    ds_config: dict[str, Any],
) -> list[SharedEngine]:
    """Put the passes under one engine. The learning rate is 0, so that every step's loss can be checked against the first's."""
    module = Passes(student, {name: passing for name, (_, passing) in passes.items()})
    made = engine(
        module,
        ds_config,
        blocks=blocks(student),
        learning_rate=0.0,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=0.0,
    )
    made.train()
    return [SharedEngine(name, terms, passing, made, teacher) for name, (terms, passing) in passes.items()]


def chosen(only: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name is asked for: equal to one of `only` or beginning with it; all are where `only` is empty."""
    return lambda name: not only or any(name.startswith(part) for part in only)
