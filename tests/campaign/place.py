"""Where trials take place: tiny inputs, the scenarios that run on them, and what each leaves when nothing disturbs it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkd.data.file_hashes import RACY
from tests.distributed.command import Command
from tests.tiny import WORDS, make

HANG_SECONDS = 240
"""Far more than any command of a trial takes."""

_STEPS = {"train.steps": 12, "train.save_every": 3, "train.micro_batch_size": 2, "train.timeout_seconds": 60}
_CHOOSES = {"data.validation.share": 0.2, "train.validate_every": 3, "train.keep": "best"}
_CACHED = {"teacher.placement": "cache", "cache.shard_mib": 0.02}
_SCORED = {
    "evaluation.generation": {"source": "FOLDER/held_out.jsonl", "items": 6, "max_new_tokens": 10, "backend": "hf"},
    "evaluation.agreement_rows": 6,
    "evaluation.angles_rows": 4,
    "study": {"strategies": ["forward"], "baselines": ["undistilled"]},
    "data.validation.share": 0.2,
}
_MADE = {
    "teacher": {"dtype": "float32"},
    "finetune.architecture": {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    },
    "finetune.train": {"steps": 6, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 0.01, "dtype": "float32",
                       "deepspeed": "cpu", "save_every": 2, "log_every": 1},
}  # fmt: skip
_SAVES = ("**/checkpoints/step-*.tmp", "**/model.tmp", "**/checkpoints/step-000000*", "**/summary.json*")
AIMS = {
    "train": _SAVES,
    "cache": ("**/cache/*.tmp", "**/cache/shard-*", "**/manifest.json*"),
    "study": (*_SAVES, "tiny/generations/*", "tiny/agreement/*", "tiny/angles/*", "tiny/undistilled/*", "tiny/report*"),
}
"""Files whose appearance marks a phase of a command that kills are aimed at: saves, exports, publishing, scoring."""


@dataclass(frozen=True)
class Scenario:
    """Commands that lead to a result, one after another."""

    changes: dict[str, Any] = field(default_factory=dict)
    """Of the tiny recipe; FOLDER in a value stands for the place's folder."""
    ranks: int = 2
    commands: tuple[str, ...] = ("train",)
    aims: tuple[str, ...] = ()
    """Further files than `AIMS` has whose appearance marks a phase of the first command."""
    half: tuple[str, ...] = ("**/checkpoints/step-00000006",)
    """Files at whose appearance the scenario is half done: each makes a state whose files are damaged."""
    harmed: tuple[str, ...] = ()
    """The files that are damaged; none: another scenario has files of these kinds."""


SCENARIOS: dict[str, dict[str, Scenario]] = {
    "training": {
        "two ranks": Scenario(_CHOOSES, aims=("**/best/*.tmp", "**/best/step-*"), harmed=("**/*",)),
        "one rank": Scenario({"matching.strategy": "in_order_random", "matching.redraw_every": 2}, ranks=1),
        "pipeline": Scenario({"teacher.placement": "pipeline", "matching.strategy": "reverse"}),
        "zero3": Scenario({"train.deepspeed": "FOLDER/zero3.json", "teacher.placement": "zero3"}),
        "packed": Scenario({"data.batching": "packed", "data.max_length": 48, "train.batch_size": 4}),
        "stream": Scenario({"data.streaming": True, "data.shuffle_rows": 8}, ranks=1, harmed=("**/stream-*",)),
        "learned": Scenario(
            {"matching.strategy": "learned", "student.init": "random"}, ranks=1, harmed=("tiny/students/*/*.json",)
        ),
        "adapters": Scenario({"student.lora": {"rank": 4, "alpha": 8}}, ranks=1, harmed=("**/initial/*",)),
        "measured": Scenario(
            {
                "student.copy_blocks": "influence", "matching.strategy": "nearest",
                "loss.schedules": {"temperature": {"shape": "dynamic", "every": 2, "maximum": 6.0}},
            },
            ranks=1, harmed=("tiny/students/*/*.json", "tiny/students/*/temperature.jsonl"),
        ),
    },
    "cache": {
        "cache": Scenario(
            _CACHED, commands=("cache", "train"),
            half=("**/cache/shard-00003.safetensors", "**/checkpoints/step-00000006"), harmed=("tiny/cache/*",),
        ),
        "top k": Scenario({**_CACHED, "cache.top_k": 8}, ranks=1, commands=("cache", "train")),
    },
    "tokens": {
        "tokens": Scenario(
            {"data.source": "FOLDER/many.jsonl", "train.steps": 4},
            aims=("tokens/*/tmp*", "tokens/*/*.json", "tokens/*/lengths*", "tokens/hashes/*"),
            half=("tokens/*/00003.json", "**/checkpoints/step-00000003"), harmed=("tokens/**/*",),
        ),
    },
    "rollouts": {
        "student": Scenario(
            {
                "loss.ce": 0.0, "loss.divergence": "reverse_kl", "data.max_length": 48,
                "rollouts": {"max_new_tokens": 8, "every": 3, "share": 0.5},
            },
            aims=("**/rollouts/*", "**/rollouts.jsonl"), harmed=("**/rollouts/**/*", "**/rollouts.jsonl"),
        ),
        "teacher": Scenario(
            {"rollouts": {"by": "teacher", "max_new_tokens": 8}, "data.max_length": 48},
            aims=("tokens/*/*", "**/*texts*/*",), harmed=("tokens/**/*", "**/*texts*/**/*"),
        ),
    },
    "study": {
        "study": Scenario(
            _SCORED,
            ranks=1,
            commands=("study",),
            half=("tiny/generations/*.jsonl",), harmed=("tiny/*", "tiny/[agru]*/**/*", "tiny/students/*/*", "tiny/students/*/model/*"),
        ),
        "in turn": Scenario(
            {**_SCORED, "study": {"strategies": ["forward", "none"], "baselines": ["ce_only"], "together": 3}},
            commands=("study",), half=("tiny/students/none-s0/checkpoints/step-00000006",),
        ),
        "beside": Scenario(
            {**_SCORED, "study": {"strategies": ["forward", "none"], "baselines": ["ce_only"], "parallel": 2}},
            ranks=1, commands=("study",), half=("tiny/students/none-s0/checkpoints/step-00000006",),
        ),
        "made teacher": Scenario(
            {**_SCORED, **_MADE}, ranks=1, commands=("study",), aims=("tiny/teacher/*",),
            half=("tiny/teacher/model",), harmed=("tiny/teacher/**/*",),
        ),
    },
}  # fmt: skip
"""Kind of trial -> its scenarios."""


class Place:
    """A folder with tiny inputs. Commands write into `work`, always this one path, so that a copy put back is the run itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        make(folder)
        shutil.copy(folder / "rows.jsonl", folder / "held_out.jsonl")
        draw = random.Random(1)
        rows = (
            {"prompt": " ".join(draw.choices(WORDS, k=6)), "completion": f" {draw.choice(WORDS)}"} for _ in range(6000)
        )
        (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._references: dict[str, Reference] = {}
        code, out = ended(
            Command("maps", "--student-blocks", "2", "--teacher-blocks", "4")
        )  # the imports are done after it
        assert code == 0, out
        # the hash of a file that has just been made is not kept, so that the first runs would differ from the later ones by it
        time.sleep(RACY / 10**9)

    def arguments(self, scenario: Scenario, command: str, **changes: Any) -> list[str]:
        """The command line of a scenario's command. `changes`: of keys that change no result."""
        values = {**_STEPS, **scenario.changes, "output": str(self.work), **changes}
        sets = [f"{key}={json.dumps(value).replace('FOLDER', str(self.folder))}" for key, value in values.items()]
        recipe = (
            ["--recipe", str(self.folder / "recipe.yaml")] if command == "train" else [str(self.folder / "recipe.yaml")]
        )
        options = [part for value in sets for part in ("--set", value)]
        return [command, *recipe, "--ranks", str(scenario.ranks), *options]

    def clear(self, before: Path | None = None) -> None:
        """Empty `work`, or put back what it held."""
        shutil.rmtree(self.work, ignore_errors=True)
        if before is not None and before.is_dir():
            shutil.copytree(before, self.work)

    def reference(self, name: str, scenario: Scenario) -> Reference:
        """What the scenario leaves after each of its commands; made once."""
        folder = self.folder / "references" / name
        if name not in self._references:
            self.clear()
            reference = self._references[name] = Reference([], [])
            for number, verb in enumerate(scenario.commands):
                began = time.monotonic()
                code, out = ended(Command(*self.arguments(scenario, verb)))
                assert code == 0, out
                reference.seconds.append(time.monotonic() - began)
                reference.after.append(folder / str(number))
                shutil.copytree(self.work, reference.after[-1])
        return self._references[name]

    def states(self, name: str, scenario: Scenario) -> list[Path]:
        """Copies of `work` half done and after each command; made once."""
        half = [self.folder / "references" / name / f"half-{number}" for number in range(len(scenario.half))]
        for folder, seen in zip(half, scenario.half, strict=True):
            if not folder.is_dir():
                self.clear()
                self._until(scenario, seen)
                shutil.copytree(self.work, folder)
        return [*half, *self.reference(name, scenario).after]

    def _until(self, scenario: Scenario, seen: str) -> None:
        """Run the scenario's commands until a file is there, and stop the one that made it."""
        for verb in scenario.commands:
            command = Command(*self.arguments(scenario, verb))
            while command.poll() is None and not matches(self.work, seen):
                time.sleep(0.001)
            there = bool(matches(self.work, seen))
            command.send_signal(signal.SIGTERM)
            code, out = ended(command)
            assert code in (0, 143), out
            if there:
                return
        raise AssertionError(f"{seen} was never there")


@dataclass(frozen=True)
class Reference:
    """An undisturbed scenario."""

    after: list[Path]
    """Copies of `work` after each command."""
    seconds: list[float]
    """How long each took."""

    @property
    def result(self) -> Path:
        """After the last command."""
        return self.after[-1]


def ended(command: Command) -> tuple[int | None, str]:
    """(exit code, or None where it had to be ended; what it said)."""
    deadline = time.monotonic() + HANG_SECONDS
    while command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return command.poll(), command.output()


def matches(work: Path, pattern: str) -> set[Path]:
    """The files of a pattern in a folder in which others make and remove files meanwhile."""
    while True:
        with suppress(FileNotFoundError):
            return set(work.glob(pattern))
