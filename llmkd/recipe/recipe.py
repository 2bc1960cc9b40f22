"""The recipe: one YAML file that describes one run completely. Frozen and strict: an unknown key is an error that names the nearest.

`load_recipe("recipes/quickstart.yaml", ["train.steps=50"])` gives a `Recipe`. Every number is here once; the rooms below get
single values (`temperature=recipe.loss.temperature`), never the recipe.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from llmkd.errors import InputError
from llmkd.layer_map import STRATEGIES
from llmkd.losses.distance_sum import KNOWN
from llmkd.recipe.data import Data
from llmkd.recipe.evaluation import Evaluation, Study, with_scoring_dtype
from llmkd.recipe.messages import sentence
from llmkd.recipe.models import Student, Teacher, check_adapters
from llmkd.recipe.objective import Loss, Matching, within
from llmkd.recipe.rollouts import Rollouts, check_rollouts
from llmkd.recipe.run import Cache, Finetune, HeadKernel, Train, check_stream, check_validation, with_batch_size
from llmkd.recipe.section import NO_EFFECT, Section
from llmkd.recipe.stones import Stones, check_lens, check_mixed, check_something_to_learn, check_stones
from llmkd.recipe.yaml_files import RecipeDumper, find_recipe, parse_yaml, read_text


class Recipe(Section):
    name: Annotated[str, NO_EFFECT] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    """Name of the run's folder."""
    output: Annotated[str, NO_EFFECT] = "runs"
    """The run's folder is `output`/`name`."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order, new weights, projectors and random maps."""
    teacher: Teacher = Field(default_factory=Teacher)
    """The model that is distilled."""
    finetune: Finetune | None = None
    """How the teacher is made, if the recipe makes it; given in place of teacher.path."""
    student: Student
    """The model that is trained."""
    matching: Matching = Field(default_factory=Matching)
    """Which blocks are compared, and how."""
    loss: Loss = Field(default_factory=Loss)
    """What is minimised."""
    stones: Stones | None = None
    """Stepping stones; if left out, there are none."""
    data: Data = Field(default_factory=Data)
    """The rows that models are trained on."""
    train: Train
    """The optimizer, the batch, and what is saved."""
    rollouts: Rollouts | None = None
    """Texts that are written during training and trained on; if left out, there are none."""
    cache: Cache = Field(default_factory=Cache)
    """The teacher's states on disk."""
    evaluation: Annotated[Evaluation, NO_EFFECT] = Field(default_factory=Evaluation)
    """How models are scored."""
    study: Annotated[Study, NO_EFFECT] = Field(default_factory=Study)
    """Which students a study trains and compares."""

    @model_validator(mode="after")
    def _one_teacher(self) -> Recipe:
        if (self.teacher.path is None) == (self.finetune is None):
            raise ValueError(
                "teacher.path: give exactly one of teacher.path (where the teacher is) and finetune (how to make it)"
            )
        for where, data in (("data", self.data), ("finetune.data", self.finetune.data if self.finetune else None)):
            if data is not None and not data.sources and data.source == "records" and data.rows is None:
                raise ValueError(f"{where}.rows: the built-in task is endless; write how many to use, e.g. rows: 20000")
        return self

    @model_validator(mode="after")
    def _held_out_rows_have_a_source(self) -> Recipe:
        for key in ("generation", "classification"):
            section = getattr(self.evaluation, key)
            if section is not None and section.source is None and self.data.sources:
                raise ValueError(
                    f"evaluation.{key}.source: the data has several sources; name the one whose held-out rows are read"
                )
        return self

    @model_validator(mode="after")
    def _options_are_read(self) -> Recipe:
        self.matching.check_options(tuple(dict.fromkeys((self.matching.strategy, *self.study_strategies))))
        return self

    @model_validator(mode="after")
    def _has_something_to_learn(self) -> Recipe:
        pairs, stones = self.matching.strategy != "none", self.stones is not None
        check_something_to_learn(self.loss, self.matching.strategy, pairs=pairs, stones=stones)
        return self

    @model_validator(mode="after")
    def _temperature_schedule_is_read(self) -> Recipe:
        schedule = None if self.loss.schedules is None else self.loss.schedules.temperature
        if schedule is None:
            return self
        where, dynamic = "loss.schedules.temperature", schedule.shape == "dynamic"
        if dynamic and not self.teacher.serving.has_weights and self.cache.top_k:
            raise ValueError(
                f"{where}: dynamic reads the teacher's own cross-entropy, which a cache of the likeliest tokens does not hold; leave out "
                "cache.top_k, or write another shape"
            )
        if not self._takes_divergence:
            others = "" if self.stones is None else ", and so are stones.kl and stones.cross"
            raise ValueError(
                f"{where}: loss.kl is 0{others}, so nothing is compared at a temperature; give one a weight, or leave the schedule out"
            )
        if dynamic and not (self.loss.ce or self.loss.kl):
            raise ValueError(
                f"{where}: dynamic reads the student's own cross-entropy, which is not computed with loss.ce and loss.kl at 0; write e.g. "
                "loss.ce: 1e-6, or another shape"
            )
        return self

    @model_validator(mode="after")
    def _schedules_are_read(self) -> Recipe:
        schedules = self.loss.schedules
        if schedules is None:
            return self
        within("distance", "hidden", schedules.distances, self.matching.distances, KNOWN)
        for key, is_read, problem in (
            ("stones", self.stones is not None, "there are no stones; add the section stones"),
            ("distances", self.loss.hidden > 0, "no states are compared, as loss.hidden is 0; give it a weight"),
            ("divergences", self._takes_divergence, "no divergence is taken, as loss.kl is 0; give it a weight"),
        ):
            if getattr(schedules, key) is not None and not is_read:
                raise ValueError(f"loss.schedules.{key}: {problem}, or leave the schedule out")
        return self

    @model_validator(mode="after")
    def _map_is_fixed_where_it_must_be(self) -> Recipe:
        if not self.teacher.serving.needs_fixed_map:
            return self
        reason = f"a teacher with {self.teacher.serving_name} has the blocks of one map, fixed before training"
        if self.matching.redraw_every:
            raise ValueError(
                f"matching.redraw_every: {reason}; write teacher.placement: replicated or zero3, or redraw_every: 0"
            )
        if STRATEGIES[self.matching.strategy].is_measured:
            raise ValueError(
                f"matching.strategy: {self.matching.strategy} is measured, but {reason}; write teacher.placement: replicated or zero3, or "
                "measure with one of these (train.steps: 1) and write the pairs of its map.json here, with strategy: explicit"
            )
        return self

    @model_validator(mode="after")
    def _influence_has_states(self) -> Recipe:
        if self.student.copy_blocks == "influence" and not self.teacher.serving.has_weights:
            raise ValueError(
                f"student.copy_blocks: influence is measured on the states of all blocks, and a teacher with {self.teacher.serving_name} "
                "gives those of its map; write perplexity, or teacher.placement: replicated, zero3 or pipeline without share_cache"
            )
        return self

    @model_validator(mode="after")
    def _top_k_is_enough(self) -> Recipe:
        if (
            not self.teacher.serving.has_weights
            and self.cache.top_k
            and self.loss.kl
            and self.loss.divergence != "forward_kl"
        ):
            raise ValueError(
                f"loss.divergence: {self.loss.divergence} needs the teacher's whole distribution, but cache.top_k keeps only the likeliest "
                "tokens; write divergence: forward_kl, or leave out cache.top_k"
            )
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> Recipe:
        check_stones(self.stones, self.teacher, self.matching)
        check_lens(self.matching, self.loss, self.teacher)
        check_mixed(self.matching, self.loss, self.teacher, self.stones)
        check_adapters(self.student, stones=self.stones is not None, compiled=self.train.compile == "blocks")
        return self

    @model_validator(mode="after")
    def _validation_is_possible(self) -> Recipe:
        check_validation("train", self.train, "data", self.data, logits=self.logits)
        if (tuned := self.finetune) is not None:
            where, data = ("data", self.data) if tuned.data is None else ("finetune.data", tuned.data)
            check_validation("finetune.train", tuned.train, where, data, logits=False)
        return self

    @model_validator(mode="after")
    def _streams_are_possible(self) -> Recipe:
        check_stream("train", self.train, "data", self.data)
        if self.data.streaming and not self.teacher.serving.has_weights:
            raise ValueError(
                f"data.streaming: a teacher with {self.teacher.serving_name} has seen all rows before training, and a stream's "
                "come only then; write data.streaming: false, or let the teacher run beside the student (placement: replicated or zero3, "
                "share_cache: false)"
            )
        if (tuned := self.finetune) is not None:
            where, data = ("data", self.data) if tuned.data is None else ("finetune.data", tuned.data)
            check_stream("finetune.train", tuned.train, where, data)
            if data.streaming and tuned.architecture is not None:
                raise ValueError(
                    f"{where}.streaming: a new model's tokenizer is trained on all rows; write {where}.streaming: false, or start from a "
                    "checkpoint (finetune.path)"
                )
        return self

    @model_validator(mode="after")
    def _rollouts_are_possible(self) -> Recipe:
        check_rollouts(self.rollouts, self.data, self.loss, self.teacher, self.train)
        own = None if self.finetune is None else self.finetune.data or self.data
        if own is not None and any(part.format == "prompts" for part in own.parts):
            raise ValueError(
                "finetune.data: prompts have no completion to fine-tune a teacher on; give rows that have one"
            )
        return self

    @property
    def _takes_divergence(self) -> bool:
        return self.loss.kl > 0 or (self.stones is not None and (self.stones.kl > 0 or self.stones.cross > 0))

    @property
    def study_strategies(self) -> tuple[str, ...]:
        """The strategies of the study's students, each once."""
        changes = [self.study.changes(student) for student in self.study.students]
        return tuple(dict.fromkeys(str(c.get("matching.strategy", self.matching.strategy)) for c in changes))

    @property
    def measures_map(self) -> bool:
        """Whether the map is measured before the first step."""
        of_stones = self.stones is not None and self.stones.pairs == "from_map"
        return STRATEGIES[self.matching.strategy].is_measured and (self.loss.hidden > 0 or of_stones)

    @property
    def head_kernel(self) -> HeadKernel:
        """What a GPU runs for the head's losses. A sum of divergences whose weights change would be compiled anew at each step."""
        changing = self.loss.schedules is not None and self.loss.schedules.divergences
        return "none" if changing and self.train.head_kernel == "compiled" else self.train.head_kernel

    @property
    def logits(self) -> bool:
        """Whether the teacher's logits are needed."""
        return self.loss.kl > 0 or self.stones is not None or (self.loss.hidden > 0 and self.matching.reads_logits)

    @property
    def folder(self) -> Path:
        return Path(os.path.expanduser(self.output)) / self.name

    def tokens_folder(self, data: Data) -> Path:
        """Where these rows are kept as tokens, for all runs beside this one; `data.tokens` puts them elsewhere."""
        return Path(os.path.expanduser(data.tokens or os.path.join(self.output, "tokens")))

    @property
    def cache_folder(self) -> Path:
        """Where the teacher's cache is written and read."""
        return Path(os.path.expanduser(self.cache.path)) if self.cache.path else self.folder / "cache"

    @property
    def teacher_path(self) -> str:
        """Where the teacher is read: the given path, or what `finetune` makes, or the sum of path and adapter."""
        given = self.teacher.path if self.teacher.adapter is None else None
        return given or str(self.folder / "teacher" / "model")

    @property
    def teacher_start(self) -> tuple[str, str] | None:
        """(the folder or hub name that the teacher is, or is fine-tuned from; its key); None for a new `finetune.architecture`."""
        if self.finetune is None:
            return self.teacher.path or "", "teacher.path"
        return None if self.finetune.path is None else (self.finetune.path, "finetune.path")

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced, and checked again: `recipe.changed({"matching.strategy": "reverse"})`."""
        values = self.model_dump(mode="json")
        for where, section in (("train", values["train"]), ("finetune.train", (values["finetune"] or {}).get("train"))):
            if section and section["batch_tokens"] and f"{where}.batch_size" not in changes:
                del section["batch_size"]  # it follows from the tokens
        for key, value in changes.items():
            _put(values, key, deepcopy(value))  # another change may be of a key within it
        return _validated(values, "the changed recipe")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides (values in YAML). Raises InputError for what is wrong with it."""
    file = find_recipe(path)
    values = parse_yaml(read_text(file), str(file))
    if not isinstance(values, dict):
        raise InputError(f"{file}: a recipe is a mapping of sections; write teacher:, student:, train: and so on")
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise InputError(f"--set {override!r}: no value is given; write key.sub=value, e.g. --set train.steps=100")
        _put(values, key.strip(), parse_yaml(text, f"--set {override!r}"))
    where = (
        f"{file} with --set" if overrides else str(file)
    )  # so that nobody looks in the file for what stands on the command line
    recipe = _validated(values, where)
    _check_variants(recipe, where)
    return recipe


def _check_variants(recipe: Recipe, where: str) -> None:
    """Raise InputError for a variant of the study that is no recipe, also where the study itself is not run."""
    for name in recipe.study.variants:
        changes = recipe.study.changes(name)
        strategy = str(changes.get("matching.strategy", recipe.matching.strategy))
        try:
            recipe.changed({**recipe.matching.without_others(strategy), **changes})
        except InputError as error:
            sentence = str(error).removeprefix("the changed recipe: ")
            raise InputError(f"{where}: study.variants.{name}: {sentence}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, width=120)


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


def _with_batch_sizes(values: dict[str, Any]) -> dict[str, Any]:
    data, finetune = values.get("data", {}), values.get("finetune")
    if isinstance(finetune, Mapping) and "train" in finetune:
        own = with_batch_size(finetune["train"], finetune.get("data") or data, "finetune.train")
        values = {**values, "finetune": {**finetune, "train": own}}
    return {**values, "train": with_batch_size(values["train"], data, "train")} if "train" in values else values


def _validated(values: dict[str, Any], where: str) -> Recipe:
    try:
        values = with_scoring_dtype(_with_batch_sizes(values))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    try:
        text = json.dumps(values, default=str)  # as JSON: strict, yet a list may fill a tuple
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{where}: {sentence(error, values, Recipe)}") from error
