"""The student's weights on their way to the writers: a model folder on each node, in memory where there is room."""

from __future__ import annotations

import hashlib
import os
import shutil
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
            folder = self._place()
            shutil.rmtree(folder, ignore_errors=True)
            self.model.save_pretrained(folder, state_dict=state)
            return str(folder)

        _, folder = on_each_node(world, write)
        return Path(folder)

    def _place(self) -> Path:
        """The folder: in memory where there is room for it, else in the run's own."""
        size = SPARE * parameter_count(self.model) * next(self.model.parameters()).element_size()
        name = hashlib.sha256(str(self.run.resolve()).encode()).hexdigest()[:16]
        in_memory = MEMORY / f"llmkd-{os.getuid()}-{name}"
        if in_memory.is_dir() or (MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > size):
            return in_memory
        return self.run / "rollouts" / "weights.tmp"

    def remove(self) -> None:
        """Remove what was written on this node."""
        shutil.rmtree(self._place(), ignore_errors=True)
