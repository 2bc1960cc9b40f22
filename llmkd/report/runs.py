"""What the training of a study's models left for its report: times, curves, validations, texts that were written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True)
class StepTimes:
    """Medians over a run's steps and the middle half of them; CPU seconds are those of rank 0, None where it has a GPU."""

    steps: int
    """So many were timed: those of the run's last part, without its first ones."""
    median_seconds: float
    quartiles: tuple[float, float]
    cpu_seconds: float | None = None
    cpu_quartiles: tuple[float, float] | None = None


@dataclass(frozen=True)
class TrainingRun:
    """What a run cost, or how far it has come."""

    name: str
    strategy: str | None
    seed: int | None
    state: Literal["done", "unfinished", "not yet"]
    last_step: int | None
    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    memory_gib: float | None = None
    world_size: int | None = None
    resumed_from_step: int | None = None
    students_in_turn: int = 1
    """How many students were trained in turn in its process, off one teacher."""
    step: StepTimes | None = None
    """None of a run that was too short, or trained before its steps were timed."""


@dataclass(frozen=True)
class LogLine:
    """One line of a run's log: the parts of its loss, and each pair's distance by the pair's name. A part that was not computed is None."""

    step: int
    parts: dict[str, float | None]
    pairs: dict[str, float | None] = field(default_factory=dict)
    not_in_loss: tuple[str, ...] = ()
    """The parts that were computed on the way and have no weight."""
    learned: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of a learned map, student block -> teacher block -> weight, by their names."""

    def to_json(self) -> dict[str, object]:
        """As results.json has it."""
        learned = {"learned_map": self.learned} if self.learned else {}
        return {"step": self.step, **self.parts, "pairs": self.pairs, **learned}


@dataclass(frozen=True)
class Curve:
    """A run's log, thinned. `blocks`: a pair's name -> its student block, through all stacks; empty while it is not known."""

    lines: list[LogLine]
    blocks: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> list[dict[str, object]]:
        """The lines as results.json has them."""
        return [line.to_json() for line in self.lines]


@dataclass(frozen=True)
class Rule:
    """How a run was validated, and by what its exported student was chosen, as its recipe says (train.validate_every and so on)."""

    every: int
    rows: int
    keep: str = "last"
    by: str | None = None
    patience: int | None = None


@dataclass(frozen=True)
class RunValidations:
    """What a run measured while it was trained; the rule and the step it kept in place of the last are known when it has ended."""

    lines: list[LogLine]
    rule: Rule | None = None
    kept: int | None = None

    def to_json(self) -> dict[str, object]:
        """As results.json has it."""
        rule = None if self.rule is None else asdict(self.rule)
        return {"rule": rule, "kept": self.kept, "lines": Curve(self.lines).to_json()}


@dataclass(frozen=True)
class ShownTexts:
    """What a student wrote after the same few prompts at one time, before the training step (from 1) that this is."""

    step: int
    prompts: list[str]
    texts: list[str]


@dataclass(frozen=True)
class RunRollouts:
    """The texts that were written while a run was trained, round by round; times are known when it has ended."""

    lines: list[LogLine]
    """By the first step (from 1) that a round's texts are for."""
    rounds: int
    texts: int
    tokens: int
    own_kl: str | None = None
    """The divergence in the run's log, if it is of the student's own texts alone; None where rows of the data are among them."""
    shown: list[ShownTexts] = field(default_factory=list)
    """In the first, the middle and the last round."""
    seconds: float | None = None
    """Writing, in the run's last part."""
    weights_seconds: float | None = None
    """Handing weights over, of these."""
    teacher_seconds: float | None = None
    """The teacher's signals, in the run's last part."""
    validation_seconds: float | None = None
    of_seconds: float | None = None
    """All that this part took."""

    @property
    def student_seconds(self) -> float | None:
        """The student's passes and the optimizer's steps: what is left of all; None where a part is not known."""
        if self.of_seconds is None or self.seconds is None or self.teacher_seconds is None:
            return None
        return self.of_seconds - self.seconds - self.teacher_seconds - (self.validation_seconds or 0.0)

    def to_json(self) -> dict[str, object]:
        """As results.json has it."""
        return {**asdict(self), "lines": Curve(self.lines).to_json()}
