"""The result files of the scoring steps as dataclasses: one class a step, read and written here and nowhere else.

A step's folder holds, for each model, `<name>.json` (a class of this module, of the angles one of `angles.results`) and, for all steps
but the angles, a file with one line per item (`GeneratedText`, `ComparedItem`, `ClassifiedRow`, `TaskItem`). Readers are tolerant of
older and of hand-made files: a key that is absent has its default, a key that is not known here is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Self, TypeGuard, TypeVar

from llmkd.evaluation import class_metrics, text_metrics
from llmkd.evaluation.text_metrics import Metric
from llmkd.files import read, read_lines

Scores = dict[str, float | None]
"""Metric -> its value; None where the step could not give it."""

AGREEMENT_METRICS = {
    "token_agreement": Metric("tokens as the teacher's", True, False),
    "kl": Metric("KL to the teacher", False, False),
    "top1": Metric("top-1 as the teacher's", True, False),
    "likelihood": Metric("log-likelihood by the teacher", True, False),
}
"""Every metric of the agreement with the teacher, in the order of a table."""


class JsonFields:
    """A dataclass that is made from a JSON object; what else the object holds is left out."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # its subclasses are dataclasses
        return cls(**{name: value[name] for name in names if name in value})


@dataclass(frozen=True, kw_only=True)
class StepResult(JsonFields):
    """What the result files of all steps hold: whose they are, what they were made of, and what went wrong."""

    LINES: ClassVar[str | None] = None
    """How the name of the file with a line per item ends, in place of `.json`; None without such a file."""

    name: str = ""
    fingerprint: str = ""
    error: str | None = None
    """Why the step failed; it may have numbers all the same, where one of several tasks failed."""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Self:
        """A result file that must be there."""
        return cls.from_json(json.loads(file.read_text()))

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def to_text(self) -> str:
        """The content of the result file, strict JSON. Raises ValueError for a NaN."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False, ensure_ascii=False)

    def summary(self) -> str:
        """What was found, in a few words for the log."""
        return f"failed: {self.error}" if self.error else "done"


@dataclass(frozen=True, kw_only=True)
class ScoredModel(StepResult):
    """A model's scores of one step. A step with nothing further to tell can use this class as it is."""

    STEP: ClassVar[str] = ""
    LABELS: ClassVar[Mapping[str, Metric]] = {}
    """How the step's metrics are shown; one that is not here is shown by its own name, higher is better."""
    LINES: ClassVar[str] = ".jsonl"

    model: str = ""
    dtype: str | None = None
    backend: str | None = None
    """What ran the model, where there is a choice: hf or vllm."""
    metrics: Scores = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return super().from_json({**value, "metrics": numbers(value.get("metrics", {}))})

    @property
    def tasks(self) -> Mapping[str, Scores]:
        """Task -> metric -> value. A step without tasks of its own is its only task."""
        return {self.STEP: self.metrics}

    @property
    def items(self) -> Mapping[str, int]:
        """Task -> how many items it was scored on, as far as the file tells."""
        return {}

    @property
    def directions(self) -> Mapping[str, Mapping[str, bool]]:
        """Task -> metric -> whether higher is better, where the file tells."""
        return {}

    @property
    def has_scores(self) -> bool:
        """Whether the file holds numbers, be it of a step that failed."""
        return any(self.tasks.values())

    def summary(self) -> str:
        scores = [(name, value) for scores in self.tasks.values() for name, value in scores.items()]
        shown = [f"{name} {'-' if value is None else format(value, '.4g')}" for name, value in scores]
        return " ".join([*shown, *([f"failed: {self.error}"] if self.error else [])])

    def to_json(self) -> dict[str, object]:
        whole = super().to_json()
        if self.backend is None:
            del whole["backend"]
        return whole


@dataclass(frozen=True, kw_only=True)
class GenerationResult(ScoredModel):
    """Scores of the texts that a model wrote."""

    STEP = "generation"
    LABELS = text_metrics.METRICS

    why: str = ""
    """Why this backend."""
    load_seconds: float = 0.0
    new_tokens: int = 0
    prompts: int | None = None

    @property
    def items(self) -> Mapping[str, int]:
        return _counted(self.STEP, self.prompts)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return super().from_json({**value, "prompts": value.get("items")})

    def to_json(self) -> dict[str, object]:
        return _renamed(super().to_json(), {"prompts": "items"})


@dataclass(frozen=True, kw_only=True)
class AgreementResult(ScoredModel):
    """How far a student agrees with the teacher."""

    STEP = "agreement"
    LABELS = AGREEMENT_METRICS

    teacher: str = ""
    rows: int | None = None
    tokens: int = 0

    @property
    def items(self) -> Mapping[str, int]:
        return _counted(self.STEP, self.rows)


@dataclass(frozen=True, kw_only=True)
class ClassificationResult(ScoredModel):
    """How well an encoder puts rows into classes."""

    STEP = "classification"
    LABELS = class_metrics.METRICS

    rows: int | None = None
    classes: list[str] = field(default_factory=list)

    @property
    def items(self) -> Mapping[str, int]:
        return _counted(self.STEP, self.rows)


@dataclass(frozen=True, kw_only=True)
class LmEvalResult(ScoredModel):
    """Scores of lm-eval's tasks. `metrics` is empty: each task has its own, in `task_scores`."""

    STEP = "lm-eval"
    LINES = ".samples.jsonl"

    why: str = ""
    task_scores: dict[str, Scores] = field(default_factory=dict)
    stderr: dict[str, Scores] = field(default_factory=dict)
    task_items: dict[str, int] = field(default_factory=dict)
    higher_is_better: dict[str, dict[str, bool]] = field(default_factory=dict)
    num_fewshot: dict[str, int | None] = field(default_factory=dict)
    command: str | None = None
    """lm-eval's command line that gives the same scores by hand."""
    batch_size: int | str | None = None

    @property
    def tasks(self) -> Mapping[str, Scores]:
        return self.task_scores

    @property
    def items(self) -> Mapping[str, int]:
        return self.task_items

    @property
    def directions(self) -> Mapping[str, Mapping[str, bool]]:
        return self.higher_is_better

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        tasks = {task: numbers(scores) for task, scores in value.get("tasks", {}).items()}
        return super().from_json({**value, "task_scores": tasks, "task_items": value.get("items", {})})

    def to_json(self) -> dict[str, object]:
        whole = super().to_json()
        del whole["metrics"]
        return _renamed(whole, {"task_scores": "tasks", "task_items": "items"})


def numbers(scores: Mapping[str, object]) -> Scores:
    """The scores with None for what is no finite number: lm-eval writes "N/A" for what it can't give, and JSON's NaN is no score."""
    return {name: value if _is_number(value) else None for name, value in scores.items()}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _counted(step: str, count: int | None) -> dict[str, int]:
    return {} if count is None else {step: count}


def _renamed(values: dict[str, object], names: Mapping[str, str]) -> dict[str, object]:
    return {names.get(key, key): value for key, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A line per item


@dataclass(frozen=True)
class Item(JsonFields):
    """A line of a file with one line per item."""

    item: int

    def to_line(self) -> str:
        """The line, strict JSON. Raises ValueError for a NaN."""
        return json.dumps(asdict(self), allow_nan=False, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class GeneratedText(Item):
    """What a model wrote for one prompt."""

    prompt: str = ""
    references: list[str] = field(default_factory=list)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    """Whether the model ended the text itself."""
    scores: Scores = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ComparedItem(Item):
    """One held-out row or text, as student and teacher see it; None where the item is of the other sort."""

    token_agreement: float | None = None
    kl: float | None = None
    top1: float | None = None
    likelihood: float | None = None
    tokens: int = 0
    """Trained tokens of the row."""

    @property
    def scores(self) -> Scores:
        return {name: getattr(self, name) for name in AGREEMENT_METRICS}


@dataclass(frozen=True, kw_only=True)
class ClassifiedRow(Item):
    """One row: its class and the one that the model gave it, as numbers."""

    label: int
    predicted: int
    classes: int
    """How many classes there are."""
    scores: Scores = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskItem(Item):
    """One item of one of lm-eval's tasks; what the task does not have is left out of the line."""

    task: str
    filter: str | None = None
    prompt: str | None = None
    output: Any = None
    choices: list[str] | None = None
    target: Any = None
    references: list[str] | None = None
    metrics: Scores = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        return self.metrics

    def to_line(self) -> str:
        """The line; what lm-eval gives that JSON does not know is written as text, and a NaN as it is."""
        values = {key: value for key, value in vars(self).items() if value is not None}
        return json.dumps(values, default=str, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------------
# Reading

_CLASSES: dict[str, type[ScoredModel]] = {
    one.STEP: one for one in (GenerationResult, ClassificationResult, LmEvalResult, AgreementResult)
}


def scored_class(step: str) -> type[ScoredModel]:
    """The class of a step's result files. A step whose files hold no keys of their own needs none here."""
    return _CLASSES.get(step) or type("ScoredModel", (ScoredModel,), {"STEP": step})


R = TypeVar("R", bound=StepResult)
L = TypeVar("L", bound=JsonFields)


def read_result(file: Path, kind: type[R]) -> R | None:
    """A result file, or None if it is not there or not whole."""
    value = read(file)
    return kind.from_json(value) if isinstance(value, dict) else None


def read_items(file: Path, kind: type[L], limit: int | None = None) -> list[L]:
    """The lines of a file with one line per item, at most `limit`; none where there is no such file."""
    return [kind.from_json(line) for line in read_lines(file, limit)]
