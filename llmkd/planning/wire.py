"""What a rank sends to the others in an optimizer step for the student itself, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkd.distributed.ds_configs import zero_stage
from llmkd.models.load import DTYPES
from llmkd.planning.rows import GIB, WIDE, millions
from llmkd.recipe.recipe import Recipe
from llmkd.text import counted
from llmkd.training.build import accumulation_steps


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends (and receives) per optimizer step, a mean over the ranks."""

    what: str
    bytes: int
    how: str
    """How they were counted."""


def student_wire(
    recipe: Recipe, trained: int, zero: Mapping[str, Any], ranks: int, *, frozen: int = 0, forward_only: int = 0
) -> list[Sent]:
    """What training so many weights beside so many frozen ones sends under a DeepSpeed configuration; nothing on one rank.

    `forward_only`: how many of the frozen ones no gradient passes, as those of the embeddings.

    A collective costs what its ring does: of n bytes a reduction to shards, and a gather of shards, (N - 1) / N; an all-reduce twice
    that (Rajbhandari et al., arXiv 1910.02054, section 7). Stages 0 and 1 reduce once per step, stages 2 and 3 every micro-batch.
    """
    if ranks == 1:
        return []
    options, stage = zero.get("zero_optimization", {}), zero_stage(dict(zero))
    size = DTYPES[recipe.train.dtype].itemsize
    rounds = accumulation_steps(recipe.train, ranks)
    count = millions(trained)
    wide = WIDE if zero.get("communication_data_type") == "fp32" else size
    to_shards = stage == 3 or (stage in (1, 2) and not options.get("use_multi_rank_bucket_allreduce", True))
    reduced = (rounds if stage >= 2 else 1) * (1 if to_shards else 2)
    how = f"{'reduced to shards' if to_shards else 'all-reduced'}{_each(rounds) if stage >= 2 else ''}, {count} x {wide} B"
    sent = [Sent("student gradients", _of_ring(reduced * trained * wide, ranks), how)]
    if stage == 3:
        weights = trained + frozen
        stays = weights <= int(options.get("stage3_max_live_parameters", 10**9))
        again, why = (0, "once") if stays else (weights - forward_only, "forward and backward")
        how = f"gathered {why}{_each(rounds)}, {millions(weights)} x {size} B"
        sent.append(Sent("student weights", _of_ring(rounds * (weights + again) * size, ranks), how))
    elif stage or size < WIDE:
        how = f"gathered after the step, {count} x {size} B"
        sent.append(Sent("student weights", _of_ring(trained * size, ranks), how))
    return sent


def _of_ring(total: int, ranks: int) -> int:
    return total * (ranks - 1) // ranks


def _each(rounds: int) -> str:
    return f" in each of {rounds} micro-batches" if rounds > 1 else ""


def wire_text(sent: Sequence[Sent], recipe: Recipe, ranks: int) -> str:
    """The bytes as a table, in GiB, and the tokens that they are sent for."""
    width = max(len(part.what) for part in sent)
    lines = [f"{'one rank sends per step':<{width}}  {'GiB':>9}  how it is counted"]
    lines += [f"{part.what:<{width}}  {part.bytes / GIB:9.3f}  {part.how}" for part in sent]
    rows = recipe.train.batch_size // ranks
    unit = "sequence" if recipe.data.batching == "packed" else "row"
    total = sum(part.bytes for part in sent)
    what_for = f"for {counted(rows, unit)} of up to {recipe.data.max_length} tokens"
    lines.append(
        f"{'together':<{width}}  {total / GIB:9.3f}  {what_for}: where these are few, a rank sends for longer than it computes"
    )
    return "\n".join(lines)
