"""The models of a recipe: teacher, student, and the shape of a new model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmkd.recipe.placements import PLACEMENTS, Placement, PlacementName
from llmkd.recipe.section import NO_EFFECT, Dtype, Section

Quantize = Literal["none", "nf4"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
MEASURED = ("influence", "perplexity")
"""Rules of `student.copy_blocks` whose blocks are known only when a run has measured them."""

MOST_BLOCKS, MOST_HEADS, MOST_WIDE, MOST_POSITIONS = 1024, 2**16, 2**24, 2**30
"""Of a model: far more than any has, and few enough that `llmkd plan` and `llmkd doctor` end."""


class Architecture(Section):
    """The shape of a new model, in the names of `transformers.Qwen3Config`, whatever its type."""

    model_type: Literal["qwen3", "bert", "t5", "bart"] = "qwen3"
    """The type of model: a decoder, an encoder, or an encoder-decoder."""
    vocab_size: int = Field(gt=0, le=MOST_WIDE)
    """Tokens of the vocabulary."""
    hidden_size: int = Field(gt=0, le=MOST_WIDE)
    """Width of the states between blocks."""
    intermediate_size: int = Field(gt=0, le=MOST_WIDE)
    """Width inside a block's MLP."""
    num_hidden_layers: int = Field(gt=0, le=MOST_BLOCKS)
    """Number of blocks; for an encoder-decoder, those of its encoder."""
    decoder_layers: int | None = Field(default=None, gt=0, le=MOST_BLOCKS)
    """Number of blocks of an encoder-decoder's decoder; default: as many as its encoder's."""
    num_attention_heads: int = Field(gt=0, le=MOST_HEADS)
    """Attention heads of a block."""
    num_key_value_heads: int | None = Field(default=None, gt=0, le=MOST_HEADS)
    """Key-value heads of a block; for qwen3 only, which requires it."""
    head_dim: int | None = Field(default=None, gt=0, le=MOST_WIDE)
    """Width of one head; required by qwen3, possible for t5 (default: hidden_size / num_attention_heads)."""
    max_position_embeddings: int = Field(gt=0, le=MOST_POSITIONS)
    """Longest sequence; t5 has no positions, and for it this is only a bound on data.max_length."""
    rope_theta: float = Field(default=1_000_000.0, gt=0)
    """Base of the rotary position embedding (qwen3)."""
    tie_word_embeddings: bool = False
    """Use one matrix for the input embeddings and the output head."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the new weights."""

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
    """The model that is distilled, and where it is while students train."""

    path: str | None = None
    """HF folder or hub name; left out if the recipe has a section `finetune`, which makes the teacher."""
    adapter: str | None = None
    """A folder of LoRA adapters as peft writes it, trained on the model at `path`: their sum is the teacher. It is written once, as a plain
    model, into teacher/ of the run's folder (`output`/`name`), and read from there."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    trust_remote_code: bool = False
    """Run the model repository's own Python code. Leave it off unless you trust its authors."""
    placement: PlacementName = "replicated"
    """`replicated`: a whole teacher on each rank. `zero3`: sharded over the ranks, gathered block by block. `pipeline`: each rank
    holds some blocks, and states are sent to the rank that owns the micro-batch. `cache`: no teacher is loaded; its states were written
    once by `llmkd cache` and are read from disk. [placements.md](placements.md) helps to choose."""
    stages: Annotated[int | None, NO_EFFECT] = Field(default=None, gt=0)
    """Ranks that share one pipelined teacher; default: those of a node."""
    share_cache: Annotated[bool, NO_EFFECT] = False
    """`llmkd study` writes one cache for all its students first, and trains them from it."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where a zero3 teacher's shards are kept between uses."""
    dtype: Dtype = "bfloat16"
    """The teacher's dtype."""
    attention: Attention = "auto"
    """The teacher's attention implementation; `auto`: varlen, which keeps packed rows apart without a mask, where the model and the GPU
    can have it; else flash_attention_2 where it is installed, there is a GPU and the model is in half precision; else sdpa or eager."""
    quantize: Quantize = "none"
    """`nf4`: while it runs, the weights of the linear maps of the teacher's blocks are kept in 4 bits (QLoRA's NF4 with double
    quantization; package bitsandbytes); embeddings, norms, head and all states stay in `dtype`. For placement replicated, and for a cache
    that such a teacher writes. Copied blocks, texts of the teacher and scores are those of the model at `path`, as it is stored."""
    offload_states: Annotated[bool, NO_EFFECT] = False
    """Keep the teacher's states in pinned host memory until the student's block needs them; useful where that is late (strategy
    `reverse`: the student's first block takes the teacher's last state)."""
    architecture: Annotated[Architecture | None, NO_EFFECT] = None
    """The teacher's shape, for `llmkd plan` where neither the folder nor the hub can be read."""

    @model_validator(mode="after")
    def _placed(self) -> Teacher:
        if self.adapter is not None and self.path is None:
            raise ValueError(
                "teacher.adapter: it is added to a model's weights; write teacher.path too, the model that it was trained on"
            )
        # A cache may be written by a sharded teacher or by a staged one.
        placed = self.placed
        if self.offload != "none" and placed.has_weights and not placed.is_sharded:
            raise ValueError(
                "teacher.offload: only a zero3 teacher can be offloaded; write placement: zero3, or offload: none"
            )
        if self.quantize != "none" and placed.has_weights and not placed.is_whole:
            raise ValueError(
                f"teacher.quantize: weights in 4 bits are not cut into a {self.placement} teacher's shards or stages; write placement: "
                "replicated (of a cache: cache.teacher_placement), or quantize: none"
            )
        if self.offload_states and placed.is_staged:
            raise ValueError(
                "teacher.offload_states: a pipelined teacher's states arrive just in time; write false, or another placement"
            )
        if self.stages is not None and placed.has_weights and not placed.is_staged:
            raise ValueError(
                "teacher.stages: only a pipelined teacher has stages; write placement: pipeline, or leave it out"
            )
        return self

    @property
    def placed(self) -> Placement:
        """What its placement can do."""
        return PLACEMENTS[self.placement]

    @property
    def serving(self) -> Placement:
        """What the placement can do that a study's students learn from: a shared cache takes the place of the teacher's own."""
        return PLACEMENTS["cache"] if self.share_cache else self.placed

    @property
    def serving_name(self) -> str:
        """The setting that decides on `serving`, for messages."""
        return "share_cache" if self.share_cache else f"placement {self.placement}"


class Lora(Section):
    """Low-rank adapters that are trained in place of a model's weights, which stay as they begin (LoRA, arXiv 2106.09685)."""

    rank: int = Field(gt=0, le=MOST_WIDE)
    """Rank of each adapter: its two matrices are rank x inputs and outputs x rank."""
    alpha: float = Field(gt=0)
    """An adapter's product is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapters' inputs that is dropped in training."""
    targets: Literal["all_linear"] | tuple[str, ...] = Field(
        default="all_linear", examples=["all_linear", ["q_proj", "v_proj"]]
    )
    """The linear maps that get adapters: `all_linear` (all those of the blocks, so neither embeddings nor head), or a list of names."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dora: bool = False
    """Train the norm of each of a map's outputs apart from its direction (arXiv 2402.09353)."""
    quantize: Quantize = "none"
    """`nf4`: the weights beside the adapters, those of all linear maps of the blocks, are kept in 4 bits (QLoRA, arXiv 2305.14314; package
    bitsandbytes), and each is made plain where it is computed with. Adapters are added to these plain weights, so that the merged model
    is the one that was trained; it takes as much room as any. Exported apart, they are for the model loaded in nf4. Not with ZeRO-3."""

    @model_validator(mode="after")
    def _has_targets(self) -> Lora:
        if not self.targets:
            raise ValueError("targets: is empty; write all_linear, or the names of linear maps")
        return self


class StudentLora(Lora):
    """As `finetune.lora`, and how the trained adapters are written out."""

    export: Literal["merged", "adapter", "both"] = "merged"
    """`merged`: a plain model, the adapters added to its weights. `adapter`: the adapters alone, as peft writes them, in adapter/ of the
    exported folder; no study scores such a student. `both`. What they are added to is the model at `path`; of any other start the run's
    folder keeps it, as initial/."""


class Student(Section):
    """The model that is trained."""

    init: Literal["teacher", "checkpoint", "random"] = "teacher"
    """`teacher`: copies of teacher blocks. `checkpoint`: the model at `path`. `random`: the teacher's shape with new weights."""
    blocks: int | None = Field(default=None, gt=0, le=MOST_BLOCKS)
    """Number of blocks, for init teacher and random, which require it; for an encoder-decoder, those of its encoder."""
    decoder_blocks: int | None = Field(default=None, gt=0, le=MOST_BLOCKS)
    """Number of blocks of an encoder-decoder's decoder; default: `blocks`."""
    classifier: Literal["new", "copied"] | None = None
    """Encoders with init teacher: whether the map to the classes has new weights (the default, as in the layer-selection paper's code)
    or the teacher's."""
    copy_blocks: Literal["spread", "matched", "influence", "perplexity"] | tuple[int, ...] = Field(
        default="spread", examples=["spread", "matched", [0, 4, 8]]
    )
    """Which teacher blocks are copied: `spread` (evenly from first to last), `matched` (those of the forward map), or a list of them. Or,
    measured of a decoder on the rows of the run's first four steps and kept in its `blocks.json`: `influence` (those that turn the state
    most, by ShortGPT's block influence), `perplexity` (what is left when blocks are removed one by one, each time the one whose removal
    leaves the lowest cross-entropy; the whole teacher is loaded for it on every rank)."""
    path: str | None = None
    """HF folder or hub name, for init checkpoint."""
    adapter: str | None = None
    """As teacher.adapter, trained on the model at `path`: the student starts from their sum."""
    hidden_size: int | None = Field(default=None, gt=0, le=MOST_WIDE)
    """Width of the states between blocks; default, as for the four keys below: the teacher's. Under init random the new model has this
    width, and only there `head_dim` is read. Under init teacher (Qwen3, Llama, Mistral) the copied blocks are narrowed to it: the
    channels, MLP columns and attention heads stay whose activations are largest on the rows of the run's first four steps (Minitron), by
    their numbers in the run's `width.json`."""
    intermediate_size: int | None = Field(default=None, gt=0, le=MOST_WIDE)
    """Width inside a block's MLP."""
    num_attention_heads: int | None = Field(default=None, gt=0, le=MOST_HEADS)
    """Attention heads of a block. Of copied blocks as many stay on each key-value head, at most the teacher's."""
    num_key_value_heads: int | None = Field(default=None, gt=0, le=MOST_HEADS)
    """Key-value heads of a block. Of copied blocks each stays with heads of its own."""
    head_dim: int | None = Field(default=None, gt=0, le=MOST_WIDE)
    """Width of one head, for init random."""
    num_experts: Literal[0] | None = None
    """0, for init random: a dense student of a teacher with experts (Qwen3-MoE), its MLPs `intermediate_size` wide. If left out, blocks of
    new weights have experts where those that `spread` would copy have them."""
    lora: StudentLora | None = None
    """Train adapters alone; `export` says how they are written. If left out, all weights are trained."""
    trust_remote_code: bool = False
    """As teacher.trust_remote_code."""
    attention: Attention = "auto"
    """As teacher.attention."""

    @property
    def measures_blocks(self) -> bool:
        """Whether the blocks that are copied are known only when they have been measured."""
        return self.copy_blocks in MEASURED

    @property
    def narrows(self) -> bool:
        """Whether the copied blocks are narrowed, to parts that are known only when they have been measured."""
        return self.init == "teacher" and bool(self.width)

    @property
    def is_measured(self) -> bool:
        """Whether what is copied is known only when it has been measured."""
        return self.measures_blocks or self.narrows

    @property
    def measured(self) -> str:
        """What of the start is measured, and how it is found, for messages."""
        blocks = f"blocks that copy_blocks: {self.copy_blocks} finds"
        return blocks if self.measures_blocks else f"width that {next(iter(self.width))} finds"

    @property
    def planned_blocks(self) -> str | tuple[int, ...]:
        """The rule by which the student's shape is told before anything is measured or made: as many blocks, of `spread` where its own
        rule is measured or none is copied."""
        return "spread" if self.init != "teacher" or self.measures_blocks else self.copy_blocks

    @property
    def width(self) -> dict[str, int]:
        """The width keys (and the number of experts) that are set, in `transformers`' names."""
        names = (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_experts",
        )
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _consistent(self) -> Student:
        if self.init == "checkpoint" and self.path is None:
            raise ValueError("student.path: init checkpoint needs one; write the HF folder or hub name to start from")
        if self.init != "checkpoint" and self.path is not None:
            raise ValueError(
                f"student.path: only init checkpoint reads it (now {self.init}); write init: checkpoint, or leave it out"
            )
        if self.init != "checkpoint" and self.adapter is not None:
            raise ValueError(
                f"student.adapter: only init checkpoint reads it (now {self.init}); write teacher.adapter, to copy blocks of an adapted "
                "teacher, or leave it out"
            )
        if self.init != "checkpoint" and self.blocks is None:
            raise ValueError("student.blocks: not given; write how many blocks the student has, e.g. blocks: 9")
        if self.decoder_blocks is not None and self.init == "checkpoint":
            raise ValueError("student.decoder_blocks: a checkpoint has its own depth; leave it out")
        if self.classifier is not None and self.init != "teacher":
            raise ValueError(f"student.classifier: only init teacher reads it (now {self.init}); leave it out")
        if self.init == "checkpoint" and self.width:
            raise ValueError(
                f"student.{next(iter(self.width))}: a checkpoint has its own width; leave it out, or write init: teacher or random"
            )
        if self.init == "teacher" and self.head_dim is not None:
            raise ValueError("student.head_dim: copied heads keep the teacher's; leave it out, or write init: random")
        if self.init == "teacher" and self.num_experts is not None:
            raise ValueError(
                "student.num_experts: copied blocks keep their experts; leave it out, or write init: random"
            )
        if self.copy_blocks in MEASURED and self.init != "teacher":
            raise ValueError(
                f"student.copy_blocks: {self.copy_blocks} chooses blocks to copy, and init {self.init} copies none; leave it out"
            )
        if self.init == "random" and self.lora is not None:
            raise ValueError(
                "student.lora: the new weights of init random would stay random; leave lora out, or write init: teacher or checkpoint"
            )
        if isinstance(self.copy_blocks, tuple) and len(self.copy_blocks) != self.blocks:
            raise ValueError(
                f"student.copy_blocks: {len(self.copy_blocks)} blocks for a student of {self.blocks} (student.blocks); "
                "make them equal"
            )
        return self


def check_adapters(student: Student, *, stones: bool, compiled: bool) -> None:
    """Raise ValueError for what has not been shown to work with adapters."""
    if student.lora is None:
        return
    for key, is_set, problem, cure in (
        ("stones", stones, "stepping stones have not been shown to teach adapters", "leave the section out"),
        ("train.compile", compiled, "blocks with adapters have not been shown to compile", "write none"),
    ):
        if is_set:
            raise ValueError(f"{key}: {problem} (student.lora); {cure}, or leave student.lora out")
