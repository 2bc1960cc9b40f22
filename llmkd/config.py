"""The recipe: one YAML file that says one run, whole. Frozen and strict: an unknown key is an error that names the nearest.

`load_recipe("recipes/quickstart.yaml", ["train.steps=50"])` gives a `Recipe`. Every number lives here once; code passes
single values on (`temperature=recipe.loss.temperature`), never the recipe, to the floors below.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmkd.divergences import DIVERGENCES, with_parameters
from llmkd.errors import InputError
from llmkd.layer_map import CHOICES
from llmkd.matching import KNOWN, terms_of
from llmkd.objective import Change

_HERE = Path(__file__).resolve().parent
ROOT = _HERE.parent if (_HERE.parent / "ds_configs").is_dir() else _HERE / "_shipped"
"""The folder of recipes/, ds_configs/ and eval/: the repository, or what a wheel carries."""
Dtype = Literal["float32", "bfloat16"]
Positions = Literal["trained", "attended"]
Backend = Literal["auto", "hf", "vllm"]
"""auto: vLLM where it is installed and the model is large enough to repay its start, else Hugging Face; the log says which and why."""


class Section(BaseModel):
    """A part of the recipe: immutable, closed to keys that it does not know and to values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Architecture(Section):
    """The shape of a model made from nothing, in `transformers.Qwen3Config`'s names, whatever its type."""

    model_type: Literal["qwen3", "bert", "t5", "bart"] = "qwen3"
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    """Of an encoder-decoder, of its encoder."""
    decoder_layers: int | None = Field(default=None, gt=0)
    """Blocks of an encoder-decoder's decoder, where they are not as many."""
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    """qwen3 alone, and needed there."""
    head_dim: int | None = Field(default=None, gt=0)
    """Needed for qwen3; t5 may have another than hidden_size / num_attention_heads."""
    max_position_embeddings: int = Field(gt=0)
    """Of t5, which has none, no more than a bound on data.max_length."""
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _of_its_type(self) -> Architecture:
        for key, types in (("num_key_value_heads", ("qwen3",)), ("head_dim", ("qwen3", "t5"))):
            if self.model_type == "qwen3" and getattr(self, key) is None:
                raise ValueError(f"{key}: a qwen3 model needs it; add it")
            if self.model_type not in types and getattr(self, key) is not None:
                raise ValueError(f"{key}: a {self.model_type} model has no such setting; leave it out")
        if self.decoder_layers is not None and self.model_type not in ("t5", "bart"):
            raise ValueError(f"decoder_layers: a {self.model_type} model has one stack of blocks; leave it out")
        if self.model_type in ("bert", "bart") and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} heads can't share a width of {self.hidden_size}; write a divisor"
            )
        return self


class Teacher(Section):
    path: str | None = None
    """HF folder or hub name. Left out when the recipe's `finetune` makes the teacher."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    trust_remote_code: bool = False
    """Run the model repository's own Python code. Off unless you trust its authors."""
    placement: Literal["replicated", "zero3", "pipeline", "cache"] = "replicated"
    """`replicated`: a whole teacher per rank. `zero3`: sharded over the ranks, one block gathered at a time. `pipeline`: each rank
    holds some blocks, and states stream to the rank that owns the micro-batch. `cache`: not there at all; what it said was written by
    `llmkd cache`, once, and is read from disk. docs/placements.md says which to choose."""
    stages: int | None = Field(default=None, gt=0)
    """Ranks that make up one pipelined teacher; default: those of a node."""
    share_cache: bool = False
    """`llmkd study` writes one cache for all its students first, and trains them from it."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where a zero3 teacher's shards rest between uses."""
    dtype: Dtype = "bfloat16"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    offload_states: bool = False
    """Let the mapped blocks' states wait for the student in pinned host memory; worth it where the student takes them late
    (`reverse`: its first block takes the teacher's last state)."""
    architecture: Architecture | None = None
    """The teacher's shape, so that `llmkd plan` works where neither folder nor hub can be read."""

    @model_validator(mode="after")
    def _placed(self) -> Teacher:
        # a cache may be written by a zero3 teacher or by a pipeline
        if self.offload != "none" and self.placement not in ("zero3", "cache"):
            raise ValueError(
                "teacher.offload: only a zero3 teacher is offloaded; write placement: zero3, or offload: none"
            )
        if self.offload_states and self.placement == "pipeline":
            raise ValueError(
                "teacher.offload_states: a pipelined teacher's states arrive when they are needed; write false, or another placement"
            )
        if self.stages is not None and self.placement not in ("pipeline", "cache"):
            raise ValueError(
                "teacher.stages: only a pipelined teacher has them; write placement: pipeline, or leave it out"
            )
        return self


class Student(Section):
    init: Literal["teacher", "checkpoint", "random"] = "teacher"
    """`teacher`: copy blocks of the teacher. `checkpoint`: start from `path`. `random`: the teacher's shape, new weights."""
    blocks: int | None = Field(default=None, gt=0)
    """Number of blocks, for init teacher and random; of an encoder-decoder, of its encoder."""
    decoder_blocks: int | None = Field(default=None, gt=0)
    """Number of blocks of an encoder-decoder's decoder, where it is another than the encoder's."""
    classifier: Literal["new", "copied"] | None = None
    """Encoders, init teacher: whether the map to the classes is drawn anew (the default, as the layer-selection paper's code has it) or
    the teacher's."""
    copy_blocks: Literal["spread", "matched"] | tuple[int, ...] = "spread"
    """Which teacher blocks are copied: `spread` first to last evenly, `matched` those of the forward map, or their numbers."""
    path: str | None = None
    hidden_size: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    num_attention_heads: int | None = Field(default=None, gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    head_dim: int | None = Field(default=None, gt=0)
    trust_remote_code: bool = False
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"

    @property
    def width(self) -> dict[str, int]:
        """The width keys that are set, in `transformers`' names."""
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _consistent(self) -> Student:
        if self.init == "checkpoint" and self.path is None:
            raise ValueError("student.path: init checkpoint needs the HF folder or hub name to start from")
        if self.init != "checkpoint" and self.path is not None:
            raise ValueError(f"student.path: only init checkpoint reads it; write init: checkpoint (now {self.init})")
        if self.init != "checkpoint" and self.blocks is None:
            raise ValueError("student.blocks: say how many blocks the student has, e.g. blocks: 9")
        if self.decoder_blocks is not None and self.init == "checkpoint":
            raise ValueError("student.decoder_blocks: a checkpoint has its own depth; leave it out")
        if self.classifier is not None and self.init != "teacher":
            raise ValueError(f"student.classifier: only init teacher reads it (now {self.init}); leave it out")
        if self.init != "random" and self.width:
            raise ValueError(
                f"student.{next(iter(self.width))}: copied blocks keep the teacher's width; leave it out, or write init: random"
            )
        if isinstance(self.copy_blocks, tuple) and len(self.copy_blocks) != self.blocks:
            raise ValueError(
                f"student.copy_blocks: names {len(self.copy_blocks)} blocks, student.blocks says {self.blocks}; "
                "make them equal"
            )
        return self


class Matching(Section):
    strategy: str = "forward"
    """One of llmkd.layer_map.STRATEGIES; `nearest`, measured before the first step; or `explicit` with `pairs`."""
    pairs: tuple[tuple[int, int], ...] | None = None
    """(student block, teacher block), 0-based, for strategy explicit."""
    target_block: int | None = Field(default=None, ge=0)
    """The one teacher block of all_to_one; default the middle one."""
    redraw_every: int = Field(default=0, ge=0)
    """in_order_random: draw the map again after so many steps; 0 draws it once."""
    distance: str | dict[str, float] = "normalized_mse"
    """One of llmkd.matching.KNOWN, or several with their weights: {procrustes: 1.0, mse: 0.1}."""
    pair_weights: tuple[float, ...] | None = None
    """What each pair counts in the hidden loss, in the map's order (the embeddings' first); default 1 each."""
    tokens: int | None = Field(default=None, gt=1)
    """Compare so many tokens per micro-batch, drawn anew each time; default all. It makes set-level distances cheap."""
    scope: Literal["micro_batch", "batch"] = "micro_batch"
    """What a set-level distance is over: a rank's own micro-batch, or the micro-batches of all ranks together."""
    positions: Positions = "attended"
    """Match every token that is not padding, or only those whose next token is trained."""
    final_state: Literal["raw", "normed"] = "raw"
    """Compare the last blocks' outputs before or after the final norm (the layer-selection paper's Qwen3 code: after)."""
    embedding: bool = False
    """Match the embeddings' outputs too (the paper does for BERT, BART and T5, not for Qwen3)."""
    projector_bias: bool = False

    @model_validator(mode="after")
    def _known(self) -> Matching:
        _one_of("matching.strategy", self.strategy, CHOICES)
        if self.redraw_every and self.strategy != "in_order_random":
            raise ValueError(
                f"matching.redraw_every: strategy {self.strategy} is not drawn again; write strategy: in_order_random, or leave it out"
            )
        _weighted("matching.distance", self.distances, KNOWN)
        if self.scope == "batch" and not any(term.of_set for term in terms_of(self.distances)):
            raise ValueError(
                f"matching.scope: {' and '.join(self.distances)} compares token by token, wherever the tokens are; leave it out"
            )
        if self.pair_weights is not None and not (min(self.pair_weights, default=0) >= 0 and any(self.pair_weights)):
            raise ValueError(
                f"matching.pair_weights: {list(self.pair_weights)}; write numbers from 0 up, one of them above 0"
            )
        return self

    @property
    def distances(self) -> dict[str, float]:
        """Each distance's weight in a pair's sum."""
        return {self.distance: 1.0} if isinstance(self.distance, str) else self.distance

    @property
    def needs_projector(self) -> bool:
        """Whether states of two widths must be brought to one."""
        return not all(term.width_free for term in terms_of(self.distances))


class Schedule(Section):
    """How a weight of the loss moves from the value that `loss` gives it; a function of the step alone."""

    shape: Literal["constant", "linear", "cosine"] = "cosine"
    final: float | None = Field(default=None, ge=0)
    """Where it ends."""
    until: float = Field(default=1.0, gt=0, le=1)
    """The share of the run after which it stands there."""

    @model_validator(mode="after")
    def _ends(self) -> Schedule:
        if (self.final is None) == (self.shape in ("linear", "cosine")):
            cure = "leave it out" if self.final is not None else "say where it ends, e.g. final: 0.0"
            raise ValueError(
                f"final: shape {self.shape} {'does not read' if self.final is not None else 'needs'} it; {cure}"
            )
        return self

    @property
    def change(self) -> Change | None:
        """The same for the floors below; None where nothing changes."""
        if self.final is None or self.shape not in ("linear", "cosine"):
            return None
        return Change("linear" if self.shape == "linear" else "cosine", self.final, self.until)


class TemperatureSchedule(Schedule):
    shape: Literal["constant", "linear", "cosine", "dynamic"] = "cosine"  # type: ignore[assignment]
    """`dynamic`: by the gap between the student's and the teacher's cross-entropy (llmkd.schedules.dynamic_temperature)."""
    final: float | None = Field(default=None, gt=0)
    minimum: float | None = Field(default=None, gt=0)
    """dynamic: the least aim; default half of loss.temperature."""
    maximum: float | None = Field(default=None, gt=0)
    """dynamic: the largest aim; default loss.temperature."""
    every: int = Field(default=10, gt=0)
    """dynamic: steps from one change to the next; at that step the two cross-entropies are waited for."""

    @model_validator(mode="after")
    def _bounds(self) -> TemperatureSchedule:
        given = [key for key in ("minimum", "maximum") if getattr(self, key) is not None]
        if given and self.shape != "dynamic":
            raise ValueError(f"{given[0]}: shape {self.shape} does not read it; leave it out, or write shape: dynamic")
        return self


class Schedules(Section):
    ce: Schedule | None = None
    kl: Schedule | None = None
    hidden: Schedule | None = None
    temperature: TemperatureSchedule | None = None

    def change(self, part: str) -> Change | None:
        """How the weight of ce, kl or hidden moves, if it does."""
        found: Schedule | None = getattr(self, part)
        return None if found is None else found.change


class Loss(Section):
    ce: float = Field(default=1.0, ge=0)
    kl: float = Field(default=1.0, ge=0)
    hidden: float = Field(default=3.0, ge=0)
    divergence: str | dict[str, float] = "forward_kl"
    """One of llmkd.divergences.DIVERGENCES, or several with their weights: {forward_kl: 0.5, reverse_kl: 0.5}."""
    beta: float | None = Field(default=None, ge=0, le=1)
    """jsd: the teacher's share of the mixture; default 0.5, which is symmetric."""
    skew: float | None = Field(default=None, ge=0, lt=1)
    """skew_kl and skew_reverse_kl: how much of its own first side the mixture holds; default 0.1."""
    akl_mu: float | None = Field(default=None, ge=0, le=1)
    """akl: how much of the teacher's probability is its head; default 0.5."""
    top_k: int | None = Field(default=None, gt=0)
    """top_k: how many of the teacher's likeliest tokens are compared one by one; default 64."""
    temperature: float = Field(default=1.0, gt=0)
    kl_positions: Positions = "trained"
    """Where the divergence is taken: where the next token is trained, or at every token that is not padding (the paper's code)."""

    schedules: Schedules | None = None
    """How the weights and the temperature move while the student learns; left out, they stand."""
    report_norms_every: int = Field(default=0, ge=0)
    """Steps between reports of the norm of each part's gradient (llmkd.term_norms); 0 reports none."""

    @model_validator(mode="after")
    def _known(self) -> Loss:
        _weighted(
            "loss.divergence",
            {self.divergence: 1.0} if isinstance(self.divergence, str) else self.divergence,
            DIVERGENCES,
        )
        with_parameters(self.divergence, self.parameters)
        for part in ("ce", "kl", "hidden"):
            if self.schedules is not None and getattr(self.schedules, part) is not None and getattr(self, part) == 0:
                raise ValueError(
                    f"loss.schedules.{part}: it starts at loss.{part}, which is 0, and a part that begins without weight is left out of "
                    f"the run; write loss.{part}: 1e-6, say, or leave the schedule out"
                )
        dynamic = None if self.schedules is None else self.schedules.temperature
        low, high = (None, None) if dynamic is None else (dynamic.minimum, dynamic.maximum)
        if (low or self.temperature / 2) > (high or self.temperature):
            raise ValueError(
                f"loss.schedules.temperature.minimum: {low or self.temperature / 2} is above the maximum, {high or self.temperature}; "
                "write both, the smaller as minimum"
            )
        return self

    @property
    def parameters(self) -> dict[str, float | None]:
        """What the divergence may read besides the temperature, by its own names."""
        return {"beta": self.beta, "skew": self.skew, "akl_mu": self.akl_mu, "top_k": self.top_k}


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
    teacher_placement: Literal["replicated", "zero3", "pipeline"] | None = None
    """Where the teacher lives while the cache is written; default: as teacher.placement says, or replicated if that is cache."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Rows per forward pass of the teacher while the cache is written; default: train.micro_batch_size."""
    shard_mib: float = Field(default=256, gt=0)
    """About how large one file is, and so how much is computed again after a kill."""
    verify: Literal["auto", "start", "read"] = "auto"
    """When checksums are compared: all before training (start), each file when it is first read, or start up to 8 GiB (auto)."""


class Stones(Section):
    """Block-wise logit distillation: the student's lower blocks under the teacher's upper ones, beside the student's own loss."""

    pairs: Literal["from_map"] | tuple[tuple[int, int], ...] = "from_map"
    """One stone per (student block, teacher block): the teacher goes on from after its block. `from_map`: the layer map's pairs."""
    ce: float = Field(default=1.0, ge=0)
    """Weight of the stones' cross-entropy; of n stones, by student block, the i-th counts 1/2^(n-i)."""
    kl: float = Field(default=1.0, ge=0)
    """Weight of the stones' divergence from the teacher, at loss.divergence, temperature and kl_positions."""
    cross: float = Field(default=0.0, ge=0)
    """Weight of the divergence of each stone and of the student from the stones' mean logits, which carry no gradient."""
    sample: Literal["all", "one"] = "all"
    """`one`: a stone drawn per step, in proportion to its share, with the weight of all: unbiased, at a fraction of the cost."""
    connector_batches: int = Field(default=4, gt=0)
    """Batches of train.batch_size rows on which the connectors are fitted before the first step."""
    checkpoint: bool = True
    """Keep the teacher blocks' inputs alone, and run each again for its gradient. A zero3 teacher needs it."""

    @model_validator(mode="after")
    def _consistent(self) -> Stones:
        if not (self.ce or self.kl or self.cross):
            raise ValueError("stones: ce, kl and cross are all 0; give one of them a weight, or leave out stones")
        if self.sample == "one" and self.cross:
            raise ValueError("stones.sample: the cross term needs every stone's logits; write all, or cross: 0")
        if isinstance(self.pairs, tuple):
            students = [student for student, _ in self.pairs]
            if not students or len(set(students)) != len(students):
                raise ValueError(
                    f"stones.pairs: {[list(pair) for pair in self.pairs]} must name at least one pair, and each student block once; "
                    "write e.g. [[0, 3], [1, 7]]"
                )
        return self


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
        if self.angles_rows and self.generation is None:
            raise ValueError("angles_rows: the held-out rows are those of evaluation.generation; add that section")
        return self


class Margin(Section):
    metric: str = Field(pattern=r"^[^/]+/.+$")
    """`generation/bleu`, `agreement/kl`, or an lm-eval task and its metric, `hellaswag/acc_norm`."""
    within: float = Field(gt=0)
    """In the metric's own unit."""


_VARIED = ("student", "matching", "loss", "train", "stones")


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
            _one_of("study.strategies", strategy, CHOICES)
        for name, changes in self.variants.items():
            _check_variant(name, changes)
        for field, values in (("strategies", self.strategies), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"study.{field}: {list(values)} names one twice; write each once")
        trained = [*self.students, *(name for name in self.baselines if name == "ce_only")]
        if self.reference is not None:
            _one_of("study.reference", self.reference, trained)
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
    taken = (*CHOICES, "ce_only", "undistilled", "teacher")
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


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the run's folder."""
    output: str = "runs"
    """The run's folder is `output`/`name`."""
    seed: int = Field(default=0, ge=0)
    """Of the data order, new weights, projectors and random maps."""
    teacher: Teacher = Field(default_factory=Teacher)
    finetune: Finetune | None = None
    student: Student
    matching: Matching = Field(default_factory=Matching)
    loss: Loss = Field(default_factory=Loss)
    stones: Stones | None = None
    """Left out: no stepping stones."""
    data: Data = Field(default_factory=Data)
    train: Train
    cache: Cache = Field(default_factory=Cache)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    study: Study = Field(default_factory=Study)

    @model_validator(mode="after")
    def _one_teacher(self) -> Recipe:
        if (self.teacher.path is None) == (self.finetune is None):
            raise ValueError(
                "teacher.path: there is one teacher; give either teacher.path (where it is) or finetune (how to make it)"
            )
        for where, data in (("data", self.data), ("finetune.data", self.finetune.data if self.finetune else None)):
            if data is not None and data.source == "records" and data.rows is None:
                raise ValueError(f"{where}.rows: the built-in task is endless; say how many to use, e.g. rows: 20000")
        return self

    @model_validator(mode="after")
    def _teacher_is_heard(self) -> Recipe:
        moving = None if self.loss.schedules is None else self.loss.schedules.temperature
        reads_cache = self.teacher.placement == "cache" or self.teacher.share_cache
        if moving is not None and moving.shape == "dynamic" and reads_cache and self.cache.top_k:
            raise ValueError(
                "loss.schedules.temperature: dynamic reads the teacher's own cross-entropy, which a cache of the likeliest tokens does not "
                "hold; leave out cache.top_k, or write another shape"
            )
        return self

    @model_validator(mode="after")
    def _map_in_place(self) -> Recipe:
        moves = (
            "redraw_every"
            if self.matching.redraw_every
            else "strategy"
            if self.matching.strategy == "nearest"
            else None
        )
        if moves is None or (self.teacher.placement in ("replicated", "zero3") and not self.teacher.share_cache):
            return self
        where = "share_cache" if self.teacher.share_cache else f"placement {self.teacher.placement}"
        reason = "has the blocks of one map, known before training"
        if moves == "redraw_every":
            raise ValueError(
                f"matching.redraw_every: a teacher under {where} {reason}; write teacher.placement: replicated or zero3, or redraw_every: 0"
            )
        raise ValueError(
            f"matching.strategy: nearest is measured, and a teacher under {where} {reason}; write teacher.placement: replicated or zero3, "
            "or measure with one (train.steps: 1) and write the pairs of its map.json here, with strategy: explicit"
        )

    @model_validator(mode="after")
    def _top_k_is_enough(self) -> Recipe:
        reads_cache = self.teacher.placement == "cache" or self.teacher.share_cache
        if reads_cache and self.cache.top_k and self.loss.kl and self.loss.divergence != "forward_kl":
            raise ValueError(
                f"loss.divergence: {self.loss.divergence} needs the teacher's whole distribution, and cache.top_k keeps the likeliest "
                "tokens alone; write divergence: forward_kl, or leave out cache.top_k"
            )
        return self

    @model_validator(mode="after")
    def _stones_have_a_teacher(self) -> Recipe:
        if self.stones is None:
            return self
        if self.teacher.placement in ("pipeline", "cache") or self.teacher.share_cache:
            placed = "share_cache" if self.teacher.share_cache else f"placement {self.teacher.placement}"
            raise ValueError(
                f"stones: they run the teacher's upper blocks on the student's states, which {placed} has no place for; write "
                "teacher.placement: replicated or zero3, or leave out stones"
            )
        if self.teacher.placement == "zero3" and not self.stones.checkpoint:
            raise ValueError(
                "stones.checkpoint: a zero3 teacher's blocks are let go between the passes; write true, or placement: replicated"
            )
        return self

    @property
    def logits(self) -> bool:
        """Whether anything is asked of the teacher's logits."""
        return self.loss.kl > 0 or self.stones is not None

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def cache_folder(self) -> Path:
        """Where the teacher's cache is written and read."""
        return Path(self.cache.path) if self.cache.path else self.folder / "cache"

    @property
    def teacher_path(self) -> str:
        """Where the teacher is read: the given path, or what `finetune` makes."""
        return self.teacher.path or str(self.folder / "teacher" / "model")

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced, checked again: `recipe.changed({"matching.strategy": "reverse"})`."""
        values = self.model_dump(mode="json")
        for key, value in changes.items():
            _put(values, key, value)
        return _validated(values, "the changed recipe")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides (values in YAML). Raises InputError for all it can't understand."""
    file = find_recipe(path)
    values = _yaml(_text(file), str(file))
    if not isinstance(values, dict):
        raise InputError(f"{file}: a recipe is a mapping of sections; write teacher:, student:, train: and so on")
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise InputError(f"--set {override!r}: no value is given; write key.sub=value, e.g. --set train.steps=100")
        _put(values, key.strip(), _yaml(text, f"--set {override!r}"))
    return _validated(values, str(file))


def find_recipe(path: str | Path) -> Path:
    """The recipe file: the path itself, or a bare name in recipes/."""
    for candidate in (Path(path), ROOT / "recipes" / f"{path}.yaml", ROOT / path):
        if candidate.is_file():
            return candidate
    known = sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
    raise InputError(f"recipe {str(path)!r}: no such file; give the path of a YAML file, or one of {', '.join(known)}")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)


def training_inputs(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that decides what a student becomes, flat and dotted; logging and saving are left out.

    A teacher that the recipe makes counts by how it is made, so that the run's folder may be renamed or moved.
    """
    values = recipe.model_dump(mode="json", exclude={"name", "output", "evaluation", "study", "finetune"})
    for key in ("architecture", "offload_states", "share_cache", "stages"):  # stages, like ranks, change nothing
        values["teacher"].pop(key)
    values["loss"] = {key: value for key, value in values["loss"].items() if value is not None}
    for key in (
        "decoder_blocks",
        "classifier",
    ):  # of other families; left out, they are not part of a decoder's fingerprint
        if values["student"][key] is None:
            values["student"].pop(key)
    # What came later and is not asked for is not named, so that a run begun before it came goes on.
    values["matching"] = {key: value for key, value in values["matching"].items() if value != _LATER.get(key, ...)}
    cache = values.pop("cache")
    if values["stones"] is None:
        values.pop("stones")
    if recipe.teacher.placement == "cache":
        values["cache"] = {"dtype": cache["dtype"], "top_k": cache["top_k"]}
    values["loss"].pop("report_norms_every")
    inputs = {key: value for key, value in flat(values).items() if key not in _SAVING}
    return {**inputs, **(finetune_inputs(recipe) if recipe.finetune else {})}


def finetune_inputs(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that decides what its teacher becomes, flat and dotted; logging and saving are left out."""
    assert recipe.finetune is not None
    values = recipe.finetune.model_dump(mode="json")
    values["data"] = (recipe.finetune.data or recipe.data).model_dump(mode="json")
    if values["architecture"] is not None:  # other families' keys, as in training_inputs
        for key, usual in (("model_type", "qwen3"), ("decoder_layers", None)):
            if values["architecture"][key] == usual:
                values["architecture"].pop(key)
    return {f"finetune.{key}": value for key, value in flat(values).items() if key not in _SAVING}


_LATER = {"redraw_every": 0, "pair_weights": None, "tokens": None, "scope": "micro_batch"}
"""Keys of `matching` that came after the first runs, with the values that change nothing."""
_SAVING = tuple(f"train.{key}" for key in ("save_every", "keep_checkpoints", "log_every", "timeout_seconds", "wandb"))


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short hash of JSON-like values, the same on every machine."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice (the first would be dropped in silence) and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
            if key_node.value in seen:
                problem = f"key {key_node.value!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads back as it was."""


for _side in (_Loader, _Dumper):  # YAML 1.1 asks for a point and a sign in 1.0e-4; people write 1e-4
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read as a text ({error}); give a YAML file") from error


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: makes no objects
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{where}: not valid YAML{place} ({problem}); mend it") from error


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise InputError(
                f"--set {key}: {parent} is a value, not a section; set {key.split('.' + last)[0]} as a whole"
            )
    values[last] = value


def _validated(values: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate_json(
            json.dumps(values, default=str)
        )  # as JSON: strict, yet a list may fill a tuple
    except ValidationError as error:
        raise InputError(f"{where}: {_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    """A pydantic error in one sentence with the cure: an unknown key, which may be a missing one misspelt, or the first."""
    problem = next((e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0])
    # less the kinds of value that a key may have, which pydantic names: `str`, `dict[str,float]`
    location = [part for part in problem["loc"] if not (isinstance(part, str) and ("[" in part or part == "str"))]
    key = ".".join(str(part) for part in location)
    kind = problem["type"]
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = _keys_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}")
    if kind == "missing":
        return f"key {key!r} is missing; add it"
    if kind == "value_error":  # a validator's own sentence; it names its key in full, or from the section down
        return message if not location or message.startswith(str(location[0])) else f"{key}.{message}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key}: a section is a mapping of keys (got {problem['input']!r}); write at least one of {', '.join(_keys_at(location))}"
    cure = "; write it in quotes" if kind == "string_type" else ""
    return f"{key}: {message[0].lower()}{message[1:]} (got {problem['input']!r}){cure}"


def _keys_at(location: Sequence[Any]) -> list[str]:
    section: Any = Recipe
    for part in location:
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(option for option in options if isinstance(option, type) and issubclass(option, Section))
    return list(section.model_fields)


def _weighted(key: str, weights: Mapping[str, float], known: Mapping[str, Any]) -> None:
    for name in weights:
        _one_of(key, name, known)
    for name, weight in weights.items():
        if weight <= 0:
            raise ValueError(f"{key}.{name}: a weight of {weight}; write a number above 0, or leave {name} out")
    if not weights:
        raise ValueError(f"{key}: names none; write one of {', '.join(known)}, or several with their weights")


def _one_of(key: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{key}: {value!r} is not known; {hint}choose from {', '.join(known)}")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> one level of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result
