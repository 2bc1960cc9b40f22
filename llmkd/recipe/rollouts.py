"""Texts that are written during training, and trained on."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmkd.errors import InputError
from llmkd.recipe.data import Data
from llmkd.recipe.models import Teacher
from llmkd.recipe.objective import Loss
from llmkd.recipe.run import Train
from llmkd.recipe.section import NO_EFFECT, Backend, Section

_OFF = "or leave the section rollouts out"
TEXTS = f"data.format: a text has no prompt to continue; give rows of prompt and completion or chats, {_OFF}"


class Rollouts(Section):
    """On-policy distillation: during training a model continues the prompts of the data's rows, and its texts are trained on in place of
    the rows' own completions. The teacher reads them like any row."""

    by: Literal["student", "mixed", "teacher", "both"] = "student"
    """Who writes. `student`: the student as it is then (on-policy). `mixed`: each token is drawn from both, from (1 − alpha) of the
    student's distribution and alpha of the teacher's (MiniLLM), which keeps a weak student's texts sensible; it takes the hf backend.
    `teacher`: the teacher, once, before training (sequence-level distillation); all students of a study read the same texts. `both`: the
    student writes its share of each batch, and the other rows have the teacher's texts (DistiLLM-2, with loss.own_divergence)."""
    alpha: float = Field(default=0.2, gt=0, lt=1)
    """The teacher's part in `by: mixed`."""
    share: float = Field(default=1.0, ge=0, le=1)
    """The share of each batch's rows whose completions are written; the others keep the data's (GKD's lambda). `by: teacher`: the share of
    all rows. `by: both`: the student's share, below 1."""
    every: int = Field(default=1, gt=0)
    """Steps for which texts are written at one time, by the student as it is before the first of them; 1 is strictly on-policy."""
    samples: int = Field(default=1, gt=0)
    """How many texts are written of each prompt; a batch then has as many fewer prompts. It divides the texts of a step."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Longest text in tokens; with its prompt it has at most data.max_length."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy, always the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this probability together."""
    truncated: Literal["train", "drop"] = "train"
    """What is done with a text that has not ended within its tokens."""
    backend: Backend = "auto"
    """What runs the model that writes; `auto`: vLLM where it is installed and enough is written at one time to repay its start, else
    Hugging Face."""
    gpu_share: Annotated[float, NO_EFFECT] = Field(default=0.3, gt=0, lt=1)
    """The share of a GPU's memory that vLLM has while it writes, beside what training keeps there; it lets go of it in between."""
    devices: Annotated[tuple[int, ...] | None, NO_EFFECT] = Field(default=None, examples=[[4, 5, 6, 7]])
    """GPUs of each node, as nvidia-smi numbers them, on which vLLM alone runs, while the ranks have the others; default: a rank's own GPU,
    shared."""
    tensor_parallel: Annotated[int, NO_EFFECT] = Field(default=1, gt=0)
    """How many of `devices` hold one copy of the model that writes, for one that is too large for a single GPU."""
    batch_size: Annotated[int, NO_EFFECT] = Field(default=64, gt=0)
    """Prompts at once on the hf backend (vLLM batches by itself)."""

    @model_validator(mode="after")
    def _consistent(self) -> Rollouts:
        if self.by == "mixed" and self.backend == "vllm":
            raise ValueError("backend: vLLM runs one model, and by: mixed draws each token from two; write hf")
        if self.devices is not None and self.backend != "vllm":
            raise ValueError("devices: vLLM alone runs there; write backend: vllm too, or leave devices out")
        if self.tensor_parallel > 1 and self.devices is None:
            raise ValueError(
                "tensor_parallel: only GPUs that no rank trains on can be joined; name them as devices, or write 1"
            )
        if self.devices is not None and (
            not self.devices or len(set(self.devices)) < len(self.devices) or len(self.devices) % self.tensor_parallel
        ):
            raise ValueError(
                f"devices: {list(self.devices)} are not whole groups of {self.tensor_parallel} different GPUs (tensor_parallel); write "
                "e.g. [4, 5, 6, 7]"
            )
        during = ("student", "mixed", "both")
        for key, whose in {"alpha": ("mixed",), "every": during, "samples": during}.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.by not in whose:
                raise ValueError(f"{key}: it belongs to by: {' or '.join(whose)}; write that, or leave {key} out")
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"temperature: at 0, always the likeliest token, the {self.samples} samples of a prompt are one text; write a temperature "
                "above 0, or samples: 1"
            )
        if self.by == "both" and self.share in (0, 1):
            one, other = ("student", "teacher") if self.share else ("teacher", "student")
            raise ValueError(
                f"share: at {self.share:g} no text of a batch is the {other}'s; write e.g. 0.5, or by: {one} with a share of 1"
            )
        return self

    @property
    def engines(self) -> int | None:
        """How many engines a node has on devices of their own; None where each rank writes on its own."""
        return None if self.devices is None else len(self.devices) // self.tensor_parallel

    def gpus_among(self, visible: str | None) -> int:
        """How many of the GPUs in CUDA_VISIBLE_DEVICES (all, where it is not set) are `devices`."""
        named = {str(device) for device in self.devices or () if self.writes}
        return len(named & set(visible.replace(" ", "").split(","))) if visible else len(named)

    @property
    def writes(self) -> bool:
        """Whether there are texts to write at all: at a share of 0 a run is the same as without the section."""
        return self.share > 0

    @property
    def before_training(self) -> bool:
        """Whether they are written once, and are then rows like the data's own."""
        return self.writes and self.by in ("teacher", "both")

    @property
    def teachers_share(self) -> float:
        """The share of all rows that the teacher writes before training."""
        return 1.0 if self.by == "both" else self.share

    def of_teacher(self) -> dict[str, Any] | None:
        """The section of a run that reads the teacher's texts alone, where there are any."""
        during = ("every", "samples", "alpha")
        given = self.model_dump(mode="json", exclude_unset=True, exclude=set(during))
        return {**given, "by": "teacher", "share": self.teachers_share} if self.before_training else None

    @property
    def during_training(self) -> bool:
        """Whether they are written as the run goes."""
        return self.writes and self.by != "teacher"


def check_rollouts(rollouts: Rollouts | None, data: Data, loss: Loss, teacher: Teacher, train: Train) -> None:
    """Raise ValueError where a run can't train on written texts as it asks, and for prompts that nobody continues."""
    if any(part.format == "prompts" for part in data.parts):
        if rollouts is None or (rollouts.share < 1 and rollouts.by != "both"):
            raise ValueError(
                "data.format: prompts have no completion to train on; add the section rollouts with a share of 1, or give rows with "
                "completions"
            )
    validated = () if data.validation is None else (data.held_out or data).parts
    if any(part.format == "prompts" for part in validated):
        raise ValueError(
            "data.validation: prompts have no completion to validate on; give a source of rows with completions and its format"
        )
    if loss.own_divergence is not None and (rollouts is None or not rollouts.during_training):
        raise ValueError(
            "loss.own_divergence: it is for texts that the student writes, and it writes none; add the section rollouts (by: both or "
            "student), or leave the key out"
        )
    if rollouts is None or not rollouts.writes:
        return
    off = _OFF
    if rollouts.during_training:
        _check_during(rollouts, data, loss, teacher, off)
        _check_samples(rollouts, train)
        try:
            check_written(rollouts, train, train.steps or 0)
        except InputError as error:
            raise ValueError(str(error)) from error
        if loss.own_divergence is not None:
            _check_apart(rollouts, train)
    if data.streaming:
        raise ValueError(f"data.streaming: prompts are taken from rows on disk; write streaming: false, {off}")
    if any(part.format == "text" for part in data.parts):
        raise ValueError(TEXTS)
    if rollouts.max_new_tokens >= data.max_length:
        raise ValueError(
            f"rollouts.max_new_tokens: {rollouts.max_new_tokens} tokens leave no room for a prompt within data.max_length "
            f"{data.max_length}; write a smaller one, or a larger max_length"
        )


def check_writers(rollouts: Rollouts | None, *, gpu: bool) -> None:
    """Raise InputError where texts are to be written on GPUs, and the ranks have none."""
    if rollouts is not None and rollouts.writes and rollouts.devices is not None and not gpu:
        raise InputError("rollouts.devices: there is no GPU here; leave the key out")


def _check_during(rollouts: Rollouts, data: Data, loss: Loss, teacher: Teacher, off: str) -> None:
    """Raise ValueError where a run can't train on texts that are written as it goes."""
    by_teacher = "write by: teacher, whose texts are written before training"
    if loss.ce:
        raise ValueError(
            "loss.ce: the tokens of a text that the student wrote are no answers to learn by heart; write loss.ce: 0 and let the "
            f"teacher's distribution teach (loss.kl, e.g. with divergence: reverse_kl), {by_teacher}, {off}"
        )
    if not teacher.serving.has_weights:
        raise ValueError(
            f"rollouts: a teacher with {teacher.serving_name} has read all rows before training, and texts are written during it; write "
            f"placement: replicated, zero3 or pipeline and share_cache: false, {by_teacher}, {off}"
        )
    if data.batching == "packed":
        raise ValueError(
            "data.batching: packed sequences are laid out before training, when nobody knows how long a text will be; write grouped, "
            f"{by_teacher}, {off}"
        )


def _check_samples(rollouts: Rollouts, train: Train) -> None:
    """Raise ValueError where a step's written texts are not whole groups of `samples` of one prompt."""
    written = round(rollouts.share * train.batch_size, 6)
    if rollouts.samples > 1 and written % rollouts.samples:
        raise ValueError(
            f"rollouts.samples: {rollouts.share:g} of batch_size {train.batch_size} = {written:g} texts a step are no whole groups of "
            f"{rollouts.samples} of a prompt; write a share and samples that divide the batch"
        )


def check_written(rollouts: Rollouts | None, train: Train, steps: int) -> None:
    """Raise InputError where a run of so many steps would not write a single text, though texts are asked for."""
    if rollouts is None or not rollouts.during_training or not steps:
        return
    if not written_until(steps, train.batch_size, rollouts.share):
        raise InputError(
            f"rollouts.share: {rollouts.share:g} of {steps} steps of {train.batch_size} rows is less than one text; write a larger share, "
            "or leave the section rollouts out"
        )


def written_until(step: int, rows: int, share: float) -> int:
    """How many texts are written in the steps before this one (from 0), of so many rows each: the share, exact within one text."""
    exact = Fraction(share).limit_denominator(10**6)  # so that no rounding adds up over a long run
    return step * rows * exact.numerator // exact.denominator


def _check_apart(rollouts: Rollouts, train: Train) -> None:
    """Raise ValueError where a step's written texts and its other rows do not each fill whole micro-batches."""
    if rollouts.share == 1:
        raise ValueError(
            "loss.own_divergence: at a rollouts.share of 1 all rows are the student's own; write it as loss.divergence"
        )
    written = round(rollouts.share * train.batch_size, 6)
    if written % train.micro_batch_size:
        raise ValueError(
            f"loss.own_divergence: the student's texts have micro-batches of their own, and {rollouts.share:g} of batch_size "
            f"{train.batch_size} = {written:g} rows do not fill any of micro_batch_size {train.micro_batch_size}; write a share and a "
            "micro_batch_size that divide the batch"
        )
