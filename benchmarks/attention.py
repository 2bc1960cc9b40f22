"""Packed rows with and without masks, padded rows beside the same rows end to end, and how much padding a run's batches have.

python -W ignore -m benchmarks.attention [--size small] [--rounds 4]      (CPU seconds, in turns)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import click
import numpy as np
import torch

from benchmarks.shapes import PAD, SIZES, Size, make_model
from llmkd.data.batches import MULTIPLE, Batch, TokenRow, collate, collate_sequences, micro_batch_rows
from llmkd.data.order import Source, rows_of_window
from llmkd.layer_map import forward
from llmkd.models import varlen
from llmkd.provenance import commit, hardware, versions
from llmkd.teachers.resident import ResidentTeacher
from tests.passes import distiller, step_settings

COLUMNS, PACK = 16_384, 2_048
"""A vocabulary that leaves most of a step to the blocks; the tokens of a packed sequence."""
Step = Callable[[Batch], None]


def padding(lengths: np.ndarray, *, batch_size: int, micro_batch_size: int) -> float:
    """The share of padding in a run's micro-batches, whose rows are of similar length, over 100 steps."""
    window = rows_of_window(
        0, [Source(0, len(lengths))], lengths=lambda rows: lengths[rows], batch_size=batch_size, seed=0, held_out_seed=0
    )
    held = places = 0
    for rows in window[:100]:
        for micro in micro_batch_rows(rows, rank=0, world_size=1, accumulation=batch_size // micro_batch_size):
            held += int(lengths[micro].sum())
            places += len(micro) * -(-int(lengths[micro].max()) // MULTIPLE) * MULTIPLE
    return 1 - held / places


def _rows(size: Size, count: int, seed: int) -> list[TokenRow]:
    """Rows of half to all of `longest` tokens, the last third trained."""
    draw = random.Random(seed)
    lengths = [draw.randint(size.longest // 2, size.longest) for _ in range(count)]
    return [
        {"input_ids": [draw.randrange(1, COLUMNS) for _ in range(n)], "trained": [k > n * 2 // 3 for k in range(n)]}
        for n in lengths
    ]


def _step(size: Size, attention: str) -> Step:
    """The teacher's pass, the student's and the backward pass, float32, forward map."""
    device, made = torch.device("cpu"), []
    for blocks in (size.teacher_blocks, size.student_blocks):
        model: Any = make_model(size, blocks, torch.float32, device, seed=blocks)
        model.set_attn_implementation(attention)
        made.append(model)
    pairs = forward(size.student_blocks, size.teacher_blocks)
    teacher = ResidentTeacher(made[0], [block for _, block in pairs], normed_last=False, ds_config=None)
    module, settings = distiller(made[1], pairs), step_settings(pairs)

    def step(batch: Batch) -> None:
        module(batch, teacher.signals(batch), settings).loss.backward()

    return step


def _compared(ways: dict[str, tuple[Step, Sequence[Batch]]], rounds: int) -> None:
    """Print the CPU seconds of each way, taken in turns, and their ratio to the first."""
    spent = dict.fromkeys(ways, 0.0)
    for number in range(rounds + 1):
        for name, (step, batches) in ways.items():
            began = time.process_time()
            for batch in batches:
                step(batch)
            spent[name] += (time.process_time() - began) if number else 0.0  # the first is to warm up
    first = next(iter(spent.values()))
    for name, seconds in spent.items():
        click.echo(f"{name}: {seconds:.1f} CPU s, {seconds / first:.2f}")


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--rounds", type=int, default=4, show_default=True)
def main(size: str, rounds: int) -> None:
    """Print what benchmarks/RESULTS.md says of attention to packed rows and of padding."""
    torch.set_num_threads(1)
    click.echo(f"commit {commit()}, {hardware()}, {versions('torch', 'transformers')}\n")
    drawn = np.random.default_rng(0)
    kinds = {
        "64 to 512 tokens": drawn.integers(64, 513, 20_000),
        "log-normal, median 200": np.clip(np.exp(drawn.normal(5.3, 0.8, 20_000)), 8, PACK).astype(int),
    }
    for name, lengths in kinds.items():
        shares = [
            f"{padding(lengths, batch_size=b, micro_batch_size=m):.1%} ({m} of {b})" for b, m in ((16, 4), (64, 8))
        ]
        click.echo(f"padding of rows of {name}, by rows of a micro-batch and a step: {', '.join(shares)}")
    shape = replace(SIZES[size], vocabulary=COLUMNS)
    masked, apart = _step(shape, "sdpa"), _step(shape, varlen.NAME)
    click.echo(f"\none sequence of {PACK} tokens, documents of {shape.longest // 2} to {shape.longest}:")
    rows = _rows(shape, 2 * PACK // shape.longest, seed=0)
    fitting = [
        row for row, end in zip(rows, accumulate(len(row["input_ids"]) for row in rows), strict=True) if end <= PACK
    ]
    packed = [collate_sequences([fitting], width=PACK, pad_id=PAD)]
    _compared({"sdpa under a mask": (masked, packed), "varlen": (apart, packed)}, rounds)
    micro = [_rows(shape, shape.rows, seed) for seed in (1, 2)]
    padded, flat = ([collate(rows, pad_id=PAD, packed=p) for rows in micro] for p in (False, True))
    share = 1 - sum(b.counts.attended for b in padded) / sum(b.input_ids.numel() for b in padded)
    click.echo(f"\nmicro-batches of {shape.rows} rows, drawn at random: {share:.0%} padding")
    _compared({"padded, sdpa": (masked, padded), "end to end, varlen": (apart, flat)}, rounds)


if __name__ == "__main__":
    main()
