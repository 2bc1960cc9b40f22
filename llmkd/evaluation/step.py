"""The driver of the scoring steps. A step is a function from a model to its result; its processes, failures and files are handled here.

    STEP = Step(GENERATION, Task, GenerationResult, prepare)             # in the step's module, run by `python -m`
    files = run(STEP, unscored, Task(...), out)                          # in the parent
    sys.exit(serve(STEP))                                                # in the child

`unscored` are the models' results before they are scored: name, model, and the fingerprint of all that decides the scores. A model
whose result file has that fingerprint and no error is not scored again. Each device has its own process, and so have the cores that
small models are spread over; all take their models from one queue. Models that need several devices come first, each on a group of
them; where none of these is left, a group is parted among the others. Where a process dies, only the model that it was scoring fails.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from llmkd.errors import InputError
from llmkd.evaluation import places
from llmkd.evaluation.results import Item, ScoredModel, StepResult, read_result
from llmkd.files import digest, file_hashes, read, write_text
from llmkd.inference import child
from llmkd.inference.child import Child, Say
from llmkd.progress import Advance, progress
from llmkd.provenance import card_bytes
from llmkd.recipe.scoring_steps import ScoringStep

log = logging.getLogger("llmkd")

NOT_OF_THE_MODEL = (
    "llmkd.json",
    "checksums.json",
    "README.md",
)  # in an exported folder, but without influence on its outputs

S = TypeVar("S")
R = TypeVar("R", bound=StepResult)
M = TypeVar("M", bound=ScoredModel)
Jobs = Sequence[tuple[str, Path]]
"""(name, model folder) of the models to score."""
Score = Callable[[R], tuple[R, Sequence[Item]]]
"""An unscored model -> its result, and a line per item. Whatever it raises is noted in the model's file."""


@dataclass(frozen=True)
class Step(Generic[S, R]):
    """A way to score models."""

    names: ScoringStep
    shared: type[S]
    """A dataclass: all that the models of a call share, as it travels to the child."""
    result: type[R]
    prepare: Callable[[S, Say], Score[R]]
    """In the child: what is done once for all models. Raises InputError where no model can be scored."""

    @property
    def log_name(self) -> str:
        return f"{self.names.name}.log"


@dataclass(frozen=True)
class Process:
    """The process that a model needs. Models that need the same one share it; they are scored in the order of `rank`."""

    rank: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False
    """Whether the process ends after one model."""


def before_scoring(kind: type[M], name: str, folder: Path, decides: Sequence[str], **values: Any) -> M:
    """A model's result before it is scored. Its fingerprint is that of the model's files and of all else that `decides` the scores."""
    return kind(name=name, model=str(folder), fingerprint=digest([*decides, *model_hashes(folder)]), **values)


def own_weights(model: StepResult) -> int:
    """The bytes of the one model that is scored."""
    assert isinstance(model, ScoredModel) and model.dtype is not None
    return places.weight_bytes([Path(model.model)], model.dtype)


def run(
    step: Step[S, R],
    unscored: Sequence[R],
    shared: S,
    out: Path,
    *,
    process: Callable[[R], Process] = lambda _: Process(),
    weights: Callable[[R], int] = own_weights,
    devices: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Score the models that have no up-to-date result in `out`, a folder; the result files by name.

    A model that can't be scored gets a file with `error` set, and is tried again at the next call. `weights`: the bytes of all that a
    model's process holds on its devices. `devices`: by default all that are there. Raises InputError where `step.prepare` does.
    """
    files = {model.name: out / f"{model.name}.json" for model in unscored}
    todo = pending(unscored, out)
    log.info("%s: %d of %d models are up to date", step.names.name, len(unscored) - len(todo), len(unscored))
    out.mkdir(parents=True, exist_ok=True)
    used = _devices(todo, process) if devices is None else devices
    sizes = _sizes(todo, weights, len(used), out)
    todo = sorted((model for model in todo if model.name in sizes), key=lambda model: process(model).rank)
    if max(sizes.values(), default=1) == 1:
        used = used[: len(todo)]
    bar = progress(step.names.name, total=len(todo), unit="models", shown=bool(todo))
    with bar as advance, ThreadPoolExecutor(max(1, len(used))) as pool:
        driver = _Driver(step, todo, sizes, shared, out, process, used.count("cpu"), advance)
        working = {pool.submit(driver.work, group, size) for group, size in driver.parted(used, None)}
        try:
            while working:
                finished, working = wait(working, return_when=FIRST_COMPLETED)
                for free, size in (lane.result() for lane in finished):
                    working |= {pool.submit(driver.work, *lane) for lane in driver.parted(free, size)}
        except BaseException:  # a refusal, or we are stopped: leave no process behind
            driver.stop()
            raise
    return files


def _devices(models: Sequence[StepResult], process: Callable[[Any], Process]) -> list[str]:
    """All CUDA devices; else `cpu`, for small models once per process that the cores carry. A model that wants a process of its own
    (vLLM's) has the CPU alone."""
    found = places.visible_devices()
    shares_cores = found == ["cpu"] and all(process(model) == Process() for model in models)
    return found * places.side_by_side(models) if shares_cores else found


def _sizes(todo: Sequence[R], weights: Callable[[R], int], count: int, out: Path) -> dict[str, int]:
    """By name over how many devices each model is spread; one for which there are too few gets that error, and is left out."""
    card, sizes = card_bytes(), {}
    for model in todo:
        try:
            sizes[model.name] = 1 if card is None else places.devices_for(model, weights(model), count, card)
        except InputError as error:
            log.warning("%s: %s", model.name, error)
            _write(out, replace(model, error=str(error)), [])
    return sizes


class _Driver(Generic[S, R]):
    """The queue of one call's models, and the processes that score them."""

    def __init__(
        self,
        step: Step[S, R],
        todo: Sequence[R],
        sizes: Mapping[str, int],
        shared: S,
        out: Path,
        process: Callable[[R], Process],
        on_cpu: int,
        advance: Advance,
    ) -> None:
        self._step, self._out, self._process = step, out, process
        values = TypeAdapter(step.shared).dump_python(shared, mode="json")
        threads = max(1, len(os.sched_getaffinity(0)) // on_cpu) if on_cpu > 1 else None
        self._shared = {"out": str(out.resolve()), "shared": values, "threads": threads}
        ordered = list(enumerate(sorted(todo, key=lambda model: -sizes[model.name]), start=1))
        self._queues = {
            size: iter([(number, model) for number, model in ordered if sizes[model.name] == size])
            for size in sorted(set(sizes.values()), reverse=True)
        }
        self._count, self._lock, self._stopped = len(todo), Lock(), False
        self._children: list[Child] = []
        self._advance, self._shares = advance, [0.0] * (len(todo) + 1)

    def parted(self, devices: Sequence[str], before: int | None) -> list[tuple[list[str], int]]:
        """The devices in groups, and the size of the models that each takes next; `before`: the size they took before, None at the start.

        Those too few for a group of the largest models left go on to the next smaller ones.
        """
        lanes: list[tuple[list[str], int]] = []
        for size in (size for size in self._queues if before is None or size < before):
            whole, devices = places.groups(devices, size)
            lanes += [(group, size) for group in whole]
        return lanes

    def work(self, devices: list[str], size: int) -> tuple[list[str], int]:
        """Score models of that size on a group of as many devices until none is left; the devices, free again, and the size."""
        running: Child | None = None
        wanted, device = Process(), ",".join(devices)
        while (taken := self._take(size)) is not None:
            number, model = taken
            before, wanted = wanted, self._process(model)
            if running is not None and (wanted != before or before.alone):
                running.close()
                running = None
            running = running or self._start(wanted, device)
            if running is None:
                return [], size
            order = {"label": f"{number}/{self._count} {model.name}", "model": model.to_json()}
            code = running.do(order, self._say, partial(self._moved, number))
            self._moved(number, 1.0)
            if code is not None and not self._stopped:
                running = None
                error = f"the process that scored it ended with code {code}; see {self._out / self._step.log_name}"
                if pending([model], self._out):  # not where it died after writing the result
                    _write(self._out, replace(model, error=error), [])
        if running is not None:
            running.close()
        return devices, size

    def _say(self, line: str) -> None:
        log.info("%s: %s", self._step.names.name, line)

    def _moved(self, number: int, share: float) -> None:
        """So much of a model is scored."""
        with self._lock:
            more, self._shares[number] = share - self._shares[number], share
            self._advance(more)

    def stop(self) -> None:
        """End all processes, and start no other."""
        with self._lock:
            self._stopped = True
            for process in self._children:
                process.kill()

    def _take(self, size: int) -> tuple[int, R] | None:
        with self._lock:
            return None if self._stopped else next(self._queues[size], None)

    def _start(self, wanted: Process, device: str) -> Child | None:
        """A process on the device; None where all were stopped."""
        place = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": device}
        log_file = self._out / self._step.log_name
        with self._lock:
            if self._stopped:
                return None
            started = child.Child(self._step.names.module, self._shared, log_file, {**wanted.variables, **place})
            self._children.append(started)
            return started


# --- The child


def serve(step: Step[S, R]) -> int:
    """Score the models on stdin one after another; returns the exit code, 2 where `step.prepare` raises InputError."""
    received, orders, say = child.listen()
    out = Path(received["out"])
    if received["threads"] is not None:
        import torch  # heavy, and needed by some steps alone

        torch.set_num_threads(min(received["threads"], torch.get_num_threads()))
    try:
        score = step.prepare(TypeAdapter(step.shared).validate_json(json.dumps(received["shared"])), say)
    except InputError as error:
        say(f"{child.REFUSAL}{error}")
        return 2
    for order in orders:
        say(f"{order['label']}: started")
        result = _scored(score, step.result.from_json(order["model"]), out)
        say(f"{child.DONE}{order['label']}: {result.summary()} ({result.seconds:.1f} s)")
    return 0


def _scored(score: Score[R], model: R, out: Path) -> R:
    """Score a model and write its files. Whatever it raises is written as its error, so that the other models are scored."""
    started = time.perf_counter()
    try:
        result, items = score(model)
        result = replace(result, seconds=result.seconds or time.perf_counter() - started)
        _write(out, result, items)
    except Exception as error:
        log.exception("%s", model.name)
        result = replace(model, error=explained(error), seconds=time.perf_counter() - started)
        _write(out, result, [])
    return result


def explained(error: Exception) -> str:
    """An exception as a result file notes it, in one sentence."""
    text = " ".join(str(error).split())[:300]
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


# --- Files


def pending(unscored: Sequence[R], out: Path) -> list[R]:
    """The models without a result in `out` of the same fingerprint; a noted error is no result."""

    def is_done(model: R) -> bool:
        file = out / f"{model.name}.json"
        result = read_result(file, type(model))
        if result is None or result.fingerprint != model.fingerprint or result.error is not None:
            return False
        items, known = _items_file(out, result), read(file).keys() <= result.to_json().keys()
        if known and result.written in (
            "",
            _hash(result, "" if items is None or not items.is_file() else items.read_text(errors="replace")),
        ):
            return True
        log.warning(
            "%s is damaged, or the file with its items: not what was written; %s is scored again", file, model.name
        )
        return False

    return [model for model in unscored if not is_done(model)]


def _write(out: Path, result: StepResult, items: Sequence[Item]) -> None:
    """Write a model's files, the items first: where a result is, its items are."""
    lines = "".join(f"{item.to_line()}\n" for item in items)
    if (file := _items_file(out, result)) is not None:
        write_text(file, lines)
    written = _hash(result, lines if file is not None else "")
    write_text(out / f"{result.name}.json", replace(result, written=written).to_text())


def _items_file(out: Path, result: StepResult) -> Path | None:
    return out / f"{result.name}{result.ITEMS_SUFFIX}" if result.ITEMS_SUFFIX else None


def _hash(result: StepResult, items: str) -> str:
    values = {key: value for key, value in result.to_json().items() if key not in ("written", "seconds", "model")}
    return digest([json.dumps(values), items])


def model_hashes(folder: Path) -> list[str]:
    """Name and hash of every file that decides what a model folder's model does; none where there is no such folder."""
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    decides = [file for file in files if not file.name.startswith(".") and file.name not in NOT_OF_THE_MODEL]
    return file_hashes(folder, sorted(decides))
