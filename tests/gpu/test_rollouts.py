"""On a GPU: texts that the student writes during training, by Hugging Face and by vLLM beside it. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from llmkd.distributed.launch import launch
from llmkd.inference.vllm_setup import vllm_version
from llmkd.models import make
from llmkd.models.load import load_tokenizer
from llmkd.recipe.recipe import load_recipe
from llmkd.training import initial
from tests.tiny import plain_run

pytestmark = pytest.mark.gpu
GREEDY = {"max_new_tokens": 16, "temperature": 0.0, "every": 2}


def run_on_gpus(tiny: Path, run: Path, changes: dict[str, Any], ranks: int | None = None) -> list[dict[str, float]]:
    """The logged values of a run that trains on written texts, by default on all GPUs."""
    if not torch.cuda.is_available():
        pytest.fail("this test was asked for by -m gpu, and there is no CUDA device")
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    ranks = min(torch.cuda.device_count(), 8) if ranks is None else ranks
    assert launch(ranks, ["--recipe", str(tiny / "recipe.yaml"), "--output", str(run), *sets]).code == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_hugging_faces_texts_teach_as_a_plain_loop_s_do(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Greedy, in fp32: rounding may turn a text, but hardly in so few steps of so small a model."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    changes = {
        "loss.ce": 0.0,
        "rollouts": {**GREEDY, "backend": "hf"},
        "train.deepspeed": stage,
        "train.micro_batch_size": 1,
    }
    logged = run_on_gpus(tiny, tmp_path / "run", changes)
    recipe = load_recipe(tiny / "recipe.yaml").changed({key: changes[key] for key in ("loss.ce", "rollouts")})
    initial.initial_student(recipe, tiny / "teacher", tmp_path / "student")
    _, losses = plain_run(recipe, tiny / "teacher", tmp_path / "student")
    for ours, theirs in zip(logged, losses, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)


needs_vllm = pytest.mark.skipif(
    vllm_version() is None, reason="vLLM is not installed: LLMKD_VLLM=1 bash scripts/environment.sh"
)


@pytest.fixture(scope="module")
def teacher(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose heads are as wide as vLLM's kernels want them."""
    shape: dict[str, Any] = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=6)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64)
    tokenizer = load_tokenizer(tiny / "teacher")
    ends: dict[str, Any] = dict(
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    folder = tmp_path_factory.mktemp("gpu") / "teacher"
    config = Qwen3Config(**shape, **ends, initializer_range=0.3)
    make.new_model(config, folder, seed=3, dtype=torch.float32, tokenizer=tokenizer.save_pretrained)
    return folder


def assert_same_losses_by_both(tiny: Path, folder: Path, changes: dict[str, Any], **of_vllm: Any) -> Path:
    """Runs whose texts are written by Hugging Face and by vLLM, greedy in fp32; the folder of vLLM's."""
    logged = {}
    for backend, further in (("hf", {}), ("vllm", of_vllm)):
        rollouts = {**changes["rollouts"], "backend": backend, **further}
        own = {"data.tokens": str(folder / f"tokens-{backend}"), "train.micro_batch_size": 1}
        ranks = min(torch.cuda.device_count(), 8) - len(of_vllm.get("devices", ()))
        logged[backend] = run_on_gpus(tiny, folder / backend, {**changes, **own, "rollouts": rollouts}, ranks)
    assert logged["hf"]
    for ours, theirs in zip(logged["vllm"], logged["hf"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
    return folder / "vllm"


@needs_vllm
def test_vllm_writes_beside_the_training(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Path
) -> None:
    """It sleeps between rounds, and says so where weights can't be taken in place; its texts are Hugging Face's, greedy in fp32."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    changes = {"teacher.path": str(teacher), "loss.ce": 0.0, "rollouts": GREEDY}
    run = assert_same_losses_by_both(tiny, tmp_path, changes)
    assert (run / "rollouts" / "writer-0.log").is_file()


@needs_vllm
def test_an_engine_sleeps_on_a_gpu_that_is_named_by_its_uuid_and_where_segments_are_expandable(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Path
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    uuids = re.findall(r"UUID: (GPU-[0-9a-f-]+)", listed)[: torch.cuda.device_count()]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(uuids))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    changes = {"teacher.path": str(teacher), "loss.ce": 0.0, "rollouts": GREEDY}
    assert_same_losses_by_both(tiny, tmp_path, changes)


@needs_vllm
@pytest.mark.parametrize("by", ["teacher", "both"])
def test_a_teacher_s_texts_by_vllm_teach_as_hugging_face_s_do(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Path, by: str
) -> None:
    """`both`: the teacher's engine is gone, with its memory, when the student's starts."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    own = {"by": "both", "share": 0.5} if by == "both" else {"by": "teacher"}
    rollouts = {key: value for key, value in GREEDY.items() if key != "every" or by == "both"}
    changes = {"teacher.path": str(teacher), "loss.ce": 0.0, "rollouts": {**rollouts, **own}}
    run = assert_same_losses_by_both(tiny, tmp_path, changes)
    told = [json.loads((tmp_path / of / "summary.json").read_text())["teachers_texts"] for of in ("hf", "vllm")]
    assert [one.pop("seconds") > 0 for one in told] == [True, True] and told[0] == told[1]
    assert (run / "rollouts.jsonl").is_file() == (by == "both")


@needs_vllm
@pytest.mark.parametrize(("devices", "together"), [((1,), 1), ((1, 2), 2)])
def test_an_engine_has_gpus_of_its_own(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher: Path,
    devices: tuple[int, ...],
    together: int,
) -> None:
    """One rank trains on the first GPU."""
    if torch.cuda.device_count() <= len(devices):
        pytest.skip(f"one rank and an engine on {len(devices)} GPUs of its own need {len(devices) + 1} GPUs")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(devices) + 1))))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices) + 1)
    changes = {"teacher.path": str(teacher), "loss.ce": 0.0, "rollouts": GREEDY}
    assert_same_losses_by_both(tiny, tmp_path, changes, devices=[*devices], tensor_parallel=together)
