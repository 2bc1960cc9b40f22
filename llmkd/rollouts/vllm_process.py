"""vLLM's process: it takes each round's weights in place where it can, and writes what one rank asks for."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmkd.errors import InputError, first_line
from llmkd.inference.backends import writing_model
from llmkd.inference.child import DONE, REFUSAL, Say, listen
from llmkd.inference.sampling import Ids
from llmkd.inference.vllm_engine import VllmEngine
from llmkd.models.load import DTYPES, load_config
from llmkd.models.make import new_model
from llmkd.processes import only_one_in
from llmkd.rollouts.writer import NOTE, TEXT, Asked, Writing

STALE = 0.3
"""Difference of the log-probabilities of a prompt's tokens, on average, from which weights count as not taken: bfloat16 alone makes some
hundredths, a head with other weights several."""

RANDOM = 718_281_828
"""Seed of the weights that an engine begins with; not one that a recipe would have, so that no student begins with the same."""


WAITS = 600
"""Seconds for which an engine waits for another one of its node that writes such weights."""


class Rounds:
    """The rounds of one run. The engine stays, and takes each round's weights in place; where it does not, each round has a fresh one.

    Whether it does is found out in the first round: the engine begins with weights drawn at random, so that what it does not take is far
    off, and its log-probabilities of a prompt are compared with Hugging Face's.
    """

    def __init__(self, writing: Writing, say: Say) -> None:
        self._writing, self._say = writing, say
        self._options: dict[str, Any] = {
            "max_length": writing.max_length,
            "trust_remote_code": writing.trust_remote_code,
            "gpu_share": writing.gpu_share,
            "tensor_parallel": writing.tensor_parallel,
        }
        self._kept: VllmEngine | None = None
        self._in_place = True

    def write(self, asked: Asked) -> list[Ids]:
        """The texts of a round."""
        weights = Path(asked.weights)
        if self._kept is not None:
            self._kept.reload(weights)
        elif self._in_place:
            self._kept = self._begun(weights, asked.prompts[0])
            self._in_place = self._kept is not None
        how = self._writing.sampling(asked)
        if self._kept is not None:
            texts = self._kept.continued(asked.prompts, how)
            self._kept.sleep()
            return texts
        with contextlib.closing(VllmEngine(weights, self._writing.dtype, **self._options)) as engine:
            return engine.continued(asked.prompts, how)

    def _begun(self, weights: Path, prompt: Ids) -> VllmEngine | None:
        """An engine that has taken these weights in place; None where it can't."""
        engine = None
        try:
            random = self._random(weights)
            engine = VllmEngine(random, self._writing.dtype, **self._options)
            for folder in (weights, random, weights):  # the first time may succeed where the next does not
                engine.reload(folder)
            problem = self._stale(engine, weights, prompt if len(prompt) > 1 else prompt * 3)
        except Exception as error:  # whatever vLLM raises, or want of room: it works without
            problem = first_line(error)
        if problem is None:
            return engine
        if engine is not None:
            engine.close()
        self._say(f"{NOTE}vLLM does not take weights in place here ({problem}); each round starts a fresh engine")
        return None

    def _random(self, weights: Path) -> Path:
        """A model like the one in the folder, with random weights: one for all engines of a node, removed with the round's."""
        folder, half = weights / "random", weights / "random.half"
        with only_one_in(weights, WAITS):
            if not folder.is_dir():
                shutil.rmtree(half, ignore_errors=True)  # of an engine that was killed
                trusted = self._writing.trust_remote_code
                config = load_config(weights, trust_remote_code=trusted)
                dtype = DTYPES[self._writing.dtype]
                new_model(config, half, seed=RANDOM, dtype=dtype, tokenizer=lambda _: None, trust_remote_code=trusted)
                half.rename(folder)
        return folder

    def _stale(self, engine: VllmEngine, weights: Path, ids: Ids) -> str | None:
        """How the engine differs from the model in the folder; None: it agrees."""
        how = self._writing
        # a model that takes several GPUs has no room on one of them beside the engine
        place = None if how.tensor_parallel == 1 else [torch.device("cpu")]
        model = writing_model(weights, how.dtype, trust_remote_code=how.trust_remote_code, devices=place)
        theirs, ours = engine.log_probabilities(ids), log_probabilities(model, ids)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # this process stays beside the training
        gap = sum(abs(a - b) for a, b in zip(theirs, ours, strict=True)) / len(ours)
        return f"a prompt's log-probabilities differ by {gap:.2g}" if gap > STALE else None


class OneModel:
    """Orders that are all of the same weights: one engine."""

    def __init__(self, writing: Writing) -> None:
        self._writing = writing
        self._engine: VllmEngine | None = None

    def write(self, asked: Asked) -> list[Ids]:
        """The texts of an order."""
        how = self._writing
        if self._engine is None:
            self._engine = VllmEngine(
                Path(asked.weights),
                how.dtype,
                max_length=how.max_length,
                trust_remote_code=how.trust_remote_code,
                tensor_parallel=how.tensor_parallel,
            )
        return self._engine.continued(asked.prompts, how.sampling(asked))


def log_probabilities(model: Any, ids: Ids) -> list[float]:
    """As `VllmEngine.log_probabilities`, by Hugging Face."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1].float().log_softmax(-1)
    return logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()


def serve(write: Callable[[Asked], list[Ids]], orders: Any, say: Say) -> int:
    """Write what is asked, until there are no more orders."""
    try:
        for order in orders:
            for text in write(Asked(**order)):
                say(f"{TEXT}{json.dumps(text)}")
            say(f"{DONE}a round")
    except InputError as error:
        say(f"{REFUSAL}{first_line(error)}")
        return 1
    return 0


def main() -> int:
    """The process."""
    shared, orders, say = listen()
    writing = Writing(**{**shared, "stops": tuple(shared["stops"])})
    write = OneModel(writing).write if writing.same_weights else Rounds(writing, say).write
    return serve(write, orders, say)


if __name__ == "__main__":
    sys.exit(main())
