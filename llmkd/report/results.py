"""What a study's files hold, gathered: the one value that all forms of the report are written from.

`Results.to_json()` is results.json. Numbers are finite; what is not known is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmkd.evaluation.angles.results import Matrix, When
from llmkd.recipe.study_entries import StatedMargins
from llmkd.report.runs import Curve, RunRollouts, RunValidations, TrainingRun
from llmkd.rollouts.texts import Wrote

NOT_YET = "not yet"
"""Why there is no result of a model whose turn has not come."""
Agreed = Mapping[str, Any]
"""Conditions shared by models, as their files give them (any JSON value); where models differ, a list of all values."""


@dataclass(frozen=True)
class Metric:
    """A metric and how to show it; `percent`: it runs from 0 to 100; `higher_is_better` is None where neither end is."""

    name: str
    label: str
    higher_is_better: bool | None
    percent: bool
    step: str


@dataclass(frozen=True)
class Cell:
    """A row's scores by one metric: their mean, half the 95 % t-interval of it, and each model's value."""

    mean: float
    half_width: float | None
    n: int
    values: list[float]
    seeds: list[int | None]

    @property
    def by_seed(self) -> dict[int | None, float]:
        """The value of each seed; of models without one, the last."""
        return dict(zip(self.seeds, self.values, strict=True))


@dataclass(frozen=True)
class Row:
    """A strategy, a baseline or the teacher, its seeds together. `missing`: step -> why models have no score."""

    name: str
    kind: str
    models: int
    seeds: list[int]
    problems: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    cells: dict[str, Cell] = field(default_factory=dict)

    def problem(self, step: str | None = None) -> str | None:
        """The first problem of a step, or of any; None where there is none."""
        return next((why for name, reasons in self.missing.items() if step in (None, name) for why in reasons), None)

    def scored(self, step: str | None = None) -> str:
        """How many of the row's models have all their scores, or all of one step's; what only waits for its turn is no failure."""
        count = self.models - len(self.problems if step is None else self.missing.get(step, []))
        if not self.waits(step):
            return f"{count} of {self.models}"
        return f"{count} of {self.models} so far" if count or self.cells else NOT_YET

    def waits(self, step: str | None = None) -> bool:
        """Whether models have no result of a step, or of any, and all of them only because their turn has not come."""
        reasons = [why for name, own in self.missing.items() if step in (None, name) for why in own]
        return bool(reasons) and all(why == NOT_YET for why in reasons)


@dataclass(frozen=True)
class Comparison:
    """One strategy minus another on one metric: over seeds, then over test items; `_holm` are corrected p-values."""

    metric: str
    strategy: str
    reference: str
    difference: float
    interval: list[float] | None
    seeds: int
    p_different: float | None
    margin: float | None
    p_equivalent: float | None
    items: int | None
    items_interval: list[float] | None
    items_p: float | None
    p_different_holm: float | None = None
    p_equivalent_holm: float | None = None
    items_p_holm: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class LayerMap:
    """The pairs of blocks of some runs of a strategy, the embeddings' left out; depths are None where no model is at hand."""

    strategy: str
    runs: list[str]
    pairs: list[list[int]]
    student_blocks: int | None
    teacher_blocks: int | None


@dataclass(frozen=True)
class Average:
    """The mean over `n` students, with half the 95 % interval where they are two or more and differ."""

    mean: float | None
    half_width: float | None
    n: int


@dataclass(frozen=True)
class BlockMap:
    """Of one student block, by places of teacher blocks: the mean cosine, and the share of tokens where it is above zero."""

    block: int
    mean: Matrix
    above_zero: Matrix


@dataclass(frozen=True)
class AnglesThen:
    """The angles of one strategy's students at one time: over all blocks, and in detail of some."""

    mean: Average
    above_zero: Average
    paper_code: Average
    paper_code_with_padding: Average
    student_blocks: int
    blocks: list[BlockMap]


@dataclass(frozen=True)
class StrategyAngles:
    """The angles of one strategy's students in one stack, before and after training.

    `teacher_blocks`: the blocks of each place along a side of the matrices.
    """

    strategy: str
    stack: str
    init: str
    seeds: list[int | None]
    rows: int
    tokens: int
    final_state: str
    projector: dict[str, str] | None
    projector_left_out: bool
    teacher_blocks: list[list[int]]
    before: AnglesThen
    after: AnglesThen

    def at(self, when: When) -> AnglesThen:
        """Before or after training."""
        return self.before if when == "before" else self.after


@dataclass(frozen=True)
class Angles:
    """The angles of a study's students; `problems`: student -> why it has none."""

    students: list[StrategyAngles]
    problems: dict[str, str]


@dataclass(frozen=True)
class Results:
    """A whole study, or as much of it as there is."""

    name: str
    models: int
    scored: int
    seeds: list[int]
    reference: str
    margins: dict[str, float]
    margins_history: list[StatedMargins]
    primary: str | None
    metrics: list[Metric]
    rows: list[Row]
    problems: dict[str, str]
    items: Agreed
    maps: list[LayerMap]
    runs: list[TrainingRun]
    curves: dict[str, Curve]
    angles: Angles | None
    backends: dict[str, dict[str, list[str]]]
    conditions: dict[str, Agreed]
    versions: Agreed
    hardware: Agreed
    commit: str | None
    thoughts: dict[str, int] = field(default_factory=dict)
    """By model, how many of its texts had thoughts, which were left out before they were scored."""
    sources: dict[str, int] = field(default_factory=dict)
    """By source of a mixture, how many rows (packed: sequences) the longest run was trained on."""
    comparisons: list[Comparison] = field(default_factory=list)
    conclusion: str = ""
    notes: list[str] = field(default_factory=list)
    validations: dict[str, RunValidations] = field(default_factory=dict)
    rollouts: dict[str, RunRollouts] = field(default_factory=dict)
    teachers_texts: list[Wrote] = field(default_factory=list)
    """What a teacher wrote before training, each once where several students read the same."""

    def metric(self, name: str | None) -> Metric | None:
        """A metric by its name; None where no model has it."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def row(self, name: str) -> Row | None:
        """A row by its name."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def main_metrics(self) -> set[str | None]:
        """The main metric's name and those of the metrics with a margin."""
        return {self.primary, *self.margins}

    def to_json(self) -> dict[str, object]:
        """What results.json holds."""
        by_run = {"curves": self.curves, "validations": self.validations, "rollouts": self.rollouts}
        return {
            **asdict(self),
            **{key: {name: values.to_json() for name, values in runs.items()} for key, runs in by_run.items()},
        }
