"""What writing texts takes: during training a copy of a student that is sharded or that vLLM writes by, the keys and values of the texts,
and weights in memory; before it the whole teacher. On GPUs of their own engines take nothing of a rank's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmkd.inference.vllm_setup import GPU_SHARE
from llmkd.models.load import DTYPES
from llmkd.planning.rows import BEFORE, GIB, Phase, Row, millions
from llmkd.planning.shapes import Shapes
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.rollouts import Rollouts

WRITING: tuple[Phase, ...] = ("writing",)


def rollout_rows(recipe: Recipe, student: Shapes, teacher: Shapes, *, sharded: bool) -> list[Row]:
    """No rows where nothing is written. vLLM takes `rollouts.gpu_share` of the device, whatever is needed of it.

    `sharded`: whether a rank has only a part of the student's weights.
    """
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
    copied = f"{millions(student.parameters)} x {size} B"
    lends = settings.backend == "hf" or settings.by == "mixed"
    how = f"{copied}, one copy on a node, every {settings.every} step(s)"
    handed = (
        [] if lends else [Row(f"weights handed over ({sent / GIB:.2f} GiB a round)", sent, how, WRITING, place="host")]
    )
    if settings.devices is not None:  # what writes is on GPUs that no rank has
        return handed
    if sharded or not lends or recipe.student.lora is not None:  # the last: sums with adapters
        rows.append(Row("a copy of the student, writing", sent, copied, WRITING))
    return [*rows, _cache_row(texts, tokens, cached, size, WRITING), *handed]


def engines_text(
    recipe: Recipe, student: Shapes, teacher: Shapes, rows: Sequence[Row], device_gib: float
) -> str | None:
    """What vLLM holds: of each rank's GPU beside the training, or on GPUs of its own (`rollouts.devices`); None where it does not write.

    rows: what a rank holds. device_gib: the memory of its GPU.
    """
    settings = recipe.rollouts
    if settings is None or not settings.writes:
        return None
    if settings.devices is not None:
        return _on_gpus_of_its_own(settings, recipe, student, teacher)
    if not settings.during_training or settings.backend == "hf" or settings.by == "mixed":
        return None
    share, weights = settings.gpu_share * device_gib, student.parameters * DTYPES[recipe.train.dtype].itemsize / GIB
    kept = sum(row.bytes for row in rows if row.place == "device" and "always" in row.phases) / GIB
    who = "vLLM, where it writes" if settings.backend == "auto" else "vLLM, writing"
    text = (
        f"{who}: {share:.3f} GiB (rollouts.gpu_share {settings.gpu_share:g} of {device_gib:g} GiB), {weights:.3f} of them weights, beside "
        f"{kept:.3f} GiB that the training keeps there: "
    )
    most = math.floor(100 * (1 - kept / device_gib)) / 100
    if share + kept > device_gib:
        cure = f"write a gpu_share of {most:.2f} at most" if most * device_gib > weights else "shard more"
        return f"{text}together too much; {cure}, or name GPUs of its own (rollouts.devices)"
    if share <= weights:
        return f"{text}no room for keys and values; write a larger gpu_share, {most:.2f} at most"
    return f"{text}together they fit"


def _on_gpus_of_its_own(settings: Rollouts, recipe: Recipe, student: Shapes, teacher: Shapes) -> str:
    assert settings.devices is not None
    models: dict[str, tuple[Shapes, str]] = {}
    if settings.before_training:
        models["the teacher, before training"] = teacher, recipe.teacher.dtype
    if settings.during_training:
        models["the student, from the first round on"] = student, recipe.train.dtype
    several = settings.tensor_parallel
    numbers = ", ".join(map(str, settings.devices))
    lines = [
        f"GPUs {numbers} of each node (rollouts.devices) are vLLM's: {settings.engines} engine(s) of {several} GPU(s), no rank among them"
    ]
    for who, (model, dtype) in models.items():
        size = DTYPES[dtype].itemsize
        share = model.parameters * size / several / GIB
        kept = _per_token(model) * size / several / 2**20
        lines.append(
            f"  {who}: {share:.3f} GiB of weights on each ({millions(model.parameters)} x {size} B / {several}), and keys and values of "
            f"{kept:.3f} MiB a token in what is left of {GPU_SHARE:.0%} of its memory"
        )
    return "\n".join(lines)


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
