"""The process that writes texts for one rank: the student's weights and prompts in, token ids out.

It is a process of its own so that vLLM finds the surroundings it needs, and so that a run outlives a writer that dies.
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
from typing import Any

import torch

from llmkd.errors import InputError, first_line
from llmkd.inference.backends import continued, writing_model
from llmkd.inference.child import DONE, REFUSAL, Child, Say, listen
from llmkd.inference.sampling import Ids, Sampling
from llmkd.inference.vllm_engine import VllmEngine
from llmkd.inference.vllm_setup import on_cpu, vllm_environment

log = logging.getLogger("llmkd")

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


class Writer:
    """The parent's side: one process, started when it is first asked, and once more where it dies."""

    def __init__(self, writing: Writing, log_file: Path, variables: Mapping[str, str]) -> None:
        self._writing, self._log_file = writing, log_file
        self._variables = {**variables, **(vllm_environment() if writing.backend == "vllm" else {})}
        self._child: Child | None = None

    def write(self, asked: Asked) -> list[Ids]:
        """The texts. Raises InputError where the model or the prompts can't be run, and where the process dies twice."""
        if not asked.prompts:
            return []
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
            "the last checkpoint; a smaller rollouts.batch_size (hf) or gpu_share (vLLM) takes less memory"
        )

    def _started(self) -> Child:
        if self._child is None:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            self._child = Child("llmkd.rollouts.writer", asdict(self._writing), self._log_file, self._variables)
        return self._child

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._child = None


def _receive(texts: list[Ids], line: str) -> None:
    if line.startswith(TEXT):
        texts.append(json.loads(line.removeprefix(TEXT)))
    elif line:
        log.info(line)


# --- The process itself

Write = Callable[[Path, Sequence[Ids], Sampling], list[Ids]]


def by_hugging_face(writing: Writing) -> Write:
    """The student is loaded for each round, a second model once."""
    trusted = {"trust_remote_code": writing.trust_remote_code}
    mixed = None
    if writing.mixed_with is not None:
        mixed = writing_model(Path(writing.mixed_with), writing.dtype, **trusted), writing.mixed_share

    def write(weights: Path, prompts: Sequence[Ids], how: Sampling) -> list[Ids]:
        model = writing_model(weights, writing.dtype, **trusted)
        return continued(model, prompts, how, mixed=mixed)

    return write


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
                    f"rollouts: vLLM {vllm_place()} does not take weights in place ({problem}); each round starts a fresh engine"
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
        write = by_vllm(writing, say) if writing.backend == "vllm" else by_hugging_face(writing)
        for order in orders:
            asked = Asked(**order)
            how = Sampling(
                max_new_tokens=writing.max_new_tokens,
                stops=writing.stops,
                temperature=writing.temperature,
                top_p=writing.top_p,
                seeds=tuple(asked.seeds),
                limits=tuple(asked.limits),
                batch_size=writing.batch_size,
                trust_remote_code=writing.trust_remote_code,
            )
            for text in write(Path(asked.weights), asked.prompts, how):
                say(f"{TEXT}{json.dumps(text)}")
            say(DONE)
    except InputError as error:
        say(f"{REFUSAL}{first_line(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
