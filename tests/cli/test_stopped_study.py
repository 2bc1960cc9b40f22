"""A study or run that is killed or stopped leaves no process behind, keeps others out of its folder, and goes on by the same command."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkd.cli import main
from llmkd.data.token_files import SHARD_ROWS
from llmkd.errors import ANOTHER_FOLDER
from llmkd.models.load import load_tokenizer
from llmkd.recipe.recipe import load_recipe
from llmkd.training.jobs import distil_job
from llmkd.training.tokens import tokens_of
from tests.distributed.command import Command
from tests.tiny import recipe_values

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; prctl is Linux's")
SECONDS = 240  # far more than any wait takes: only a fault comes near


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Studies:
    """The commands of one test, and the processes that they have started."""

    def __init__(self) -> None:
        self._started: list[Command] = []

    def start(self, *arguments: str) -> Command:
        """A command, as a terminal starts it."""
        self._started.append(Command(*arguments))
        return self._started[-1]

    def output(self) -> str:
        """Of the last command."""
        return self._started[-1].output()

    def running(self, name: str = "") -> list[int]:
        """The commands' processes with this in their name."""
        return [process for command in self._started for process in command.running(name)]

    def workers(self) -> list[int]:
        """The processes that a rank has started; they are called as the rank is."""
        ranks = self.running("llmkd rank")
        parents = {rank: int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]) for rank in ranks}
        return [process for process, parent in parents.items() if parent in ranks]

    def freeze(self, name: str) -> None:
        """Stop a process where it is, so that from now on only the kernel can end it."""
        (process,) = self.running(name)
        os.kill(process, signal.SIGSTOP)

    def kill(self, study: Command) -> None:
        """Kill a study, and wait until no process of it is left."""
        study.send_signal(signal.SIGKILL)
        study.wait(SECONDS)
        wait_for(lambda: not self.running())


@pytest.fixture
def studies() -> Iterator[Studies]:
    started = Studies()
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
    studies.freeze("generation")  # which would otherwise be done before the signal on a busy machine
    os.killpg(stopped.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    assert stopped.wait(SECONDS) == 130
    last = studies.output().rstrip().splitlines()[-1]
    assert last.endswith("kept, and the same command goes on with the rest.")
    assert not studies.running() and not list((folder / "generations").glob("*.json"))
    assert "Traceback" not in studies.output()


@pytest.mark.slow
def test_a_stopped_study_names_the_student_that_had_failed(recipe: Path, studies: Studies) -> None:
    """Two at a time: the first has failed when Ctrl-C comes, which the second heeds after its step."""
    folder = recipe.parent / "runs" / "tiny"
    spoilt = "{bad: {train.learning_rate: 1.0e+30, train.weight_decay: 1.0e+20, matching.strategy: none}}"
    sets = [
        f"study.variants={spoilt}",
        "study.parallel=2",
        "study.seeds=[0]",
        "train.warmup_steps=0",
        "train.steps=300",
    ]
    command = ("study", str(recipe), *(part for change in sets for part in ("--set", change)))
    stopped = studies.start(*command)
    wait_for(lambda: (folder / "logs" / "bad-s0.log").is_file() or stopped.poll() is not None)
    wait_for(lambda: len(studies.running("llmkd rank")) == 1 or stopped.poll() is not None)  # the other has failed
    wait_for(lambda: "step 3/" in (folder / "logs" / "none-s0.log").read_text() or stopped.poll() is not None)
    os.killpg(stopped.pid, signal.SIGINT)
    assert stopped.wait(SECONDS) == 2, studies.output()
    *_, kept, mistake = studies.output().rstrip().splitlines()
    assert kept.startswith("Stopped: all that is trained and scored so far is kept")
    assert mistake.startswith("Error: study: training bad-s0 ended with code 2 (see ") and "none-s0" not in mistake
    assert re.search("stopped by SIG(INT|TERM) after step", (folder / "logs" / "none-s0.log").read_text())
    assert not studies.running() and not list(folder.rglob(".lock"))


@pytest.mark.slow
def test_a_run_killed_while_it_tokenizes_leaves_no_process_and_goes_on_at_the_shard(
    tiny: Path, recipe: Path, studies: Studies, world: Any
) -> None:
    """On two ranks and two cores, so that there are shards that are done and others that are not."""
    rows, tokens = recipe.parent / "many.jsonl", recipe.parent / "tokens"
    pairs = ({"prompt": f"red {number}", "completion": " tree"} for number in range(4 * SHARD_ROWS - 5))
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    own = {"data.source": str(rows), "data.tokens": str(tokens), "train.steps": 2, "train.warmup_steps": 0}
    sets = [part for key, value in own.items() for part in ("--set", f"{key}={value}")]
    command = ("train", "-r", str(recipe), "--output", str(recipe.parent / "run"), "--ranks", "2", *sets)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])  # inherited by what is started
    try:
        killed = studies.start(*command)
        wait_for(lambda: list(tokens.glob("*/0000?.json")) or killed.poll() is not None)
        working = studies.workers()
        for process in {*studies.running()} - {*working}:  # and nobody is left to end the processes that tokenize
            os.kill(process, signal.SIGKILL)
        studies.kill(killed)
        done = {
            file: file.stat().st_mtime_ns
            for record in tokens.glob("*/0000?.json")
            for file in (record, record.with_suffix(".arrow"))
        }
        assert working and 2 <= len(done) < 8 and not list(tokens.glob("*/tokens.json")), studies.output()
        assert studies.start(*command).wait(SECONDS) == 0, studies.output()
    finally:
        os.sched_setaffinity(0, cores)
    (folder,) = (file.parent for file in tokens.glob("*/tokens.json"))
    assert done == {file: file.stat().st_mtime_ns for file in done}, "what was done was not made again"
    assert sorted(file.name for file in folder.glob("*.arrow")) == [f"0000{number}.arrow" for number in range(4)]
    assert (recipe.parent / "run" / "model" / "model.safetensors").is_file() and not list(folder.glob("tmp*"))
    digests = []
    for place in (tokens, recipe.parent / "undisturbed"):
        changed = load_recipe(recipe).changed({**own, "data.tokens": str(place)})
        job = distil_job(world, changed, recipe.parent / "unused")
        digests.append(tokens_of(world, job, load_tokenizer(tiny / "teacher")).digests)
    assert digests[0] == digests[1]


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
