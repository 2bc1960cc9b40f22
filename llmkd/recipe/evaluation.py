"""How models are scored, and what a study compares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from llmkd.data.formats import check_names
from llmkd.errors import InputError
from llmkd.layer_map import STRATEGIES
from llmkd.recipe.run import Train
from llmkd.recipe.section import SEEDS_END, Backend, Dtype, Section, TakenFrom, check_name

_VARIED = ("student", "matching", "loss", "train", "stones", "rollouts")


class Generation(Section):
    """Text generation: each model continues the prompts of held-out rows, and is scored against the rows' own completions."""

    source: str | None = None
    """Where the prompts are, as in data.source; default: data.source itself."""
    name: str | None = None
    """The hub data set's configuration."""
    split: str = "test"
    """The split of held-out rows."""
    format: Literal["auto", "prompt_completion", "messages", "sharegpt", "alpaca"] | None = None
    """What a row of a `source` of its own holds; default: `data.format`, or auto where that is text, which has no prompts."""
    columns: dict[str, str] | None = None
    """Other names of columns of a `source` of its own; default: `data.columns`."""
    items: int = Field(default=200, gt=0)
    """Use the first so many rows."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Longest continuation in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 is greedy, always the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this probability together."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampling."""
    backend: Backend = "auto"
    """What runs the models; `auto`: vLLM where it is installed and the model is large enough to repay its start, else Hugging Face."""
    batch_size: int = Field(default=64, gt=0)
    """Prompts at once on the hf backend (vLLM batches by itself)."""

    @model_validator(mode="after")
    def _own_rows(self) -> Generation:
        _check_own(self.source, self.columns, self.format)
        return self


class Classification(Section):
    """Classification by encoders of held-out rows of text and label, scored by accuracy and F1."""

    source: str | None = None
    """Where the rows are, as in data.source; default: data.source itself."""
    name: str | None = None
    """The hub data set's configuration."""
    split: str = "test"
    """The split of held-out rows."""
    columns: dict[str, str] | None = None
    """Other names of columns of a `source` of its own; default: `data.columns`."""
    rows: int | None = Field(default=None, gt=0)
    """Use the first so many rows; default: all."""

    @model_validator(mode="after")
    def _own_rows(self) -> Classification:
        _check_own(self.source, self.columns)
        return self


def _check_own(source: str | None, columns: dict[str, str] | None, format: str | None = None) -> None:
    """Raise ValueError for how rows are read where they are data's own, and for names that no format has."""
    for key, value in (("format", format), ("columns", columns)):
        if value is not None and source is None:
            raise ValueError(f"{key}: it belongs to a source of its own; give source too, or leave {key} out")
    try:
        check_names(columns or {})
    except InputError as error:
        raise ValueError(str(error).removeprefix("data.")) from error


class Evaluation(Section):
    """How a study's models are scored."""

    tasks: tuple[str, ...] = ()
    """Names of lm-eval tasks."""
    include: str | None = "eval"
    """A folder of more lm-eval tasks (YAML), relative to the repository or the current folder."""
    trust_include: bool = False
    """Run the Python that tasks of that folder name (`!function`), if it is not llmkd's own. Leave it off unless you trust its authors."""
    backend: Backend = "auto"
    """What runs the models under lm-eval, as in generation.backend."""
    limit: int | None = Field(default=None, gt=0)
    """Items of each lm-eval task; default: all."""
    batch_size: int | Literal["auto"] = "auto"
    """Rows at once."""
    dtype: Annotated[Dtype, TakenFrom("train.dtype")] = "float32"
    """The models' dtype while they are scored, the same for all models of a study."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; default: each task's own number."""
    seed: int = Field(default=0, ge=0, lt=SEEDS_END)
    """Seed of lm-eval."""
    max_length: int | None = Field(default=None, gt=0)
    """Longest sequence under lm-eval; default: the model's."""
    generation: Generation | None = None
    """If left out, no texts are generated."""
    classification: Classification | None = None
    """Encoders: if left out, no rows are classified."""
    agreement_rows: int = Field(default=0, ge=0)
    """Held-out rows on which each student's distributions are compared with the teacher's; 0 compares none."""
    angles_rows: int | None = Field(default=None, gt=0)
    """Held-out rows on which `llmkd study` measures the angles between teacher blocks as seen from each student's blocks; unset: none."""

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


def with_scoring_dtype(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with `evaluation.dtype` written out: where it is left out, models are scored in the dtype of their training.

    What may be wrong with the values is left to the sections.
    """
    train, evaluation = values.get("train"), values.get("evaluation") or {}
    if not isinstance(train, Mapping) or not isinstance(evaluation, Mapping) or "dtype" in evaluation:
        return values
    dtype = train.get("dtype", Train.model_fields["dtype"].default)
    return {**values, "evaluation": {**evaluation, "dtype": dtype}} if dtype in get_args(Dtype) else values


class Margin(Section):
    """The largest difference of a metric that counts as none."""

    metric: str = Field(pattern=r"^[^/]+/.+$")
    """`generation/bleu`, `agreement/kl`, or an lm-eval task and its metric, `hellaswag/acc_norm`."""
    within: float = Field(gt=0)
    """The margin, in the metric's own unit."""


class Study(Section):
    """The students that `llmkd study` trains and compares: every strategy and variant with every seed, and the baselines."""

    strategies: tuple[str, ...] = ()
    """Strategies of `matching.strategy`, each a student."""
    variants: dict[str, dict[str, Any]] = {}
    """More students, each a name and the recipe keys in which it differs: `{procrustes: {matching.distance: procrustes}}`."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Each student is trained once with each seed."""
    baselines: tuple[Literal["undistilled", "ce_only"], ...] = ("undistilled", "ce_only")
    """Models to compare with: `undistilled` (a student before its first step), `ce_only` (cross-entropy alone)."""
    reference: str | None = None
    """The strategy or variant (or ce_only) that the others are compared with; default: forward, or the first student if there is none."""
    margins: tuple[Margin, ...] = ()
    """For each metric that matters, the largest difference that counts as none, set before the run; the first is the main metric."""
    ranks: int = Field(default=1, gt=0)
    """Processes on this machine for each training run."""
    parallel: Annotated[int, Field(gt=0)] | Literal["auto"] = 1
    """So many training runs at a time, each on `ranks` processes and, where there are GPUs, as many GPUs of its own; what each says goes to
    logs/ in the study's folder. For small students, which gain nothing from more ranks. `auto`: as many as there are GPUs for."""
    together: Annotated[int, Field(gt=0)] | Literal["auto"] = 1
    """So many students of a seed are trained in turn, a micro-batch each, off one pass of one teacher; each becomes what it becomes alone.
    A rank holds them all: `llmkd plan` says how many fit, and `auto` takes the most of them. 1: one student after another, each with a
    teacher of its own."""

    @model_validator(mode="after")
    def _known(self) -> Study:
        for strategy in self.strategies:
            check_name("study.strategies", strategy, STRATEGIES)
        for name, changes in self.variants.items():
            _check_variant(name, changes)
        for field, values in (("strategies", self.strategies), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"study.{field}: {list(values)} has one twice; write each once")
        trained = [*self.students, *(name for name in self.baselines if name == "ce_only")]
        if self.reference is not None:
            check_name("study.reference", self.reference, trained)
        metrics = [margin.metric for margin in self.margins]
        if len(set(metrics)) != len(metrics):
            raise ValueError(f"study.margins: {metrics} has one twice; write each once")
        return self

    @property
    def compared_with(self) -> str:
        """The strategy that the others are compared with."""
        return self.reference or ("forward" if "forward" in self.students else self.students[0])

    @property
    def students(self) -> tuple[str, ...]:
        """The names of the students: strategies, then variants."""
        return (*self.strategies, *self.variants)

    def changes(self, student: str) -> Mapping[str, object]:
        """The recipe keys in which a student of that name differs."""
        return self.variants[student] if student in self.variants else {"matching.strategy": student}


def _check_variant(name: str, changes: Mapping[str, Any]) -> None:
    """Raise ValueError for a variant whose name is taken, or that changes more than a student."""
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
