"""Two ways to continue prompts, Hugging Face and vLLM: the same token ids in, the same out (greedy, in fp32).

Both take prompts as token ids and are told at which tokens a text ends, so that neither reads a folder's tokenizer or generation settings
by itself. A call loads one model, and unloads it at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from llmkd.errors import InputError
from llmkd.inference.cache import roomy_cache
from llmkd.inference.child import Say, quietly, say_share
from llmkd.inference.choices import Draws, Mixed, likeliest
from llmkd.inference.decoding import Choose, decoded, runs_plainly
from llmkd.inference.sampling import Ids, Sampling
from llmkd.inference.vllm_engine import VllmEngine
from llmkd.models.families import family
from llmkd.models.load import DTYPES, attention_implementation, load_config, load_model
from llmkd.models.spread import all_devices, placed


@dataclass(frozen=True)
class Continuations:
    """What one model wrote, and how long it took to load and to write."""

    token_ids: list[Ids]
    load_seconds: float
    seconds: float


def by_hugging_face(
    folder: Path, prompts: Sequence[Ids], dtype: str, how: Sampling, say: Say = quietly
) -> Continuations:
    """Continue prompts by one model, which is loaded for it, on all GPUs of this process."""
    started = time.perf_counter()
    model = writing_model(folder, dtype, trust_remote_code=how.trust_remote_code, devices=all_devices())
    loaded = time.perf_counter()
    texts = continued(model, prompts, how, say)
    return Continuations(texts, loaded - started, time.perf_counter() - loaded)


def writing_model(
    folder: Path, dtype: str, *, trust_remote_code: bool, devices: Sequence[torch.device] | None = None
) -> Any:
    """A folder's model, ready for `continued`, on these devices; by default on the process's own GPU if there is one.

    Raises InputError for a model that writes no texts.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    attention, _ = attention_implementation("auto", DTYPES[dtype], config)  # without a line in the log each time
    how = {"dtype": DTYPES[dtype], "ds_config": None, "attention": attention, "trust_remote_code": trust_remote_code}
    model: Any = load_model(folder, **how)
    if family(model.config).kind == "encoder":
        raise InputError(f"{folder}: an encoder writes no texts; give a decoder or an encoder-decoder")
    model.config.use_cache = True
    return placed(model, devices or [torch.device("cuda" if torch.cuda.is_available() else "cpu")])


def continued(
    model: Any, prompts: Sequence[Ids], how: Sampling, say: Say = quietly, mixed: tuple[Any, float] | None = None
) -> list[Ids]:
    """Continue prompts in batches of like length, padded on the left; an encoder-decoder answers them, padded on the right.

    `say` gets the share that is done, batch by batch. `mixed`: (a second model of the same tokens, its share of the distribution that each
    token is drawn from).
    """
    device = model.device
    model_family = family(model.config)
    answers = model_family.kind == "encoder_decoder"
    pad = how.stops[0]
    limits, seeds = how.of(len(prompts))
    ends = {"eos_token_id": list(how.stops), "pad_token_id": pad}
    if answers:
        ends["decoder_start_token_id"] = model_family.start
    model.generation_config = GenerationConfig(do_sample=False, **ends)  # in place of the folder's own
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    texts: dict[int, Ids] = {}
    for start in range(0, len(order), how.batch_size):
        batch = order[start : start + how.batch_size]
        width = len(prompts[batch[0]])
        rows = [(prompts[n], [pad] * (width - len(prompts[n]))) for n in batch]
        ids = torch.tensor([ids + padding if answers else padding + ids for ids, padding in rows], device=device)
        lengths = torch.tensor([len(prompts[n]) for n in batch], device=device)[:, None]
        places = torch.arange(width, device=device)
        mask = (places < lengths if answers else places >= width - lengths).long()
        longest = max(limits[n] for n in batch)
        other = None if mixed is None else Mixed(*mixed, mask)
        draws = (
            Draws([seeds[n] for n in batch], longest, how.temperature, how.top_p, device) if how.temperature else None
        )
        cache = None if answers else roomy_cache(model, width + longest)
        if cache is not None and runs_plainly(model):
            new = decoded(model, cache, ids, mask, [limits[n] for n in batch], how.stops, _choose(other, draws))
        else:
            choices = LogitsProcessorList([one for one in (other, draws) if one is not None])
            given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": longest, "logits_processor": choices}
            with torch.inference_mode():
                new = model.generate(**given, past_key_values=cache)[:, 1 if answers else width :]
        texts |= {n: _ended(text[: limits[n]], how.stops) for n, text in zip(batch, new.tolist(), strict=True)}
        say_share(say, len(texts), len(prompts))
    return [texts[n] for n in range(len(prompts))]


def _choose(other: Mixed | None, draws: Draws | None) -> Choose:
    """How the next token is chosen: from the model's distribution or a mixture of it with another's, drawn or the likeliest."""
    choose = likeliest if draws is None else draws.tokens
    return choose if other is None else lambda ids, scores: choose(ids, other(ids, scores))


def by_vllm(folder: Path, prompts: Sequence[Ids], dtype: str, how: Sampling, say: Say = quietly) -> Continuations:
    """Continue all prompts by one call of vLLM's engine, which is silent, over all GPUs of this process; it needs `vllm_environment`."""
    started = time.perf_counter()
    longest = max(map(len, prompts)) + how.max_new_tokens
    engine = VllmEngine(
        folder,
        dtype,
        max_length=longest,
        trust_remote_code=how.trust_remote_code,
        tensor_parallel=len(all_devices()),
    )
    loaded = time.perf_counter()
    try:
        texts = engine.continued(prompts, how)
    finally:
        engine.close()
    return Continuations(texts, loaded - started, time.perf_counter() - loaded)


BACKENDS: dict[str, Callable[[Path, Sequence[Ids], str, Sampling, Say], Continuations]] = {
    "hf": by_hugging_face,
    "vllm": by_vllm,
}


def _ended(text: Ids, stops: Sequence[int]) -> Ids:
    """A row of a batch up to the token that ended it, without the padding after it."""
    end = next((place for place, token in enumerate(text) if token in stops), len(text))
    return text[: end + 1]


def stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text of this model: the tokenizer's own and those that the folder's settings name."""
    ids = [tokenizer.eos_token_id]
    for file in (folder / "generation_config.json", folder / "config.json"):
        eos = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        ids += eos if isinstance(eos, list) else [eos]
    stops = tuple(dict.fromkeys(token for token in ids if token is not None))
    if not stops:
        raise InputError(
            f"{folder}: neither tokenizer nor configuration names an end-of-sequence token; set the tokenizer's eos_token"
        )
    return stops
