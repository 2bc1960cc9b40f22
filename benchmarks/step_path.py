"""Through how many files a training step goes: `python -m benchmarks.step_path`.

From one line of the log to the next, on one process, with the tests' tiny model: every call of a function of llmkd counts its file. Who
follows a batch by reading has these files open.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from llmkd.distributed import ranks
from llmkd.files import PACKAGE
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import jobs
from llmkd.training.journal import Journal
from tests.tiny import make

OPTIONS = {"train.steps": 4, "train.micro_batch_size": 8, "train.warmup_steps": 0}


def main() -> None:
    files: list[str] = []

    def called(frame: FrameType, event: str, argument: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            files.append(str(file.relative_to(PACKAGE)))

    write, lines = Journal.write, 0

    def watched(self: Journal, *arguments: Any, **options: Any) -> None:
        nonlocal lines
        sys.setprofile(None)
        write(self, *arguments, **options)
        lines += 1
        sys.setprofile(called if lines == 2 else None)

    Journal.write = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        recipe = load_recipe(Path(folder) / "recipe.yaml").changed(OPTIONS)
        world = ranks.start(60)
        train(world, jobs.distil_job(world, recipe, Path(folder) / "run"))
        ranks.stop()
    changes = sum(before != after for before, after in zip(files, files[1:], strict=False))
    visited = list(dict.fromkeys(files))
    print(f"{len(visited)} files, {changes} changes from one to another")
    print("\n".join(visited))


if __name__ == "__main__":
    main()
