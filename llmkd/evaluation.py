"""Scores models through lm-eval on Hugging Face, all in one process of their own, one JSON file per model.

`evaluate([("forward-s0", folder)], settings, out)` writes `out/forward-s0.json` and `out/forward-s0.samples.jsonl`;
what is there and made of the same model, tasks, settings and versions is not done again. The child process is this
file: `python -m llmkd.evaluation` reads its order from stdin as JSON, says a line per model on stdout and leaves
lm-eval's own talk in `out/evaluation.log`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from llmkd import __version__
from llmkd.config import ROOT, Evaluation
from llmkd.errors import InputError

log = logging.getLogger("llmkd")

PACKAGE = Path(__file__).resolve().parent
BACKEND = "hf"
PACKAGES = ("lm_eval", "transformers", "torch", "sacrebleu")  # their versions belong to a score
NOT_OF_THE_MODEL = ("llmkd.json", "README.md")  # in an exported folder, but without influence on its outputs
# What a launcher sets for its ranks, by how the names begin: lm-eval's process is none and would wait for the others.
LAUNCHER_VARIABLES = tuple("RANK WORLD_SIZE MASTER_ LOCAL_ GROUP_ ROLE_ CROSS_ TORCHELASTIC_ ACCELERATE_".split())
REFUSAL = "input error: "  # begins the child's last line when it can't follow its order
BOOTSTRAP = 100  # draws for the standard error of a metric without a formula


def evaluate(jobs: Sequence[tuple[str, Path]], settings: Evaluation, out: Path) -> dict[str, Path]:
    """Evaluate every (name, model folder) that has no up-to-date result in `out`; the result files by name.

    A model that can't be scored gets a file with `error` set, and is tried again at the next call. Raises InputError
    for a task or task folder that is not there.
    """
    files = {name: out / f"{name}.json" for name, _ in jobs}
    include = task_folder(settings)
    shared = _shared_fingerprint(settings, include)
    orders = [{"name": name, "model": str(model), "fingerprint": _fingerprint(shared, model)} for name, model in jobs]
    todo = [order for order in orders if not _up_to_date(files[order["name"]], order["fingerprint"])]
    log.info("evaluation: %d of %d models are up to date", len(orders) - len(todo), len(orders))
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.log").unlink(missing_ok=True)
    while todo:
        code = _run_child(todo, settings, include, out)
        left = [order for order in todo if not _written(files[order["name"]], order["fingerprint"])]
        if left:  # the child fell over one model (no memory, say): note it, and go on with the others
            error = f"the evaluation's process ended with code {code}; see {out / 'evaluation.log'}"
            _write_result(out, _result(left.pop(0), error=error))
        todo = left
    return files


def check_tasks(settings: Evaluation) -> None:
    """Raise InputError for a task or task folder that is not there; for a study to call before it trains for hours."""
    include = task_folder(settings)
    _task_manager(settings.tasks, str(include) if include else None)


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


def _run_child(todo: list[dict[str, Any]], settings: Evaluation, include: Path | None, out: Path) -> int:
    """Run one process over `todo`, logging its lines; its exit code. Raises InputError if it ends on one."""
    order: dict[str, Any] = {"jobs": todo, "settings": settings.model_dump(mode="json"), "out": str(out.resolve())}
    order["include"] = str(include) if include else None
    command, pipe = [sys.executable, "-m", "llmkd.evaluation"], subprocess.PIPE
    line = ""
    with (out / "evaluation.log").open("a") as talk:
        with subprocess.Popen(command, env=_environment(), text=True, stdin=pipe, stdout=pipe, stderr=talk) as child:
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(json.dumps(order))
                child.stdin.close()
                for line in child.stdout:
                    if not line.startswith(REFUSAL):
                        log.info("evaluation: %s", line.rstrip())
            except BrokenPipeError:  # it died at once; its code says so
                pass
            except BaseException:  # we are stopped: leave no one behind
                child.kill()
                raise
    if line.startswith(REFUSAL):
        raise InputError(line.removeprefix(REFUSAL).rstrip())
    return child.returncode


def _environment() -> dict[str, str]:
    """Ours, less what a launcher set for its ranks (lm-eval would wait for them), with this checkout importable."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
    paths = [str(ROOT)] * (PACKAGE.parent == ROOT) + [path for path in [kept.get("PYTHONPATH")] if path]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


# --- What is already done


def _up_to_date(file: Path, fingerprint: str) -> bool:
    return _written(file, fingerprint) and json.loads(file.read_text())["error"] is None


def _written(file: Path, fingerprint: str) -> bool:
    try:
        return json.loads(file.read_text())["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):  # none, or not whole
        return False


def _fingerprint(shared: str, model: Path) -> str:
    """A hash of all that decides a model's scores: its files' contents, and what every model of the call shares."""
    files = (file for file in _files(model) if file.name not in NOT_OF_THE_MODEL)
    return _digest([shared, *_contents(model, files)])


def _shared_fingerprint(settings: Evaluation, include: Path | None) -> str:
    parts = [settings.model_dump_json(exclude={"include"}), json.dumps(_versions(), sort_keys=True)]
    parts += _contents(PACKAGE, [PACKAGE / "records.py"])
    if include is not None:
        parts += _contents(include, _task_files(include, settings.tasks))
    return _digest(parts)


def _task_files(include: Path, tasks: Sequence[str]) -> list[Path]:
    """What these tasks are made of: their YAML with all it includes or groups, its local data, the folder's Python."""
    configs = {file: yaml.load(file.read_text(), Loader=_AnyTag) or {} for file in sorted(include.rglob("*.yaml"))}
    files, wanted = sorted(include.rglob("*.py")), list(tasks)
    while wanted:
        name = wanted.pop()
        for file, config in configs.items():
            task = config.get("task")  # its name, or a group's list
            told = _strings([config.get("group"), config.get("tag"), task if isinstance(task, str) else None])
            if name in (str(file), *told) and file not in files:
                wanted += _strings(task) + [str(file.parent / base) for base in _strings(config.get("include"))]
                data = map(Path, _strings((config.get("dataset_kwargs") or {}).get("data_files")))
                files += [file, *(path for path in data if path.is_file())]
    return files


def _strings(value: Any) -> list[str]:
    """All strings in a YAML value, at any depth."""
    if isinstance(value, dict | list):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in _strings(item)]
    return [value] if isinstance(value, str) else []


class _AnyTag(yaml.SafeLoader):
    """YAML whose `!function` and the like are read as None: only plain values are asked of it."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


def _files(folder: Path) -> list[Path]:
    found = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return sorted(file for file in found if not file.name.startswith("."))


def _contents(root: Path, files: Iterable[Path]) -> list[str]:
    """Each file's name under `root`, and the hash of its content."""
    named = []
    for file in files:
        with file.open("rb") as stream:
            named.append(f"{os.path.relpath(file, root)} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    return named


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _versions() -> dict[str, str]:
    return {"llmkd": __version__, **{package: version(package) for package in PACKAGES}}


# --- The child process


def main() -> int:
    """Evaluate the models of the order on stdin one after another; 2 if the order can't be followed."""
    order = json.load(sys.stdin)
    settings, out = Evaluation.model_validate_json(json.dumps(order["settings"])), Path(order["out"])
    import lm_eval.models.huggingface  # noqa: F401 (takes seconds: not on the first model's account)

    try:
        manager = _task_manager(settings.tasks, order["include"])
    except InputError as error:
        print(f"{REFUSAL}{error}", flush=True)
        return 2
    jobs = order["jobs"]
    for number, job in enumerate(jobs, start=1):
        print(f"{number}/{len(jobs)} {job['name']}: started", flush=True)
        started = time.perf_counter()
        samples: dict[str, list[dict[str, Any]]] = {}
        try:
            found, samples = _score(Path(job["model"]), settings, manager)
            result = _result(job, seconds=time.perf_counter() - started, **found)
        except Exception as error:  # whatever is wrong with one model must not cost the others their scores
            log.exception("%s", job["name"])
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            result = _result(job, error=said, seconds=time.perf_counter() - started)
        _write_samples(out / f"{job['name']}.samples.jsonl", samples)
        _write_result(out, result)
        print(f"{number}/{len(jobs)} {job['name']}: {_line(result)} ({result['seconds']:.1f} s)", flush=True)
    return 0


def _task_manager(tasks: Sequence[str], include: str | None) -> Any:
    """lm-eval's index of tasks; its own thousands are read only when one of them is asked for."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include, include_defaults=False)
    if all(task in manager.all_tasks for task in tasks):
        return manager
    manager = TaskManager(include_path=include, include_defaults=True)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"evaluation.tasks: lm-eval knows no task {task!r}, nor has {include} one{hint}")
    return manager


def _score(model: Path, settings: Evaluation, manager: Any) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """One model's scores and samples. Raises whatever loading or lm-eval raises."""
    import lm_eval

    simple_evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its signature
    found = simple_evaluate(
        model=_load(model, settings),
        tasks=list(settings.tasks),
        task_manager=manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAP,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )
    scores, errors = {}, {}
    for task, values in found["results"].items():
        numbers = {key: _number(value) for key, value in values.items() if "," in key}  # the rest: name, alias, ...
        scores[task] = {_metric(key): value for key, value in numbers.items() if "_stderr," not in key}
        errors[task] = {_metric(key): value for key, value in numbers.items() if "_stderr," in key}
    items = {task: count["effective"] for task, count in found["n-samples"].items()}
    return {"tasks": scores, "stderr": errors, "items": items}, found["samples"]


def _load(folder: Path, settings: Evaluation) -> Any:
    """lm-eval's HF backend around a model loaded here: on one device, without accelerate."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (no config.json)")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if model.generation_config.eos_token_id is None:  # a finished row of a batch would run on to the batch's end
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    backend: Any = HFLM
    return backend(
        pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, max_length=settings.max_length
    )


def _metric(key: str) -> str:
    """`acc_stderr,none` -> `acc`; a filter other than none stays in the name."""
    name, _, chosen = key.partition(",")
    return name.removesuffix("_stderr") + ("" if chosen == "none" else f" ({chosen})")


def _number(value: Any) -> float | None:
    """A finite float, or None: JSON knows no NaN, and lm-eval writes "N/A" for an error it can't give."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _result(job: dict[str, Any], *, error: str | None = None, seconds: float = 0.0, **found: Any) -> dict[str, Any]:
    empty = {"tasks": {}, "stderr": {}, "items": {}}
    return {**job, **empty, **found, "error": error, "backend": BACKEND, "versions": _versions(), "seconds": seconds}


def _line(result: dict[str, Any]) -> str:
    if result["error"]:
        return f"failed: {result['error']}"
    scores = [(metric, value) for values in result["tasks"].values() for metric, value in values.items()]
    return " ".join(f"{metric} {value:.4g}" if value is not None else f"{metric} -" for metric, value in scores)


def _write_samples(file: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """A line per task and item: what was asked, what the model gave, what was wanted, and the item's own scores."""
    lines = []
    for task, items in samples.items():
        for item in items:
            line = {
                "task": task,
                "item": item["doc_id"],
                "prompt": item["arguments"][0][0],
                "output": item["filtered_resps"],
                "choices": [argument[1] for argument in item["arguments"]] if len(item["arguments"]) > 1 else None,
                "target": item["target"],
                "references": item["doc"].get("references"),
                "metrics": {name: item[name] for name in item["metrics"] if isinstance(item[name], Real)},
            }
            said = {key: value for key, value in line.items() if value is not None}
            lines.append(json.dumps(said, default=str, ensure_ascii=False))
    _publish(file, "".join(line + "\n" for line in lines))


def _write_result(out: Path, result: dict[str, Any]) -> None:
    _publish(out / f"{result['name']}.json", json.dumps(result, indent=1, allow_nan=False))


def _publish(file: Path, text: str) -> None:
    tmp = file.with_name(file.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, file)


if __name__ == "__main__":
    sys.exit(main())
