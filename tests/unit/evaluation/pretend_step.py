"""A scoring step without models, for the tests of the driver: `python -m tests.unit.evaluation.pretend_step`.

A model's folder is a file of words: `die` ends the process, `fail` raises, `slow` takes a while, `halfway` says so, `where` becomes
the devices that the process sees; each else is counted.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from llmkd.errors import InputError
from llmkd.evaluation.results import GeneratedText, ScoredModel
from llmkd.evaluation.step import Score, Step, serve
from llmkd.inference.child import Say, say_share
from llmkd.recipe.scoring_steps import ScoringStep


@dataclass(frozen=True)
class Task:
    """What all models share."""

    factor: int
    folder: Path
    """Where each process leaves a file of its number, with what it sees of the devices."""


def prepare(task: Task, say: Say) -> Score[ScoredModel]:
    if task.factor < 0:
        raise InputError("factor: must not be negative")
    seen = {"device": os.environ.get("CUDA_VISIBLE_DEVICES", "all"), "backend": os.environ.get("PRETEND_BACKEND", "")}
    (task.folder / f"process-{os.getpid()}").write_text(f"{seen['device']} {seen['backend']}")
    print("this is not for the parent")
    return partial(score, task=task, say=say)


def score(model: ScoredModel, task: Task, say: Say) -> tuple[ScoredModel, list[GeneratedText]]:
    words = Path(model.model).read_text().split()
    if "slow" in words:
        time.sleep(0.5)
    if "halfway" in words:
        say_share(say, 1, 2)
    if "die" in words:
        os._exit(7)
    if "fail" in words:
        raise ValueError("it\nfails")
    words = [os.environ.get("CUDA_VISIBLE_DEVICES", "") if word == "where" else word for word in words]
    items = [GeneratedText(item=n, prompt=word, references=[], text=word) for n, word in enumerate(words)]
    return replace(model, metrics={"words": float(task.factor * len(words))}), items


STEP = Step(ScoringStep("pretend", "", "", "tests.unit.evaluation.pretend_step"), Task, ScoredModel, prepare)


def main() -> int:
    """The process that scores models."""
    return serve(STEP)


if __name__ == "__main__":
    sys.exit(main())
