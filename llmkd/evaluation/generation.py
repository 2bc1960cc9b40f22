"""Lets models continue held-out prompts, by Hugging Face or vLLM, and scores what they write.

`generate([("forward-s0", folder)], settings, data, out)` writes `out/forward-s0.json` (scores, and what they were made with)
and `out/forward-s0.jsonl` (a line per item: prompt, references, text, token ids, scores). What is there and made of the same
model, prompts, settings and versions is not made again. Each backend has a process of its own, this file; it loads a model or
starts vLLM's engine once for all prompts, and leaves the libraries' own output in `out/generation.log`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from llmkd.data import records
from llmkd.errors import InputError
from llmkd.evaluation import text_metrics
from llmkd.evaluation.held_out import check_model_folder
from llmkd.evaluation.prompts import KEY, Encoded, Prompt, encoded, encoded_sources, held_out_prompts, section
from llmkd.evaluation.results import GeneratedText, GenerationResult
from llmkd.evaluation.step import Process, Score, Step, explained, model_hashes, run, serve
from llmkd.evaluation.text_metrics import corpus_metrics
from llmkd.files import digest, sources
from llmkd.inference.backends import BACKENDS, Sampling, stop_ids
from llmkd.inference.child import Say
from llmkd.inference.choose import choose_backend, is_encoder_decoder
from llmkd.inference.vllm_setup import check_installed, vllm_environment, vllm_version
from llmkd.models.families import kind
from llmkd.models.load import load_config, load_tokenizer
from llmkd.provenance import versions
from llmkd.recipe.evaluation import Generation
from llmkd.recipe.recipe import Data, Evaluation
from llmkd.recipe.scoring_steps import GENERATION

WORTH_VLLM = 3e11
"""Parameters x new tokens from which vLLM repays its start. On one CPU thread 26M parameters x 12,800 tokens (3.3e11) took 21 s by
Hugging Face and 10 + 7 s by vLLM; 7M parameters 5 s against 8 + 4 s. Not measured on a GPU."""


@dataclass(frozen=True)
class Task:
    """What all models of a call share."""

    generation: Generation
    dtype: str
    prompts: list[Prompt]
    log_file: str
    trust_remote_code: bool


def generate(
    jobs: Sequence[tuple[str, Path]],
    settings: Evaluation,
    data: Data,
    out: Path,
    *,
    trust_remote_code: bool = False,
    devices: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Continue the prompts by every (name, model folder) that has no up-to-date result in `out`; the result files by name.

    A model that can't be run gets a file with `error` set, and is tried again at the next call. Raises InputError, before anything is
    written, for prompts or a backend that are not there.
    """
    prompts = check(settings, data)
    unscored = [_unscored(name, folder, settings, prompts) for name, folder in jobs]
    log_file = str(out / STEP.log_name)
    task = Task(section(settings), settings.dtype, prompts, log_file, trust_remote_code)
    return run(STEP, unscored, task, out, process=_process, devices=devices)


def check(settings: Evaluation, data: Data) -> list[Prompt]:
    """The prompts. Raises InputError for prompts or a backend that are not there; for a study to call before it trains."""
    generation = section(settings)
    if generation.backend == "vllm":
        check_installed(f"{KEY}.backend")
    return held_out_prompts(generation, data)


def _unscored(name: str, folder: Path, settings: Evaluation, prompts: Sequence[Prompt]) -> GenerationResult:
    """A model before it is run: its backend and why, and the fingerprint of all that decides its texts."""
    generation = section(settings)
    backend, why = choose(generation, folder, len(prompts))
    packages = versions("torch", "transformers", "tokenizers", "sacrebleu", "rouge-score")
    packages |= {"vllm": vllm_version() or "none"} if backend == "vllm" else {}
    used = generation.model_dump(mode="json", exclude={"backend", "source", "name", "split", "items"})
    used |= {"backend": backend, "dtype": settings.dtype, "versions": packages, "prompts": [asdict(p) for p in prompts]}
    code = sources(text_metrics, records)
    return GenerationResult(
        name=name,
        model=str(folder),
        fingerprint=digest([json.dumps(used, sort_keys=True), *code, *model_hashes(folder)]),
        backend=backend,
        why=why,
        dtype=settings.dtype,
        versions=packages,
        rows=0,
    )


def choose(generation: Generation, folder: Path, prompts: int) -> tuple[str, str]:
    """(backend, why): the one asked for, or vLLM where it is there and the work repays its start."""
    if is_encoder_decoder(folder):
        if generation.backend == "vllm":
            raise InputError(f"{KEY}.backend: vLLM does not run an encoder-decoder here ({folder}); write hf")
        return "hf", "vLLM does not run an encoder-decoder here"
    task = f" x {prompts} items x {generation.max_new_tokens} tokens"
    return choose_backend(generation.backend, folder, prompts * generation.max_new_tokens, WORTH_VLLM, task)


def _process(model: GenerationResult) -> Process:
    return Process(1, vllm_environment()) if model.backend == "vllm" else Process()


# --- The child process


def prepare(task: Task, say: Say) -> Score[GenerationResult]:
    """All is done model by model."""
    return partial(_score, task=task, say=say)


def _score(model: GenerationResult, task: Task, say: Say) -> tuple[GenerationResult, list[GeneratedText]]:
    say(f"{model.name}: by {model.backend} ({model.why})")
    try:
        return score(model, task)
    except InputError:
        raise
    except Exception as error:
        fix = f"write {KEY}.backend: hf" if model.backend == "vllm" else f"a smaller {KEY}.batch_size needs less memory"
        raise InputError(
            f"{model.backend} could not run this model ({explained(error)}); see {task.log_file}, or {fix}"
        ) from error


def score(model: GenerationResult, task: Task) -> tuple[GenerationResult, list[GeneratedText]]:
    """One model's scores and texts. Raises whatever loading or generating raises."""
    folder, generation = Path(model.model), task.generation
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=task.trust_remote_code)
    asked = _encoded(folder, tokenizer, task)
    how = Sampling(
        max_new_tokens=generation.max_new_tokens,
        stops=stop_ids(folder, tokenizer),
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=generation.seed,
        batch_size=generation.batch_size,
        trust_remote_code=task.trust_remote_code,
    )
    written = BACKENDS[model.backend or "hf"](folder, [ids for _, ids in asked], task.dtype, how)
    decode: Callable[..., str] = tokenizer.decode
    texts = [
        decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip() for ids in written.token_ids
    ]
    finished = [bool(ids) and ids[-1] in how.stops for ids in written.token_ids]
    answers = [(text, prompt.references) for text, prompt in zip(texts, task.prompts, strict=True)]
    slots = [prompt.record for prompt in task.prompts if prompt.record is not None]
    metrics, scores = corpus_metrics(answers, finished, slots)
    items = [
        GeneratedText(
            item=number,
            prompt=asked[number][0],
            references=prompt.references,
            text=texts[number],
            token_ids=written.token_ids[number],
            finished=finished[number],
            scores={**scores[number]},
        )
        for number, prompt in enumerate(task.prompts)
    ]
    result = replace(
        model,
        seconds=written.seconds,
        load_seconds=written.load_seconds,
        new_tokens=sum(map(len, written.token_ids)),
        rows=len(items),
        metrics={**metrics},
    )
    return result, items


def _encoded(folder: Path, tokenizer: object, task: Task) -> Encoded:
    """The prompts as the model reads them. Raises InputError for one that it has no room for."""
    config = load_config(folder, trust_remote_code=task.trust_remote_code)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if kind(config) == "encoder_decoder":
        asked = encoded_sources(task.prompts, tokenizer)
        _check_sides(asked, task.generation.max_new_tokens, positions)
    else:
        asked = encoded(task.prompts, tokenizer)
        _check_room(asked, task.generation.max_new_tokens, positions)
    return asked


def _check_room(asked: Encoded, new: int, positions: int | None) -> None:
    """Raise InputError for a prompt that leaves no room for its continuation, or that is empty."""
    for number, (_, ids) in enumerate(asked):
        if not ids:
            raise InputError(
                f"{KEY}: the prompt of item {number} is empty; give it at least one token, or leave the row out"
            )
        if positions is not None and len(ids) + new > positions:
            raise InputError(
                f"{KEY}.max_new_tokens: item {number} has {len(ids)} tokens and may get {new} more, the model has {positions} "
                f"positions; write at most {max(positions - len(ids), 1)}, or leave such rows out"
            )


def _check_sides(asked: Encoded, new: int, positions: int | None) -> None:
    """As `_check_room`, where prompt and answer have positions of their own."""
    longest = max(len(ids) for _, ids in asked)
    if positions is not None and max(longest, new) > positions:
        key = f"{KEY}.max_new_tokens: {new}" if new > positions else f"{KEY}: a prompt of {longest}"
        raise InputError(
            f"{key} tokens are more than the model's {positions} positions; write fewer, or leave such rows out"
        )


STEP = Step(GENERATION, Task, GenerationResult, prepare)

if __name__ == "__main__":
    sys.exit(serve(STEP))
