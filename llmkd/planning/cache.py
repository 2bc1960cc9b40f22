"""What a cached teacher costs: bytes on each rank, on disk and read per step, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from llmkd.layer_map import Pairs
from llmkd.planning.rows import GIB, WAITING, Row
from llmkd.planning.teacher import PlannedTeacher
from llmkd.recipe.data import Data
from llmkd.teachers.cache_files import Contents, sizes
from llmkd.teachers.cached import AHEAD
from llmkd.training.cache_contents import Student, asked_for, students

ROWS = 1000
"""So many rows are planned for where `data.rows` does not say how many there are."""


def cache_rows(teacher: PlannedTeacher) -> list[Row]:
    """A cached teacher: its head alone, a state at a time on the device, what is read ahead, and the files, which the ranks share."""
    recipe, shape, size, tokens = teacher.recipe, teacher.whole, teacher.size, teacher.tokens
    state, student = tokens * shape.hidden * size, (recipe, teacher.pairs)
    top_k = asked_for([student], shape.depth).top_k
    rows = []
    if recipe.loss.kl and top_k is None:
        how = f"{shape.head / 1e6:,.1f} M x {size} B, alone"
        rows.append(Row("teacher head", shape.head * size, how, part="teacher weights"))
    if teacher.pairs:
        waiting = states_at_once(teacher.pairs)
        how = f"{waiting} at a time, [B, T, H] x {size} B; the others wait as they were read"
        rows.append(Row("teacher states", waiting * state, how, WAITING))
    if top_k is not None:
        how = f"[B, T, {top_k}] x 8 B: an id and a log-probability"
        rows.append(Row("teacher top k", tokens * top_k * 8, how, WAITING))
    elif recipe.loss.kl:
        rows.append(Row("teacher final state", state, f"[B, T, H] x {size} B", WAITING))
    read = cache_bytes([student], shape.hidden, shape.depth, tokens)
    how = f"{AHEAD} micro-batches and the one in use, in {recipe.cache.dtype}"
    rows.append(Row("teacher states, read ahead", (AHEAD + 1) * read, how, place="host"))
    known = _rows(recipe.data)
    count = known or ROWS
    counted = f"{count:,} rows" if known else f"each {count:,} rows"
    step = read * recipe.train.batch_size // recipe.train.micro_batch_size
    how = f"at most, {counted} of {recipe.data.max_length} tokens, shared; all ranks together read {step / GIB:.3f} GiB per step"
    served = students(recipe, teacher.student_depth, shape.depth)
    on_disk = cache_bytes(served, shape.hidden, shape.depth, count * recipe.data.max_length)
    return [*rows, Row("teacher's cache", on_disk, how, place="disk")]


def _rows(data: Data) -> int | None:
    """How many rows the recipe asks for; None where a source's number is not written."""
    rows = [part.rows for part in data.parts]
    return None if None in rows else sum(count for count in rows if count)


def cache_traffic(teacher: PlannedTeacher) -> tuple[int, str]:
    """Nothing is sent; the note says how often a row is seen by all the students of the recipe's study."""
    recipe = teacher.recipe
    train, rows = recipe.train, _rows(recipe.data)
    students = max(1, len(recipe.study.students) * len(recipe.study.seeds))
    epochs = (
        train.epochs if train.epochs is not None else (train.steps or 0) * train.batch_size / rows if rows else None
    )
    times = "" if epochs is None else f"{epochs:.3g} epochs x "
    seen = f"{times}{students} {'student' if students == 1 else 'students'}"
    return 0, f"worth its disk where rows are seen more than once; here {seen}"


def states_at_once(pairs: Pairs) -> int:
    """How many states are on the device at the worst moment, each from its first use to its last, in the student's order."""
    order = [teacher for _, teacher in sorted(pairs, key=lambda pair: pair[0])]
    spans = [(order.index(block), len(order) - 1 - order[::-1].index(block)) for block in set(order)]
    return max(sum(first <= at <= last for first, last in spans) for at in range(len(order)))


def cache_bytes(served: Sequence[Student], hidden: int, depth: int, tokens: int) -> int:
    """Bytes of a cache of so many tokens that serves these students, its files' headers not counted."""
    dtype = served[0][0].cache.dtype  # one for all, as the rest of the cache section
    asked = asked_for(served, depth)
    contents = Contents(
        identity={}, recipe={}, rows=0, tokens=tokens, hidden=hidden, dtype=dtype, columns=None, **asdict(asked)
    )
    return sum(sizes(contents).values())
