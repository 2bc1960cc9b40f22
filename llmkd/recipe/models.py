"""The models of a recipe: teacher, student, and the shape of one made from nothing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkd.recipe.placements import PLACEMENTS, Placement, PlacementName
from llmkd.recipe.section import Dtype, Section


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
    placement: PlacementName = "replicated"
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
        # A cache may be written by a sharded teacher or by a staged one.
        placed = self.placed
        if self.offload != "none" and placed.has_weights and not placed.is_sharded:
            raise ValueError(
                "teacher.offload: only a zero3 teacher is offloaded; write placement: zero3, or offload: none"
            )
        if self.offload_states and placed.is_staged:
            raise ValueError(
                "teacher.offload_states: a pipelined teacher's states arrive when they are needed; write false, or another placement"
            )
        if self.stages is not None and placed.has_weights and not placed.is_staged:
            raise ValueError(
                "teacher.stages: only a pipelined teacher has them; write placement: pipeline, or leave it out"
            )
        return self

    @property
    def placed(self) -> Placement:
        """What its placement can do."""
        return PLACEMENTS[self.placement]

    @property
    def serving(self) -> Placement:
        """What the placement can do that a study's students learn from: a shared cache stands in for the teacher's own."""
        return PLACEMENTS["cache"] if self.share_cache else self.placed

    @property
    def serving_name(self) -> str:
        """The setting that decides on `serving`, for messages."""
        return "share_cache" if self.share_cache else f"placement {self.placement}"


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
    copy_blocks: Literal["spread", "matched"] | tuple[int, ...] = Field(
        default="spread", examples=["spread", "matched", [0, 4, 8]]
    )
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
