"""Students that are trained alone, each by itself, and the same ones in turn, off one teacher."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

AHEAD = 2
"""The step from which a student of `resumed` goes on while the others begin."""


def _refused(train: Callable[[], object]) -> str:
    """The mistake for which a training ends that all ranks find."""
    from llmkd.errors import FoundByAll

    try:
        train()
    except FoundByAll as error:
        return str(error)
    raise AssertionError("it was trained")


def main() -> None:
    """For each scenario (name -> its students' recipe changes) the students alone, in turn, and in turn where one is ahead."""
    from llmkd.distributed import ranks as distributed
    from llmkd.recipe.recipe import load_recipe
    from llmkd.teachers import shared
    from llmkd.train import Stopping, train, train_in_turn
    from llmkd.training import jobs, write_cache

    work = json.loads(Path(sys.argv[1]).read_text())
    distributed.quiet()
    world = distributed.start(120)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    output = Path(work["output"])
    passes: dict[str, int] = {}
    refused = ""
    for name, students in work["scenarios"].items():
        recipes = {student: load_recipe(work["recipe"]).changed(changes) for student, changes in students.items()}
        for recipe in recipes.values():
            if recipe.teacher.placement == "cache" and (recipe.loss.kl or recipe.loss.hidden):
                assert write_cache.cache(world, recipe, Stopping())
        folder = output / name
        for student, recipe in recipes.items():
            assert train(world, jobs.distil_job(world, recipe, folder / "alone" / student))
        made: list[Any] = []
        real = shared.SharedTeacher.__init__

        def noted(self: Any, make: Any, real: Any = real, made: list[Any] = made) -> None:
            made.append(self)
            real(self, make)

        shared.SharedTeacher.__init__ = noted  # type: ignore[method-assign]
        in_turn = [jobs.distil_job(world, recipe, folder / "in_turn" / s) for s, recipe in recipes.items()]
        assert train_in_turn(world, in_turn)
        passes[name] = sum(teacher.passes for teacher in made)
        first = next(iter(recipes))
        if recipes[first].train.keep == "best":  # what it would go on from is gone when it is over
            shared.SharedTeacher.__init__ = real  # type: ignore[method-assign]
            continue
        checkpoint = f"checkpoints/step-{AHEAD:08}"
        if world.is_main:
            shutil.copytree(folder / "alone" / first / checkpoint, folder / "resumed" / first / checkpoint)
        distributed.barrier(world)
        resumed = [jobs.distil_job(world, recipe, folder / "resumed" / s) for s, recipe in recipes.items()]
        assert train_in_turn(world, resumed)
        shared.SharedTeacher.__init__ = real  # type: ignore[method-assign]
        if name != next(iter(work["scenarios"])):
            continue
        if world.is_main:  # the only checkpoint of the first
            shutil.copytree(folder / "alone" / first / checkpoint, folder / "damaged" / first / checkpoint)
            (folder / "damaged" / first / checkpoint / "state.json").write_text("{")
        distributed.barrier(world)
        damaged = [jobs.distil_job(world, recipe, folder / "damaged" / s) for s, recipe in recipes.items()]
        refused = _refused(lambda jobs=damaged: train_in_turn(world, jobs))
    if world.is_main:
        (output / "passes.json").write_text(json.dumps(passes))
        (output / "refused.json").write_text("{}")
        (output / "damaged.json").write_text(json.dumps(refused))
    distributed.stop()
