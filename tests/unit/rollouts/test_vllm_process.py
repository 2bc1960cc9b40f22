"""vLLM's process with a pretended engine: how it is found out whether weights are taken in place."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd.inference.backends import writing_model
from llmkd.models.make import new_model
from llmkd.processes import only_one_in
from llmkd.rollouts import vllm_process
from llmkd.rollouts.vllm_process import Rounds, log_probabilities
from llmkd.rollouts.writer import Asked, Writing

WRITING = Writing(
    backend="vllm",
    dtype="float32",
    max_new_tokens=8,
    max_length=64,
    stops=(1,),
    temperature=1.0,
    top_p=1.0,
    batch_size=4,
    trust_remote_code=False,
)


class Engine:
    """An engine that has the weights of the folder that it was last given, or where it takes none those that it began with."""

    takes = True

    def __init__(self, folder: Path, dtype: str, **options: Any) -> None:
        self.model = writing_model(folder, dtype, trust_remote_code=False)
        self.began_with = folder

    def reload(self, folder: Path) -> None:
        if self.takes:
            self.model = writing_model(folder, "float32", trust_remote_code=False)

    def log_probabilities(self, ids: list[int]) -> list[float]:
        return log_probabilities(self.model, ids)

    def continued(self, prompts: list[list[int]], how: Any) -> list[list[int]]:
        return [[1] for _ in prompts]

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def weights(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "teacher", tmp_path / "weights"))


def test_the_engines_of_a_node_share_the_model_that_they_begin_with(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed one left half written is written again."""
    made: list[Path] = []

    def noted(config: Any, folder: Path, **how: Any) -> None:
        made.append(folder)
        new_model(config, folder, **how)

    monkeypatch.setattr(vllm_process, "VllmEngine", Engine)
    monkeypatch.setattr(vllm_process, "new_model", noted)
    (weights / "random.half").mkdir()
    (weights / "random.half" / "config.json").write_text("{")
    rounds = [Rounds(WRITING, print) for _ in range(3)]
    engines = [each._begun(weights, [4, 5, 6]) for each in rounds]
    assert len(made) == 1 and not made[0].exists()
    assert [engine is not None and vars(engine)["began_with"] for engine in engines] == [weights / "random"] * 3
    drawn, student = (
        writing_model(folder, "float32", trust_remote_code=False).state_dict()
        for folder in (weights / "random", weights)
    )
    assert not any(torch.equal(drawn[name], student[name]) for name in drawn if drawn[name].dim() > 1)


def test_an_engine_waits_for_the_one_that_writes_that_model(weights: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with only_one_in(weights):
            waiting = pool.submit(Rounds(WRITING, print)._random, weights)
            time.sleep(0.3)
            assert not waiting.done() and not (weights / "random.half").exists()
        assert (waiting.result(60) / "config.json").is_file()


def test_an_engine_that_keeps_its_weights_is_found_out(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "VllmEngine", Engine)
    monkeypatch.setattr(Engine, "takes", False)
    said: list[str] = []
    assert Rounds(WRITING, said.append)._begun(weights, [4, 5, 6]) is None
    (sentence,) = said
    assert "vLLM does not take weights in place here (a prompt's log-probabilities differ by" in sentence


def test_rounds_are_written_either_way(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "VllmEngine", Engine)
    for takes in (True, False):
        monkeypatch.setattr(Engine, "takes", takes)
        rounds = Rounds(WRITING, lambda _: None)
        for _ in range(2):
            assert rounds.write(Asked(str(weights), [[4, 5, 6]], [8], [0])) == [[1]]
        assert (rounds._kept is not None) == takes
