"""What writes texts for one rank: the student's weights and prompts in, token ids out.

Hugging Face writes in the rank's own process. vLLM has one of its own, so that it finds the surroundings it needs, and a run outlives an
engine that dies.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from llmkd.errors import InputError, first_line
from llmkd.inference.backends import continued, writing_model
from llmkd.inference.child import DONE, REFUSAL, Child, Say, listen
from llmkd.inference.sampling import Ids, Sampling
from llmkd.inference.vllm_engine import VllmEngine
from llmkd.inference.vllm_setup import on_cpu, vllm_environment

log = logging.getLogger("llmkd")

NOTE = "rollouts: "
"""Begins a line for the run's log."""
TEXT = "text: "
"""Begins a line with the ids of one text; they come in the order of the prompts."""
STALE = 0.3
"""Difference of a prompt's mean log-probabilities from which weights that were loaded in place count as not taken; bfloat16 alone makes
some hundredths, a stale head several."""


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
    gpu_share: float | None = None
    """vLLM's share of the memory of a GPU that it has together with the training."""

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
    """What one rank wants of a round."""

    weights: str
    """The student's folder."""
    prompts: list[Ids]
    limits: list[int]
    """Each text's most tokens."""
    seeds: list[int]


def writer_variables(device: torch.device, local_rank: int) -> dict[str, str]:
    """The environment of a rank's writer beside the rank's own: its share of the cores, and the GPU that is the rank's."""
    variables = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank] if visible else str(local_rank)
    return variables


class Writer(Protocol):
    """What writes one rank's texts."""

    def write(self, asked: Asked) -> list[Ids]:
        """The texts. Raises InputError where the model or the prompts can't be run."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


def writer_of(writing: Writing, log_file: Path, variables: Mapping[str, str]) -> Writer:
    """The writer of a backend; `log_file` and `variables` are for a process of its own, which vLLM has."""
    return VllmWriter(writing, log_file, variables) if writing.backend == "vllm" else HuggingFaceWriter(writing)


class HuggingFaceWriter:
    """Writes in this process. The student is loaded for each round, a second model once."""

    def __init__(self, writing: Writing) -> None:
        self._writing = writing
        self._mixed: tuple[Any, float] | None = None
        if writing.mixed_with is not None:
            self._mixed = self._model(writing.mixed_with), writing.mixed_share

    def _model(self, folder: str) -> Any:
        trusted = self._writing.trust_remote_code
        return writing_model(Path(folder), self._writing.dtype, trust_remote_code=trusted)

    def write(self, asked: Asked) -> list[Ids]:
        try:
            return continued(
                self._model(asked.weights), asked.prompts, self._writing.sampling(asked), mixed=self._mixed
            )
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"rollouts.batch_size: {self._writing.batch_size} texts at once do not fit on the GPU beside the training; write a "
                "smaller number"
            ) from error

    def close(self) -> None:
        self._mixed = None


class VllmWriter:
    """Has a process of its own write, started when it is first asked, and once more where it dies."""

    def __init__(self, writing: Writing, log_file: Path, variables: Mapping[str, str]) -> None:
        self._writing, self._log_file = writing, log_file
        self._variables = {**variables, **vllm_environment()}
        self._child: Child | None = None

    def write(self, asked: Asked) -> list[Ids]:
        for last in (False, True):
            texts: list[Ids] = []
            code = self._started().do(asdict(asked), partial(_receive, texts), lambda share: None)
            if code is None:
                return texts
            self._child = None
            if not last:
                log.warning("rollouts: the process that writes texts ended with code %d; it is started again", code)
        raise InputError(
            f"rollouts: the process that writes texts ended twice with code {code}, see {self._log_file}; the same command resumes from "
            "the last checkpoint; a smaller rollouts.gpu_share takes less memory, and rollouts.backend: hf does without vLLM"
        )

    def _started(self) -> Child:
        if self._child is None:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            self._child = Child("llmkd.rollouts.writer", asdict(self._writing), self._log_file, self._variables)
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


# --- vLLM's process

Write = Callable[[Path, Sequence[Ids], Sampling], list[Ids]]


def by_vllm(writing: Writing, say: Say) -> Write:
    """One engine that takes each round's weights in place; a fresh one each round where that leaves old weights behind."""
    options: dict[str, Any] = {"max_length": writing.max_length, "trust_remote_code": writing.trust_remote_code}
    options["gpu_share"] = writing.gpu_share
    kept: list[VllmEngine] = []
    in_place = True

    def write(weights: Path, prompts: Sequence[Ids], how: Sampling) -> list[Ids]:
        nonlocal in_place
        if in_place and not kept:
            kept.append(VllmEngine(weights, writing.dtype, empty=True, **options))
            kept[0].reload(weights)
            problem = stale(kept[0], weights, prompts[0], writing)
            if problem is not None:
                say(
                    f"{NOTE}vLLM {vllm_place()} does not take weights in place ({problem}); each round starts a fresh engine"
                )
                in_place = False
                kept.pop().close()
        elif kept:
            kept[0].reload(weights)
        if kept:
            texts = kept[0].continued(prompts, how)
            kept[0].sleep()
            return texts
        engine = VllmEngine(weights, writing.dtype, **options)
        with contextlib.closing(engine):
            return engine.continued(prompts, how)

    return write


def vllm_place() -> str:
    return "on this processor" if on_cpu() else "on this GPU"


def stale(engine: VllmEngine, weights: Path, ids: Ids, writing: Writing) -> str | None:
    """How an engine that took its weights in place differs from the model in the folder, by a prompt's log-probabilities; None: it agrees.

    The engine began with random weights: what was not taken is far off.
    """
    if len(ids) < 2:
        ids = [*ids, *ids, *ids]
    theirs = engine.log_probabilities(ids)
    model = writing_model(weights, writing.dtype, trust_remote_code=writing.trust_remote_code)
    ours = own_log_probabilities(model, ids)
    gap = sum(abs(a - b) for a, b in zip(theirs, ours, strict=True)) / len(ours)
    return f"a prompt's log-probabilities differ by {gap:.2g} on average" if gap > STALE else None


def own_log_probabilities(model: Any, ids: Ids) -> list[float]:
    """As `VllmEngine.log_probabilities`, by Hugging Face."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1].float().log_softmax(-1)
    return logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()


def main() -> int:
    """Write what is asked, until there are no more orders."""
    shared, orders, say = listen()
    writing = Writing(**{**shared, "stops": tuple(shared["stops"])})
    try:
        write = by_vllm(writing, say)
        for order in orders:
            asked = Asked(**order)
            for text in write(Path(asked.weights), asked.prompts, writing.sampling(asked)):
                say(f"{TEXT}{json.dumps(text)}")
            say(f"{DONE}{len(asked.prompts)}")
    except InputError as error:
        say(f"{REFUSAL}{first_line(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
