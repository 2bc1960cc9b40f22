"""What stepping stones add to a rank's memory and to the wire, before anything is loaded."""

from __future__ import annotations

from llmkd.layer_map import STRATEGIES, Pairs
from llmkd.losses.chunked_head import BUFFERS, rows_at_once
from llmkd.models.load import DTYPES
from llmkd.planning.rows import WIDE, Row, block_activations
from llmkd.planning.shapes import Shapes
from llmkd.recipe.recipe import Recipe
from llmkd.student.stepping_stones import shares


def stone_rows(recipe: Recipe, teacher: Shapes, stones: Pairs) -> list[Row]:
    """One stone's pass through the teacher's upper blocks at a time, and the stones' states and gradients; connectors are not here."""
    settings = recipe.stones
    assert settings is not None and stones
    size = DTYPES[recipe.teacher.dtype].itemsize
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    state, block = tokens * teacher.hidden * size, block_activations(teacher, size) * tokens
    upper = max(teacher.depth - 1 - block for block in _starts(recipe, stones))
    active = 1 if settings.sample == "one" else len(stones)
    how = f"{active + 1} states [B, T, H] x {size} B, a gradient in each state's place"
    rows = [Row("stones' states", (active + 1) * state, how, ("head", "backward"))]
    if settings.checkpoint:
        how = f"inputs of up to {upper} teacher blocks [B, T, H] x {size} B, and one block computed again"
        rows.append(Row("stones, one pass", upper * state + (block if upper else 0), how, ("head",)))
    else:
        how = f"up to {upper} teacher blocks x B x T x {block // tokens:,} B"
        rows.append(Row("stones, one pass", upper * block, how, ("head",)))
    if upper and recipe.teacher.placed.is_sharded:
        how = f"one block, {teacher.largest_block / 1e6:,.1f} M x {size} B, beside the head"
        rows.append(Row("teacher block, for stones", teacher.largest_block * size, how, ("head",)))
    if not (
        recipe.loss.ce or recipe.loss.kl
    ):  # else the student's own, of like size and not at the same time, are counted
        chunk = min(recipe.train.tokens_at_once(gpu=True), tokens)
        at_once = rows_at_once(chunk, teacher.vocabulary, "cuda")
        held = 2 * chunk * size + BUFFERS["kl"] * at_once * WIDE
        how = f"2 x {chunk} tokens x {teacher.vocabulary:,} x {size} B, and {BUFFERS['kl']} buffers of {at_once} tokens x {WIDE} B"
        rows.append(Row("stones' logits of a chunk", held * teacher.vocabulary, how, ("head",)))
    return rows


def _starts(recipe: Recipe, stones: Pairs) -> list[int]:
    """The teacher block that each stone stands for; where the map is yet to be measured, the first, which has the most above it."""
    assert recipe.stones is not None
    measured = recipe.stones.pairs == "from_map" and STRATEGIES[recipe.matching.strategy].is_measured
    return [0 if measured else block for _, block in stones]


def stones_wire(recipe: Recipe, teacher: Shapes, stones: Pairs, ranks: int) -> int:
    """Bytes that each rank receives for the stones of one micro-batch when a ZeRO-3 teacher's upper blocks are gathered, on average.

    Each stone gathers the blocks above its own and the final norm, and again for the gradient, and once more for the cross term. Where
    the student's own divergence gathers the head, the stones do so apart from it.
    """
    settings = recipe.stones
    assert settings is not None
    weights = shares(len(stones))
    often = [weight / sum(weights) if settings.sample == "one" else 1.0 for weight in weights]
    passes = 3 if settings.cross else 2
    upper = [sum(teacher.each_block[block + 1 :]) + teacher.hidden for block in _starts(recipe, stones)]
    gathered = passes * sum(o * u for o, u in zip(often, upper, strict=True)) + (teacher.head if recipe.loss.kl else 0)
    return round(gathered * DTYPES[recipe.teacher.dtype].itemsize * (ranks - 1) / ranks)
