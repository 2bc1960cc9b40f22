"""The result files of the scoring steps as dataclasses: one class a step, read and written here and nowhere else.

A step's folder holds, for each model, `<name>.json` (a class of this module, of the angles one of `angles.results`) and, for all steps
but the angles, a file with one line per item (`GeneratedText`, `ComparedItem`, `ClassifiedRow`, `TaskItem`). Older and hand-made files
are read too: an absent key has its default, an unknown one is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeGuard, TypeVar

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError

from llmkd.evaluation import class_metrics, text_metrics
from llmkd.evaluation.text_metrics import Metric
from llmkd.files import read, read_lines
from llmkd.text import figures

SHOWN = 5
"""Scores of a model in a line of the log; its file has all."""


def finite_or_none(value: object) -> float | None:
    """A finite number, else None: lm-eval writes "N/A" for a score it can't give, and JSON's NaN is no score."""
    return value if _is_number(value) else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


Scores = dict[str, Annotated[float | None, PlainValidator(finite_or_none)]]
"""Metric -> its value; None where the step could not give it."""

AGREEMENT_METRICS = {
    "token_agreement": Metric("tokens as the teacher's", True, False),
    "kl": Metric("KL to the teacher", False, False),
    "top1": Metric("top-1 as the teacher's", True, False),
    "likelihood": Metric("log-likelihood by the teacher", True, False),
}
"""Every metric of the agreement with the teacher, in the order of a table."""


class JsonFields:
    """A dataclass that is made from a JSON object and becomes one; a field may have another name there (`Field(alias=...)`)."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return _adapter(cls).validate_python(value)

    def to_json(self) -> dict[str, object]:
        return _adapter(type(self)).dump_python(self, by_alias=True)


_adapter: Any = cache(TypeAdapter)  # made once for each class


# --- A line per item


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

    @property
    def answer(self) -> str:
        """What of the text is scored: all but thoughts that no reference has."""
        return text_metrics.answer_in(self.text, self.references)


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


ScoredItem = GeneratedText | ComparedItem | ClassifiedRow | TaskItem


# --- A file per model


@dataclass(frozen=True, kw_only=True)
class StepResult(JsonFields):
    """What the result files of all steps hold: whose they are, what they were made of, and what went wrong."""

    ITEMS_SUFFIX: ClassVar[str | None] = None
    """How the name of the file with a line per item ends, in place of `.json`; None without such a file."""

    name: str = ""
    fingerprint: str = ""
    error: str | None = None
    """Why the step failed; it may have numbers all the same, where one of several tasks failed."""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    written: str = ""
    """A hash of all else that its files held when they were written, but for `seconds` and `model`."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """A result file that must be there."""
        return cls.from_json(json.loads(file.read_text()))

    def to_text(self) -> str:
        """The content of the result file, strict JSON. Raises ValueError for a NaN."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False, ensure_ascii=False)

    def summary(self) -> str:
        """The result in a few words, for the log."""
        return f"failed: {self.error}" if self.error else "done"


@dataclass(frozen=True, kw_only=True)
class ScoredModel(StepResult):
    """A model's scores of one step."""

    STEP: ClassVar[str] = ""
    LABELS: ClassVar[Mapping[str, Metric]] = {}
    """How the step's metrics are shown; one that is not here is shown by its own name, higher is better."""
    ITEM: ClassVar[type[ScoredItem]]
    ITEMS_SUFFIX: ClassVar[str] = ".jsonl"

    model: str = ""
    dtype: str | None = None
    backend: str | None = None
    """What ran the model, where there is a choice: hf or vllm."""
    metrics: Scores = field(default_factory=dict)
    rows: int | None = None
    """How many items were scored; None in a hand-made file that does not say so."""

    @property
    def tasks(self) -> Mapping[str, Scores]:
        """Task -> metric -> value. A step without tasks of its own is its only task."""
        return {self.STEP: self.metrics}

    @property
    def items(self) -> Mapping[str, int]:
        """Task -> how many items it was scored on, where the file says so."""
        return {} if self.rows is None else {self.STEP: self.rows}

    @property
    def has_scores(self) -> bool:
        """Whether the file holds numbers, be it of a step that failed."""
        return any(self.tasks.values())

    def summary(self) -> str:
        scores = [(name, value) for scores in self.tasks.values() for name, value in scores.items()]
        shown = [f"{name} {figures(value, 4)}" for name, value in scores[:SHOWN]]
        shown += [f"and {len(scores) - SHOWN} more"] if len(scores) > SHOWN else []
        return " ".join([*shown, *([f"failed: {self.error}"] if self.error else [])])

    def to_json(self) -> dict[str, object]:
        return {key: value for key, value in super().to_json().items() if (key, value) != ("backend", None)}


@dataclass(frozen=True, kw_only=True)
class GenerationResult(ScoredModel):
    """Scores of the texts that a model wrote."""

    STEP = "generation"
    ITEM = GeneratedText
    LABELS = text_metrics.METRICS

    why: str = ""
    """Why this backend."""
    load_seconds: float = 0.0
    new_tokens: int = 0
    thoughts: int = 0
    """How many texts have thoughts, which were left out before they were scored."""
    rows: Annotated[int | None, Field(alias="items")] = None


@dataclass(frozen=True, kw_only=True)
class AgreementResult(ScoredModel):
    """How far a student agrees with the teacher."""

    STEP = "agreement"
    ITEM = ComparedItem
    LABELS = AGREEMENT_METRICS

    teacher: str = ""
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class ClassificationResult(ScoredModel):
    """How well an encoder puts rows into classes."""

    STEP = "classification"
    ITEM = ClassifiedRow
    LABELS = class_metrics.METRICS

    classes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LmEvalResult(ScoredModel):
    """Scores of lm-eval's tasks. Each task has its own metrics and rows, in `task_scores` and `task_items`."""

    STEP = "lm-eval"
    ITEM = TaskItem
    ITEMS_SUFFIX = ".samples.jsonl"

    why: str = ""
    task_scores: Annotated[dict[str, Scores], Field(alias="tasks")] = field(default_factory=dict)
    stderr: dict[str, Scores] = field(default_factory=dict)
    task_items: Annotated[dict[str, int], Field(alias="items")] = field(default_factory=dict)
    higher_is_better: dict[str, dict[str, bool]] = field(default_factory=dict)
    """Of tasks and their metrics, where lm-eval says so."""
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

    def to_json(self) -> dict[str, object]:
        return {key: value for key, value in super().to_json().items() if key not in ("metrics", "rows")}


RESULT_CLASSES: dict[str, type[ScoredModel]] = {
    kind.STEP: kind for kind in (GenerationResult, ClassificationResult, LmEvalResult, AgreementResult)
}
"""Scoring step -> the class of its result files."""


# --- Reading

R = TypeVar("R", bound=StepResult)
L = TypeVar("L", bound=Item)


def read_result(file: Path, kind: type[R]) -> R | None:
    """A result file, or None if it is not there, not whole, or holds something else."""
    value = read(file)
    try:
        return kind.from_json(value) if isinstance(value, dict) else None
    except ValidationError:
        return None


def read_items(file: Path, kind: type[L], limit: int | None = None) -> list[L]:
    """The lines of a file with one line per item, at most `limit`; none where there is no such file."""
    return [kind.from_json(line) for line in read_lines(file, limit)]
