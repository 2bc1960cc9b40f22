"""What two GPUs must show: a model spread over both, scoring on both, and a lost rank that is named while the other waits in its GPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd import starting
from llmkd.distributed import ending, ranks
from llmkd.evaluation import generation, places, step
from llmkd.evaluation.held_out import load_to_run
from llmkd.inference import backends
from llmkd.inference.sampling import Sampling
from llmkd.models import spread
from llmkd.recipe.evaluation import Generation
from llmkd.recipe.recipe import Data, Evaluation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
PROMPTS = [[5, 6, 7], [8], [9, 10]]


def main() -> None:
    """A rank of two, of which number 1 is killed while number 0 waits for its GPU, which waits for number 1."""
    world = ranks.start(600)
    ending.start_watch(world.timeout)
    ranks.sum_tensor(world, torch.ones(1, device=world.device))
    ranks.barrier(world)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        ranks.sum_tensor(world, torch.ones(1, device=world.device))
        ranks.wait_for_device(world)
        time.sleep(300)
    except RuntimeError as error:  # as `llmkd.train` does
        ending.end_lost(error)


def test_a_rank_that_waits_in_its_gpu_names_the_lost_one(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        starting.start("tests.gpu.test_two_gpus", [], {**size, "RANK": str(rank), "LOCAL_RANK": str(rank)}, name="rank")
        for rank in range(2)
    ]
    assert [process.wait(200) for process in started] == [1, -signal.SIGKILL]
    assert "silent ranks: 1. The same command resumes" in capfd.readouterr().err


def test_a_model_over_two_gpus_writes_what_it_writes_on_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Sampling(stops=(1,), max_new_tokens=8, batch_size=2)
    both = backends.by_hugging_face(tiny / "teacher", PROMPTS, "float32", how).token_ids
    ids = torch.tensor([[5, 6, 7, 8]], device="cuda")
    with torch.no_grad():
        model: Any = load_to_run(tiny / "teacher", "float32")
        logits = model(input_ids=ids).logits
    assert {parameter.device.index for parameter in model.parameters()} == {0, 1} and logits.device.index == 0
    for module in (backends, sys.modules["llmkd.evaluation.held_out"]):
        monkeypatch.setattr(module, "all_devices", lambda: spread.all_devices()[:1])
    assert backends.by_hugging_face(tiny / "teacher", PROMPTS, "float32", how).token_ids == both
    with torch.no_grad():
        assert torch.equal(load_to_run(tiny / "teacher", "float32")(input_ids=ids).logits, logits)


def test_texts_are_the_same_on_one_gpu_on_each_of_two_and_over_both(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = str(tiny / "rows.jsonl")
    asked = Generation(source=rows, items=4, max_new_tokens=5, backend="hf")
    models = [(name, tiny / folder) for name, folder in (("a", "teacher"), ("b", "tied"), ("c", "teacher"))]
    weights, every, found = places.weight_bytes([tiny / "teacher"], "float32"), places.visible_devices(), []
    for name, devices, card in (("one", every[:1], 10**9), ("each", every[:2], 10**9), ("both", every[:2], weights)):
        monkeypatch.setattr(places, "visible_devices", lambda devices=devices: devices)
        monkeypatch.setattr(step, "card_bytes", lambda card=card: card)
        files = generation.generate(models, Evaluation(generation=asked), Data(source=rows), tmp_path / name)
        results = [json.loads(file.read_text()) for file in files.values()]
        assert all(result["error"] is None for result in results), results
        found.append([file.with_suffix(".jsonl").read_text() for file in files.values()])
    assert found[0] == found[1] == found[2]


if __name__ == "__main__":
    main()
