"""How far each student agrees with the teacher: on held-out rows token by token, and in the texts that both have written.

`agree([("forward-s0", folder)], teacher, settings, data, generations, out)` writes `out/forward-s0.json` and, with a line per item,
`out/forward-s0.jsonl`; what is there and made of the same is not done again. The work is done in a process of its own, this file:
`python -m llmkd.evaluation.agreement` reads its order from stdin as JSON, says a line per model and leaves all other talk in
`out/agreement.log`. The teacher runs over the rows once for all students: its final states at the trained positions are kept, and
its head; the logits of a few hundred tokens are made from them where they are compared.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkd.data.batches import IGNORE, Batch, Family
from llmkd.data.other_families import collate_for, tokenize_for
from llmkd.data.rows import load_rows
from llmkd.errors import InputError
from llmkd.evaluation.agreement_metrics import compare, final_states, text_likelihoods, token_agreement
from llmkd.evaluation.generation import prompts
from llmkd.evaluation.prompts import encoded, sources
from llmkd.evaluation.step import model_contents, one_sentence, up_to_date, written
from llmkd.files import contents, digest, publish_json, publish_lines
from llmkd.inference import child
from llmkd.models.families import family
from llmkd.models.load import DTYPES, check_same_tokens, load_config, load_model, load_tokenizer
from llmkd.models.parts import whole_head
from llmkd.provenance import versions
from llmkd.recipe.recipe import Data, Evaluation

log = logging.getLogger("llmkd")

TEACHER = "teacher"  # the entry whose generated texts the others are held against
PACKAGES = ("transformers", "torch", "datasets")
ROWS = 8  # at once, where the recipe's evaluation.batch_size is auto
METRICS = ("token_agreement", "kl", "top1", "likelihood")

Item = dict[str, Any]
Texts = dict[int, Item]
"""A model's generated texts, lines of its generations file, by item."""


@dataclass(frozen=True)
class Task:
    """One call's order, as both processes read it."""

    teacher: Path
    settings: Evaluation
    data: Data
    generations: Path
    out: Path
    trust_remote_code: bool


def agree(
    jobs: Sequence[tuple[str, Path]],
    teacher: Path,
    settings: Evaluation,
    data: Data,
    generations: Path,
    out: Path,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Path]:
    """Compare every (name, model folder) that has no up-to-date result in `out` with the teacher; the result files by name.

    The rows are the first `settings.agreement_rows` of `settings.generation`'s source, the texts those of
    `generations/<name>.jsonl` and `generations/teacher.jsonl`. A model that can't be compared gets a file with `error` set, and is
    tried again at the next call. Raises InputError where no rows are asked for or the rows can't be read.
    """
    if settings.generation is None or not settings.agreement_rows:
        raise InputError(
            "evaluation.agreement_rows: how many held-out rows to compare on; write a number above 0, e.g. 100"
        )
    task = Task(teacher, settings, data, generations, out, trust_remote_code)
    shared = _shared_fingerprint(task)
    files = {name: out / f"{name}.json" for name, _ in jobs}
    orders = []
    for name, model in jobs:
        texts = [file for file in (generations / f"{name}.jsonl",) if file.is_file()]
        fingerprint = digest([shared, *contents(generations, texts), *model_contents(model)])
        orders.append({"name": name, "model": str(model), "teacher": str(teacher), "fingerprint": fingerprint})
    todo = [order for order in orders if not up_to_date(files[order["name"]], order["fingerprint"])]
    log.info("agreement: %d of %d models are up to date", len(orders) - len(todo), len(orders))
    out.mkdir(parents=True, exist_ok=True)
    (out / "agreement.log").unlink(missing_ok=True)
    while todo:
        code = child.run("llmkd.evaluation.agreement", _order(task, todo), out / "agreement.log", "agreement")
        todo = [order for order in todo if not written(files[order["name"]], order["fingerprint"])]
        if todo:  # the process fell over one model: note it, and go on with the others
            error = f"the process that compares ended with code {code}; see {out / 'agreement.log'}"
            _write(task, _result(todo.pop(0), task, error=error), [])
    return files


def _order(task: Task, todo: list[dict[str, Any]]) -> dict[str, Any]:
    paths = {key: str(getattr(task, key).resolve()) for key in ("teacher", "generations", "out")}
    sections = {key: getattr(task, key).model_dump(mode="json") for key in ("settings", "data")}
    return {"jobs": todo, "trust_remote_code": task.trust_remote_code, **paths, **sections}


def _read_order(order: dict[str, Any]) -> Task:
    return Task(
        teacher=Path(order["teacher"]),
        settings=Evaluation.model_validate_json(json.dumps(order["settings"])),
        data=Data.model_validate_json(json.dumps(order["data"])),
        generations=Path(order["generations"]),
        out=Path(order["out"]),
        trust_remote_code=order["trust_remote_code"],
    )


def _shared_fingerprint(task: Task) -> str:
    """A hash of what all students share: rows and how they become tokens, the teacher and its texts, precision and versions."""
    source, name = _source(task)
    generation, rows = task.settings.generation, task.settings.agreement_rows
    assert generation is not None
    parts = [source, str(name), generation.split, str(rows), task.settings.dtype, str(task.settings.batch_size)]
    data = task.data.model_dump(include={"records_seed", "format", "max_length", "too_long"})
    parts += [json.dumps(data), json.dumps(versions(*PACKAGES), sort_keys=True)]
    local = Path(source).expanduser()
    files = sorted(file for file in (local.rglob("*") if local.is_dir() else [local]) if file.is_file())
    texts = [file for file in (task.generations / f"{TEACHER}.jsonl",) if file.is_file()]
    return digest(parts + contents(local, files) + model_contents(task.teacher) + contents(task.generations, texts))


def _source(task: Task) -> tuple[str, str | None]:
    """Where the held-out rows are: the generation step's source, or else the training data's."""
    generation = task.settings.generation
    assert generation is not None
    if generation.source is not None:
        return generation.source, generation.name
    return task.data.source, generation.name or task.data.name


# --- The child process


def main() -> int:
    """Compare the models of the order on stdin one after another; 2 if the order can't be followed."""
    order, say = child.listen()
    task, jobs = _read_order(order), order["jobs"]
    try:
        tokenizer = load_tokenizer(task.teacher, trust_remote_code=task.trust_remote_code)
        items, batches = held_out(task, tokenizer)
    except InputError as error:
        say(f"{child.REFUSAL}{error}")
        return 2
    say(f"teacher: started on {len(items)} rows")
    started = time.perf_counter()
    try:
        texts = {job["name"]: read_texts(task.generations, job["name"]) for job in jobs}
        teacher = listen(task, tokenizer, batches, texts)
    except Exception as error:
        log.exception("teacher")
        for job in jobs:
            _write(task, _result(job, task, error=f"the teacher can't be run: {_said(error)}"), [])
        return 0
    size = sum(states.numel() * states.element_size() for states in teacher.states) / 2**20
    say(f"teacher: done; its states take {size:.1f} MiB ({time.perf_counter() - started:.1f} s)")
    for number, job in enumerate(jobs, start=1):
        say(f"{number}/{len(jobs)} {job['name']}: started")
        started = time.perf_counter()
        try:
            made, lines = compare_model(job, task, tokenizer, items, batches, teacher, texts)
        except Exception as error:  # whatever is wrong with one model must not cost the others their numbers
            log.exception("%s", job["name"])
            made, lines = {"error": _said(error)}, []
        result = _result(job, task, seconds=time.perf_counter() - started, **made)
        _write(task, result, lines)
        told = " ".join(f"{key} {value:.4g}" for key, value in result["metrics"].items() if value is not None)
        failed = f"failed: {result['error']}" if result["error"] else ""
        say(f"{number}/{len(jobs)} {job['name']}: {told} {failed} ({result['seconds']:.1f} s)")
    return 0


def held_out(task: Task, tokenizer: Any) -> tuple[list[int], list[Batch]]:
    """The rows' numbers in their split, and the rows in batches, tokens and trained positions as in training."""
    generation, data, settings = task.settings.generation, task.data, task.settings
    assert generation is not None
    source, name = _source(task)
    found = load_rows(
        source, name=name, split=generation.split, rows=settings.agreement_rows, records_seed=data.records_seed
    )
    format = data.format if generation.source is None else "auto"
    of = _family(task)
    lengths: dict[str, Any] = dict(max_length=data.max_length, too_long=data.too_long)
    rows = tokenize_for(of, found, tokenizer, format=format, **lengths)
    size = settings.batch_size if isinstance(settings.batch_size, int) else ROWS
    cut = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
    batches = [collate_for(of)([rows[number] for number in part], pad_id=_pad(tokenizer), packed=False) for part in cut]
    return list(rows["row"]), batches


@dataclass(frozen=True)
class Listened:
    """What the teacher has said: final states at each batch's trained positions [N, H], its head, and by name the log-probability
    of each item's generated tokens."""

    states: list[Tensor]
    head: nn.Linear
    likelihoods: dict[str, dict[int, float]]


def listen(task: Task, tokenizer: Any, batches: Sequence[Batch], texts: dict[str, Texts | None]) -> Listened:
    """Run the teacher over the rows once, and over what each student has written."""
    generation = task.settings.generation
    assert generation is not None
    asked: list[tuple[str, list[int]]] = []
    if any(texts.values()):
        items = prompts(generation, task.data)
        reads = sources if _family(task).kind == "encoder_decoder" else encoded
        asked = reads(items, tokenizer)
    model = _load(task, task.teacher)
    states = [final_states(model, batch) for batch in batches]
    likelihoods = {}
    for name, found in texts.items():
        both = {item: (asked[item][1], text["token_ids"]) for item, text in (found or {}).items()}
        likelihoods[name] = text_likelihoods(model, both, pad_id=_pad(tokenizer))
    return Listened(states, whole_head(model), likelihoods)


def _family(task: Task) -> Family:
    """The teacher's family. Raises InputError for an encoder, which says nothing of tokens."""
    found = family(load_config(task.teacher, trust_remote_code=task.trust_remote_code))
    if found.kind == "encoder":
        raise InputError(
            "evaluation.agreement_rows: an encoder says nothing of tokens; write 0, and evaluation.classification"
        )
    return found


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def compare_model(
    job: dict[str, Any],
    task: Task,
    tokenizer: Any,
    items: Sequence[int],
    batches: Sequence[Batch],
    teacher: Listened,
    texts: dict[str, Texts | None],
) -> tuple[dict[str, Any], list[Item]]:
    """One student against the teacher: what its result file holds, and a line per item."""
    folder, name = Path(job["model"]), job["name"]
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (no config.json)")
    check_same_tokens(tokenizer, load_tokenizer(folder, trust_remote_code=task.trust_remote_code))
    model = _load(task, folder)
    lines: dict[int, Item] = {}
    numbers = iter(items)
    for batch, theirs in zip(batches, teacher.states, strict=True):
        kl, same = compare(final_states(model, batch), whole_head(model), theirs, teacher.head)
        per_row = (batch.targets != IGNORE).sum(1).tolist()
        for part, match in zip(kl.split(per_row), same.split(per_row), strict=True):
            item = next(numbers)
            lines[item] = {"item": item, "tokens": len(part), "kl": part.mean().item(), "top1": match.mean().item()}
    if not all(math.isfinite(line["kl"]) for line in lines.values()):
        raise InputError(f"{name}'s distributions are not numbers: its training has diverged; lower its learning rate")
    tokens = sum(line["tokens"] for line in lines.values())
    metrics = {key: sum(line[key] * line["tokens"] for line in lines.values()) / tokens for key in ("kl", "top1")}
    ours, theirs_texts = texts[name], read_texts(task.generations, TEACHER)
    missing = [whose for whose, found in ((name, ours), (TEACHER, theirs_texts)) if found is None]
    if ours is not None and theirs_texts is not None:
        metrics |= _texts(lines, ours, theirs_texts, teacher.likelihoods[name])
    error = (
        f"no texts of {' and '.join(missing)} in {task.generations}: see that generation's result" if missing else None
    )
    made = {"rows": len(items), "tokens": tokens, "metrics": {key: metrics.get(key) for key in METRICS}, "error": error}
    return made, [lines[item] for item in sorted(lines)]


def _texts(
    lines: dict[int, Item], ours: dict[int, Item], theirs: dict[int, Item], likelihoods: dict[int, float]
) -> dict[str, float | None]:
    """Token agreement (mean over items) and likelihood (mean over the student's tokens), added to the items' lines too."""
    agreements, written_tokens = [], 0
    for item in sorted(ours.keys() & theirs.keys()):
        line = lines.setdefault(item, {"item": item, "tokens": 0})
        count = len(ours[item]["token_ids"])
        line["token_agreement"] = token_agreement(ours[item]["token_ids"], theirs[item]["token_ids"])
        line["likelihood"] = likelihoods[item] / count if count else None
        agreements.append(line["token_agreement"])
        written_tokens += count
    total = sum(likelihoods[item] for item in ours.keys() & theirs.keys())
    return {
        "token_agreement": sum(agreements) / len(agreements) if agreements else None,
        "likelihood": total / written_tokens if written_tokens else None,
    }


# --- Files


def _load(task: Task, folder: Path) -> Any:
    model: Any = load_model(
        folder,
        dtype=DTYPES[task.settings.dtype],
        ds_config=None,
        attention="auto",
        trust_remote_code=task.trust_remote_code,
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_texts(generations: Path, name: str) -> Texts | None:
    """A model's generated texts by item; None where there are none."""
    try:
        lines = (generations / f"{name}.jsonl").read_text().splitlines()
    except OSError:
        return None
    return {line["item"]: line for line in map(json.loads, lines)} or None


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else one_sentence(error)


def _result(job: dict[str, Any], task: Task, **found: Any) -> dict[str, Any]:
    empty = {"error": None, "seconds": 0.0, "rows": 0, "tokens": 0, "metrics": dict.fromkeys(METRICS)}
    return {**job, **empty, "dtype": task.settings.dtype, "versions": versions(*PACKAGES), **found}


def _write(task: Task, result: dict[str, Any], lines: Sequence[Item]) -> None:
    """Publish a model's numbers: the items first, so that who sees the result finds them."""
    keys = ("item", *METRICS, "tokens")
    publish_lines(task.out / f"{result['name']}.jsonl", [{key: line.get(key) for key in keys} for line in lines])
    publish_json(task.out / f"{result['name']}.json", result)


if __name__ == "__main__":
    sys.exit(main())
