"""What two nodes of one rank each do in their turn; each writes how it ended for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """A node's part: `results`, a user's `mistake` and another `failure` on node 1, and the tokens of its own recipes."""
    from llmkd.distributed import ranks
    from llmkd.errors import InputError
    from llmkd.models.load import load_tokenizer
    from llmkd.recipe.recipe import load_recipe
    from llmkd.training import jobs
    from llmkd.training.tokens import tokens_of
    from llmkd.training.written_texts import rows_of

    tasks = Path(sys.argv[1])
    ranks.quiet()
    world = ranks.start(60)

    def only_on_1(error: Exception) -> str:
        if world.rank == 1:
            raise error
        return "done"

    def tokens(recipes: list[str]) -> Any:
        recipe = load_recipe(recipes[world.rank])
        job = jobs.distil_job(world, recipe, tasks.parent / "unused")
        make = tokens_of if recipe.rollouts is None else lambda *given: rows_of(*given).training
        made = make(world, job, load_tokenizer(Path(recipe.teacher_path)))
        return {"digests": made.digests, "rows": made.count, "folders": [str(folder) for folder in made.folders]}

    work: dict[str, Callable[[], Any]] = {
        "results": lambda: ranks.on_each_node(world, lambda: {"rank": world.rank}),
        "mistake": lambda: ranks.on_each_node(world, lambda: only_on_1(InputError("data.source: no rows; give some"))),
        "failure": lambda: ranks.on_each_node(world, lambda: only_on_1(ValueError("out of range"))),
    }
    for name, recipes in json.loads(tasks.read_text()).items():
        work[name] = lambda recipes=recipes: tokens(recipes)  # type: ignore[misc]
    ended = {}
    for name, do in work.items():
        try:
            ended[name] = do()
        except Exception as error:
            ended[name] = f"{type(error).__name__}: {error}"
    (tasks.parent / f"ended{world.rank}.json").write_text(json.dumps(ended))
    ranks.stop()
