"""What a run works on and how: data, training, the teacher's cache, the making of a teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkd.recipe.models import Architecture
from llmkd.recipe.placements import WithWeights
from llmkd.recipe.section import Dtype, Section


class Data(Section):
    source: str = "records"
    """`records` (the built-in task), a local .jsonl/.json/.parquet/.csv (may be .gz) or a folder of them, or a hub name."""
    name: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    rows: int | None = Field(default=None, gt=0)
    """Use the first `rows` rows; the built-in task is endless and needs it."""
    records_seed: int = 0
    format: Literal["auto", "prompt_completion", "messages", "text", "classification"] = "auto"
    """`classification` (encoders): text, or text_a and text_b, and label. Encoder-decoders read prompt and write completion."""
    max_length: int = Field(default=512, gt=1)
    """Tokens of a row; of an encoder-decoder, of prompt and completion each."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What becomes of a row of more than `max_length` tokens. The number of them is logged."""
    batching: Literal["grouped", "packed"] = "grouped"
    """`grouped`: rows of like length padded together. `packed`: rows laid end to end, attention kept within each."""


class Train(Section):
    steps: int | None = Field(default=None, ge=0)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(gt=0)
    """Rows per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = Field(gt=0)
    """Rows per forward pass on one rank. Accumulation follows: batch_size / (ranks * micro_batch_size)."""
    learning_rate: float = Field(gt=0)
    final_learning_rate: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    dtype: Dtype = "bfloat16"
    activation_checkpointing: bool = False
    head_chunk: int = Field(default=1024, gt=0)
    """Tokens whose logits exist at one time."""
    deepspeed: str = "zero3"
    """A name in ds_configs/ or a path to a DeepSpeed JSON of your own."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves only at the end or when stopped."""
    keep_checkpoints: int = Field(default=2, gt=0)
    log_every: int = Field(default=10, gt=0)
    timeout_seconds: int = Field(default=1800, gt=0)
    """How long a rank waits for another before the run ends."""
    wandb: str | None = None
    """Weights & Biases project, if the run is to be logged there."""

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps: how long to train is said once; give exactly one of steps and epochs")
        if self.steps and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} warm-up steps in {self.steps} steps; write a number from 0 to {self.steps - 1}"
            )
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size: {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}; write one"
            )
        return self


class Cache(Section):
    """What `llmkd cache` writes and `teacher.placement: cache` reads. Only `dtype` and `top_k` change what a student becomes."""

    path: str | None = None
    """The cache's folder; default: cache/ in the run's folder."""
    dtype: Literal["bfloat16", "fp8", "int8", "float32"] = "bfloat16"
    """How a state is stored; fp8 (e4m3) and int8 with one scale per token, at half of bfloat16's bytes."""
    top_k: int | None = Field(default=None, gt=0)
    """Store the likeliest tokens' log-probabilities in place of the final state; only forward_kl can use them."""
    teacher_placement: WithWeights | None = None
    """Where the teacher lives while the cache is written; default: as teacher.placement says, or replicated if that is cache."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Rows per forward pass of the teacher while the cache is written; default: train.micro_batch_size."""
    shard_mib: float = Field(default=256, gt=0)
    """About how large one file is, and so how much is computed again after a kill."""
    verify: Literal["auto", "start", "read"] = "auto"
    """When checksums are compared: all before training (start), each file when it is first read, or start up to 8 GiB (auto)."""


class Finetune(Section):
    """How the teacher is made: the same loop with cross-entropy alone."""

    path: str | None = None
    """HF folder or hub name to start from; else a new model of `architecture` with a byte-level BPE trained on the data."""
    architecture: Architecture | None = None
    train: Train
    data: Data | None = None
    """The data to fine-tune on, where it differs from the students'."""
    seed: int = Field(default=0, ge=0)
    """Of the teacher's own data order and new weights; the recipe's seed is the students'."""

    @model_validator(mode="after")
    def _one_start(self) -> Finetune:
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                "finetune: a teacher has one start; give exactly one of path (a checkpoint) and architecture (from nothing)"
            )
        return self
