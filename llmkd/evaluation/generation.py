"""Lets models continue held-out prompts, by Hugging Face or vLLM, and scores what they write.

`generate([("forward-s0", folder)], settings, data, out)` writes `out/forward-s0.json` (scores, and what they were made with)
and `out/forward-s0.jsonl` (a line per item: prompt, references, text, token ids, scores). Each backend has a process of its own.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from llmkd.data import records
from llmkd.data.batches import Kind
from llmkd.errors import InputError
from llmkd.evaluation import text_metrics
from llmkd.evaluation.held_out import KEY, Encoded, Prompt, check_model_folder, encoded, held_out_prompts
from llmkd.evaluation.results import GeneratedText, GenerationResult, read_items
from llmkd.evaluation.step import Jobs, Process, Score, Step, before_scoring, explained, run, serve
from llmkd.files import sources
from llmkd.inference.backends import BACKENDS, stop_ids
from llmkd.inference.child import Say
from llmkd.inference.choose import WORTH_VLLM, choose_backend, is_encoder_decoder
from llmkd.inference.sampling import Sampling
from llmkd.inference.vllm_setup import check_installed, vllm_environment, vllm_version
from llmkd.models.families import kind
from llmkd.models.folders import resolve
from llmkd.models.load import load_config, load_tokenizer
from llmkd.provenance import versions
from llmkd.recipe.evaluation import Generation
from llmkd.recipe.recipe import Data, Evaluation
from llmkd.recipe.scoring_steps import GENERATION
from llmkd.recipe.study_entries import read_study

log = logging.getLogger("llmkd")


@dataclass(frozen=True)
class Task:
    """What all models of a call share."""

    generation: Generation
    dtype: str
    prompts: list[Prompt]
    log_file: str
    trust_remote_code: bool


def generate(
    jobs: Jobs, settings: Evaluation, data: Data, out: Path, *, trust_remote_code: bool = False
) -> dict[str, Path]:
    """Let models continue the prompts, as `step.run` says; the result files by name.

    Raises InputError, before anything is written, for prompts or a backend that are not there.
    """
    prompts = check(settings, data)
    unscored = [_unscored(name, folder, settings, prompts) for name, folder in jobs]
    task = Task(_section(settings), settings.dtype, prompts, str(out / STEP.log_name), trust_remote_code)
    return run(STEP, unscored, task, out, process=_process)


def check(settings: Evaluation, data: Data) -> list[Prompt]:
    """The prompts. Raises InputError for prompts or a backend that are not there; for a study to call before it trains."""
    generation = _section(settings)
    if generation.backend == "vllm":
        check_installed(f"{KEY}.backend")
    return held_out_prompts(generation, data)


def _section(settings: Evaluation) -> Generation:
    if settings.generation is None:
        raise InputError(f"{KEY}: the recipe asks for no texts; add that section, e.g. {KEY}.items: 200")
    return settings.generation


def _unscored(name: str, folder: Path, settings: Evaluation, prompts: Sequence[Prompt]) -> GenerationResult:
    """A model before it is run: its backend and why, and the fingerprint of all that decides its texts."""
    generation = _section(settings)
    backend, why = choose(generation, folder, len(prompts))
    packages = versions("torch", "transformers", "tokenizers", "sacrebleu", "rouge-score")
    packages |= {"vllm": vllm_version() or "none"} if backend == "vllm" else {}
    used = generation.model_dump(
        mode="json", exclude={"backend", "source", "name", "split", "format", "columns", "items"}
    )
    used |= {"backend": backend, "dtype": settings.dtype, "versions": packages, "prompts": [asdict(p) for p in prompts]}
    decides = [json.dumps(used, sort_keys=True), *sources(text_metrics, records)]
    about = {"backend": backend, "why": why, "dtype": settings.dtype, "versions": packages, "rows": 0}
    return before_scoring(GenerationResult, name, folder, decides, **about)


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
    return partial(score, task=task, say=say)


def score(model: GenerationResult, task: Task, say: Say) -> tuple[GenerationResult, list[GeneratedText]]:
    """One model's scores and texts. Raises whatever loading it raises, and InputError where it can't be run."""
    say(f"{model.name}: by {model.backend} ({model.why})")
    folder, generation = Path(model.model), task.generation
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=task.trust_remote_code)
    config = load_config(folder, trust_remote_code=task.trust_remote_code)
    asked = encoded(task.prompts, tokenizer, kind(config))
    check_room(asked, generation.max_new_tokens, getattr(config, "max_position_embeddings", None), kind(config))
    how = Sampling(
        stops=stop_ids(folder, tokenizer),
        trust_remote_code=task.trust_remote_code,
        **generation.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed", "batch_size"}),
    )
    try:
        written = BACKENDS[model.backend or "hf"](folder, [ids for _, ids in asked], task.dtype, how, say)
    except InputError:
        raise
    except Exception as error:
        fix = f"write {KEY}.backend: hf" if model.backend == "vllm" else f"a smaller {KEY}.batch_size needs less memory"
        problem = f"{model.backend} could not run this model ({explained(error)})"
        raise InputError(f"{problem}; see {task.log_file}, or {fix}") from error
    decode: Callable[..., str] = tokenizer.decode
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = [decode(ids, **plain).strip() for ids in written.token_ids]
    finished = [bool(ids) and ids[-1] in how.stops for ids in written.token_ids]
    answers = [
        (text_metrics.answer_in(text, prompt.references), prompt.references)
        for text, prompt in zip(texts, task.prompts, strict=True)
    ]
    thoughts = sum(answer != text for (answer, _), text in zip(answers, texts, strict=True))
    slots = [prompt.record for prompt in task.prompts if prompt.record is not None]
    metrics, scores = text_metrics.corpus_metrics(answers, finished, slots)
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
    took = {"seconds": written.seconds, "load_seconds": written.load_seconds}
    new_tokens = sum(map(len, written.token_ids))
    about = {"new_tokens": new_tokens, "thoughts": thoughts, "rows": len(items)}
    return replace(model, **took, **about, metrics={**metrics}), items


def check_room(asked: Encoded, new: int, positions: int | None, kind: Kind = "decoder") -> None:
    """Raise InputError for an empty prompt, and for one that leaves no room for its continuation."""
    for number, (_, ids) in enumerate(asked):
        if not ids:
            raise InputError(f"{KEY}: the prompt of item {number} is empty; fill it, or leave the row out")
        if positions is None:
            continue
        room = positions if kind == "encoder_decoder" else positions - len(ids)  # there an answer has its own positions
        if new > room or len(ids) > positions:
            raise InputError(
                f"{KEY}.max_new_tokens: item {number} has {len(ids)} tokens and may get {new} more, the model has {positions} "
                f"positions; write at most {max(room, 1)}, or leave such rows out"
            )


# --- The command


def models_of(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, folder) of models given as folders or hub names, and of all models of studies. Raises InputError for neither.

    What a study has not trained yet is left out, and logged.
    """
    models: list[tuple[str, Path]] = []
    for path in paths:
        if (path / "study.json").is_file():
            models += _models_of_study(path)
        else:
            folder, place = resolve(str(path), "MODEL_OR_STUDY"), path.resolve()
            models.append((place.parent.name if place.name == "model" else place.name, folder))
    if not models:
        raise InputError(f"MODEL_OR_STUDY: {paths[0]} has no model yet; run the study first")
    names = [name for name, _ in models]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"MODEL_OR_STUDY: two models are called {name!r}; run each alone, with its own --output")
    return models


def _models_of_study(study: Path) -> Iterator[tuple[str, Path]]:
    for entry in read_study(study).entries:
        inside = study / entry.model
        if inside.is_dir():
            yield entry.name, inside
        elif entry.train is None and entry.strategy != "undistilled":  # the study reads it from elsewhere
            yield entry.name, resolve(entry.model, entry.name)
        else:
            log.info("generation: %s has no model yet and is left out", entry.name)


def summary(files: dict[str, Path], samples: int = 3) -> str:
    """A table of the models' scores, the texts of the first items side by side, and where it all is."""
    results = {name: GenerationResult.read(file) for name, file in files.items()}
    scored = {metric for result in results.values() for metric in result.metrics}
    labels = {metric: about.label for metric, about in text_metrics.METRICS.items() if metric in scored}
    width = max(len(name) for name in [*results, "model"])
    lines = [f"{'model':{width}}  backend  " + "  ".join(labels.values())]
    for name, result in results.items():
        cells = [f"{result.metrics[m]:>{len(label)}.4g}" for m, label in labels.items() if m in result.metrics]
        lines.append(f"{name:{width}}  {result.backend:7}  " + (result.error or "  ".join(cells)))
    texts = {name: read_items(file.with_suffix(".jsonl"), GeneratedText) for name, file in files.items()}
    for prompt in next((some[:samples] for some in texts.values() if some), []):
        lines += ["", f"prompt {prompt.item}: {prompt.prompt}", f"  {'reference':{width}}  {prompt.references[0]}"]
        lines += [f"  {name:{width}}  {some[prompt.item].text}" for name, some in texts.items() if some]
    return "\n".join([*lines, "", *(f"{file} and {file.stem}.jsonl" for file in files.values())])


STEP = Step(GENERATION, Task, GenerationResult, prepare)


def main() -> int:
    """The process that scores models."""
    return serve(STEP)


if __name__ == "__main__":
    sys.exit(main())
