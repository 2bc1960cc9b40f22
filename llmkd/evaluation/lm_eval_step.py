"""Scores models through lm-eval, on Hugging Face or vLLM.

`evaluate([("forward-s0", folder)], settings, out)` writes `out/forward-s0.json` and `out/forward-s0.samples.jsonl`, in processes of
llmkd.evaluation.lm_eval_worker. One serves all models on Hugging Face; vLLM gives back a model's memory only by ending.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from llmkd.data import records
from llmkd.errors import InputError
from llmkd.evaluation import text_metrics
from llmkd.evaluation.lm_eval_tasks import problem, task_files, task_manager
from llmkd.evaluation.lm_eval_worker import PACKAGES, STEP, Task
from llmkd.evaluation.results import LmEvalResult, read_result
from llmkd.evaluation.step import Jobs, Process, before_scoring, pending, run
from llmkd.files import ROOT, digest, file_hashes, sources
from llmkd.inference.choose import choose_backend
from llmkd.inference.vllm_setup import check_installed, vllm_environment
from llmkd.provenance import versions
from llmkd.recipe.recipe import Evaluation
from llmkd.recipe.scoring_steps import LM_EVAL

log = logging.getLogger("llmkd")

WORTH_VLLM = 1e8
"""Parameters from which vLLM is started for a model; how much its tasks ask is not known before they are read."""
NOT_OF_LM_EVAL = {"include", "trust_include", "backend", "generation", "agreement_rows", "angles_rows"}
"""Settings without influence on these scores."""

DECODING = "decoded as the task says"
"""Scores of before, when the settings in a model's folder were mixed in, are made anew."""


def evaluate(jobs: Jobs, settings: Evaluation, out: Path, *, trust_remote_code: bool = False) -> dict[str, Path]:
    """Score models on lm-eval's tasks, as `step.run` says; the result files by name.

    Raises InputError for a task or task folder that is not there.
    """
    include = task_folder(settings)
    if settings.backend == "vllm":
        check_installed("evaluation.backend")
    unscored = [_unscored(name, folder, settings, include) for name, folder in jobs]
    task = Task(settings, None if include is None else str(include), trust_remote_code)

    def process(model: LmEvalResult) -> Process:
        vllm = model.backend == "vllm"
        return Process(1, vllm_environment(out.resolve() / "vllm"), alone=True) if vllm else Process()

    todo = pending(unscored, out)
    files = run(STEP, unscored, task, out, process=process)
    scored = [result for model in todo if (result := read_result(files[model.name], LmEvalResult)) and result.command]
    if scored:
        log.info(
            "%s: every result file has its model's command, as %s's: %s",
            LM_EVAL.name,
            scored[0].name,
            scored[0].command,
        )
    return files


def check_tasks(settings: Evaluation) -> None:
    """Raise InputError for what would stop the scoring of the tasks; a study calls it before it trains for hours.

    That is a missing task, folder or metric, data that can't be read or downloaded, and vLLM where it is not installed.
    """
    include = task_folder(settings)
    if settings.backend == "vllm":
        check_installed("evaluation.backend")
    manager = task_manager(settings.tasks, str(include) if include else None, trusted=settings.trust_include)
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


def _unscored(name: str, folder: Path, settings: Evaluation, include: Path | None) -> LmEvalResult:
    """A model before it is scored: which backend takes it and why, and the fingerprint of all that decides its scores."""
    backend, why = choose_backend(settings.backend, folder, 1, WORTH_VLLM)
    packages = versions(*PACKAGES["hf"], *PACKAGES[backend])
    shared = [settings.model_dump_json(exclude=NOT_OF_LM_EVAL), backend, json.dumps(packages, sort_keys=True)]
    shared += [DECODING, *sources(records, text_metrics)]
    shared += [] if include is None else file_hashes(include, task_files(include, settings.tasks))
    about = {"backend": backend, "why": why, "dtype": settings.dtype, "versions": packages}
    return before_scoring(LmEvalResult, name, folder, [digest(shared)], **about)
