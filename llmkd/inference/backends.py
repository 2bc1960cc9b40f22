"""Two ways to continue prompts, Hugging Face and vLLM: the same token ids in, the same out (greedy, in fp32).

Both take prompts as token ids and are told at which tokens a text ends, so that neither reads a folder's tokenizer or generation settings
by itself. A call loads one model, and unloads it at the end.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llmkd.errors import InputError
from llmkd.inference.child import Say, quietly, say_share
from llmkd.inference.vllm_setup import engine_options
from llmkd.models.families import family
from llmkd.models.load import load_model

Ids = list[int]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where a text ends."""

    max_new_tokens: int
    stops: tuple[int, ...]
    """Token ids that end a text, and stay in it."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64
    """Prompts at once on the hf backend."""
    trust_remote_code: bool = False
    """Run the model folder's own Python code."""


@dataclass(frozen=True)
class Continuations:
    """What one model wrote, and how long it took to load and to write."""

    token_ids: list[Ids]
    load_seconds: float
    seconds: float


def by_hugging_face(
    folder: Path, prompts: Sequence[Ids], dtype: str, how: Sampling, say: Say = quietly
) -> Continuations:
    """Continue prompts in batches of like length, padded on the left; an encoder-decoder answers them, padded on the right.

    `say` gets the share that is done, batch by batch.
    """
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_model(
        folder,
        dtype=getattr(torch, dtype),
        ds_config=None,
        attention="auto",
        trust_remote_code=how.trust_remote_code,
    )
    model = model.to(device).eval()
    model.config.use_cache = True
    model_family = family(model.config)
    if model_family.kind == "encoder":
        raise InputError(f"{folder}: an encoder writes no texts; give a decoder or an encoder-decoder")
    answers = model_family.kind == "encoder_decoder"
    pad = how.stops[0]
    chosen: dict[str, Any] = {"do_sample": False}
    if how.temperature:
        chosen = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    ends = {"max_new_tokens": how.max_new_tokens, "eos_token_id": list(how.stops), "pad_token_id": pad}
    if answers:
        ends["decoder_start_token_id"] = model_family.start
    model.generation_config = GenerationConfig(**chosen, **ends)  # in place of the folder's own
    loaded = time.perf_counter()
    torch.manual_seed(how.seed)
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
        with torch.inference_mode():
            new = model.generate(input_ids=ids, attention_mask=mask)[:, 1 if answers else width :].tolist()
        texts |= {number: _ended(text, how.stops) for number, text in zip(batch, new, strict=True)}
        say_share(say, len(texts), len(prompts))
    return Continuations([texts[n] for n in range(len(prompts))], loaded - started, time.perf_counter() - loaded)


def by_vllm(folder: Path, prompts: Sequence[Ids], dtype: str, how: Sampling, say: Say = quietly) -> Continuations:
    """Continue all prompts by one call of vLLM's engine, which is silent. The process needs `vllm_environment` from its start."""
    started = time.perf_counter()
    from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]  # optional, and takes seconds

    longest = max(len(prompt) for prompt in prompts) + how.max_new_tokens
    options = engine_options(dtype, max_length=longest, seed=how.seed)
    options["trust_remote_code"] = how.trust_remote_code
    engine: Any = LLM(model=str(folder), skip_tokenizer_init=True, generation_config="vllm", **options)
    loaded = time.perf_counter()
    try:
        sampling = [
            SamplingParams(
                temperature=how.temperature,
                top_p=how.top_p,
                seed=how.seed + number if how.temperature else None,  # its own stream, whatever shares the batch
                max_tokens=how.max_new_tokens,
                stop_token_ids=list(how.stops),
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        outputs = engine.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], sampling, use_tqdm=False)
        texts = [list(output.outputs[0].token_ids) for output in outputs]
    finally:
        engine.llm_engine.engine_core.shutdown()  # else its memory is not free for the next model
        del engine
        gc.collect()
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
