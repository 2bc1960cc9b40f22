"""What must hold after a trial. Each function gives the faults that it finds, as sentences; none where all is right."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkd.distributed import checksums
from tests.distributed.command import Command

ENDS_SECONDS = 20
"""How long the processes of a command may outlive it: the kernel ends them, on a machine that may be busy."""
EXACT = (
    ".safetensors",
    ".arrow",
    ".npy",
    ".sha256",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "config.json",
)
"""Files that hold the same bytes after every run."""
NOT_COMPARED = (".pt", ".py", ".log", ".html", ".md", ".csv", ".yaml", "checksums.json", "state.json", "summary.json")
"""Files of a run that hold times or places, or that are compared as a whole checkpoint (`checkpoints`)."""
VOLATILE = (
    *(
        "seconds",
        "tokens_per_second",
        "memory_gib",
        "changed",
        "created",
        "finished",
        "date",
        "time",
        "times",
        "step_seconds",
        "cost",
    ),
    *(
        "resumed_from_step",
        "seconds_per_step",
        "peak_memory_gib",
        "logged_at",
        "wall",
        "llmkd",
        "commit",
        "written",
        "quartiles",
        "cpu_quartiles",
        "checksum",
        "students_in_turn",
    ),
)
"""Keys of JSON files that differ between two undisturbed runs."""


def result(work: Path, reference: Path) -> list[str]:
    """How what a run left differs from what an undisturbed one did."""
    names, theirs = _names(work), _names(reference)
    faults = [f"missing: {name}" for name in sorted(theirs - names)] + [
        f"left over: {name}" for name in sorted(names - theirs)
    ]
    for file in _files(work):
        name = str(file.relative_to(work))
        if (reference / name).is_file() and (where := _difference(file, reference / name)) is not None:
            faults.append(f"not as undisturbed: {name}{where}")
        if file.name == "metrics.jsonl":
            faults += _steps(file, work)
    return faults + checkpoints(work)


def checkpoints(work: Path) -> list[str]:
    """Faults of the published checkpoints: damaged ones, and more than are kept."""
    faults = []
    for folder in work.glob("**/checkpoints"):
        published = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name)]
        if not 1 <= len(published) <= 2:
            faults.append(f"{folder.relative_to(work)} holds {len(published)} checkpoints")
        faults += [f"{path.relative_to(work)}: {fault}" for path in published if (fault := checksums.damage(path))]
    return faults


def _steps(file: Path, work: Path) -> list[str]:
    """Whether each step stands in metrics.jsonl once, in order."""
    try:
        lines = [json.loads(line) for line in file.read_text(errors="replace").splitlines()]
        steps = [line["step"] for line in lines if "validation" not in line]
    except (ValueError, KeyError, TypeError):
        return [f"{file.relative_to(work)} holds lines that are not JSON, or no steps"]
    right = steps == list(range(1, len(steps) + 1))
    return [] if right else [f"{file.relative_to(work)} has the steps {steps}"]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _names(folder: Path) -> set[str]:
    """The files' names, but for what differs by how often a run was started."""
    return {kind_of(file, folder, hashes=True) for file in _files(folder)}


def kind_of(file: Path, folder: Path, *, hashes: bool = False) -> str:
    """A file's name with its numbers, and unless `hashes` its hashes, taken out."""
    name = re.sub(r"events\.out\.tfevents\..*", "events", str(file.relative_to(folder)))
    name = re.sub(r"step-\d+", "step-N", name)
    return name if hashes else re.sub(r"\d{5}", "N", re.sub(r"[0-9a-f]{16}", "HASH", name))


def _difference(ours: Path, theirs: Path) -> str | None:
    """Where a file differs from the undisturbed one, as far as can be said in a few words; None where it does not."""
    if ours.name.endswith(EXACT):
        return None if ours.read_bytes() == theirs.read_bytes() else ""
    if ours.name.endswith(NOT_COMPARED) or ours.suffix not in (".json", ".jsonl"):
        return None
    return _first_difference(_lasting(_values(ours)), _lasting(_values(theirs)))


def _first_difference(ours: Any, theirs: Any) -> str | None:
    if ours == theirs:
        return None
    parts: list[tuple[Any, Any, Any]] = []
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        parts = [(key, ours[key], theirs[key]) for key in ours]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        parts = [(key, *pair) for key, pair in enumerate(zip(ours, theirs, strict=True))]
    found = next(((key, inside) for key, a, b in parts if (inside := _first_difference(a, b)) is not None), None)
    return f" {str(ours)[:80]!r} for {str(theirs)[:80]!r}" if found is None else f" {found[0]}{found[1]}"


def _values(file: Path) -> list[Any]:
    text = file.read_text(errors="replace")
    try:
        return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else [json.loads(text)]
    except ValueError:
        return [text]


def _lasting(value: Any) -> Any:
    """A JSON value without what differs between two undisturbed runs."""
    if isinstance(value, dict):
        of_start = (
            ("tokens", "step") if "resumed_from_step" in value else ()
        )  # what is counted or timed is of its last start
        kept = {k: part for k, part in value.items() if k not in (*VOLATILE, *of_start) and "second" not in k}
        return {key: _lasting(part) for key, part in kept.items()}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


def refusal(out: str) -> list[str]:
    """Whether a command that ended with 2 said why in one sentence."""
    said = [line for line in out.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("Error: ")]
    if len(errors) == 2 and "(see above)" in errors[1]:  # a study's, after that of the run which it started
        errors, said = errors[:1], said[:-1]
    if "Traceback" in out:
        return ["a traceback"]
    if len(errors) != 1:
        return [f"{len(errors)} sentences that begin with 'Error: '"]
    return (
        []
        if said[-1] == errors[0] and len(errors[0]) > len("Error: ") + 10
        else ["the error is not the last line, or says nothing"]
    )


def orphans(command: Command) -> list[str]:
    """Processes that outlive their command, which are ended."""
    deadline = time.monotonic() + ENDS_SECONDS
    while (left := command.running()) and time.monotonic() < deadline:
        time.sleep(0.02)
    names = [_name(process) for process in left]
    for process in left:
        os.kill(process, signal.SIGKILL)
    return [f"still alive: {', '.join(names)}"] if left else []


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return "?"
