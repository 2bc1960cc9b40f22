"""What a recipe's cache must hold, its identity, and whether the cache on disk matches both."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from llmkd.data.tokenized import Tokens
from llmkd.distributed.ranks import World, on_main
from llmkd.errors import InputError
from llmkd.layer_map import Pairs
from llmkd.models import folders, load
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.study_entries import entry_recipe, study_entries
from llmkd.teachers import cache_files
from llmkd.teachers.cache_files import Contents, Manifest
from llmkd.teachers.cached import CacheTeacher
from llmkd.training.jobs import Job
from llmkd.training.pairs import pairs_of

log = logging.getLogger("llmkd")

Student = tuple[Recipe, Pairs]
"""A student's recipe and its map."""
VERIFIED_AT_START = 8 * 2**30
"""Up to so many bytes `cache.verify: auto` compares all checksums before training; half a minute on a slow disk."""


def contents_of(recipe: Recipe, students: Sequence[Student], teacher: Path, tokenizer: Any, data: Tokens) -> Contents:
    """What a cache of the recipe's teacher and data holds that serves these students (rank 0 alone: all tokens are hashed)."""
    settings = recipe.teacher
    shape = load.load_config(teacher, trust_remote_code=settings.trust_remote_code)
    asked = asked_for(students, shape.num_hidden_layers)
    top_k = asked.top_k
    columns = _columns([student for student, _ in students if student.loss.kl] or [recipe], shape.vocab_size, top_k)
    if top_k is not None and top_k > columns:
        raise InputError(f"cache.top_k: {top_k} of {columns} tokens; write a smaller number, or leave it out")
    quantized = (
        {} if settings.quantize == "none" else {"teacher.quantize": settings.quantize}
    )  # older caches stay whole
    return Contents(
        identity={
            "teacher": folders.folder_contents(teacher, weights_alone=True),
            "teacher.dtype": settings.dtype,
            **quantized,
            "tokenizer": _short(json.dumps(sorted(tokenizer.get_vocab().items()))),
            "data": tokens_hash(data.rows),
        },
        recipe={
            "teacher.path": recipe.teacher_path,
            "teacher.dtype": settings.dtype,
            **quantized,
            **{f"data.{key}": value for key, value in recipe.data.model_dump(mode="json", exclude={"tokens"}).items()},
        },
        rows=len(data.rows),
        tokens=int(data.all_lengths.sum()),
        hidden=shape.hidden_size,
        dtype=recipe.cache.dtype,
        columns=columns if top_k else None,
        **asdict(asked),
    )


def students(recipe: Recipe, student_depth: int, teacher_depth: int) -> list[Student]:
    """The students that a cache must serve: those of the recipe's study, each with each seed, or the recipe's own."""
    entries = [entry for entry in study_entries(recipe) if entry.kind == "student"]
    recipes = [entry_recipe(recipe, entry) for entry in entries] or [recipe]

    def depth(student: Recipe) -> int:
        own = student.student
        return own.blocks or (student_depth if own.path == recipe.student.path else depths(student)[0])

    return [(student, pairs_of(student, depth(student), teacher_depth)) for student in recipes]


def depths(recipe: Recipe) -> tuple[int, int]:
    """How many blocks student and teacher have."""
    teacher = folders.resolve(recipe.teacher_path, "teacher.path", recipe.teacher.revision)
    depth = load.load_config(teacher, trust_remote_code=recipe.teacher.trust_remote_code).num_hidden_layers
    if recipe.student.blocks is not None:
        return recipe.student.blocks, depth
    student = folders.resolve(recipe.student.path or "", "student.path")
    return load.load_config(student, trust_remote_code=recipe.student.trust_remote_code).num_hidden_layers, depth


@dataclass(frozen=True)
class Asked:
    """What students ask of a teacher."""

    blocks: tuple[int, ...]
    final: bool
    """Whether the final state."""
    top_k: int | None
    """How many log-probabilities."""


def asked_for(students: Iterable[Student], depth: int) -> Asked:
    """What these students ask of a teacher of so many blocks."""
    blocks: set[int] = set()
    final, top_k = False, None
    for recipe, pairs in students:
        used, last = {block for _, block in pairs}, normed_last(recipe, depth)
        blocks |= used - {last}
        final |= last in used
        if recipe.loss.kl:
            top_k = recipe.cache.top_k  # one for all: no variant may change it
            final |= top_k is None
    return Asked(tuple(sorted(blocks)), final, top_k)


def normed_last(recipe: Recipe, depth: int) -> int | None:
    """The teacher's block whose pair reads the final state in place of the block's own; None where none does."""
    return depth - 1 if recipe.matching.final_state == "normed" else None


def _columns(recipes: Iterable[Recipe], teacher_vocabulary: int, top_k: int | None) -> int:
    """How many tokens both the teacher's head and a student's have. Raises InputError where students differ and a top k is kept."""
    columns = {min(teacher_vocabulary, student_vocabulary(recipe) or teacher_vocabulary) for recipe in recipes}
    if top_k is not None and len(columns) > 1:
        raise InputError(
            f"cache.top_k: the study's students have {' and '.join(map(str, sorted(columns)))} of the teacher's tokens, and a cache holds "
            "the likeliest of one vocabulary; leave out cache.top_k, or put them into separate studies"
        )
    return min(columns)


def student_vocabulary(recipe: Recipe) -> int | None:
    """The size of a student checkpoint's vocabulary; None for a copied or new student, which has the teacher's."""
    if recipe.student.init != "checkpoint":
        return None
    folder = folders.resolve(recipe.student.path or "", "student.path")
    return load.load_config(folder, trust_remote_code=recipe.student.trust_remote_code).vocab_size


def tokens_hash(data: Dataset) -> str:
    """A hash of every row's token ids. Which of them are trained is left out: the teacher's signals do not depend on it."""
    digest = hashlib.sha256()
    for table in data.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000):
        ids: Any = table["input_ids"].combine_chunks()  # type: ignore[index]
        for numbers in (ids.value_lengths(), ids.flatten()):
            digest.update(numbers.to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# The cache on disk


def open_teacher(world: World, job: Job, tokenizer: Any, data: Tokens) -> CacheTeacher | None:
    """The job's teacher from its cache (all ranks take part); None where the recipe places it elsewhere.

    Raises InputError, before anything of the run is written, unless the cache is whole and of the same teacher, tokenizer and data,
    and holds what the job's map and divergence ask for.
    """
    recipe, teacher = job.recipe, job.teacher
    if teacher is None or recipe.teacher.placed.has_weights:
        return None
    wanted = on_main(world, lambda: contents_of(recipe, [(recipe, job.pairs)], teacher, tokenizer, data))
    manifest = on_main(world, lambda: _checked(recipe, wanted))
    dtype = load.DTYPES[recipe.teacher.dtype]
    trust = recipe.teacher.trust_remote_code
    head = None
    if recipe.loss.kl > 0 and wanted.top_k is None:
        weight, bias = load.load_head(teacher, dtype=dtype, trust_remote_code=trust)
        head = (weight.to(world.device), None if bias is None else bias.to(world.device))
    depth = load.load_config(teacher, trust_remote_code=trust).num_hidden_layers
    return CacheTeacher(
        recipe.cache_folder,
        manifest,
        [block for _, block in job.pairs],
        normed_last=normed_last(recipe, depth),
        head=head,
        top_k=wanted.top_k is not None,
        dtype=dtype,
        verify_reads=not verifies_at_start(recipe, manifest),
    )


def verifies_at_start(recipe: Recipe, manifest: Manifest) -> bool:
    """Whether all checksums are compared before training: by `cache.verify`, for auto by the cache's size."""
    verify = recipe.cache.verify
    return verify == "start" or (verify == "auto" and sum(s.bytes for s in manifest.shards) <= VERIFIED_AT_START)


def _checked(recipe: Recipe, wanted: Contents) -> Manifest:
    """The manifest of the recipe's cache. Raises InputError where it can't serve, or where a shard is not what was written."""
    folder = recipe.cache_folder
    manifest = cache_files.read_manifest(folder)
    if manifest is None:
        state = "is not finished" if (folder / "plan.json").is_file() else "holds no cache"
        raise InputError(f"teacher.placement: {folder} {state}; run llmkd cache with this recipe, then train")
    why = cache_files.unfit(manifest.contents, wanted)
    if why is not None:
        raise InputError(
            f"the teacher's cache {folder} {why}; put the recipe back, or write another with llmkd cache RECIPE --set cache.path=FOLDER"
        )
    for shard, what in damaged(folder, manifest, hashed=verifies_at_start(recipe, manifest)):
        raise cache_files.damage(folder, shard, what)
    return manifest


def damaged(folder: Path, manifest: Manifest, *, hashed: bool) -> list[tuple[cache_files.Shard, str]]:
    """The shards that are not what was written, and why: by size and header, and if `hashed` by every byte."""
    checked = [(shard, cache_files.problem(folder, shard, manifest.contents)) for shard in manifest.shards]
    bad = [(shard, what) for shard, what in checked if what is not None]
    if hashed:
        sound = [shard for shard, what in checked if what is None]
        bad += [(shard, what) for shard, what in cache_files.changed_shards(folder, sound) if what is not None]
    return bad
