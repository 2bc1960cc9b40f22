"""lm-eval's tasks: found by name, checked before anything is trained for their sake, and the files they are made of; which run Python."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import yaml

from llmkd import hub
from llmkd.errors import InputError, first_line
from llmkd.files import ROOT

Config = dict[str, Any]

LOCAL_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
"""What `dataset_path` is where a task's rows are files that `dataset_kwargs.data_files` names."""
PARTS_OF_A_DATA_SET = ("data_dir", "data_files", "revision")


def task_manager(tasks: Sequence[str], include: str | None, *, trusted: bool = False) -> Any:
    """lm-eval's index of tasks; its own thousands are read only when one of them is asked for.

    Raises InputError for a task that is neither among them nor in the folder `include`, and for one that runs Python of that folder
    where it is not `trusted`.
    """
    from lm_eval.tasks import TaskManager  # heavy; a study without tasks needs none of it

    logging.getLogger("lm_eval.api.task").addFilter(_is_for_us)
    sandbox_templates()
    manager = TaskManager(include_path=include, include_defaults=False)
    if not all(task in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=include, include_defaults=True)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"evaluation.tasks: lm-eval knows no task {task!r}, nor has {include} one{hint}")
    check_trust(manager, tasks, trusted=trusted)
    return manager


def _is_for_us(record: logging.LogRecord) -> bool:
    """Whether a line of lm-eval's is for who scores models: not how those who write a task may give it more arguments."""
    return "--metadata" not in record.getMessage()


# --- What would stop a task


def problem(manager: Any, name: str) -> str | None:
    """What would keep a task (or any of a group's) from being scored here, and the cure, in one sentence; None if nothing.

    Rows that lie on this machine are read as lm-eval will read them. Of a hub data set only its description is asked for.
    """
    seen: set[str] = set()
    for config in _configs(manager, name):
        source = str(config.get("dataset_path"))
        fault = _kind_fault(config) or _metric_fault(config)
        if fault is None and _is_local(manager, config):
            fault = _local_fault(manager, config)
        elif fault is None and source not in seen and not _made_by_code(config):  # a group often shares one data set
            seen.add(source)
            fault = _hub_fault(config)
        if fault is not None:
            return f"evaluation.tasks: {config.get('task', name)} {fault}"
    return None


def _configs(manager: Any, name: str, changes: Config | None = None) -> Iterator[Config]:
    """The configurations behind a name: a task's own, or those of all members of a group or tag."""
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _configs(manager, task, changes)
    elif entry.kind.name == "GROUP":
        yield from _members(manager, entry.cfg["task"])
    else:
        yield {**entry.cfg, **(changes or {})}


def _members(manager: Any, members: list[Any]) -> Iterator[Config]:
    """Members of a group: names, names with changes, groups written in place and tasks written in place."""
    for member in members:
        given: Config = {"task": member} if isinstance(member, str) else member
        inner = given.get("task")
        name = given.get("group") if isinstance(inner, list) or inner is None else inner
        if name in manager.task_index:
            changes = {key: value for key, value in given.items() if key not in ("task", "group")}
            yield from _configs(manager, str(name), changes)
        elif isinstance(inner, list):
            yield from _members(manager, inner)
        else:
            yield given


def _kind_fault(config: Config) -> str | None:
    if config.get("unsafe_code"):
        return (
            "runs code that the model has written, which llmkd does not; choose another task, or score the model by hand with "
            "lm_eval --confirm_run_unsafe_code"
        )
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        return "shows pictures or sound, and the models here read text; choose another task"
    return None


def _metric_fault(config: Config) -> str | None:
    """A metric that the `evaluate` library would fetch, and can't: lm-eval itself would fall over it after the last answer."""
    if config.get("process_results") or _made_by_code(config):
        return None
    for metric in config.get("metric_list") or []:
        name = metric.get("metric")
        if isinstance(name, str) and "/" not in name:  # a local !function reads as its file's path
            if not _is_there(name, fetched=metric.get("hf_evaluate") is True):
                return (
                    f"is scored by the metric {name!r}, which is not lm-eval's own but fetched from the hub, and that failed; connect "
                    "to the hub (and install what the metric needs), or choose a task scored by acc, exact_match, bleu, chrf or ter"
                )
    return None


def _is_there(metric: str, *, fetched: bool) -> bool:
    """Whether lm-eval has a metric of its own (which `fetched` rules out), or the `evaluate` library gets one."""
    importlib.import_module("lm_eval.api.metrics")  # registers lm-eval's own
    from lm_eval.api.registry import get_metric, metric_registry  # heavy, as above

    if metric in metric_registry and not fetched:
        return True
    importlib.import_module("evaluate.config")  # which hub.fetch switches
    return hub.fetch(lambda: get_metric(metric, fetched)) is not None


def _made_by_code(config: Config) -> bool:
    return "class" in config or bool(config.get("custom_dataset"))


def _is_local(manager: Any, config: Config) -> bool:
    """Whether a task's rows are at hand: files here, or made by the code of the user's own folder."""
    if config.get("dataset_path") in LOCAL_BUILDERS and not any("://" in file for file in _data_files(config)):
        return True
    entry = manager.task_index.get(config.get("task"))
    path = getattr(entry, "yaml_path", None)
    return _made_by_code(config) and manager.include_path is not None and path is not None and (
        Path(path).resolve().is_relative_to(Path(manager.include_path).resolve())
    )  # fmt: skip


def _local_fault(manager: Any, config: Config) -> str | None:
    if "class" not in config:
        for file in _data_files(config):
            if not any(character in file for character in "*?[") and not Path(file).exists():
                return f"reads the file {file!r}, which is not here (seen from {Path.cwd()}); make it, or name another in its YAML"
    if config.get("task") not in manager.task_index:
        return None  # written within a group: lm-eval builds it as a part of that
    try:
        manager.load([config["task"]])
    except Exception as error:  # whatever the task's own code or data raises, it would raise after the training too
        return f"can't be built ({first_line(error)}); fix its YAML or its data"
    return None


def _hub_fault(config: Config) -> str | None:
    source, kwargs = str(config.get("dataset_path")), config.get("dataset_kwargs") or {}
    parts = {key: kwargs[key] for key in PARTS_OF_A_DATA_SET if key in kwargs}
    try:
        hub.fetch(lambda: datasets.load_dataset_builder(source, config.get("dataset_name"), **parts))
    except hub.OutOfReach as error:
        return f"reads the data set {source}, and {error}; or choose a task on local files such as those in eval/"
    except Exception as error:  # the hub client has a score of errors
        return (
            f"reads the data set {source}, which is not in the cache and the hub did not give it ({first_line(error)}); connect to "
            "the hub once, or choose a task on local files such as those in eval/"
        )
    return None


def _data_files(config: Config) -> list[str]:
    return strings((config.get("dataset_kwargs") or {}).get("data_files"))


# --- What a task is made of


def task_files(include: Path, tasks: Sequence[str]) -> list[Path]:
    """What these tasks are made of: their YAML with all it includes or groups, its local data, the folder's Python."""
    configs = {file: plain_yaml(file) for file in sorted(include.rglob("*.yaml"))}
    files, wanted = sorted(include.rglob("*.py")), list(tasks)
    while wanted:
        name = wanted.pop()
        for file, config in configs.items():
            task = config.get("task")  # its name, or a group's list
            told = strings([config.get("group"), config.get("tag"), task if isinstance(task, str) else None])
            if name in (str(file), *told) and file not in files:
                wanted += strings(task) + [str(file.parent / base) for base in strings(config.get("include"))]
                files += [file, *(path for path in map(Path, _data_files(config)) if path.is_file())]
    return files


# --- Python in a task's folder: lm-eval imports what a YAML names by `!function`, and a metric that is a path, when it builds the task


def check_trust(manager: Any, tasks: Sequence[str], *, trusted: bool) -> None:
    """Raise InputError for a task that runs Python of a folder that is neither llmkd's, lm-eval's nor trusted by the recipe.

    `manager` is lm-eval's index of tasks, which it makes without running anything.
    """
    if trusted:
        return
    import lm_eval.tasks  # heavy; a study without tasks needs none of it

    own = (ROOT / "eval").resolve(), Path(lm_eval.tasks.__file__).resolve().parent
    for task in tasks:
        for file in _files(manager.task_index, task):
            code = None if any(file.is_relative_to(folder) for folder in own) else _code(file)
            if code is not None:
                raise InputError(
                    f"evaluation.tasks: {task} runs Python of its folder ({file}: {code}); read that code, and write "
                    "evaluation.trust_include: true if you trust it"
                )


def sandbox_templates() -> None:
    """Have lm-eval fill in its tasks' templates in a sandbox: the same text, but no way to Python's inside. Each is compiled once."""
    from jinja2.sandbox import SandboxedEnvironment  # with lm-eval alone
    from lm_eval import utils  # heavy, as above

    if not isinstance(utils.env, SandboxedEnvironment):
        sandbox: Any = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
        sandbox.filters.update(utils.env.filters)
        # lm-eval compiles a template for each row anew, which takes longer than a small model
        sandbox.from_string = lru_cache(sandbox.from_string)
        utils.env = sandbox


def _files(index: Any, task: str) -> Iterator[Path]:
    """The YAML files that a task, or any task of a group or tag, is made of."""
    names, files = [task], []
    for name in names:  # grows while it is read
        entry = index[name]
        members = (*entry.tags, *strings(entry.cfg))
        names += [member for member in dict.fromkeys(members) if member in index and member not in names]
        files += [] if entry.yaml_path is None else [Path(entry.yaml_path).resolve()]
    files = list(dict.fromkeys(files))
    for file in files:  # as well
        yield file
        included = (file.parent / base for base in strings(plain_yaml(file).get("include")))
        files += [path for path in dict.fromkeys(path.resolve() for path in included) if path not in files]


def _code(file: Path) -> str | None:
    """What a YAML file has run as Python; None if nothing."""
    for event in yaml.parse(file.read_text(), Loader=yaml.SafeLoader):
        if getattr(event, "tag", None) == "!function":
            return f"!function {getattr(event, 'value', '')}"
    metrics = plain_yaml(file).get("metric_list") or []
    return next((f"metric {name}" for name in strings(metrics) if "/" in name or "\\" in name), None)


def plain_yaml(file: Path) -> dict[str, Any]:
    """A task's YAML, with None in place of what its tags would have run; empty if it is no mapping."""
    values = yaml.load(file.read_text(), Loader=_AnyTag)
    return values if isinstance(values, dict) else {}


def strings(value: Any) -> list[str]:
    """All strings in a YAML value, at any depth."""
    if isinstance(value, dict | list):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in strings(item)]
    return [value] if isinstance(value, str) else []


class _AnyTag(yaml.SafeLoader):
    """YAML whose `!function` and the like are read as None: only plain values are asked of it."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)
