"""Writers: vLLM's texts are Hugging Face's, round after round, and an engine that dies is started again."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from llmkd.errors import InputError
from llmkd.inference.child import Child
from llmkd.inference.vllm_setup import vllm_version
from llmkd.rollouts import writer
from llmkd.rollouts.writer import Asked, HuggingFaceWriter, VllmWriter, Writing, writer_of

needs_vllm = pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")

WRITING = Writing(
    backend="vllm",
    dtype="float32",
    max_new_tokens=24,
    max_length=64,
    stops=(1,),
    temperature=0.0,
    top_p=1.0,
    batch_size=8,
    trust_remote_code=False,
)
PROMPTS = [[5, 7, 9, 11], [20, 21], [6, 6, 40, 3, 2, 18, 33]]


def model_folder(folder: Path, seed: int, *, tied: bool) -> str:
    """A Qwen3 whose head size vLLM's CPU build has."""
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def asked(weights: str) -> Asked:
    return Asked(weights, PROMPTS, [24, 24, 9], [3, 4, 5])


@needs_vllm
@pytest.mark.slow  # engines start
@pytest.mark.parametrize("tied", [False, True])
def test_vllm_and_hugging_face_write_the_same_greedy_texts_in_every_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tied: bool
) -> None:
    folders = [model_folder(tmp_path / str(seed), seed, tied=tied) for seed in range(3)]
    by_vllm = writer_of(WRITING, tmp_path / "writer.log", {})
    with caplog.at_level(logging.WARNING, "llmkd"):
        rounds = [
            (by_vllm.write(asked(folder)), HuggingFaceWriter(replace(WRITING, backend="hf")).write(asked(folder)))
            for folder in folders
        ]
    by_vllm.close()
    assert all(ours == theirs for ours, theirs in rounds)
    assert rounds[0][1] != rounds[1][1]  # other weights, other texts
    # on a processor an engine keeps the old head where it is the embeddings too, which the first round notices
    assert ("does not take weights in place" in caplog.text) == tied


@needs_vllm
@pytest.mark.slow  # an engine starts
def test_a_model_whose_texts_are_written_once_stays_loaded_and_writes_the_same_by_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_folder(tmp_path / "model", 0, tied=True)
    how = replace(WRITING, same_weights=True)
    by_vllm, by_hugging_face = (
        writer_of(replace(how, backend=backend), tmp_path / "writer.log", {}) for backend in ("vllm", "hf")
    )
    with caplog.at_level(logging.WARNING, "llmkd"):
        ours = [by_vllm.write(asked(folder)) for _ in "ab"]
    theirs = by_hugging_face.write(asked(folder))
    (tmp_path / "model" / "model.safetensors").unlink()  # it is not read again
    assert ours == [theirs, theirs] == [theirs, by_hugging_face.write(asked(folder))]
    by_vllm.close()
    by_hugging_face.close()
    assert "in place" not in caplog.text


def dying(monkeypatch: pytest.MonkeyPatch, folder: Path, deaths: int) -> VllmWriter:
    """A writer whose process dies so often; without vLLM's variables, so that it is forked."""
    monkeypatch.setattr(
        writer, "Child", lambda module, shared, file, variables: Child("tests.unit.rollouts.dying", shared, file)
    )
    (folder / "starts").write_text("")
    return VllmWriter(replace(WRITING, mixed_with=f"{deaths} {folder / 'starts'}"), folder / "writer.log", {})


def test_a_writer_that_dies_is_started_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    once = dying(monkeypatch, tmp_path, 1)
    with caplog.at_level(logging.WARNING, "llmkd"):
        assert once.write(asked("weights")) == [[9], [9], [9]]
    assert "ended with code 7; it is started again" in caplog.text
    with pytest.raises(InputError, match="no such weights; give some"):
        once.write(asked(""))
    once.close()
    with pytest.raises(InputError, match=r"ended twice with code 7, see .*writer\.log; the same command resumes"):
        dying(monkeypatch, tmp_path, 2).write(asked("weights"))


def test_hugging_face_writes_in_this_process(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", 0, tied=True)
    texts = HuggingFaceWriter(replace(WRITING, backend="hf")).write(asked(folder))
    assert [len(text) <= limit for text, limit in zip(texts, (24, 24, 9), strict=True)] == [True] * 3
