"""Who else works on a study: a whole one and its parts refuse each other, and who waits for the first part is told whether it runs."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmkd.errors import ANOTHER_FOLDER, InputError
from llmkd.planning import parts
from llmkd.planning.parts import WHOLE, note_teacher, wait_for_first, working_on
from llmkd.processes import LOCK
from llmkd.recipe.options import Part
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.recipe.study_entries import study_entries

WORKS = """
import sys
from pathlib import Path
from llmkd.processes import only_one_in
with only_one_in(Path(sys.argv[1])):
    print("at work", flush=True)
    sys.stdin.read()
"""


def place(study: Path, part: Part) -> Path:
    """Where the lock of a part is."""
    return study if part == WHOLE else study / "parts" / f"{part.number}-of-{part.count}"


@pytest.fixture
def works() -> Iterator[Callable[[Path, Part], subprocess.Popen[str]]]:
    """Start a process that works on a part of the study in a folder."""
    started: list[subprocess.Popen[str]] = []

    def start(study: Path, part: Part) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKS, str(place(study, part))]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        stdout = started[-1].stdout
        assert stdout is not None and stdout.readline() == "at work\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("running", "second", "what"),
    [
        (Part(2, 2), WHOLE, "part 2/2 of this study"),
        (WHOLE, Part(1, 2), "the whole study"),
        (Part(2, 3), Part(1, 2), "part 2/3 of this study"),
    ],
)
def test_a_whole_study_and_its_parts_refuse_each_other_until_one_is_killed(
    running: Part,
    second: Part,
    what: str,
    works: Callable[[Path, Part], subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts, "PATIENCE_SECONDS", 0.2)
    process = works(tmp_path / "study", running)
    with pytest.raises(InputError) as refused, working_on(tmp_path / "study", second):
        raise AssertionError("both are at work")
    sentence = str(refused.value)
    assert sentence.startswith(f"{tmp_path / 'study'}: process {process.pid} on ") and "(since " in sentence
    assert sentence.endswith(f" works on {what} in this folder; wait for it, stop it, or {ANOTHER_FOLDER}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [file.name for file in (tmp_path / "study").rglob("*") if file.is_file()] == [LOCK], "of the killed one"
    with working_on(tmp_path / "study", second):
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert files == [place(tmp_path / "study", second) / LOCK], "its own, and no longer that of the killed one"
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_parts_of_one_division_work_beside_each_other(
    works: Callable[[Path, Part], subprocess.Popen[str]], tmp_path: Path
) -> None:
    works(tmp_path, Part(1, 2))
    with working_on(tmp_path, Part(2, 2)):
        pass


def test_what_another_machine_left_is_warned_of_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = tmp_path / "parts" / "1-of-2" / LOCK
    left.parent.mkdir(parents=True)
    left.write_text(json.dumps({"process": 7, "host": "elsewhere", "since": "then"}))
    with working_on(tmp_path, WHOLE):
        assert "process 7 on elsewhere (since then) began on part 1/2 of this study" in caplog.text
        assert "can't be told from this machine; if it does, stop one of the two" in caplog.text
    assert left.is_file()


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Recipe:
    return load_recipe(tiny / "recipe.yaml", [f"output={tmp_path}", "study.strategies=[none]"])


def said_while_waiting(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, until: Callable[[], object]
) -> str:
    """What part 2 says of part 1 until a second look, before which `until` has been called."""
    entries = study_entries(recipe)
    monkeypatch.setattr(parts.time, "sleep", lambda seconds: until())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        wait_for_first(recipe, entries, Part(2, 2))
    return caplog.text


def test_a_first_part_that_was_killed_is_not_said_to_be_at_it(
    recipe: Recipe,
    works: Callable[[Path, Part], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = works(recipe.folder, Part(1, 2))
    monkeypatch.setattr(parts, "SAYS_EVERY", -1.0)
    looks = 0

    def between() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            assert f"process {first.pid} on " in caplog.text and caplog.text.rstrip().endswith(" is at it")
            first.kill()
            first.wait()
        else:
            note_teacher(recipe, study_entries(recipe))

    said = said_while_waiting(recipe, monkeypatch, caplog, between)
    assert looks == 2 and (recipe.folder / "parts" / "1-of-2" / LOCK).is_file()
    assert said.rstrip().endswith("it is not running: start it by `--shard 1/2` and the same recipe")


def test_of_a_first_part_on_another_machine_it_is_said_that_it_can_not_be_told(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = recipe.folder / "parts" / "1-of-2" / LOCK
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"process": 7, "host": "elsewhere", "since": "then"}))
    said = said_while_waiting(recipe, monkeypatch, caplog, lambda: note_teacher(recipe, study_entries(recipe)))
    assert "process 7 on elsewhere (since then) began on it, and whether it still runs can't be told" in said
    assert "if it does not, start it by `--shard 1/2` and the same recipe" in said and "is at it" not in said
