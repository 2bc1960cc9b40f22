"""What writing texts takes: during training a second copy of the student, the keys and values of the texts, and weights in memory; before
it the whole teacher."""

from __future__ import annotations

from llmkd.models.load import DTYPES
from llmkd.planning.rows import BEFORE, GIB, Phase, Row, millions
from llmkd.planning.shapes import Shapes
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.rollouts import Rollouts

WRITING: tuple[Phase, ...] = ("writing",)


def rollout_rows(recipe: Recipe, student: Shapes, teacher: Shapes) -> list[Row]:
    """No rows where nothing is written. vLLM takes `rollouts.gpu_share` of the device, whatever is needed of it."""
    settings = recipe.rollouts
    if settings is None or not settings.writes:
        return []
    before = _by_teacher(settings, recipe, teacher) if settings.before_training and settings.devices is None else []
    if not settings.during_training:
        return before
    size = DTYPES[recipe.train.dtype].itemsize
    texts, tokens = settings.batch_size, recipe.data.max_length
    models, rows = [student], before
    if settings.by == "mixed":
        models.append(teacher)
        wide = DTYPES[recipe.teacher.dtype].itemsize
        how = f"{millions(teacher.parameters)} x {wide} B, beside the one that reads"
        rows.append(Row("a whole teacher that writes", teacher.parameters * wide, how))
    cached = sum(map(_per_token, models))
    sent = student.parameters * size
    how = f"{millions(student.parameters)} x {size} B, one copy on a node, every {settings.every} step(s)"
    copied = f"{millions(student.parameters)} x {size} B"
    handed = Row(f"weights handed over ({sent / GIB:.2f} GiB a round)", sent, how, WRITING, place="host")
    if settings.devices is not None:  # what writes is on GPUs that no rank has
        return [handed]
    return [
        *rows,
        Row("a copy of the student, writing", sent, copied, WRITING),
        _cache_row(texts, tokens, cached, size, WRITING),
        handed,
    ]


def _by_teacher(settings: Rollouts, recipe: Recipe, teacher: Shapes) -> list[Row]:
    size = DTYPES[recipe.teacher.dtype].itemsize
    how = f"{millions(teacher.parameters)} x {size} B, in every placement; then it is let go"
    return [
        Row("the whole teacher, writing", teacher.parameters * size, how, BEFORE),
        _cache_row(settings.batch_size, recipe.data.max_length, _per_token(teacher), size, BEFORE),
    ]


def _per_token(model: Shapes) -> int:
    """How many numbers are kept of a token that is read."""
    return 2 * model.depth * model.keys


def _cache_row(texts: int, tokens: int, kept: int, size: int, phases: tuple[Phase, ...]) -> Row:
    how = f"{texts} texts x {tokens} tokens x {kept:,} x {size} B (hf; vLLM fills its share)"
    return Row("keys and values of the texts", texts * tokens * kept * size, how, phases)
