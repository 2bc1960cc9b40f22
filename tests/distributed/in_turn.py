"""Students that are trained alone, each by itself, and the same ones in turn, off one teacher."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

AHEAD = 2
"""The step from which a student of `resumed` goes on while the others begin."""


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
        if world.is_main:
            checkpoint = f"checkpoints/step-{AHEAD:08}"
            shutil.copytree(folder / "alone" / first / checkpoint, folder / "resumed" / first / checkpoint)
        distributed.barrier(world)
        resumed = [jobs.distil_job(world, recipe, folder / "resumed" / s) for s, recipe in recipes.items()]
        assert train_in_turn(world, resumed)
        shared.SharedTeacher.__init__ = real  # type: ignore[method-assign]
    if world.is_main:
        (output / "passes.json").write_text(json.dumps(passes))
        (output / "refused.json").write_text("{}")
    distributed.stop()
