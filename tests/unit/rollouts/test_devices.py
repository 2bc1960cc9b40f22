"""GPUs on which vLLM alone runs: which engine has which, which ranks hand prompts to one, and what can't be had."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkd.distributed.ranks import World
from llmkd.errors import InputError
from llmkd.rollouts import writer
from llmkd.rollouts.writer import Asked, VllmWriter, Writing, writer_variables, written_together

WRITING = Writing("vllm", "float32", 8, 64, (1,), 0.0, 1.0, 8, trust_remote_code=False)


def world(rank: int, *, local: int, nodes: int = 1, device: str = "cuda") -> World:
    """A rank of nodes with so many ranks each."""
    given: dict[str, Any] = {"device": torch.device(device), "control": None, "timeout": timedelta(seconds=1)}
    return World(rank=rank, size=local * nodes, local_rank=rank % local, local_size=local, **given)


def gpus(*given: Any) -> str | None:
    return writer_variables(*given).get("CUDA_VISIBLE_DEVICES")


def test_each_writer_shares_its_ranks_gpu_or_has_those_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpus(world(rank, local=2, nodes=2)) for rank in range(4)] == ["0", "1", "0", "1"]
    assert [gpus(world(rank, local=4), (4, 5, 6, 7)) for rank in range(4)] == ["4", "5", "6", "7"]
    assert [gpus(world(rank, local=4), (4, 5, 6, 7), 2) for rank in range(2)] == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6")
    assert [gpus(world(rank, local=2)) for rank in range(2)] == ["2", "3"]
    assert gpus(world(1, local=2), (0, 6)) == "6"
    assert gpus(world(0, local=2, device="cpu")) is None or gpus(world(0, local=2, device="cpu")) == "2,3,6"


@pytest.mark.parametrize(
    ("here", "devices", "parallel", "sentence"),
    [
        (world(0, local=4), (3, 4), 1, r"rollouts\.devices: ranks train on GPU 3; name others, or start fewer ranks"),
        (world(0, local=1), (4, 5, 6, 7), 2, r"rollouts\.devices: 2 engines are more than the node's 1 ranks"),
    ],
)
def test_what_can_not_be_had_is_named(
    monkeypatch: pytest.MonkeyPatch, here: World, devices: tuple[int, ...], parallel: int, sentence: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match=sentence):
        writer_variables(here, devices, parallel)


def test_gpus_by_other_names_are_shared_but_none_is_told_from_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f6a, MIG-41b2")
    assert [gpus(world(rank, local=2)) for rank in range(2)] == ["GPU-8f6a", "MIG-41b2"]
    with pytest.raises(
        InputError, match=r"rollouts\.devices: CUDA_VISIBLE_DEVICES has names \(GPU-8f6a\).* write numbers into it"
    ):
        writer_variables(world(0, local=1), (1,))


def test_an_engine_that_sleeps_has_no_expandable_segments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    for gpu_share, expected in ((0.3, "max_split_size_mb:64"), (None, None)):
        found = VllmWriter(replace(WRITING, gpu_share=gpu_share), tmp_path / "log", {})
        assert found.variables.get("PYTORCH_CUDA_ALLOC_CONF") == expected
        assert "PYTORCH_ALLOC_CONF" not in found.variables


class Echo:
    """Writes the prompt's tokens again."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def write(self, asked: Asked) -> list[list[int]]:
        self.asked.append(asked)
        return asked.prompts

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("engines", "writers"), [(None, [0, 1, 2, 3]), (1, [0, 2]), (2, [0, 1, 2, 3])])
def test_ranks_without_an_engine_write_nothing_and_all_get_every_text(
    monkeypatch: pytest.MonkeyPatch, engines: int | None, writers: list[int]
) -> None:
    prompts = [np.arange(2, 3 + number % 5, dtype=np.int32) for number in range(11)]
    attempts: list[Any] = []
    monkeypatch.setattr(writer, "on_every_rank", lambda world, thread, work: attempts.append(work()) or attempts)
    writing, echoes = replace(WRITING, engines=engines), [Echo() for _ in range(4)]
    given = Path("weights"), prompts, list(range(11))
    texts: list[Any] = []
    for rank, echo in enumerate(echoes):
        here: Any = world(rank, local=2, nodes=2)
        with contextlib.suppress(KeyError):  # until the last rank: the texts of those after it are not there yet
            texts = written_together(here, None, echo, writing, *given)  # type: ignore[arg-type]
    assert texts == [prompt.tolist() for prompt in prompts]
    assert [rank for rank, echo in enumerate(echoes) if echo.asked] == writers
    counts = [len(echo.asked[0].prompts) for echo in echoes if echo.asked]
    assert sum(counts) == 11 and max(counts) - min(counts) <= 1
