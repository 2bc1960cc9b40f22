"""What a run starts from: a student not yet distilled, a teacher not yet tuned, a tokenizer."""

from __future__ import annotations

import gc
import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmkd.data.batches import Batch
from llmkd.distributed.checksums import write_checksums
from llmkd.distributed.ranks import World, on_main, sum_counts, sum_tensor
from llmkd.errors import InputError
from llmkd.files import read, read_checked, write_checked
from llmkd.layer_map import EMBEDDING
from llmkd.losses.distances import cosine
from llmkd.losses.head_scores import head_scores
from llmkd.models import families, folders, load, make, removal, width
from llmkd.models.adapter_folders import write_merged
from llmkd.models.architectures import new_config
from llmkd.models.parts import blocks, final_state, whole_head
from llmkd.models.stored import read_config
from llmkd.processes import only_one_in
from llmkd.recipe.inputs import training_inputs
from llmkd.recipe.recipe import Recipe
from llmkd.teachers.base import Demand
from llmkd.training import build
from llmkd.training.checkpoint import check_same
from llmkd.training.checks import teacher_shape
from llmkd.training.jobs import Job, check_student, read_rows
from llmkd.training.pairs import depths_of

log = logging.getLogger("llmkd")
Rows = Callable[..., Iterator[list[Batch]]]
"""The micro-batches of each step, by `start_step` and `steps`."""
BLOCKS = "blocks.json"
"""In a run's folder, the teacher's blocks that were measured for its student: the rule, the blocks, and what was measured."""
WIDTH = "width.json"
"""In a run's folder, the parts of the copied blocks that its student was made of: numbers of channels, heads and MLP columns."""
MEASURED_STEPS = 4
"""Of the run, those on whose rows blocks and widths are measured, whether it trains on as many or not."""
SUMMED = ("teacher.path", "teacher.adapter", "teacher.revision", "teacher.dtype")
"""The inputs that decide a teacher with its adapters added."""
TEXT_COLUMNS = ("prompt", "completion", "text", "text_a", "text_b")
"""Of rows, the columns that a new tokenizer is trained on."""


def initial_student(recipe: Recipe, teacher: Path, folder: Path, kept: width.Kept | None = None) -> None:
    """Write the HF folder an undistilled student starts from (rank 0 alone); `kept`: the parts of the copied blocks, default all."""
    dtype = load.DTYPES[recipe.train.dtype]
    if recipe.student.adapter is not None:
        start = folders.resolve(recipe.student.path or "", "student.path")
        own = recipe.student.trust_remote_code
        write_merged(start, recipe.student.adapter, folder, key="student.adapter", dtype=dtype, trust_remote_code=own)
        log.info("student: %s with the adapters of %s", recipe.student.path, recipe.student.adapter)
        return
    trust = recipe.teacher.trust_remote_code
    shape = load.load_config(teacher, trust_remote_code=trust)
    depths, wanted = families.depths(shape), depths_of(recipe, shape)
    if recipe.student.init == "random":
        make.random_student(
            teacher, wanted, recipe.student.width, folder, seed=recipe.seed, dtype=dtype, trust_remote_code=trust
        )
        return
    chosen = make.stack_choices(recipe.student.copy_blocks, wanted, depths)
    if families.kind(shape) == "encoder":
        copied = recipe.student.classifier == "copied"
        make.copied_encoder(teacher, chosen, folder, seed=recipe.seed, dtype=dtype, classifier=copied)
    else:
        make.copied_student(teacher, chosen, folder, dtype=dtype, trust_remote_code=trust, kept=kept)
    log.info("student: %s blocks copied from the teacher's %s", " + ".join(map(str, wanted)), list(chosen))
    if kept is not None:
        log.info("student: of their width %s", ", ".join(f"{key} {size}" for key, size in kept.sizes.items()))


def merged_teacher(recipe: Recipe) -> None:
    """Write the teacher with its adapters added, where the recipe gives some, unless it is there (rank 0 alone).

    Raises InputError where the sum of another model or of other adapters is there, and for a student that can't be trained from it.
    """
    settings, folder = recipe.teacher, Path(recipe.teacher_path)
    if settings.adapter is None:
        return
    inputs = {key: value for key, value in training_inputs(recipe).items() if key in SUMMED}
    inputs |= folders.contents_of({"teacher.path": settings.path, "teacher.adapter": settings.adapter})
    base = folders.resolve(settings.path or "", "teacher.path", settings.revision)
    how: dict[str, Any] = {"dtype": load.DTYPES[settings.dtype], "trust_remote_code": settings.trust_remote_code}
    with only_one_in(folder.parent, patience_seconds=600):  # several students may be started at once
        if (meta := read(folder / "llmkd.json")) is not None:
            check_same(meta["inputs"], inputs, folder.parent)
            return
        shape = teacher_shape(recipe)  # a run that is refused leaves no teacher behind, which may take many GB
        trust, student = recipe.student.trust_remote_code, recipe.student.path
        own = shape if student is None else read_config(student, "student.path", trust_remote_code=trust)[1]
        check_student(recipe, families.family(shape), shape, own)
        write_merged(base, settings.adapter, folder, key="teacher.adapter", meta={"inputs": inputs}, **how)
    log.info("teacher: %s with the adapters of %s, in %s", settings.path, settings.adapter, folder)


def initial_teacher(recipe: Recipe, tokenizer: Any, job: Job, *, resuming: bool) -> None:
    """Write the HF folder a teacher starts from: a new model of `finetune.architecture` with this tokenizer, or an encoder's checkpoint
    with new classes (rank 0 alone)."""
    settings, folder = recipe.finetune, job.initial
    assert settings is not None
    if settings.path is not None:
        assert job.tokenizer is not None
        dtype = load.DTYPES[settings.train.dtype]
        make.new_classifier(job.tokenizer, job.family.labels, folder, seed=settings.seed, dtype=dtype)
        return
    assert settings.architecture is not None
    shape = new_config(settings.architecture.model_dump(), tokenizer, job.family.labels)
    make.new_model(
        shape,
        folder,
        seed=settings.seed,
        dtype=load.DTYPES[settings.train.dtype],
        # saved again by transformers, one that was read from a folder has other settings
        tokenizer=partial(folders.copy_tokenizer, _of_run(job)) if resuming else tokenizer.save_pretrained,
    )


def teacher_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a new teacher, trained on its data (rank 0 alone)."""
    settings = recipe.finetune
    assert settings is not None and settings.architecture is not None
    sources = [read_rows(part) for part in (settings.data or recipe.data).parts]
    if any("messages" in rows.column_names for rows in sources):
        raise InputError(
            "finetune.architecture: a new tokenizer has no chat template; give prompt/completion or text data"
        )
    texts = (
        text for rows in sources for column in TEXT_COLUMNS if column in rows.column_names for text in rows[column]
    )
    kind = families.kind(new_config(settings.architecture.model_dump()))
    return make.new_tokenizer(texts, settings.architecture.vocab_size, kind)


def job_tokenizer(world: World, job: Job, *, resuming: bool) -> Any:
    """The job's tokenizer, before anything is written."""
    if job.tokenizer is not None or resuming:
        return load.load_tokenizer(
            job.tokenizer or _of_run(job), trust_remote_code=job.recipe.teacher.trust_remote_code
        )
    return on_main(world, lambda: teacher_tokenizer(job.recipe))


def _of_run(job: Job) -> Path:
    """Where a resumed run has its tokenizer: one that was killed after its export has removed what it started from."""
    return job.initial if job.initial.is_dir() else job.folder / "model"


def write_initial(world: World, job: Job, tokenizer: Any, rows: Rows, *, resuming: bool) -> None:
    """Write the folder the model starts from, over an older one (it may be another recipe's) unless the run resumes.

    `rows`: the run's micro-batches, on whose first `MEASURED_STEPS` steps the blocks to copy, and then what stays of their width, are
    measured where the recipe asks for it (all ranks take part).
    """
    if job.initial != job.folder / "initial":
        return
    here = resuming and (job.initial / "config.json").is_file()
    if job.makes_teacher:
        if not here:
            on_main(world, lambda: initial_teacher(job.recipe, tokenizer, job, resuming=resuming))
            write_checksums(world, job.initial)
        return
    recipe = job.recipe
    teacher = on_main(world, lambda: folders.resolve(recipe.teacher_path, "teacher.path", recipe.teacher.revision))
    measures = recipe.student.is_measured and not resuming
    micro_batches: Sequence[Batch] = ()
    if measures:
        micro_batches = [*itertools.chain.from_iterable(rows(start_step=0, steps=MEASURED_STEPS))]
    if measures and recipe.student.measures_blocks:
        measure_blocks(world, replace(job, teacher=teacher), micro_batches)
    measured = on_main(world, lambda: with_blocks(recipe, job.folder))
    if measures and recipe.student.narrows:
        measure_width(world, replace(job, teacher=teacher, recipe=measured), micro_batches)
    kept = on_main(world, lambda: kept_width(recipe, job.folder))
    if not here:
        on_main(world, lambda: initial_student(measured, teacher, job.initial, kept))
        write_checksums(world, job.initial)


def with_blocks(recipe: Recipe, run: Path) -> Recipe:
    """The recipe of a run with the blocks that its student was made of, where these were measured: as a list, from the run's folder."""
    if not recipe.student.measures_blocks:
        return recipe
    found = read_checked(run / BLOCKS)
    if found is None:
        raise InputError(
            f"{run / BLOCKS}: the blocks that this run's student was made of are missing or damaged; put the file back, or train the "
            "student again in another folder"
        )
    return recipe.changed({"student.copy_blocks": found["blocks"]})


def kept_width(recipe: Recipe, run: Path) -> width.Kept | None:
    """The parts of the copied blocks that a run's student was made of, from the run's folder; None where these are whole."""
    if not recipe.student.narrows:
        return None
    found = read_checked(run / WIDTH)
    if found is None:
        raise InputError(
            f"{run / WIDTH}: the parts of blocks that this run's student was made of are missing or damaged; put the file back, or train "
            "the student again in another folder"
        )
    return width.Kept.of(found)


def measure_blocks(world: World, job: Job, micro_batches: Sequence[Batch]) -> None:
    """Choose the teacher's blocks to copy, by the job's rule, over the tokens of these micro-batches of all ranks, and write `blocks.json`.

    All ranks take part. The teacher is loaded for this alone: for `influence` in its placement, for `perplexity` whole on every rank.
    Raises InputError, and writes nothing, where it can't be measured, or no student can be made of the blocks.
    """
    assert job.teacher is not None
    rule, keep = job.recipe.student.copy_blocks, job.student_depths[0]
    said: dict[str, Any]
    if rule == "influence":
        measured = _influence(world, job, micro_batches)
        chosen, said = removal.most_influential(measured, keep), {"influence": measured}
    else:
        chosen, removed = _least_harmful(world, job, micro_batches, keep)
        said = {"removed": [asdict(one) for one in removed]}
    gc.collect()  # the teacher, before the run's own is loaded
    trust = job.recipe.teacher.trust_remote_code
    shape = load.load_config(job.teacher, trust_remote_code=trust)

    def kept() -> None:
        load.check_copied_config(shape, load.student_config(shape, chosen, {}), chosen, trust_remote_code=trust)
        job.folder.mkdir(parents=True, exist_ok=True)
        write_checked(job.folder / BLOCKS, {"rule": rule, "blocks": chosen, **said})

    on_main(world, kept)
    log.info("%s: %s keeps blocks %s of %d", job.title, rule, list(chosen), job.teacher_depths[0])


def _influence(world: World, job: Job, micro_batches: Sequence[Batch]) -> list[float]:
    """Of every block of the teacher the block influence of arXiv 2403.03853 (eq. 1): 1 - cos(input, output), mean over all tokens."""
    depth = job.teacher_depths[0]
    teacher = build.load_teacher(world, job, Demand((EMBEDDING, *range(depth)), logits=False))
    teacher.expect(micro_batches)
    total = torch.zeros(depth, dtype=torch.float64, device=world.device)
    for batch in micro_batches:
        here = batch.to(world.device)
        signal = teacher.signals(here)
        states = (signal.take(block).flatten(0, 1)[here.attended_at] for block in (EMBEDDING, *range(depth)))
        for block, (before, after) in enumerate(itertools.pairwise(states)):
            total[block] += cosine(before, after).double().sum()
    [tokens] = sum_counts(world, [sum(batch.counts.attended for batch in micro_batches)])
    return (sum_tensor(world, total) / tokens).tolist()


@torch.no_grad()
def _least_harmful(
    world: World, job: Job, micro_batches: Sequence[Batch], keep: int
) -> tuple[removal.Kept, list[removal.Removal]]:
    """The teacher's blocks that stay when those go without which its cross-entropy over the trained tokens is lowest."""
    [trained] = sum_counts(world, [sum(batch.counts.trained for batch in micro_batches)])
    if not trained:
        raise InputError(
            "student.copy_blocks: no token of the first steps' rows is trained, so there is no perplexity; write influence, or a list"
        )
    settings = job.recipe.teacher
    assert job.teacher is not None
    model = load.load_model(
        job.teacher,
        dtype=load.DTYPES[settings.dtype],
        ds_config=None,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        quantize=settings.quantize,
    )
    cast(nn.Module, model).to(world.device).eval()
    head, chunk = whole_head(model), job.train.tokens_at_once(gpu=world.device.type == "cuda")
    here = [batch.to(world.device) for batch in micro_batches]

    def cross_entropy() -> Tensor:
        """Summed over this rank's trained tokens, in float64."""
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for batch in here:
            states = final_state(model, batch).flatten(0, 1)[batch.trained_at]
            targets = batch.targets.flatten()[batch.trained_at]
            total += head_scores(states, head.weight, head.bias, None, targets, chunk).ce.double().sum()
        return total

    with removal.run_of(blocks(model)) as only:

        def measure(lists: Sequence[removal.Kept]) -> list[float]:
            sums = []
            for kept in lists:
                only(kept)
                sums.append(cross_entropy())
            return (sum_tensor(world, torch.stack(sums)) / trained).tolist()

        return removal.least_harmful(job.teacher_depths[0], keep, measure)


def measure_width(world: World, job: Job, micro_batches: Sequence[Batch]) -> None:
    """Choose what stays of the width of the blocks that the job's student copies, over all tokens of these micro-batches of all ranks, and
    write `width.json`.

    All ranks take part. The teacher is loaded for this alone: sharded where it is placed so, elsewhere whole on every rank. Raises
    InputError, and writes nothing, where an activation is not a number.
    """
    assert job.teacher is not None
    student = job.recipe.student
    config: Any = load.load_config(job.teacher, trust_remote_code=job.recipe.teacher.trust_remote_code)
    copied = make.stack_choices(student.copy_blocks, job.student_depths, job.teacher_depths)
    last, small = max(copied), load.student_config(config, copied, student.width)
    uncompiled = replace(
        job, train=job.train.model_copy(update={"compile": "none"})
    )  # what is inside a block is looked at
    first = last + 1 if last + 1 < job.teacher_depths[0] else None
    part = load.student_config(config, range(last + 1), {})
    teacher = build.resident(world, uncompiled, job.teacher, Demand((last,), logits=False), part, first_blocks=first)
    sums = width.zero_sums(config, len(copied), world.device)
    stack = [teacher.blocks[block] for block in copied]
    for batch in (batch.to(world.device) for batch in micro_batches):
        with width.measured(stack, config.head_dim, batch, sums):
            teacher.signals(batch).take(last)
    del teacher, stack
    gc.collect()  # before the run's own is loaded
    sums = {name: sum_tensor(world, of) for name, of in sums.items()}
    kept = width.chosen(sums, small, config.num_key_value_heads)

    def keep() -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_checked(job.folder / WIDTH, asdict(kept))

    on_main(world, keep)


def remove_initial(job: Job, *, but_a_base: bool = False) -> None:
    """Remove the run's folder `initial`, which the exported model replaces, and the teacher's offloaded weights.

    `but_a_base`: not where adapters were exported that are added to what is in it.
    """
    stays = but_a_base and build.export_options(job)["form"] != "merged"
    if job.initial == job.folder / "initial" and not stays:
        shutil.rmtree(job.initial, ignore_errors=True)
    shutil.rmtree(job.folder / "nvme" / "teacher", ignore_errors=True)
