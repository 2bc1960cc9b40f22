"""Lets models continue held-out prompts, by Hugging Face or vLLM, and scores what they write.

`generate([("forward-s0", folder)], settings, data, out)` writes `out/forward-s0.json` (scores, and what they were made with)
and `out/forward-s0.jsonl` (a line per item: prompt, references, text, token ids, scores). What is there and made of the same
model, prompts, settings and versions is not made again. Each backend has a process of its own, this file; it loads a model or
starts vLLM's engine once for all prompts, and leaves the libraries' own talk in `out/generation.log`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmkd.data import records
from llmkd.errors import InputError
from llmkd.evaluation import text_metrics
from llmkd.evaluation.prompts import Item, held_out
from llmkd.evaluation.step import model_contents, one_sentence, up_to_date, written
from llmkd.evaluation.text_metrics import METRICS, corpus_metrics
from llmkd.files import digest, publish_json, publish_lines, sources
from llmkd.inference import child
from llmkd.inference.vllm_setup import CPU_HEAD_SIZES, check_installed, on_cpu, vllm_environment, vllm_version
from llmkd.provenance import versions
from llmkd.recipe.evaluation import Generation
from llmkd.recipe.recipe import Data, Evaluation
from llmkd.recipe.study_entries import read_study

log = logging.getLogger("llmkd")

WORTH_VLLM = 3e11
"""Parameters x new tokens from which vLLM repays its start. On one CPU thread 26M parameters x 12,800 tokens (3.3e11) took 21 s by
Hugging Face and 10 + 7 s by vLLM; 7M parameters 5 s against 8 + 4 s. Not measured on a GPU."""
KEY = "evaluation.generation"


def generate(
    jobs: Sequence[tuple[str, Path]],
    settings: Evaluation,
    data: Data,
    out: Path,
    items: Sequence[Item] | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Path]:
    """Continue the prompts by every (name, model folder) that has no up-to-date result in `out`; the result files by name.

    `items` are the prompts where the caller has read them already. A model that can't be run gets a file with `error` set, and
    is tried again at the next call. Raises InputError, before anything is written, for prompts or a backend that are not there.
    """
    items = check(settings, data) if items is None else items
    orders = [_order(name, model, settings, items) for name, model in jobs]
    files = {name: out / f"{name}.json" for name, _ in jobs}
    todo = [order for order in orders if not up_to_date(files[order["name"]], order["fingerprint"])]
    log.info("generation: %d of %d models are up to date", len(orders) - len(todo), len(orders))
    out.mkdir(parents=True, exist_ok=True)
    (out / "generation.log").unlink(missing_ok=True)
    shared = {"settings": settings.model_dump(mode="json"), "items": list(items), "out": str(out.resolve())}
    shared["trust_remote_code"] = trust_remote_code
    for backend in ("hf", "vllm"):
        chosen = [order for order in todo if order["backend"] == backend]
        for order in chosen:
            log.info("generation: %s by %s (%s)", order["name"], backend, order["why"])
        _run(backend, chosen, shared, out)
    return files


def check(settings: Evaluation, data: Data) -> list[Item]:
    """The prompts. Raises InputError for prompts or a backend that are not there; for a study to call before it trains."""
    generation = section(settings)
    if generation.backend == "vllm":
        check_installed(f"{KEY}.backend")
    return prompts(generation, data)


def section(settings: Evaluation) -> Generation:
    """The recipe's section on texts; InputError where it has none."""
    if settings.generation is None:
        raise InputError(f"{KEY}: the recipe asks for no texts; add that section, e.g. {KEY}.items: 200")
    return settings.generation


def prompts(generation: Generation, data: Data) -> list[Item]:
    """The held-out prompts that a recipe asks for. Raises InputError for rows that the students are trained on."""
    ours = generation.source is None
    source = data.source if generation.source is None else generation.source
    if ours and generation.split == data.split:
        raise InputError(
            f"{KEY}.split: the students are trained on the split {data.split!r} of {source!r}; write a split that is held out"
        )
    path = Path(source).expanduser()
    if ours and (
        path.is_file() or (path.is_dir() and not any(generation.split in f.name.lower() for f in path.iterdir()))
    ):
        raise InputError(
            f"{KEY}.source: the students are trained on all of {source!r}; name a file of held-out rows, or a folder with one file "
            "named after each split"
        )
    return held_out(
        source,
        name=data.name if ours else generation.name,
        split=generation.split,
        rows=generation.items,
        format=data.format if ours else "auto",
        records_seed=data.records_seed,
    )


def _order(name: str, model: Path, settings: Evaluation, items: Sequence[Item]) -> dict[str, Any]:
    """What a child must know of one model: its backend and why, and the fingerprint of all that decides its texts."""
    generation = section(settings)
    backend, why = choose(generation, model, len(items))
    used = generation.model_dump(mode="json", exclude={"backend", "source", "name", "split", "items"})
    made_of = {"backend": backend, "dtype": settings.dtype, "versions": _versions(backend), "items": list(items)}
    code = sources(text_metrics, records)
    fingerprint = digest([json.dumps(used | made_of, sort_keys=True), *code, *model_contents(model)])
    return {"name": name, "model": str(model), "fingerprint": fingerprint, "backend": backend, "why": why}


def choose(generation: Generation, model: Path, items: int) -> tuple[str, str]:
    """(backend, why): the one asked for, or vLLM where it is there and the work repays its start."""
    if encoder_decoder(model):
        if generation.backend == "vllm":
            raise InputError(f"{KEY}.backend: vLLM does not run an encoder-decoder here ({model}); write hf")
        return "hf", "vLLM does not run an encoder-decoder here"
    if generation.backend != "auto":
        return generation.backend, "as the recipe says"
    if vllm_version() is None:
        return "hf", "vLLM is not installed"
    try:
        size, head = parameters(model), head_size(model)
    except (OSError, ValueError, KeyError):  # the child says what is wrong with it
        return "hf", "the model's size can't be read"
    if on_cpu() and head not in CPU_HEAD_SIZES:
        return "hf", f"vLLM's CPU build knows no attention heads of size {head}"
    work = size * items * generation.max_new_tokens
    told = f"{size / 1e6:.3g}M parameters x {items} items x {generation.max_new_tokens} tokens = {work:.1g}"
    if work < WORTH_VLLM:
        return "hf", f"{told}, too little to repay vLLM's start (from {WORTH_VLLM:.0e} on)"
    return "vllm", f"{told}, enough to repay its start (from {WORTH_VLLM:.0e} on)"


def parameters(folder: Path) -> int:
    """How many numbers a folder's safetensors hold; read from their headers. Raises OSError where there are none."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    if not count:
        raise FileNotFoundError(folder)
    return count


def encoder_decoder(folder: Path) -> bool:
    """Whether a model folder's is an encoder-decoder; False where that can't be read (loading will say why)."""
    try:
        return bool(json.loads((folder / "config.json").read_text()).get("is_encoder_decoder"))
    except (OSError, ValueError):
        return False


def head_size(folder: Path) -> int:
    """The width of one attention head."""
    config = json.loads((folder / "config.json").read_text())
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _run(backend: str, todo: list[dict[str, Any]], shared: dict[str, Any], out: Path) -> None:
    """Run children until every model has its result; one that brings its child down is noted and passed over."""
    variables = vllm_environment() if backend == "vllm" else {}
    while todo:
        order = {**shared, "jobs": todo}
        code = child.run("llmkd.evaluation.generation", order, out / "generation.log", "generation", variables)
        left = [job for job in todo if not written(out / f"{job['name']}.json", job["fingerprint"])]
        if left:
            error = f"the process that generated ended with code {code}; see {out / 'generation.log'}"
            _publish(out, _result(left.pop(0), shared["settings"], error=error), [])
        todo = left


def _versions(backend: str) -> dict[str, str]:
    found = versions("torch", "transformers", "tokenizers", "sacrebleu", "rouge-score")
    return found | ({"vllm": vllm_version() or "none"} if backend == "vllm" else {})


def _result(job: dict[str, Any], settings: dict[str, Any], *, error: str | None = None, **found: Any) -> dict[str, Any]:
    empty = {"seconds": 0.0, "load_seconds": 0.0, "new_tokens": 0, "items": 0, "metrics": {}}
    made_with = {"versions": _versions(job["backend"]), "dtype": settings["dtype"]}
    return {**job, "error": error, **made_with, **empty, **found}


def _publish(out: Path, result: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """The texts first: where a result is, its texts are."""
    publish_lines(out / f"{result['name']}.jsonl", lines)
    publish_json(out / f"{result['name']}.json", result)


def models_of(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, folder) of models given as folders or hub names, and of all models of studies. Raises InputError for neither.

    What a study has not trained yet is passed over, with a word about it.
    """
    from llmkd.models.folders import resolve

    found: list[tuple[str, Path]] = []
    for path in paths:
        if (path / "study.json").is_file():
            found += _models_of_study(path)
            continue
        folder = resolve(str(path), "MODEL_OR_STUDY")
        named = path.resolve()
        found.append((named.parent.name if named.name == "model" else named.name, folder))
    if not found:
        raise InputError(f"MODEL_OR_STUDY: {paths[0]} has no model yet; run the study first")
    names = [name for name, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"MODEL_OR_STUDY: two models are called {name!r}; give each a call of its own, with another --output"
            )
    return found


def _models_of_study(study: Path) -> list[tuple[str, Path]]:
    from llmkd.models.folders import resolve

    found = []
    for entry in read_study(study).entries:
        inside = study / entry.model
        if inside.is_dir():
            found.append((entry.name, inside))
        elif entry.train is None and entry.strategy != "undistilled":  # the study reads it from elsewhere
            found.append((entry.name, resolve(entry.model, entry.name)))
        else:
            log.info("generation: %s has no model yet and is left out", entry.name)
    return found


def shown(files: dict[str, Path], samples: int = 3) -> str:
    """A table of the models' scores, the texts of the first items side by side, and where it all is."""
    found = {name: json.loads(file.read_text()) for name, file in files.items()}
    names = [metric for metric in METRICS if any(metric in result["metrics"] for result in found.values())]
    width = max(len(name) for name in [*found, "model"])
    lines = [f"{'model':{width}}  backend  " + "  ".join(METRICS[metric].label for metric in names)]
    for name, result in found.items():
        cells = [f"{result['metrics'][m]:>{len(METRICS[m].label)}.4g}" for m in names if m in result["metrics"]]
        lines.append(f"{name:{width}}  {result['backend']:7}  " + (result["error"] or "  ".join(cells)))
    texts = {name: lines_of(file) for name, file in files.items()}
    for item in next((some[:samples] for some in texts.values() if some), []):
        lines += ["", f"prompt {item['item']}: {item['prompt']}", f"  {'reference':{width}}  {item['references'][0]}"]
        lines += [f"  {name:{width}}  {some[item['item']]['text']}" for name, some in texts.items() if some]
    return "\n".join([*lines, "", *(f"{file} and {file.stem}.jsonl" for file in files.values())])


def lines_of(result: Path) -> list[dict[str, Any]]:
    """The lines beside a result file, one per item; none where the model could not be run."""
    file = result.with_suffix(".jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


# ---------------------------------------------------------------------------------------------------------------------
# The child process


def main() -> int:
    """Run the models of the order on stdin one after another."""
    order, say = child.listen()
    settings = Evaluation.model_validate_json(json.dumps(order["settings"]))
    jobs, out = order["jobs"], Path(order["out"])
    for number, job in enumerate(jobs, start=1):
        say(f"{number}/{len(jobs)} {job['name']}: started")
        started, lines = time.perf_counter(), []
        try:
            found, lines = _written_by(job, order["items"], settings, order["trust_remote_code"])
            result = _result(job, order["settings"], **found)
        except Exception as error:  # whatever is wrong with one model must not cost the others their texts
            log.exception("%s", job["name"])
            result = _result(job, order["settings"], error=_told(error, job, out))
        _publish(out, result, lines)
        scores = result["error"] or " ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
        say(f"{number}/{len(jobs)} {job['name']}: {scores} ({time.perf_counter() - started:.1f} s)")
    return 0


def _told(error: Exception, job: dict[str, Any], out: Path) -> str:
    if isinstance(error, InputError):
        return str(error)
    cure = f"write {KEY}.backend: hf" if job["backend"] == "vllm" else f"a smaller {KEY}.batch_size needs less memory"
    return f"{job['backend']} could not run this model ({one_sentence(error)}); see {out / 'generation.log'}, or {cure}"


def _written_by(
    job: dict[str, Any], items: Sequence[Item], settings: Evaluation, trust_remote_code: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One model's scores and lines. Raises whatever loading or generating raises."""
    from llmkd.evaluation.prompts import encoded, sources
    from llmkd.inference.backends import BACKENDS, Sampling, stop_ids
    from llmkd.models.families import kind
    from llmkd.models.load import load_config, load_tokenizer

    folder, generation = Path(job["model"]), section(settings)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (no config.json)")
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    shape = load_config(folder, trust_remote_code=trust_remote_code)
    if kind(shape) == "encoder_decoder":
        asked = sources(items, tokenizer)
        _check_sides(asked, generation.max_new_tokens, getattr(shape, "max_position_embeddings", None))
    else:
        asked = encoded(items, tokenizer)
        _check_room(asked, generation.max_new_tokens, getattr(shape, "max_position_embeddings", None))
    how = Sampling(
        max_new_tokens=generation.max_new_tokens,
        stops=stop_ids(folder, tokenizer),
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=generation.seed,
        batch_size=generation.batch_size,
        trust_remote_code=trust_remote_code,
    )
    made = BACKENDS[job["backend"]](folder, [ids for _, ids in asked], settings.dtype, how)
    decode: Callable[..., str] = tokenizer.decode
    texts = [
        decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip() for ids in made.token_ids
    ]
    finished = [bool(ids) and ids[-1] in how.stops for ids in made.token_ids]
    pairs = [(text, item["references"]) for text, item in zip(texts, items, strict=True)]
    slots = [item["record"] for item in items] if "record" in items[0] else None
    metrics, scores = corpus_metrics(pairs, finished, slots)
    lines = [
        {
            "item": number,
            "prompt": asked[number][0],
            "references": item["references"],
            "text": texts[number],
            "token_ids": made.token_ids[number],
            "finished": finished[number],
            "scores": scores[number],
        }
        for number, item in enumerate(items)
    ]
    cost = {"seconds": made.seconds, "load_seconds": made.load_seconds, "new_tokens": sum(map(len, made.token_ids))}
    return {**cost, "items": len(items), "metrics": metrics}, lines


def _check_room(asked: Sequence[tuple[str, list[int]]], new: int, positions: int | None) -> None:
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


def _check_sides(asked: Sequence[tuple[str, list[int]]], new: int, positions: int | None) -> None:
    """As `_check_room`, where prompt and answer have positions of their own."""
    longest = max(len(ids) for _, ids in asked)
    if positions is not None and max(longest, new) > positions:
        key = f"{KEY}.max_new_tokens: {new}" if new > positions else f"{KEY}: a prompt of {longest}"
        raise InputError(
            f"{key} tokens are more than the model's {positions} positions; write fewer, or leave such rows out"
        )


if __name__ == "__main__":
    sys.exit(main())
