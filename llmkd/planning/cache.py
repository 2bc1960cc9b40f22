"""What a cached teacher costs: bytes on each rank, on disk and read per step, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkd.layer_map import Pairs
from llmkd.models.load import DTYPES
from llmkd.planning.rows import GIB, Row
from llmkd.planning.shapes import Shapes
from llmkd.recipe.recipe import Recipe
from llmkd.teachers.cache_files import Contents, sizes
from llmkd.teachers.cached import AHEAD
from llmkd.training.cache_contents import Student, asked_for, students

ROWS = 1000
"""So many rows are planned for where `data.rows` does not say how many there are."""


def cache_rows(recipe: Recipe, shape: Shapes, student_depth: int, pairs: Pairs) -> list[Row]:
    """A cached teacher: its head alone, a state at a time on the device, what is read ahead, and the files, which the ranks share."""
    size = DTYPES[recipe.teacher.dtype].itemsize
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    state = tokens * shape.hidden * size
    top_k = asked_for([(recipe, pairs)], shape.depth)[2]
    rows = []
    if recipe.loss.kl and top_k is None:
        how = f"{shape.head / 1e6:,.1f} M x {size} B, alone"
        rows.append(Row("teacher head", shape.head * size, "device", ("always",), how))
    if pairs:
        waiting = states_at_once(pairs)
        how = f"{waiting} at a time, [B, T, H] x {size} B; the others wait as they were read"
        rows.append(Row("teacher states", waiting * state, "device", ("teacher forward", "head"), how))
    if top_k is not None:
        held, how = tokens * top_k * 8, f"[B, T, {top_k}] x 8 B: an id and a log-probability"
        rows.append(Row("teacher top k", held, "device", ("teacher forward", "head"), how))
    elif recipe.loss.kl:
        rows.append(Row("teacher final state", state, "device", ("teacher forward", "head"), f"[B, T, H] x {size} B"))
    read = cache_bytes([(recipe, pairs)], shape, tokens)
    how = f"{AHEAD} micro-batches and the one in use, in {recipe.cache.dtype}"
    rows.append(Row("teacher states, read ahead", (AHEAD + 1) * read, "host", ("always",), how))
    count = recipe.data.rows or ROWS
    said = f"{count:,} rows" if recipe.data.rows else f"each {count:,} rows"
    step = read * recipe.train.batch_size // recipe.train.micro_batch_size
    how = f"at most, {said} of {recipe.data.max_length} tokens, shared; all ranks together read {step / GIB:.3f} GiB per step"
    on_disk = cache_bytes(students(recipe, student_depth, shape.depth), shape, count * recipe.data.max_length)
    rows.append(Row("teacher's cache", on_disk, "disk", ("always",), how))
    return rows


def states_at_once(pairs: Pairs) -> int:
    """How many states are on the device at the worst moment, each from its first use to its last, in the student's order."""
    order = [teacher for _, teacher in sorted(pairs, key=lambda pair: pair[0])]
    spans = [(order.index(block), len(order) - 1 - order[::-1].index(block)) for block in set(order)]
    return max(sum(first <= at <= last for first, last in spans) for at in range(len(order)))


def cache_bytes(served: Sequence[Student], shape: Shapes, tokens: int) -> int:
    """Bytes of a cache of so many tokens that serves these students, its files' headers not counted."""
    blocks, final, top_k = asked_for(served, shape.depth)
    dtype = served[0][0].cache.dtype  # one for all, as the rest of the cache section
    settings: dict[str, Any] = dict(identity={}, recipe={}, rows=0, columns=None, dtype=dtype)
    return sum(
        sizes(
            Contents(tokens=tokens, hidden=shape.hidden, blocks=blocks, final=final, top_k=top_k, **settings)
        ).values()
    )
