"""What writing texts during training takes: a second copy of the student, the keys and values of the texts, and weights in memory."""

from __future__ import annotations

from llmkd.models.load import DTYPES
from llmkd.planning.rows import GIB, Phase, Row, millions
from llmkd.planning.shapes import Shapes
from llmkd.recipe.recipe import Recipe

WRITING: tuple[Phase, ...] = ("writing",)


def rollout_rows(recipe: Recipe, student: Shapes, teacher: Shapes) -> list[Row]:
    """No rows where nothing is written. vLLM takes `rollouts.gpu_share` of the device, whatever is needed of it."""
    settings = recipe.rollouts
    if settings is None or not settings.writes:
        return []
    size = DTYPES[recipe.train.dtype].itemsize
    texts, tokens = settings.batch_size, recipe.data.max_length
    models, rows = [student], []
    if settings.by == "mixed":
        models.append(teacher)
        wide = DTYPES[recipe.teacher.dtype].itemsize
        how = f"{millions(teacher.parameters)} x {wide} B, beside the one that reads"
        rows.append(Row("a whole teacher that writes", teacher.parameters * wide, how))
    cached = sum(2 * model.depth * model.keys for model in models)
    sent = student.parameters * size
    how = f"{millions(student.parameters)} x {size} B, one copy on a node, every {settings.every} step(s)"
    copied = f"{millions(student.parameters)} x {size} B"
    return [
        *rows,
        Row("a copy of the student, writing", sent, copied, WRITING),
        Row(
            "keys and values of the texts",
            texts * tokens * cached * size,
            f"{texts} texts x {tokens} tokens x {cached:,} x {size} B (hf; vLLM fills its share)",
            WRITING,
        ),
        Row(f"weights handed over ({sent / GIB:.2f} GiB a round)", sent, how, WRITING, place="host"),
    ]
