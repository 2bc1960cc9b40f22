"""A study that is killed or stopped leaves no process behind, keeps another one out of its folder, and goes on by the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkd.cli import main
from llmkd.errors import ANOTHER_FOLDER
from llmkd.files import ROOT
from tests.tiny import recipe_values

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; prctl is Linux's")
MARK = "LLMKD_TEST_STUDY"
SECONDS = 240  # far more than any wait takes: only a fault comes near


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Studies:
    """The processes of one test's commands, whoever started them: each inherits the mark in its environment."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._started, self.value = folder, 0, uuid.uuid4().hex

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A command, as a terminal starts it: the leader of a group; its output goes to a file of its own."""
        self._started += 1
        code = "import sys; from llmkd.cli import main; main(sys.argv[1:])"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: self.value}
        with self._file().open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-c", code, *arguments], env=environment, stdout=output, stderr=output, process_group=0
            )

    def output(self) -> str:
        """Of the last command."""
        return self._file().read_text()

    def _file(self) -> Path:
        return self._folder / f"output{self._started}"

    def running(self, name: str = "") -> list[int]:
        """The marked processes with this in their name."""
        processes = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"{MARK}={self.value}".encode() in (place / "environ").read_bytes()
                if marked and name in (place / "comm").read_text():
                    processes.append(int(place.name))
            except OSError:  # it has ended, or is another user's
                continue
        return processes

    def freeze(self, name: str) -> None:
        """Stop a process where it is, so that from now on only the kernel can end it."""
        (process,) = self.running(name)
        os.kill(process, signal.SIGSTOP)

    def kill(self, study: subprocess.Popen[bytes]) -> None:
        """Kill a study, and wait until no process of it is left."""
        study.kill()
        study.wait()
        wait_for(lambda: not self.running())


@pytest.fixture
def studies(tmp_path: Path) -> Iterator[Studies]:
    started = Studies(tmp_path)
    yield started
    for process in started.running():
        os.kill(process, signal.SIGKILL)


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    (tmp_path / "held_out.jsonl").write_text((tiny / "rows.jsonl").read_text())
    values = recipe_values(tiny)
    values["output"] = str(tmp_path / "runs")
    values["train"].update(steps=30, save_every=1)
    texts = {"source": str(tmp_path / "held_out.jsonl"), "items": 20, "max_new_tokens": 40, "backend": "hf"}
    texts["batch_size"] = 1  # so that it takes seconds
    values["evaluation"] = {"generation": texts}
    values["study"] = {"strategies": ["none"], "baselines": [], "ranks": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
def test_a_killed_study_leaves_no_process_and_a_stopped_one_is_explained(recipe: Path, studies: Studies) -> None:
    folder = recipe.parent / "runs" / "tiny"
    while_training = studies.start("study", str(recipe))
    wait_for(lambda: "step 3/" in studies.output() or while_training.poll() is not None)
    studies.freeze("llmkd rank 0")
    studies.kill(while_training)

    while_scoring = studies.start("study", str(recipe))
    wait_for(lambda: "1/2 teacher: started" in studies.output() or while_scoring.poll() is not None)
    studies.freeze("generation")
    assert "resum" in studies.output()  # the killed student's checkpoint was not lost
    second = studies.start("study", str(recipe))
    assert second.wait(SECONDS) == 2
    assert f"Error: {folder}: process {while_scoring.pid} on " in studies.output()
    assert studies.output().rstrip().endswith(f"works in this folder; wait for it, stop it, or {ANOTHER_FOLDER}")
    studies.kill(while_scoring)

    stopped = studies.start("study", str(recipe))
    wait_for(lambda: "1/2 teacher: started" in studies.output() or stopped.poll() is not None)
    os.killpg(stopped.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    assert stopped.wait(SECONDS) == 130
    last = studies.output().rstrip().splitlines()[-1]
    assert last.endswith("kept, and the same command goes on with the rest.")
    assert not studies.running() and not list((folder / "generations").glob("*.json"))
    assert "Traceback" not in studies.output()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_stopped_texts_are_explained_and_go_on(
    tiny: Path,
    recipe: Path,
    studies: Studies,
    inside: list[dict[str, Any]],
    number: signal.Signals,
    code: int,
) -> None:
    command = ("generate", str(tiny / "teacher"), "-r", str(recipe), "--output", str(recipe.parent / "texts"))
    stopped = studies.start(*command)
    wait_for(lambda: "teacher: by hf" in studies.output() or stopped.poll() is not None)  # its last line for seconds
    os.killpg(stopped.pid, number)
    assert stopped.wait(SECONDS) == code
    assert studies.output().rstrip().endswith("kept, and the same command goes on with the rest.")
    assert "Traceback" not in studies.output() and not studies.running()
    assert not (recipe.parent / "texts" / "teacher.json").exists()
    main([*command])
    assert len(inside) == 1
    assert (recipe.parent / "texts" / "teacher.json").is_file()
