"""What the parts of a study (`llmkd study --shard i/n`) know of each other: who else works in its folder, and whether the teacher is there.

runs/<name>/.lock                       a whole study is at work
runs/<name>/parts/<i>-of-<n>/.lock      a part is
runs/<name>/parts/teacher.json          the first part has made and scored the teacher
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmkd.errors import ANOTHER_FOLDER, InputError
from llmkd.files import read, write_text
from llmkd.processes import LOCK, Holder, holder, only_one_in
from llmkd.recipe.options import Part
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.study_entries import StudyEntry, shared_by_parts
from llmkd.training import jobs

log = logging.getLogger("llmkd")
WHOLE = Part(1, 1)
PARTS = "parts"
"""The folder, in a study's, by which its parts know of each other."""
LOOKS_EVERY = 5.0
"""Seconds between looks at what another part makes."""
SAYS_EVERY = 60.0
"""Seconds after which it is said again what is waited for."""
PATIENCE_SECONDS = 2.0
"""For one that was killed a moment ago, as `only_one_in` has it."""


def _folder(study: Path, part: Part) -> Path:
    """Whose lock says that this part is at work; the study's own where there are no parts."""
    return study if part == WHOLE else study / PARTS / f"{part.number}-of-{part.count}"


@contextlib.contextmanager
def working_on(study: Path, part: Part) -> Iterator[None]:
    """Inside, nobody else works on this part of a study, nor on what it is a part of, nor divides the study otherwise.

    Raises InputError that names who does. Each takes its own lock before it looks for others, so that of two that start at once at least
    one sees the other.
    """
    with only_one_in(_folder(study, part)):
        whole = {} if part == WHOLE else {study: "the whole study"}
        parts = {
            folder: f"part {folder.name.replace('-of-', '/')} of this study"
            for folder in sorted((study / PARTS).glob("*-of-*"))
            if part == WHOLE or not folder.name.endswith(f"-of-{part.count}")
        }
        for folder, what in {**whole, **parts}.items():
            _refuse_beside(study, folder, what)
        yield


def _refuse_beside(study: Path, folder: Path, what: str) -> None:
    """Raise InputError where somebody works in a folder, and remove the lock of one that was killed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := holder(folder)) is not None and found.is_certain:
        if time.monotonic() > deadline:
            raise InputError(
                f"{study}: {found.name} works on {what} in this folder; wait for it, stop it, or {ANOTHER_FOLDER}"
            )
        time.sleep(0.1)
    if found is not None:
        log.warning(
            "%s: %s began on %s, and whether it still runs can't be told from this machine; if it does, stop one of the two",
            study,
            found.name,
            what,
        )
    elif (folder / LOCK).is_file():
        with contextlib.suppress(InputError), only_one_in(folder, patience_seconds=0):
            pass


def note_teacher(recipe: Recipe, entries: Sequence[StudyEntry]) -> None:
    """Tell the other parts that the teacher, its cache and its scores are there."""
    write_text(recipe.folder / PARTS / "teacher.json", json.dumps({"made_of": shared_by_parts(recipe, entries)}))


def _teacher_is_ready(recipe: Recipe, entries: Sequence[StudyEntry]) -> bool:
    noted = read(recipe.folder / PARTS / "teacher.json")
    made = recipe.finetune is None or jobs.is_finished(recipe.folder / "teacher")
    return made and isinstance(noted, dict) and noted.get("made_of") == shared_by_parts(recipe, entries)


def wait_for_first(recipe: Recipe, entries: Sequence[StudyEntry], part: Part) -> None:
    """Wait until the first part has made and scored the teacher; whether it runs is said at once, and again every minute."""
    first, said = Part(1, part.count), -math.inf
    while not _teacher_is_ready(recipe, entries):
        if time.monotonic() > said + SAYS_EVERY:
            now = _told(holder(_folder(recipe.folder, first)), first)
            log.info("study: waiting for part %s, which makes and scores the teacher; %s", first, now)
            said = time.monotonic()
        time.sleep(LOOKS_EVERY)


def _told(running: Holder | None, first: Part) -> str:
    start = f"start it by `--shard {first}` and the same recipe"
    if running is None:
        return f"it is not running: {start}"
    if running.is_certain:
        return f"{running.name} is at it"
    return f"{running.name} began on it, and whether it still runs can't be told from this machine: if it does not, {start}"
