"""What a teacher says, sends and holds, without a student: `main` on every rank, by tests/distributed/runner.py."""

from __future__ import annotations

import json
import random
import sys
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch

from llmkd.data import batches as data
from llmkd.data.batches import Batch, collate
from llmkd.distributed import ranks
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.teachers.cached import CacheTeacher
from llmkd.training import build, cache_contents, initial, jobs
from llmkd.training.tokens import drawn, tokens_of
from tests.tensor_bytes import TensorBytes
from tests.wire_bytes import WireBytes


def batch_of(draw: random.Random, lengths: list[int], *, packed: bool = False) -> Batch:
    """A micro-batch of random tokens; every row's last half is trained."""
    rows = [
        {"input_ids": draw.choices(range(2, 300), k=n), "trained": [i >= n // 2 for i in range(n)]} for n in lengths
    ]
    return collate(rows, pad_id=0, packed=packed)


def states_of(teacher: Any, batch: Batch, recipe: Recipe, uses: list[int]) -> dict[str, torch.Tensor]:
    """All that a teacher says of a batch, each state taken as often as a student would."""
    signal = teacher.signals(batch)
    said = {str(block): signal.take(block) for block in uses}
    assert signal.held == 0
    if recipe.loss.kl:
        with signal.head() as (weight, _):
            said["head"] = weight
        said["final"] = signal.take_final()
    return said


def uneven(world: Any, recipe: Recipe, job: Any, chunks: list[list[int]]) -> dict[str, Any]:
    """Micro-batches of different lengths, and different numbers of them: `chunks[c][rank]` are told to rank at once, a chunk ahead.

    Compared, to the bit, with a whole teacher. A rank that has none in a chunk does its stage's work by `finish`.
    """
    uses = [block for _, block in job.pairs]
    teacher = build.load_teacher(world, job)
    whole = build.load_teacher(world, jobs.distil_job(world, recipe.changed(WHOLE), job.folder))
    draw = random.Random(world.rank)
    packed = recipe.data.batching == "packed"

    def chunk(count: int) -> list[Batch]:
        return [
            batch_of(draw, [draw.randint(2, 60) for _ in range(draw.randint(1, 3))], packed=packed)
            for _ in range(count)
        ]

    told = [chunk(counts[world.rank]) for counts in chunks]
    checked, same = 0, True
    teacher.expect(told[0])
    for number, batches in enumerate(told):
        if number + 1 < len(told):
            teacher.expect(told[number + 1])
        for batch in batches:
            ours, theirs = (states_of(t, batch, recipe, uses) for t in (teacher, whole))
            same = same and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
            checked += 1
        if not batches:
            teacher.finish()  # type: ignore[attr-defined]
    return {"checked": checked, "same": same}


def measured(world: Any, recipe: Recipe, job: Any) -> dict[str, Any]:
    """Bytes received per step, counted where torch.distributed is called, and the most tensor bytes held, over four steps."""
    rounds = recipe.train.batch_size // (recipe.train.micro_batch_size * world.size)
    teacher, steps = (_cached if recipe.teacher.placement == "cache" else _present)(world, recipe, job, rounds)
    weights = _weights(teacher)
    uses = [block for _, block in job.pairs]
    with WireBytes() as wire, TensorBytes() as held:
        teacher.expect(steps[0])
        for number, batches in enumerate(steps):
            teacher.expect(steps[number + 1] if number + 1 < len(steps) else [])
            for batch in batches:
                states_of(teacher, batch, recipe, uses)
    found = {"weights": weights, "peak": held.peak, "gathered": wire.gathered / len(steps)}
    if recipe.teacher.placement == "pipeline":
        found["received"] = wire.received / len(steps)
        found["counted"] = teacher.sent_bytes / len(steps)
        found["told"] = teacher.announced_bytes / len(steps)
        found["sent"] = wire.sent / len(steps)
    return found


def stones(world: Any, recipe: Recipe, job: Any) -> dict[str, Any]:
    """Bytes gathered per step by a sharded teacher that also runs its upper blocks for each stone, forward and for the gradient."""
    teacher: Any = build.load_teacher(world, job)
    draw = random.Random(world.rank)
    rounds = recipe.train.batch_size // (recipe.train.micro_batch_size * world.size)
    with WireBytes() as wire:
        for _ in range(rounds):
            batch = batch_of(draw, [recipe.data.max_length] * recipe.train.micro_batch_size)
            signal = teacher.signals(batch)
            with signal.head():
                for _, block in job.stones:
                    state = torch.randn_like(signal.final).requires_grad_()
                    signal.upper(block, state, batch).sum().backward()
    return {"gathered": wire.gathered}


def _present(world: Any, recipe: Recipe, job: Any, rounds: int) -> tuple[Any, list[list[Batch]]]:
    """The teacher, and four steps of random rows of full length."""
    draw = random.Random(world.rank)
    lengths = [recipe.data.max_length] * recipe.train.micro_batch_size
    steps = [[batch_of(draw, lengths) for _ in range(rounds)] for _ in range(4)]
    return build.load_teacher(world, job), steps


def _cached(world: Any, recipe: Recipe, job: Any, rounds: int) -> tuple[Any, list[list[Batch]]]:
    """The teacher as a cache that is there, and four steps of the rows that it holds."""
    tokenizer = initial.job_tokenizer(world, job, resuming=False)
    rows = tokens_of(world, job, tokenizer)
    size = recipe.train.batch_size
    found = data.batches(
        rows, seed=0, start_step=0, steps=4, batch_size=size, accumulation=rounds, rank=world.rank, world_size=world.size,
        make=drawn(world, job, rows, tokenizer.pad_token_id)[1],
    )  # fmt: skip
    teacher: Any = cache_contents.open_teacher(world, job, tokenizer, rows)
    teacher._pool = _AtOnce()  # bytes are counted in this thread alone
    for first in teacher._shards._firsts:  # opened here, or the maps of the files would count as memory
        teacher._shards.row(first, teacher._tensors)
    return teacher, list(found)


class _AtOnce(Executor):
    """Does its work in the caller's thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def _weights(teacher: Any) -> int:
    """Bytes of the teacher's weights on this rank, shards as such, each storage once."""
    if isinstance(teacher, CacheTeacher):
        return sum(tensor.nbytes for tensor in teacher._weights or () if tensor is not None)
    head = teacher._head
    own = [
        *teacher._body.parameters(),
        *([head] if isinstance(head, torch.Tensor) else head.parameters() if head else []),
    ]
    stored = [getattr(p, "ds_tensor", p).untyped_storage() for p in own]
    return sum({s.data_ptr(): s.nbytes() for s in stored}.values())


WHOLE = {"teacher.placement": "replicated", "teacher.stages": None, "teacher.offload": "none"}
EXAMS = {"uneven": uneven, "measured": measured, "stones": stones}


def main() -> None:
    """Every rank's part: each scenario is (exam, recipe changes, further arguments); results go to rankN.json."""
    work = json.loads(Path(sys.argv[1]).read_text())
    ranks.quiet()
    world = ranks.start(60)
    torch.manual_seed(0)
    results = {}
    for name, (exam, changes, arguments) in work["scenarios"].items():
        print(f"=== {name}", flush=True)
        recipe = load_recipe(work["recipe"]).changed(changes)
        job = jobs.distil_job(world, recipe, Path(work["output"]) / name)
        results[name] = EXAMS[exam](world, recipe, job, **arguments)
    (Path(work["output"]) / f"rank{world.rank}.json").write_text(json.dumps(results))
    ranks.stop()
