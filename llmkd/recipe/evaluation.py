"""How models are scored, and what a study compares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from llmkd.layer_map import STRATEGIES
from llmkd.recipe.section import Backend, Dtype, Section, one_of

_VARIED = ("student", "matching", "loss", "train", "stones")


class Generation(Section):
    """What the models write: prompts of held-out rows, continued by each model, scored against the rows' own completions."""

    source: str | None = None
    """Where the prompts are: `records`, a file, a folder or a hub name as in data.source; default: data.source itself."""
    name: str | None = None
    """The hub data set's configuration."""
    split: str = "test"
    items: int = Field(default=200, gt=0)
    """How many rows of it, from the first on."""
    max_new_tokens: int = Field(default=128, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy: the likeliest token, always."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0)
    """Of sampling, where temperature is above 0."""
    backend: Backend = "auto"
    batch_size: int = Field(default=64, gt=0)
    """Prompts at once on the hf backend (vLLM batches by itself)."""


class Classification(Section):
    """Held-out rows of text and label that encoders put into classes, scored by accuracy and F1."""

    source: str | None = None
    """A file, a folder or a hub name as in data.source; default: data.source itself."""
    name: str | None = None
    """The hub data set's configuration."""
    split: str = "test"
    rows: int | None = Field(default=None, gt=0)
    """How many of them, from the first on; default: all."""


class Evaluation(Section):
    tasks: tuple[str, ...] = ()
    """lm-eval task names."""
    include: str | None = "eval"
    """Folder of further lm-eval YAML tasks, relative to the repository or the current folder."""
    backend: Backend = "auto"
    """What runs the models under lm-eval."""
    limit: int | None = Field(default=None, gt=0)
    batch_size: int | Literal["auto"] = "auto"
    dtype: Dtype = "float32"
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; default: what each task's own definition says."""
    seed: int = 0
    max_length: int | None = Field(default=None, gt=0)
    generation: Generation | None = None
    """Left out: no texts are generated."""
    classification: Classification | None = None
    """Encoders: left out, no rows are classified."""
    agreement_rows: int = Field(default=0, ge=0)
    """Held-out rows on which each student's distributions are compared with the teacher's; 0 compares none."""
    angles_rows: int | None = Field(default=None, gt=0)
    """Held-out rows on which `llmkd study` measures the angles between teacher blocks as each student's blocks see them; left out: none."""

    @model_validator(mode="after")
    def _positive(self) -> Evaluation:
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size} rows at once; write a whole number from 1 up, or auto")
        if self.agreement_rows and self.generation is None:
            raise ValueError("agreement_rows: the held-out rows are those of evaluation.generation; add that section")
        if self.angles_rows and self.generation is None and self.classification is None:
            raise ValueError(
                "angles_rows: the held-out rows are those of evaluation.generation, of encoders evaluation.classification; add that section"
            )
        return self


class Margin(Section):
    metric: str = Field(pattern=r"^[^/]+/.+$")
    """`generation/bleu`, `agreement/kl`, or an lm-eval task and its metric, `hellaswag/acc_norm`."""
    within: float = Field(gt=0)
    """In the metric's own unit."""


class Study(Section):
    strategies: tuple[str, ...] = ()
    variants: dict[str, dict[str, Any]] = {}
    """Further students, each a name and the recipe keys by which it differs: `{procrustes: {matching.distance: procrustes}}`."""
    seeds: tuple[int, ...] = (0,)
    baselines: tuple[Literal["undistilled", "ce_only"], ...] = ("undistilled", "ce_only")
    reference: str | None = None
    """The strategy or variant (or ce_only) that the others are compared with; default: forward, or the first where it is not among them."""
    margins: tuple[Margin, ...] = ()
    """For the metrics that matter, the largest difference that counts as none, said before the run; the first is the main metric."""
    ranks: int = Field(default=1, gt=0)
    """Processes on this machine for each training run."""

    @model_validator(mode="after")
    def _known(self) -> Study:
        for strategy in self.strategies:
            one_of("study.strategies", strategy, STRATEGIES)
        for name, changes in self.variants.items():
            _check_variant(name, changes)
        for field, values in (("strategies", self.strategies), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"study.{field}: {list(values)} names one twice; write each once")
        trained = [*self.students, *(name for name in self.baselines if name == "ce_only")]
        if self.reference is not None:
            one_of("study.reference", self.reference, trained)
        metrics = [margin.metric for margin in self.margins]
        if len(set(metrics)) != len(metrics):
            raise ValueError(f"study.margins: {metrics} names one twice; write each once")
        return self

    @property
    def compared_with(self) -> str:
        """The strategy that the others are compared with."""
        return self.reference or ("forward" if "forward" in self.students else self.students[0])

    @property
    def students(self) -> tuple[str, ...]:
        """What the table's students are called: strategies, then variants."""
        return (*self.strategies, *self.variants)

    def changes(self, student: str) -> dict[str, Any]:
        """The recipe keys by which a student of that name differs."""
        return self.variants[student] if student in self.variants else {"matching.strategy": student}


def _check_variant(name: str, changes: Mapping[str, Any]) -> None:
    """Raise ValueError for a variant that can't be told from the study's other students, or changes more than a student."""
    taken = (*STRATEGIES, "ce_only", "undistilled", "teacher")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in taken:
        raise ValueError(
            f"study.variants: {name!r} can't name a student; use letters, digits, _ . and -, and no strategy's or baseline's name"
        )
    if not changes:
        raise ValueError(f"study.variants.{name}: nothing is changed; give recipe keys, e.g. matching.distance: cosine")
    for key in changes:
        if key.partition(".")[0] not in _VARIED:
            raise ValueError(
                f"study.variants.{name}: {key} is the same for all students of a study; change keys of {', '.join(_VARIED)}"
            )
