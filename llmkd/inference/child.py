"""A step in a process of its own: an order goes in as JSON, a line per model comes out, all other talk goes to a file.

code = child.run("llmkd.evaluation.generation", order, out / "generation.log", "generation")     # the parent
order, say = child.listen()                                                           # the child
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmkd.errors import InputError
from llmkd.files import PACKAGE, ROOT

log = logging.getLogger("llmkd")

# What a launcher sets for its ranks, by how the names begin: a child is none of them and would wait for the others.
LAUNCHER_VARIABLES = tuple("RANK WORLD_SIZE MASTER_ LOCAL_ GROUP_ ROLE_ CROSS_ TORCHELASTIC_ ACCELERATE_".split())
REFUSAL = "input error: "  # begins the child's last line when it can't follow its order


def run(module: str, order: Any, talk: Path, label: str, variables: Mapping[str, str] | None = None) -> int:
    """Run `python -m module` on an order, logging its lines under `label`; its exit code.

    What it says else is added to the file `talk`. Raises InputError if its last line is a refusal.
    """
    pipe, line = subprocess.PIPE, ""
    environment = {**clean_environment(), **(variables or {})}
    with talk.open("a") as errors:
        command = [sys.executable, "-m", module]
        with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=errors) as child:
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(json.dumps(order))
                child.stdin.close()
                for line in child.stdout:
                    if not line.startswith(REFUSAL):
                        log.info("%s: %s", label, line.rstrip())
            except BrokenPipeError:  # it died at once; its code says so
                pass
            except BaseException:  # we are stopped: leave no one behind
                child.kill()
                raise
    if line.startswith(REFUSAL):
        raise InputError(line.removeprefix(REFUSAL).rstrip())
    return child.returncode


def clean_environment() -> dict[str, str]:
    """Ours, less what a launcher set for its ranks, with this checkout importable and progress bars off."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
    checkout = [str(PACKAGE.parent)] if ROOT == PACKAGE.parent else []
    paths = checkout + [path for path in [kept.get("PYTHONPATH")] if path]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


def listen() -> tuple[Any, Callable[[str], None]]:
    """In the child: the order, and the function that says a line to the parent.

    Whatever else is written to stdout from now on, by libraries in C too, goes where stderr goes.
    """
    order = json.load(sys.stdin)
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return order, lambda line: print(line, file=ours, flush=True)
