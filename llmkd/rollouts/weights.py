"""The student's weights on their way to the writers.

A writer in another process reads a model folder, one on each node, in memory where there is room. One in the rank's own process has a model
to which the student lends its weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llmkd.distributed.engines import lent_tensors, whole_state
from llmkd.distributed.ranks import World, on_each_node
from llmkd.models.lora import merged

MEMORY = Path("/dev/shm")
SPARE = 2.1
"""How much more room than the weights take must be free in memory: in the first round a model with other weights lies beside them, by which
vLLM's engines are tried (vllm_process.py)."""


class Handing(Protocol):
    """One way for the student's weights to reach the writers."""

    def handed_over(self, world: World) -> contextlib.AbstractContextManager[Path]:
        """Inside, the writers can use the present weights, which are those of the model folder that is given (all ranks take part)."""
        ...


class Lent:
    """A model in this process to which the student lends its weights while it writes; in between it has none.

    Where the student is whole on each rank these are its own tensors and nothing is copied, where it is sharded whole copies; a map with
    an adapter lends their sum.
    """

    def __init__(self, student: Any, folder: Path, load: Callable[[Path], Any]) -> None:
        """`student`: transformers' model. `folder`: the one that it began as. `load`: reads a folder's model into host memory."""
        self._student, self._folder, self._load = student, folder, load
        self._tensors: dict[str, Tensor] = {}
        self._model: Any = None

    @contextlib.contextmanager
    def handed_over(self, world: World) -> Iterator[Path]:
        """As `Handing`."""
        self._tensors = merged(self._student, lent_tensors(self._student))
        try:
            yield self._folder
        finally:
            self._tensors = {}

    @contextlib.contextmanager
    def writing(self) -> Iterator[Any]:
        """A model with the weights that are handed over; afterwards it holds none."""
        if self._model is None:
            self._model = self._load(self._folder)
            _empty(self._model)
            self._model.to(next(iter(self._tensors.values())).device)
        try:
            for name, parameter in self._model.named_parameters():
                parameter.data = self._tensors[name].to(parameter.dtype)
            yield self._model
        finally:
            _empty(self._model)


def _empty(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


@dataclass(frozen=True)
class InFolder:
    """A folder with the student's weights, for writers in processes of their own."""

    model: Any
    """transformers' model, sharded or not."""
    run: Path
    """The run's folder."""

    @contextlib.contextmanager
    def handed_over(self, world: World) -> Iterator[Path]:
        """As `Handing`; afterwards the folder is gone."""
        folder = self._written(world)
        try:
            yield folder
        finally:
            if world.local_rank == 0:
                self.remove(folder)

    def _written(self, world: World) -> Path:
        state = merged(self.model, whole_state(self.model, here=world.local_rank == 0))

        def write() -> str:
            folder = self._new_folder(sum(values.nbytes for values in state.values()))
            try:
                self.model.save_pretrained(folder, state_dict=state)
            except BaseException:
                self.remove(folder)
                raise
            return str(folder)

        _, folder = on_each_node(world, write)
        return Path(folder)

    @property
    def prefix(self) -> str:
        """What the names of this run's folders begin with."""
        return f"llmkd-{hashlib.sha256(str(self.run.resolve()).encode()).hexdigest()[:16]}-"

    def _new_folder(self, size: int) -> Path:
        """An empty folder of this user's alone, in memory where there is room for weights of so many bytes, else in the run's own.

        What killed starts of the same run left there is removed.
        """
        for place in (MEMORY, self.run / "rollouts"):
            for leftover in place.glob(f"{self.prefix}*"):
                if leftover.stat().st_uid == os.getuid():
                    self.remove(leftover)
        if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > SPARE * size:
            return Path(tempfile.mkdtemp(prefix=self.prefix, dir=MEMORY))
        (self.run / "rollouts").mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=self.prefix, dir=self.run / "rollouts"))

    def remove(self, folder: Path) -> None:
        """Remove what was written."""
        shutil.rmtree(folder, ignore_errors=True)
