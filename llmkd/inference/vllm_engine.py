"""vLLM's engine as llmkd uses it: token ids in, token ids out, other weights in place, memory let go between rounds of writing."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkd.inference.sampling import Ids, Sampling
from llmkd.inference.vllm_setup import engine_options, on_cpu


class VllmEngine:
    """One engine in this process, which needs `vllm_environment` from its start."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        *,
        max_length: int,
        trust_remote_code: bool,
        gpu_share: float | None = None,
        tensor_parallel: int = 1,
    ) -> None:
        """`gpu_share`: the share of the GPU's memory, where another process has the rest; the engine can then sleep.

        `tensor_parallel`: over how many of the process's GPUs the model is spread.
        """
        from vllm import LLM  # type: ignore[import-not-found]  # optional, and takes seconds

        options = engine_options(dtype, max_length=max_length, seed=0)
        if gpu_share is not None and not on_cpu():
            options |= {"gpu_memory_utilization": gpu_share, "enable_sleep_mode": True}
        if tensor_parallel > 1:
            options["tensor_parallel_size"] = tensor_parallel
        self._engine: Any = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            generation_config="vllm",
            trust_remote_code=trust_remote_code,
            **options,
        )
        self._can_sleep, self._sleeps = bool(options.get("enable_sleep_mode")), False

    def continued(self, prompts: Sequence[Ids], how: Sampling) -> list[Ids]:
        """What the model writes after each prompt."""
        from vllm import SamplingParams  # type: ignore[import-not-found]  # as above

        limits, seeds = how.of(len(prompts))
        sampling = [
            SamplingParams(
                temperature=how.temperature,
                top_p=how.top_p,
                seed=seed if how.temperature else None,  # its own stream, whatever shares the batch
                max_tokens=limit,
                stop_token_ids=list(how.stops),
                detokenize=False,
            )
            for limit, seed in zip(limits, seeds, strict=True)
        ]
        return [list(output.outputs[0].token_ids) for output in self._outputs(prompts, sampling)]

    def _outputs(self, prompts: Sequence[Ids], sampling: Any) -> Any:
        from vllm import TokensPrompt  # type: ignore[import-not-found]  # as above

        return self._engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)

    def log_probabilities(self, ids: Ids) -> list[float]:
        """Of each token of a text after the first, given those before it."""
        from vllm import SamplingParams  # type: ignore[import-not-found]  # as above

        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        [output] = self._outputs([ids], asked)
        return [of_token[token].logprob for of_token, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]

    def reload(self, folder: Path) -> None:
        """Take a folder's weights in place of the present ones, and wake up."""
        if self._sleeps:
            self._engine.wake_up(tags=["weights"])
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if self._sleeps:
            self._engine.wake_up(tags=["kv_cache"])
            self._sleeps = False
        self._engine.reset_prefix_cache()

    def sleep(self) -> None:
        """Let the GPU's memory go, weights and cache; `reload` wakes it up."""
        if self._can_sleep:
            self._engine.sleep(level=2)
            self._sleeps = True

    def close(self) -> None:
        """Shut the engine down, so that its memory is free."""
        self._engine.llm_engine.engine_core.shutdown()
        del self._engine
        gc.collect()
