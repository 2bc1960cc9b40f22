"""Scores models through lm-eval, on Hugging Face or vLLM, in processes of their own, one JSON file per model.

`evaluate([("forward-s0", folder)], settings, out)` writes `out/forward-s0.json` and `out/forward-s0.samples.jsonl`; what is there
and made of the same model, tasks, settings and versions is not done again. The process (llmkd.evaluation.lm_eval_worker) says a line per
model and leaves lm-eval's own talk in `out/evaluation.log`. One process serves all models on Hugging Face; vLLM gets one for each model,
for it gives back a model's memory only by ending.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkd.data import records
from llmkd.errors import InputError
from llmkd.evaluation import text_metrics
from llmkd.evaluation.generation import head_size, parameters
from llmkd.evaluation.lm_eval_tasks import problem, task_files, task_manager
from llmkd.evaluation.lm_eval_worker import PACKAGES, result, write_result
from llmkd.evaluation.step import model_contents, up_to_date, written
from llmkd.files import ROOT, contents, digest, sources
from llmkd.inference import child
from llmkd.inference.vllm_setup import CPU_HEAD_SIZES, check_installed, on_cpu, vllm_environment, vllm_version
from llmkd.provenance import versions
from llmkd.recipe.recipe import Evaluation

log = logging.getLogger("llmkd")

WORTH_VLLM = 1e8
"""Parameters from which vLLM is started for a model; how much its tasks ask is not known before they are read."""
NOT_OF_LM_EVAL = {
    "include",
    "backend",
    "generation",
    "agreement_rows",
    "angles_rows",
}  # settings without influence on these scores


def evaluate(
    jobs: Sequence[tuple[str, Path]], settings: Evaluation, out: Path, *, trust_remote_code: bool = False
) -> dict[str, Path]:
    """Evaluate every (name, model folder) that has no up-to-date result in `out`; the result files by name.

    A model that can't be scored, or not on every task, gets a file with `error` set, and is tried again at the next call. Raises
    InputError for a task or task folder that is not there.
    """
    files = {name: out / f"{name}.json" for name, _ in jobs}
    include = task_folder(settings)
    orders = _orders(jobs, settings, include)
    todo = [order for order in orders if not up_to_date(files[order["name"]], order["fingerprint"])]
    log.info("evaluation: %d of %d models are up to date", len(orders) - len(todo), len(orders))
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.log").unlink(missing_ok=True)
    while todo:
        together = [order for order in todo if order["backend"] == "hf"] or todo[:1]
        code = _run_child(together, settings, include, out, trust_remote_code)
        left = [order for order in together if not written(files[order["name"]], order["fingerprint"])]
        if left:  # the process fell over one model (no memory, say): note it, and go on with the others
            error = f"the evaluation's process ended with code {code}; see {out / 'evaluation.log'}"
            write_result(out, result(left.pop(0), settings, error=error))
        todo = left + [order for order in todo if order not in together]
    return files


def check_tasks(settings: Evaluation) -> None:
    """Raise InputError for what would keep the tasks from being scored; for a study to call before it trains for hours.

    That is a task or folder that is not there, one whose data can't be read or had from the hub, a metric that can't be had, and
    vLLM asked for where there is none.
    """
    include = task_folder(settings)
    if settings.backend == "vllm":
        check_installed("evaluation.backend")
    manager = task_manager(settings.tasks, str(include) if include else None)
    for task in settings.tasks:
        fault = problem(manager, task)
        if fault is not None:
            raise InputError(fault)


def task_folder(settings: Evaluation) -> Path | None:
    """The folder of YAML tasks, as seen from the current folder or else the repository.

    Raises InputError if there is none, or if no task is asked for.
    """
    if not settings.tasks:
        raise InputError("evaluation.tasks: name at least one lm-eval task, e.g. [records_generation, records_choice]")
    if settings.include is None:
        return None
    for folder in (Path(settings.include), ROOT / settings.include):
        if folder.is_dir():
            return folder.resolve()
    raise InputError(
        f"evaluation.include: no folder {settings.include!r} here or in {ROOT}; name a folder of lm-eval YAML tasks, or null"
    )


def _orders(jobs: Sequence[tuple[str, Path]], settings: Evaluation, include: Path | None) -> list[dict[str, Any]]:
    """For each model: where it is, which backend takes it and why, and the fingerprint of all that decides its scores."""
    orders = []
    for name, model in jobs:
        backend, why = _backend(settings, model)
        fingerprint = digest([_shared_fingerprint(settings, include, backend), *model_contents(model)])
        orders.append({"name": name, "model": str(model), "fingerprint": fingerprint, "backend": backend, "why": why})
    return orders


def _backend(settings: Evaluation, model: Path) -> tuple[str, str]:
    """(backend, why): the one asked for, or vLLM where it is there and the model large. Raises InputError for vLLM where there is none."""
    if settings.backend == "vllm":
        check_installed("evaluation.backend")
    if settings.backend != "auto":
        return settings.backend, "as the recipe says"
    if vllm_version() is None:
        return "hf", "vLLM is not installed"
    try:
        size, width = parameters(model), head_size(model)
    except (OSError, ValueError, KeyError):  # loading says what is wrong with it
        return "hf", "the model's size can't be read"
    if on_cpu() and width not in CPU_HEAD_SIZES:
        return "hf", f"vLLM's CPU build knows no attention heads of size {width}"
    if size < WORTH_VLLM:
        return "hf", f"{size / 1e6:.3g}M parameters, too few to repay vLLM's start (from {WORTH_VLLM / 1e6:.0f}M on)"
    return "vllm", f"{size / 1e6:.3g}M parameters, enough to repay vLLM's start (from {WORTH_VLLM / 1e6:.0f}M on)"


def _shared_fingerprint(settings: Evaluation, include: Path | None, backend: str) -> str:
    """A hash of what every model on this backend shares: settings, versions, and what the tasks are made of."""
    made_with = versions(*PACKAGES["hf"], *PACKAGES[backend])
    parts = [settings.model_dump_json(exclude=NOT_OF_LM_EVAL), backend, json.dumps(made_with, sort_keys=True)]
    parts += sources(records, text_metrics)
    return digest(parts + ([] if include is None else contents(include, task_files(include, settings.tasks))))


def _run_child(
    todo: list[dict[str, Any]], settings: Evaluation, include: Path | None, out: Path, trust_remote_code: bool
) -> int:
    order: dict[str, Any] = {"jobs": todo, "settings": settings.model_dump(mode="json"), "out": str(out.resolve())}
    order |= {"include": str(include) if include else None, "trust_remote_code": trust_remote_code}
    more = vllm_environment(out.resolve() / "vllm") if todo[0]["backend"] == "vllm" else {}
    return child.run("llmkd.evaluation.lm_eval_worker", order, out / "evaluation.log", "evaluation", more)
