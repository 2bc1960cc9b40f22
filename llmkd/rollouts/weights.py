"""The student's weights on their way to the writers: a model folder on each node, in memory where there is room."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkd.distributed.engines import parameter_count, whole_state
from llmkd.distributed.ranks import World, on_each_node

MEMORY = Path("/dev/shm")
SPARE = 1.1
"""How much more room than the weights take must be free in memory."""


@dataclass(frozen=True)
class Weights:
    """A student whose weights are handed over."""

    model: Any
    """transformers' model, sharded or not."""
    run: Path
    """The run's folder."""

    def hand_over(self, world: World) -> Path:
        """Write the present weights, one copy on each node, and tell where (all ranks take part)."""
        state = whole_state(self.model, here=world.local_rank == 0)

        def write() -> str:
            folder = self._new_folder()
            try:
                self.model.save_pretrained(folder, state_dict=state)
            except BaseException:
                self.remove(folder)
                raise
            return str(folder)

        _, folder = on_each_node(world, write)
        return Path(folder)

    def _new_folder(self) -> Path:
        """An empty folder of this user's alone, in memory where there is room for the weights, else in the run's own.

        What killed starts of the same run left there is removed.
        """
        name = f"llmkd-{hashlib.sha256(str(self.run.resolve()).encode()).hexdigest()[:16]}-"
        for place in (MEMORY, self.run / "rollouts"):
            for leftover in place.glob(f"{name}*"):
                if leftover.stat().st_uid == os.getuid():
                    self.remove(leftover)
        size = SPARE * parameter_count(self.model) * next(self.model.parameters()).element_size()
        if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > size:
            return Path(tempfile.mkdtemp(prefix=name, dir=MEMORY))
        (self.run / "rollouts").mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=name, dir=self.run / "rollouts"))

    def remove(self, folder: Path) -> None:
        """Remove what was written."""
        shutil.rmtree(folder, ignore_errors=True)
