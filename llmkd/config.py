"""The recipe: one YAML file that says one run, whole. Frozen and strict; an unknown key is an error that names the nearest one.

`load_recipe("recipes/quickstart.yaml", ["train.steps=50"])` gives a `Recipe`. Every number lives here once; code passes single values on
(`temperature=recipe.loss.temperature`), never the recipe, to the floors below.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmkd.distances import DISTANCES
from llmkd.divergences import DIVERGENCES
from llmkd.errors import InputError
from llmkd.layer_map import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
Dtype = Literal["float32", "bfloat16"]
Positions = Literal["trained", "attended"]


class Section(BaseModel):
    """A part of the recipe: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Architecture(Section):
    """The shape of a Qwen3 model made from nothing, in `transformers.Qwen3Config`'s names."""

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False


class Teacher(Section):
    path: str | None = None
    """HF folder or hub name. Left out when the recipe's `finetune` makes the teacher."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    trust_remote_code: bool = False
    """Run the model repository's own Python code. Off unless you trust its authors."""
    placement: Literal["replicated", "zero3"] = "replicated"
    """`replicated`: a whole teacher per rank. `zero3`: sharded over the ranks, one block gathered at a time."""
    offload: Literal["none", "cpu"] = "none"
    """Where a zero3 teacher's shards rest between uses."""
    dtype: Dtype = "bfloat16"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    architecture: Architecture | None = None
    """The teacher's shape, so that `llmkd plan` works where neither folder nor hub can be read."""

    @model_validator(mode="after")
    def _offload_needs_zero3(self) -> Teacher:
        if self.offload != "none" and self.placement != "zero3":
            raise ValueError("teacher.offload: only a zero3 teacher is offloaded; write placement: zero3 or offload: none")
        return self


class Student(Section):
    init: Literal["teacher", "checkpoint", "random"] = "teacher"
    """`teacher`: copy blocks of the teacher. `checkpoint`: start from `path`. `random`: the teacher's shape, new weights."""
    blocks: int | None = Field(default=None, gt=0)
    """Number of blocks, for init teacher and random."""
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
        if self.init != "random" and self.width:
            raise ValueError(
                f"student.{next(iter(self.width))}: a width of its own needs init: random (copied blocks keep the teacher's width)"
            )
        if isinstance(self.copy_blocks, tuple) and len(self.copy_blocks) != self.blocks:
            raise ValueError(f"student.copy_blocks: names {len(self.copy_blocks)} blocks, student.blocks says {self.blocks}; make them equal")
        return self


class Matching(Section):
    strategy: str = "forward"
    """One of llmkd.layer_map.STRATEGIES, or `explicit` with `pairs`."""
    pairs: tuple[tuple[int, int], ...] | None = None
    """(student block, teacher block), 0-based, for strategy explicit."""
    target_block: int | None = Field(default=None, ge=0)
    """The one teacher block of all_to_one; default the middle one."""
    distance: str = "normalized_mse"
    positions: Positions = "attended"
    """Match every token that is not padding, or only those whose next token is trained."""
    final_state: Literal["raw", "normed"] = "raw"
    """Compare the last blocks' outputs before or after the final norm (the layer-selection paper's Qwen3 code: after)."""
    embedding: bool = False
    """Match the embeddings' outputs too (the paper does for BERT, BART and T5, not for Qwen3)."""
    projector_bias: bool = False

    @model_validator(mode="after")
    def _known(self) -> Matching:
        _one_of("matching.strategy", self.strategy, [*STRATEGIES, "explicit"])
        _one_of("matching.distance", self.distance, DISTANCES)
        return self


class Loss(Section):
    ce: float = Field(default=1.0, ge=0)
    kl: float = Field(default=1.0, ge=0)
    hidden: float = Field(default=3.0, ge=0)
    divergence: str = "forward_kl"
    temperature: float = Field(default=1.0, gt=0)
    kl_positions: Positions = "trained"
    """Where the divergence is taken: where the next token is trained, or at every token that is not padding (the paper's code)."""

    @model_validator(mode="after")
    def _known(self) -> Loss:
        _one_of("loss.divergence", self.divergence, DIVERGENCES)
        return self


class Data(Section):
    source: str = "records"
    """`records` (the built-in task), a local .jsonl/.json/.parquet/.csv (may be .gz) or a folder of them, or a hub name."""
    name: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    rows: int | None = Field(default=None, gt=0)
    """Use the first `rows` rows; the built-in task is endless and needs it."""
    records_seed: int = 0
    format: Literal["auto", "prompt_completion", "messages", "text"] = "auto"
    max_length: int = Field(default=512, gt=1)
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
            raise ValueError("steps: give exactly one of steps and epochs")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size: {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        return self


class Finetune(Section):
    """How the teacher is made: the same loop with cross-entropy alone."""

    path: str | None = None
    """HF folder or hub name to start from; else a new model of `architecture` with a byte-level BPE trained on the data."""
    architecture: Architecture | None = None
    train: Train
    data: Data | None = None
    """The data to fine-tune on, where it differs from the students'."""

    @model_validator(mode="after")
    def _one_start(self) -> Finetune:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("finetune: give exactly one of path (start from a checkpoint) and architecture (start from nothing)")
        return self


class Evaluation(Section):
    tasks: tuple[str, ...] = ()
    """lm-eval task names."""
    include: str | None = "eval"
    """Folder of further lm-eval YAML tasks, relative to the repository or the current folder."""
    limit: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=32, gt=0)
    dtype: Dtype = "float32"
    num_fewshot: int = Field(default=0, ge=0)
    seed: int = 0
    max_length: int | None = Field(default=None, gt=0)


class Study(Section):
    strategies: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    baselines: tuple[Literal["undistilled", "ce_only"], ...] = ("undistilled", "ce_only")
    ranks: int = Field(default=1, gt=0)
    """Processes on this machine for each training run."""

    @model_validator(mode="after")
    def _known(self) -> Study:
        for strategy in self.strategies:
            _one_of("study.strategies", strategy, [*STRATEGIES, "explicit"])
        for field, values in (("strategies", self.strategies), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"study.{field}: {list(values)} names one twice; each makes one row of the table")
        return self


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
    data: Data = Field(default_factory=Data)
    train: Train
    evaluation: Evaluation = Field(default_factory=Evaluation)
    study: Study = Field(default_factory=Study)

    @model_validator(mode="after")
    def _one_teacher(self) -> Recipe:
        if (self.teacher.path is None) == (self.finetune is None):
            raise ValueError("teacher.path: give either teacher.path (an existing teacher) or finetune (how to make one), not both")
        for data in (self.data, self.finetune.data if self.finetune else None):
            if data is not None and data.source == "records" and data.rows is None:
                raise ValueError("data.rows: the built-in task is endless; say how many rows to use, e.g. rows: 20000")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

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
    """Read a recipe and apply `key.sub=value` overrides (values in YAML). Raises InputError for anything it does not understand."""
    file = find_recipe(path)
    try:
        values = yaml.load(file.read_text(), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: a recipe is a mapping of sections (teacher:, student:, ...), this holds {type(values).__name__}")
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise InputError(f"--set {override!r}: write key.sub=value, e.g. --set train.steps=100")
        try:
            _put(values, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise InputError(f"--set {override!r}: the value is not valid YAML") from error
    return _validated(values, str(file))


def find_recipe(path: str | Path) -> Path:
    """The recipe file: the path itself, or a bare name in recipes/."""
    for candidate in (Path(path), ROOT / "recipes" / f"{path}.yaml", ROOT / path):
        if candidate.is_file():
            return candidate
    known = sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
    raise InputError(f"recipe {str(path)!r}: no such file; give a path to a YAML file or one of {', '.join(known) or '(no recipes found)'}")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def training_inputs(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that decides what a training run computes, flat and dotted; logging and saving are left out."""
    values = recipe.model_dump(mode="json", exclude={"name", "output", "evaluation", "study", "finetune"})
    for key in ("save_every", "keep_checkpoints", "log_every", "timeout_seconds", "wandb"):
        values["train"].pop(key)
    values["teacher"].pop("path")
    values["teacher"]["path"] = recipe.teacher_path
    return flat(values)


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short hash of JSON-like values, the same on every machine."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice (the first would be dropped in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise InputError(f"--set {key}: {parent} is a value, not a section")
    values[last] = value


def _validated(values: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    """The first problem of a pydantic error, in one sentence with the cure."""
    problem = error.errors()[0]
    location = [part for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        section = ".".join(str(part) for part in location)
        return message if not section or message.startswith(section.split(".")[0]) else f"{section}.{message}"
    return f"{key}: {message[0].lower()}{message[1:]} (got {problem['input']!r})"


def _keys_at(location: Sequence[Any]) -> list[str]:
    section: Any = Recipe
    for part in location:
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(option for option in options if isinstance(option, type) and issubclass(option, Section))
    return list(section.model_fields)


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
