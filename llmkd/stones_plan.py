"""What stepping stones add to a rank's memory, before anything is loaded."""

from __future__ import annotations

from llmkd.config import Recipe
from llmkd.head import BUFFERS, rows_at_once
from llmkd.layer_map import Pairs
from llmkd.models import DTYPES
from llmkd.planner import WIDE, Row, Shapes, block_activations


def stone_rows(recipe: Recipe, teacher: Shapes, stones: Pairs) -> list[Row]:
    """One stone's pass through the teacher's upper blocks at a time, and the stones' states and gradients; connectors are not here."""
    settings = recipe.stones
    assert settings is not None and stones
    size = DTYPES[recipe.teacher.dtype].itemsize
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    state, block = tokens * teacher.hidden * size, block_activations(teacher, size) * tokens
    upper = max(teacher.depth - 1 - block for _, block in stones)
    active = 1 if settings.sample == "one" else len(stones)
    how = f"{active + 1} states [B, T, H] x {size} B, a gradient in each state's place"
    rows = [Row("stones' states", (active + 1) * state, "device", ("head", "backward"), how)]
    if settings.checkpoint:
        how = f"inputs of up to {upper} teacher blocks [B, T, H] x {size} B, and one block computed again"
        rows.append(Row("stones, one pass", upper * state + (block if upper else 0), "device", ("head",), how))
    else:
        how = f"up to {upper} teacher blocks x B x T x {block // tokens:,} B"
        rows.append(Row("stones, one pass", upper * block, "device", ("head",), how))
    if upper and recipe.teacher.placement == "zero3":
        how = f"one block, {teacher.largest_block / 1e6:,.1f} M x {size} B, beside the head"
        rows.append(Row("teacher block, for stones", teacher.largest_block * size, "device", ("head",), how))
    if not (
        recipe.loss.ce or recipe.loss.kl
    ):  # else the student's own, of like size and not at the same time, are counted
        chunk = min(recipe.train.head_chunk, tokens)
        at_once = rows_at_once(chunk, teacher.vocabulary, "cuda")
        held = 2 * chunk * size + BUFFERS["kl"] * at_once * WIDE
        how = f"2 x {chunk} tokens x {teacher.vocabulary:,} x {size} B, and {BUFFERS['kl']} buffers of {at_once} tokens x {WIDE} B"
        rows.append(Row("stones' logits of a chunk", held * teacher.vocabulary, "device", ("head",), how))
    return rows
