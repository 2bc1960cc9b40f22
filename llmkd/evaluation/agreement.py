"""How far each student agrees with the teacher: on held-out rows token by token, and in the texts that both have written.

`agree([("forward-s0", folder)], teacher, settings, data, generations, out)` writes `out/forward-s0.json` and, with a line per item,
`out/forward-s0.jsonl`.

The teacher runs over the rows once for all students: its head and its final states at the trained positions are kept, and from them
the logits of a few hundred tokens at a time. Several devices repeat that run, each for itself, side by side: it is one pass over
`agreement_rows` rows, and to share its states would take a file of them and a process that the others wait for.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkd.data.batches import IGNORE, Batch, Family
from llmkd.data.other_families import collate_for
from llmkd.errors import InputError
from llmkd.evaluation import held_out
from llmkd.evaluation.places import weight_bytes
from llmkd.evaluation.results import AGREEMENT_METRICS, AgreementResult, ComparedItem, GeneratedText, Scores, read_items
from llmkd.evaluation.step import Jobs, Score, Step, before_scoring, explained, model_hashes, pending, run, serve
from llmkd.files import digest, file_hashes
from llmkd.inference.child import Say
from llmkd.losses.head_inputs import TeacherHead
from llmkd.losses.head_scores import head_scores
from llmkd.models.families import family
from llmkd.models.load import load_config, load_tokenizer
from llmkd.models.parts import final_state, whole_head
from llmkd.models.vocabularies import check_ids, check_same_tokens
from llmkd.provenance import versions
from llmkd.recipe.recipe import Data, Evaluation
from llmkd.recipe.scoring_steps import AGREEMENT

log = logging.getLogger("llmkd")

TEACHER = "teacher"  # the entry whose generated texts the others are compared with
PACKAGES = ("transformers", "torch", "datasets")
CHUNK = 256  # tokens whose logits exist at one time
ROWS = 8  # texts at once

Ids = list[int]
Texts = dict[int, GeneratedText]
"""A model's generated texts by item."""


@dataclass(frozen=True)
class Task:
    """What all students of a call share."""

    teacher: Path
    settings: Evaluation
    data: Data
    generations: Path
    students: list[str]
    """Those whose texts the teacher reads; it does so before the first student is loaded, and its blocks are then freed."""
    trust_remote_code: bool


def agree(
    jobs: Jobs,
    teacher: Path,
    settings: Evaluation,
    data: Data,
    generations: Path,
    out: Path,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Path]:
    """Compare models with the teacher, as `step.run` says; the result files by name.

    The rows are the first `settings.agreement_rows` of `settings.generation`'s source, the texts those of
    `generations/<name>.jsonl` and `generations/teacher.jsonl`. Raises InputError where no rows are asked for or can't be read.
    """
    if settings.generation is None or not settings.agreement_rows:
        raise InputError("evaluation.agreement_rows: no rows to compare on; write a number above 0, e.g. 100")
    rows = held_out.held_out_data(settings.generation, data, settings.agreement_rows)
    packages = versions(*PACKAGES)
    decides = [rows.source, str(rows.name), rows.split, str(rows.rows), settings.dtype, str(settings.batch_size)]
    read = rows.model_dump(include={"records_seed", "format", "columns", "template_options", "max_length", "too_long"})
    decides += [json.dumps(read), json.dumps(packages, sort_keys=True)]
    decides += [*held_out.local_hashes(rows.source), *model_hashes(teacher), *_text_hashes(generations, TEACHER)]
    shared = digest(decides)
    about = {"teacher": str(teacher), "dtype": settings.dtype, "versions": packages, "rows": 0}
    about["metrics"] = dict.fromkeys(AGREEMENT_METRICS)
    unscored = [
        before_scoring(AgreementResult, name, folder, [shared, *_text_hashes(generations, name)], **about)
        for name, folder in jobs
    ]
    students = [student.name for student in pending(unscored, out)]
    task = Task(teacher, settings, data, generations, students, trust_remote_code)
    return run(STEP, unscored, task, out, weights=lambda student: _weights(student, teacher))


def _weights(student: AgreementResult, teacher: Path) -> int:
    """The teacher's and the student's: both are loaded by the same process, one after the other, and the teacher's head stays."""
    assert student.dtype is not None
    return weight_bytes([teacher, Path(student.model)], student.dtype)


def _text_hashes(generations: Path, name: str) -> list[str]:
    return file_hashes(generations, [file for file in (generations / f"{name}.jsonl",) if file.is_file()])


# --- The child process


@dataclass(frozen=True)
class TeacherOutputs:
    """All of the teacher that students are compared with."""

    rows: list[int]
    """The rows' numbers in their split."""
    batches: list[Batch]
    states: list[Tensor]
    """Its final states [N, H] at each batch's trained positions."""
    head: nn.Linear
    texts: Texts
    likelihoods: dict[str, dict[int, float]]
    """Student -> item -> the log-probability that the teacher gives to the student's text."""


def prepare(task: Task, say: Say) -> Score[AgreementResult]:
    """Run the teacher. Raises InputError where the rows can't be read; a teacher that can't be run fails each student."""
    if family(load_config(task.teacher, trust_remote_code=task.trust_remote_code)).kind == "encoder":
        raise InputError("evaluation.agreement_rows: an encoder predicts no tokens; write 0")
    generation = task.settings.generation
    assert generation is not None
    data = held_out.held_out_data(generation, task.data, task.settings.agreement_rows)
    rows, batches = held_out.batches_of(data, task.teacher, task.settings, task.trust_remote_code)
    say(f"teacher: started on {len(rows)} rows")
    started = time.perf_counter()
    try:
        teacher = run_teacher(task, rows, batches)
    except Exception as error:
        log.exception("teacher")
        return partial(_refuse, why=f"the teacher can't be run: {explained(error)}")
    size = sum(states.numel() * states.element_size() for states in teacher.states) / 2**20
    say(f"teacher: done; its states take {size:.1f} MiB ({time.perf_counter() - started:.1f} s)")
    return partial(compare_model, task=task, teacher=teacher)


def _refuse(_: AgreementResult, why: str) -> tuple[AgreementResult, list[ComparedItem]]:
    raise InputError(why)


def run_teacher(task: Task, rows: list[int], batches: list[Batch]) -> TeacherOutputs:
    """Run the teacher over the rows once, and over the texts of each student."""
    generation = task.settings.generation
    assert generation is not None
    tokenizer = load_tokenizer(task.teacher, trust_remote_code=task.trust_remote_code)
    texts = {name: read_texts(task.generations, name) for name in task.students}
    model = held_out.load_to_run(task.teacher, task.settings.dtype, trust_remote_code=task.trust_remote_code)
    asked: list[tuple[str, list[int]]] = []
    if any(texts.values()):
        prompts = held_out.held_out_prompts(generation, task.data)
        asked = held_out.encoded(prompts, tokenizer, family(model.config).kind)
        for name, written in texts.items():
            check_items(written, len(asked), task.generations / f"{name}.jsonl")
    states = [final_states(model, batch) for batch in batches]
    columns = model.config.vocab_size  # a text with tokens that the teacher lacks is refused by compare_model
    known = {
        name: {
            item: tuple(text.token_ids) for item, text in written.items() if max(text.token_ids, default=0) < columns
        }
        for name, written in texts.items()
    }
    # students of one teacher often write the same text, which it reads once
    different = sorted({text for written in known.values() for text in written.items()})
    prompt_and_text = {number: (asked[item][1], list(ids)) for number, (item, ids) in enumerate(different)}
    found = text_likelihoods(model, prompt_and_text, pad_id=held_out.pad_of(tokenizer))
    of = {text: found[number] for number, text in enumerate(different)}
    likelihoods = {name: {item: of[item, ids] for item, ids in written.items()} for name, written in known.items()}
    head, own_texts = whole_head(model), read_texts(task.generations, TEACHER)
    return TeacherOutputs(rows, batches, states, head, own_texts, likelihoods)


def check_items(written: Texts, rows: int, file: Path) -> None:
    """Raise InputError where texts answer rows that `evaluation.generation` no longer asks for."""
    if written and max(written) >= rows:
        raise InputError(
            f"{file}: a text of row {max(written)}, but evaluation.generation asks for {rows} rows now; run llmkd generate "
            "again, or write the number of items it was made with"
        )


def compare_model(
    student: AgreementResult, task: Task, teacher: TeacherOutputs
) -> tuple[AgreementResult, list[ComparedItem]]:
    """One student against the teacher: its result, and a line per item."""
    folder, name = Path(student.model), student.name
    held_out.check_model_folder(folder)
    ours, theirs = (load_tokenizer(f, trust_remote_code=task.trust_remote_code) for f in (folder, task.teacher))
    further = check_same_tokens(theirs, ours)
    for batch in teacher.batches:
        for ids in (batch.input_ids, batch.source_ids):
            check_ids([] if ids is None else ids.flatten().tolist(), further, "a row of evaluation.generation")
    for item, text in read_texts(task.generations, name).items():
        check_ids(text.token_ids, further, f"{name}'s text of item {item}")
    model = held_out.load_to_run(folder, task.settings.dtype, trust_remote_code=task.trust_remote_code)
    items = compare_rows(model, teacher)
    if not all(math.isfinite(item.kl) for item in items.values() if item.kl is not None):
        raise InputError(f"{name}'s distributions are not numbers: its training has diverged; lower its learning rate")
    tokens = sum(item.tokens for item in items.values())
    metrics: Scores = dict.fromkeys(AGREEMENT_METRICS)
    for metric in ("kl", "top1"):
        metrics[metric] = sum(getattr(item, metric) * item.tokens for item in items.values()) / tokens
    written = {name: read_texts(task.generations, name), TEACHER: teacher.texts}
    missing = [whose for whose, texts in written.items() if not texts]
    if not missing:
        metrics |= compare_texts(items, written[name], teacher.texts, teacher.likelihoods[name])
    error = f"no texts of {' and '.join(missing)} in {task.generations}: see that generation's result"
    result = replace(student, rows=len(teacher.rows), tokens=tokens, metrics=metrics, error=error if missing else None)
    return result, [items[number] for number in sorted(items)]


def compare_rows(model: Any, teacher: TeacherOutputs) -> dict[int, ComparedItem]:
    """KL and top-1 of each row, the means over its trained tokens."""
    items: dict[int, ComparedItem] = {}
    numbers = iter(teacher.rows)
    for batch, states in zip(teacher.batches, teacher.states, strict=True):
        ours, own, theirs = final_states(model, batch), whole_head(model), teacher.head
        targets = batch.targets.flatten()[batch.trained_at].to(ours.device)
        outputs = TeacherHead(states, theirs.weight, theirs.bias)
        _, kl, same = head_scores(ours, own.weight, own.bias, outputs, targets, CHUNK)
        assert kl is not None and same is not None
        per_row = (batch.targets != IGNORE).sum(1).tolist()
        for row_kl, row_same in zip(kl.split(per_row), same.split(per_row), strict=True):
            number, means = next(numbers), {"kl": row_kl.mean().item(), "top1": row_same.mean().item()}
            items[number] = ComparedItem(item=number, tokens=len(row_kl), **means)
    return items


def compare_texts(items: dict[int, ComparedItem], ours: Texts, theirs: Texts, likelihoods: dict[int, float]) -> Scores:
    """Token agreement (mean over items) and likelihood (mean over the student's tokens), added to the items too."""
    agreements, total, tokens = [], 0.0, 0
    for number in sorted(ours.keys() & theirs.keys()):
        text = ours[number].token_ids
        agreements.append(token_agreement(text, theirs[number].token_ids))
        total += likelihoods[number]
        tokens += len(text)
        items[number] = replace(
            items.get(number, ComparedItem(item=number)),
            token_agreement=agreements[-1],
            likelihood=likelihoods[number] / len(text) if text else None,
        )
    return {
        "token_agreement": sum(agreements) / len(agreements) if agreements else None,
        "likelihood": total / tokens if tokens else None,
    }


def read_texts(generations: Path, name: str) -> Texts:
    """A model's generated texts by item; none where it has not written any."""
    return {text.item: text for text in read_items(generations / f"{name}.jsonl", GeneratedText)}


# --- Two models at the same tokens


def token_agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The share of positions with the same token, over the longer of two texts; 1 for two empty ones."""
    longer = max(len(ours), len(theirs))
    return sum(a == b for a, b in zip(ours, theirs, strict=False)) / longer if longer else 1.0


@torch.no_grad()
def final_states(model: Any, batch: Batch) -> Tensor:
    """The final states [N, H] from which a batch's N trained tokens are predicted."""
    batch = batch.to(model.device)
    return final_state(model, batch).flatten(0, 1)[batch.trained_at]


def _logits(states: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(states, layer.weight, layer.bias).float()


@torch.no_grad()
def text_likelihoods(
    model: Any, texts: dict[int, tuple[Ids, Ids]], *, pad_id: int, chunk: int = CHUNK
) -> dict[int, float]:
    """By item, the log-probability that a model gives to a text's tokens after its prompt's; texts are (prompt, text) by item."""
    likelihoods, layer, of = {}, whole_head(model), family(model.config)
    collate, numbers = collate_for(of), sorted(texts)
    for start in range(0, len(numbers), ROWS):
        part = numbers[start : start + ROWS]
        batch = collate([_row(*texts[item], of) for item in part], pad_id=pad_id, packed=False)
        states = final_states(model, batch)
        targets = batch.targets.flatten()[batch.trained_at].to(states.device)
        scores = [
            _logits(some, layer).log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            for some, wanted in zip(states.split(chunk), targets.split(chunk), strict=True)
        ]
        per_row = (batch.targets != IGNORE).sum(1).tolist()
        for item, values in zip(part, torch.cat(scores).split(per_row), strict=True):
            likelihoods[item] = values.double().sum().item()
    return likelihoods


def _row(prompt: Ids, text: Ids, of: Family) -> dict[str, Any]:
    if of.kind == "encoder_decoder":
        return {"source_ids": prompt, "target_ids": [of.start, *text]}
    return {"input_ids": [*prompt, *text], "trained": [False] * len(prompt) + [True] * len(text)}


STEP = Step(AGREEMENT, Task, AgreementResult, prepare)


def main() -> int:
    """The process that scores models."""
    return serve(STEP)


if __name__ == "__main__":
    sys.exit(main())
