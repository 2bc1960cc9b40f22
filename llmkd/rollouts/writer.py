"""What writes texts for one rank: a model's weights and prompts in, token ids out.

Hugging Face writes in the rank's own process. vLLM has one of its own, so that it finds the surroundings it needs, and a run outlives an
engine that dies.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from llmkd.distributed.ranks import World, on_every_rank
from llmkd.errors import InputError
from llmkd.inference.backends import continued, writing_model
from llmkd.inference.child import Child
from llmkd.inference.sampling import Ids, Sampling
from llmkd.inference.vllm_setup import allocator_variables, vllm_environment
from llmkd.rollouts.weights import Lent

log = logging.getLogger("llmkd")

NOTE = "rollouts: "
"""Begins a line for the run's log."""
TEXT = "text: "
"""Begins a line with the ids of one text; they come in the order of the prompts."""


@dataclass(frozen=True)
class Writing:
    """All that the rounds of a run share, as it travels to the writer."""

    backend: str
    """hf or vllm."""
    dtype: str
    max_new_tokens: int
    max_length: int
    """Of prompt and text together."""
    stops: tuple[int, ...]
    temperature: float
    top_p: float
    batch_size: int
    trust_remote_code: bool
    mixed_with: str | None = None
    """The folder of a second model from whose distribution, too, tokens are drawn; hf alone."""
    mixed_share: float = 0.0
    mixed_dtype: str = "float32"
    mixed_trusts: bool = False
    """As `trust_remote_code`, for the second model."""
    gpu_share: float | None = None
    """vLLM's share of the memory of a GPU that it has together with the training."""
    same_weights: bool = False
    """Whether all orders are of the same model."""
    engines: int | None = None
    """How many of a node's ranks write, where engines have devices of their own; None: all ranks do."""
    tensor_parallel: int = 1
    """How many devices of an engine's own hold one copy of the model."""

    def decides(self) -> dict[str, Any]:
        """What of it may change the texts."""
        places = ("gpu_share", "batch_size", "engines", "tensor_parallel")
        return {name: value for name, value in vars(self).items() if name not in places}

    def sampling(self, asked: Asked) -> Sampling:
        """How the texts of an order are drawn."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            stops=self.stops,
            temperature=self.temperature,
            top_p=self.top_p,
            seeds=tuple(asked.seeds),
            limits=tuple(asked.limits),
            batch_size=self.batch_size,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class Asked:
    """What one rank wants written."""

    weights: str
    """The model's folder."""
    prompts: list[Ids]
    limits: list[int]
    """Each text's most tokens."""
    seeds: list[int]


def writer_variables(world: World, devices: Sequence[int] | None = None, tensor_parallel: int = 1) -> dict[str, str]:
    """The environment of a rank's writer beside the rank's own: its share of the cores, and its GPUs.

    devices: those of the node on which vLLM alone runs, as nvidia-smi numbers them; None: each rank's writer shares the rank's GPU.
    Raises InputError where they can't be had.
    """
    variables = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    of_ranks = (
        [name.strip() for name in visible.split(",")] if visible else [str(rank) for rank in range(world.local_size)]
    )[: world.local_size]
    if devices is not None:
        if named := [name for name in visible.split(",") if visible and not name.strip().isdecimal()]:
            raise InputError(
                f"rollouts.devices: CUDA_VISIBLE_DEVICES has names ({named[0].strip()}), and nobody knows which of the numbers in devices "
                "they are; write numbers into it, as nvidia-smi has them, or leave devices out"
            )
        if trained := sorted({str(device) for device in devices} & set(of_ranks)):
            raise InputError(
                f"rollouts.devices: ranks train on GPU {', '.join(trained)}; name others, or start fewer ranks than the node's "
                f"{world.local_size} (--ranks)"
            )
        if len(devices) // tensor_parallel > world.local_size:
            raise InputError(
                f"rollouts.devices: {len(devices) // tensor_parallel} engines are more than the node's {world.local_size} ranks, each of "
                "which hands prompts to one at most; name fewer, or write a larger tensor_parallel"
            )
        mine = devices[world.local_rank * tensor_parallel :][:tensor_parallel]
        variables |= {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, mine)),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        }  # nvidia-smi's
    elif world.device.type == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = of_ranks[world.local_rank]
    return variables


class Writer(Protocol):
    """What writes one rank's texts."""

    def write(self, asked: Asked) -> list[Ids]:
        """The texts. Raises InputError where the model or the prompts can't be run."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


def writer_of(writing: Writing, log_file: Path, variables: Mapping[str, str], lent: Lent | None = None) -> Writer:
    """The writer of a backend.

    log_file, variables: for a process of its own, which vLLM has. lent: the model by which Hugging Face writes, where a student lends it
    its weights.
    """
    if writing.backend == "vllm":
        return VllmWriter(writing, log_file, variables)
    return HuggingFaceWriter(writing, lent)


def written_together(
    world: World,
    thread: Executor,
    writer: Writer,
    writing: Writing,
    weights: Path,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
) -> list[Ids]:
    """What is written after each prompt, each rank that has an engine its share of them (all ranks take part).

    seeds: each prompt's own. thread: of this rank, in which it writes; a process that a thread starts ends with it.
    """
    # alike in length, so that no rank has all of the long ones
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
    engines = writing.engines or world.local_size
    writers = [rank for rank in range(world.size) if rank % world.local_size < engines]
    mine = order[writers.index(world.rank) :: len(writers)] if world.rank in writers else []
    limits = [min(writing.max_new_tokens, writing.max_length - len(prompts[number])) for number in mine]
    asked = Asked(str(weights), [prompts[number].tolist() for number in mine], limits, [seeds[n] for n in mine])
    every = on_every_rank(world, thread, lambda: (mine, writer.write(asked) if mine else []))
    texts = {number: text for numbers, result in every for number, text in zip(numbers, result, strict=True)}
    return [texts[number] for number in range(len(prompts))]


class HuggingFaceWriter:
    """Writes in this process, by a model that is loaded once: the one in the folder it is asked for, or one that is lent weights."""

    def __init__(self, writing: Writing, lent: Lent | None = None) -> None:
        self._writing, self._lent = writing, lent
        self._loaded: Any = None
        self._mixed: tuple[Any, float] | None = None

    def write(self, asked: Asked) -> list[Ids]:
        how = self._writing
        try:
            if self._mixed is None and how.mixed_with is not None:
                other = writing_model(Path(how.mixed_with), how.mixed_dtype, trust_remote_code=how.mixed_trusts)
                self._mixed = other, how.mixed_share
            with self._model(asked) as model:
                return continued(model, asked.prompts, how.sampling(asked), mixed=self._mixed)
        except torch.OutOfMemoryError as error:
            beside = "" if self._lent is None else " beside the training"
            raise InputError(
                f"rollouts.batch_size: {how.batch_size} texts at once do not fit on the GPU{beside}; write a smaller number"
            ) from error

    def _model(self, asked: Asked) -> contextlib.AbstractContextManager[Any]:
        if self._lent is not None:
            return self._lent.writing()
        if self._loaded is None:
            how = self._writing
            self._loaded = writing_model(Path(asked.weights), how.dtype, trust_remote_code=how.trust_remote_code)
        return contextlib.nullcontext(self._loaded)

    def close(self) -> None:
        self._loaded = self._mixed = self._lent = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # a run's peak is its training's, whoever wrote before it


class VllmWriter:
    """Has a process of its own write, started when it is first asked, and once more where it dies."""

    def __init__(self, writing: Writing, log_file: Path, variables: Mapping[str, str]) -> None:
        self._writing, self._log_file = writing, log_file
        sleeps = writing.gpu_share is not None
        self.variables = {**variables, **vllm_environment(), **(allocator_variables() if sleeps else {})}
        self._child: Child | None = None

    def write(self, asked: Asked) -> list[Ids]:
        for last in (False, True):
            texts: list[Ids] = []
            code = self._started().do(asdict(asked), partial(_receive, texts), lambda share: None)
            if code is None:
                return texts
            self.close()  # what it had started may live on, with the memory that the next one needs
            if not last:
                log.warning("rollouts: the process that writes texts ended with code %d; it is started again", code)
        cure = "a smaller rollouts.gpu_share takes less memory, and rollouts.backend: hf does without vLLM"
        if self._writing.gpu_share is None:  # GPUs that nothing else uses
            cure = "a larger rollouts.tensor_parallel spreads the model over more devices, and rollouts.backend: hf does without vLLM"
        where = "where the texts ended" if self._writing.same_weights else "from the last checkpoint"
        raise InputError(
            f"rollouts: the process that writes texts ended twice with code {code}, see {self._log_file}; the same command resumes "
            f"{where}; {cure}"
        )

    def _started(self) -> Child:
        if self._child is None:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            self._child = Child("llmkd.rollouts.vllm_process", asdict(self._writing), self._log_file, self.variables)
        return self._child

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


def _receive(texts: list[Ids], line: str) -> None:
    if line.startswith(TEXT):
        texts.append(json.loads(line.removeprefix(TEXT)))
    elif line.startswith(NOTE):
        log.warning(line)
