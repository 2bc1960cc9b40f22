"""A scoring process with several GPUs gives all of them to its model, by vLLM and under lm-eval too. The GPUs are pretended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd.evaluation import lm_eval_worker
from llmkd.evaluation.results import LmEvalResult
from llmkd.inference import backends
from llmkd.inference.sampling import Sampling
from llmkd.recipe.recipe import Evaluation

ONE, TWO = [[torch.device("cuda", number) for number in range(count)] for count in (1, 2)]


@pytest.mark.parametrize("devices", [ONE, TWO])
def test_vllm_is_tensor_parallel_over_all(devices: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Engine:
        def __init__(self, *_: Any, tensor_parallel: int, **__: Any) -> None:
            asked.append(tensor_parallel)

        def continued(self, prompts: list[list[int]], how: Sampling) -> list[list[int]]:
            return prompts

        def close(self) -> None:
            pass

    monkeypatch.setattr(backends, "VllmEngine", Engine)
    monkeypatch.setattr(backends, "all_devices", lambda: devices)
    how = Sampling(max_new_tokens=3, stops=(1,))
    assert backends.by_vllm(Path("model"), [[5]], "bfloat16", how).token_ids == [[5]] and asked == [len(devices)]


@pytest.mark.parametrize("devices", [ONE, TWO])
@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_the_command_by_hand_spreads_the_model_as_well(
    devices: list[torch.device], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval_worker, "all_devices", lambda: devices)
    task = lm_eval_worker.Task(Evaluation(tasks=("records_choice",)), None, False)
    said = lm_eval_worker.command(LmEvalResult(name="m", model="folder", backend=backend), task, 4)
    spreads = "parallelize=True" if backend == "hf" else "tensor_parallel_size=2"
    assert (spreads in said) == (devices is TWO)
    assert ("--device cuda" in said) == (devices is ONE and backend == "hf")
