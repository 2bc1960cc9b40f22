"""How a run trains: the optimizer and the batch, the teacher's cache, the making of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llmkd.errors import InputError
from llmkd.losses.head_kernels import HeadKernel
from llmkd.recipe.data import Data
from llmkd.recipe.models import Architecture, Lora
from llmkd.recipe.placements import WithWeights
from llmkd.recipe.section import NO_EFFECT, Dtype, InPlaceOf, Section
from llmkd.text import counted

Beta = Annotated[float, Field(ge=0, lt=1)]


class Train(Section):
    """The optimizer, the batch and what is saved. Exactly one of `steps` and `epochs` is given."""

    steps: int | None = Field(default=None, ge=0)
    """Optimizer steps."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data, in place of `steps`."""
    batch_size: Annotated[int, InPlaceOf("batch_tokens", "where rows are packed")] = Field(gt=0)
    """Rows per optimizer step, over all ranks and accumulation steps; where rows are packed, sequences of data.max_length tokens."""
    batch_tokens: int | None = Field(default=None, gt=0)
    """In place of batch_size, where rows are packed: tokens per optimizer step, a multiple of data.max_length."""
    micro_batch_size: int = Field(gt=0)
    """Rows per forward pass on one rank. Accumulation follows: batch_size / (ranks × micro_batch_size)."""
    learning_rate: float = Field(gt=0)
    """AdamW's peak learning rate."""
    final_learning_rate: float = Field(default=0.0, ge=0)
    """The learning rate at the last step (schedules cosine and linear)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay, of matrices only: norms and biases have none."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    dtype: Dtype = "bfloat16"
    """The student's dtype; bfloat16 is trained with fp32 master weights."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them: less memory, more time."""
    head_chunk: int | None = Field(default=None, gt=0)
    """Tokens whose logits exist at one time; unset: 1024 on a CPU, 4096 on a GPU."""
    head_kernel: HeadKernel = "compiled"
    """On a GPU: one kernel for all that follows the head's products, `compiled` by torch.compile or written in `triton`, both of which need
    Triton and a C compiler; `none`: an operation at a time, as on a CPU, and as for divergences that a kernel does not take in."""
    compile: Literal["blocks", "none"] = "none"
    """`blocks` compiles what each block of student and teacher computes, in the first step: a minute or more. PyTorch needs Triton and a C
    compiler for it, without a GPU a C++ compiler. Not for packed rows. Results differ by rounding."""
    kernels: Literal["liger", "none"] = "none"
    """`liger` takes liger-kernel's norms, rotary embeddings and gated MLPs for student and teacher, on GPUs. Results differ by rounding."""
    deepspeed: str = "zero3"
    """A name in ds_configs/, or the path of a DeepSpeed JSON of your own; `"auto"` in it stands for the recipe's value."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations on `data.validation`; the last step is validated too. 0: never. They change no weight: where `keep` is last
    and there is no `patience`, this key and the rows may be changed before a run is resumed, all but a `share`."""
    keep: Literal["last", "best"] = "last"
    """Which student is exported: that of the last step, or that of the validation with the best `keep_by`, the first of equals."""
    keep_by: Literal["validation/ce", "validation/kl", "validation/agreement"] = "validation/ce"
    """By what validations are compared, for `keep: best` and `patience`. All models have the cross-entropy; the other two compare with the
    teacher's distribution, and need a `loss.kl` or stones in every student of a study. Of `agreement` more is better."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after so many validations in a row of which none was the best so far; unset: train all steps."""
    save_every: Annotated[int, NO_EFFECT] = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves only at the end and when stopped."""
    keep_checkpoints: Annotated[int, NO_EFFECT] = Field(default=2, gt=0)
    """How many of the newest checkpoints are kept."""
    log_every: Annotated[int, NO_EFFECT] = Field(default=10, gt=0)
    """Steps between lines of the log and of metrics.jsonl."""
    profile_steps: Annotated[int, NO_EFFECT] = Field(default=0, ge=0)
    """Steps, after the first three of a start, that each rank records with torch's profiler in traces/ of the run's folder, for
    chrome://tracing or Perfetto; 0: none."""
    timeout_seconds: Annotated[int, NO_EFFECT] = Field(default=1800, gt=0, le=10**7)
    """How long a rank waits for another before the run ends."""
    wandb: Annotated[str | None, NO_EFFECT] = None
    """Weights & Biases project that the run is logged to; unset: none."""

    @property
    def chooses(self) -> bool:
        """Whether validations decide what is exported."""
        return self.keep == "best" or self.patience is not None

    @property
    def batch_text(self) -> str:
        """How large a step's batch is, beginning with the key that says so."""
        if self.batch_tokens is None:
            return f"batch_size: {self.batch_size} rows"
        return f"batch_tokens: {self.batch_tokens} tokens ({counted(self.batch_size, 'sequence')})"

    def batch_multiple(self, of: int) -> str:
        """What a batch is written as that is a multiple of so many rows or sequences."""
        if self.batch_tokens is None:
            return f"a multiple of {of}"
        return f"a multiple of {of * self.batch_tokens // self.batch_size} ({counted(of, 'sequence')})"

    def validates(self, step: int, last: int) -> bool:
        """Whether a step (from 1) of so many is validated."""
        return self.validate_every > 0 and (step % self.validate_every == 0 or step == last)

    def tokens_at_once(self, *, gpu: bool) -> int:
        """Tokens whose logits exist at one time."""
        return self.head_chunk or (4096 if gpu else 1024)

    @field_validator("compile", mode="before")
    @classmethod
    def _head_has_a_key_of_its_own(cls, value: object) -> object:
        if value == "head":
            raise ValueError(
                "train.compile: the head's kernel has a key of its own now; write head_kernel: compiled, and leave compile out"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps: give exactly one of steps and epochs, which both set how long the training is")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate: {self.final_learning_rate:g} is above learning_rate {self.learning_rate:g}; it falls, so write less"
            )
        if self.steps and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} warm-up steps in {self.steps} steps; write a number from 0 to {self.steps - 1}"
            )
        chooses = ["keep: best"] * (self.keep == "best") + ["patience"] * (self.patience is not None)
        if chooses and not self.validate_every:
            raise ValueError(f"validate_every: {chooses[0]} goes by validations; write how many steps apart, e.g. 100")
        if self.keep_by != "validation/ce" and not chooses:
            raise ValueError("keep_by: nothing is chosen by it; write keep: best, or a patience, or leave keep_by out")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"{self.batch_text} are no multiple of micro_batch_size {self.micro_batch_size}; write "
                f"{self.batch_multiple(self.micro_batch_size)}"
            )
        return self


def with_batch_size(train: Any, data: Any, where: str) -> Any:
    """The values of a section `train` whose batch_tokens are written as batch_size too; `data`: the values of its section data.

    Raises InputError for tokens that are no whole number of sequences; what else may be wrong with the values is left to the sections.
    """
    tokens = train.get("batch_tokens") if isinstance(train, Mapping) else None
    if tokens is None or not isinstance(data, Mapping):
        return train
    length = data.get("max_length", Data.model_fields["max_length"].default)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InputError(
            f"{where}.batch_tokens: {tokens!r} is no number of tokens; write a multiple of data.max_length {length}, without quotes"
        )
    if data.get("batching") != "packed":
        raise InputError(
            f"{where}.batch_tokens: rows that are not packed have no fixed number of tokens; write data.batching: packed, or batch_size in "
            "place of batch_tokens"
        )
    if not isinstance(length, int) or length < 1:
        return train
    if tokens % length:
        raise InputError(
            f"{where}.batch_tokens: {tokens} is no whole number of sequences of data.max_length {length}; write a multiple of it"
        )
    if train.get("batch_size", tokens // length) != tokens // length:
        raise InputError(
            f"{where}.batch_tokens: {tokens} tokens are {tokens // length} sequences of {length}, and batch_size says "
            f"{train['batch_size']}; give one of the two"
        )
    return {**train, "batch_size": tokens // length}


class Cache(Section):
    """What `llmkd cache` writes and `teacher.placement: cache` reads. Only `dtype` and `top_k` change what a student becomes."""

    path: Annotated[str | None, NO_EFFECT] = None
    """The cache's folder; default: cache/ in the run's folder."""
    dtype: Literal["bfloat16", "fp8", "int8", "float32"] = "bfloat16"
    """How a state is stored; fp8 (e4m3) and int8 have one scale per token and half of bfloat16's bytes."""
    top_k: int | None = Field(default=None, gt=0)
    """Store the log-probabilities of so many likeliest tokens in place of the final state; only forward_kl can use them."""
    teacher_placement: Annotated[WithWeights | None, NO_EFFECT] = None
    """Where the teacher is while the cache is written; default: teacher.placement, or replicated if that is cache."""
    micro_batch_size: Annotated[int | None, NO_EFFECT] = Field(default=None, gt=0)
    """Rows per forward pass of the teacher while the cache is written; default: train.micro_batch_size."""
    shard_mib: Annotated[float, NO_EFFECT] = Field(default=256, gt=0)
    """Size of one file in MiB, about; that much is computed again after a kill."""
    verify: Annotated[Literal["auto", "start", "read"], NO_EFFECT] = "auto"
    """When checksums are compared. `start`: all before training. `read`: each file's when it is first read. `auto`: start up to 8 GiB."""


class Finetune(Section):
    """How the recipe's own teacher is made: the same loop with cross-entropy alone. Exactly one of `path` and `architecture` is given."""

    path: str | None = None
    """HF folder or hub name to start from."""
    architecture: Architecture | None = None
    """The shape of a new model, in place of `path`; its tokenizer is a byte-level BPE trained on the data."""
    lora: Lora | None = None
    """Train adapters alone, as `student.lora` does for students; the teacher that is written has them added to its weights."""
    train: Train
    """As the students' section `train`."""
    data: Data | None = None
    """The data to fine-tune on, where it differs from the students'."""
    seed: int = Field(default=0, ge=0)
    """Seed of the teacher's own data order and new weights; the recipe's seed is the students'."""

    @model_validator(mode="after")
    def _one_start(self) -> Finetune:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("finetune: give exactly one of path (a checkpoint) and architecture (a new model)")
        if self.lora is not None and self.architecture is not None:
            raise ValueError(
                "lora: the new weights of finetune.architecture would stay random; leave lora out, or write finetune.path"
            )
        if self.lora is not None and self.train.compile == "blocks":
            raise ValueError(
                "train.compile: blocks with adapters have not been shown to compile (finetune.lora); write none, or leave finetune.lora out"
            )
        return self


def check_validation(where: str, train: Train, rows: str, data: Data, *, logits: bool) -> None:
    """Raise ValueError where a run can't be validated as it asks. `where`, `rows`: the sections' names. `logits`: a teacher's are read."""
    if train.validate_every and data.validation is None:
        raise ValueError(
            f"{where}.validate_every: there are no rows to validate on; give {rows}.validation, e.g. {{share: 0.05}}"
        )
    if train.keep_by != "validation/ce" and not logits:
        raise ValueError(
            f"{where}.keep_by: {train.keep_by} compares with the teacher's distribution, which this training does not read; write "
            "validation/ce, which every model has"
        )


def check_stream(where: str, train: Train, rows: str, data: Data) -> None:
    """Raise ValueError where a streamed run can't be as long as it asks. `where`, `rows`: the sections' names."""
    if data.streaming and train.epochs is not None:
        raise ValueError(
            f"{where}.epochs: nobody knows how long a stream is before its end; write {where}.steps, or {rows}.streaming: false"
        )
