"""What the file system refuses, or memory that is used up, is one sentence with the cure, from whichever library it comes."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkd.errors import InputError, problem, storage_problem
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import checkpoint, jobs


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_on_a_full_disk(zipped: bool) -> None:
    with pytest.raises((OSError, RuntimeError)) as caught:
        torch.save({"a": torch.zeros(10**6)}, "/dev/full", _use_new_zipfile_serialization=zipped)
    assert "the disk is full; free some space and give the same command again" in str(storage_problem(caught.value))


def test_other_errors_are_no_problem_of_storage() -> None:
    no_file = PermissionError(errno.EPERM, "denied")  # e.g. of os.kill
    for error in (ValueError("x"), RuntimeError("differ"), FileNotFoundError(errno.ENOENT, "none", "a"), no_file):
        assert storage_problem(error) is None and problem(error) is None
    assert storage_problem(PermissionError(errno.EACCES, "denied", "/a/b")) == (
        "/a/b: this user may not use it; change its permissions, or give another folder"
    )


GPU_SAYS = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 12.56 MiB is free. Including "
    "non-PyTorch memory, this process has 79.08 GiB memory in use. See documentation for Memory Management"
)


@pytest.mark.parametrize(
    ("error", "quoted"),
    [
        (torch.OutOfMemoryError(GPU_SAYS), GPU_SAYS.partition(". Including")[0]),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), "CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), None),
        (RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), "NCCL error: unhandled"),
    ],
)
def test_a_gpu_without_memory(error: Exception, quoted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    said = problem(error)
    assert said is not None and said.startswith(f"rank 3 gets no more memory from its GPU ({quoted or ''}")
    assert "\n" not in said and "Including" not in said
    assert "write a smaller train.micro_batch_size" in said and "`llmkd plan` says what a rank needs" in said


def test_a_machine_without_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (caught.value, MemoryError()):
        said = problem(error)
        assert (
            said is not None and "gets no more memory from this machine" in said and "start fewer ranks there" in said
        )


def test_an_output_that_can_not_be_a_folder_is_one_sentence(tiny: Path, world: Any, tmp_path: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml")
    (tmp_path / "file").touch()
    for folder, sentence in (
        (tmp_path / "file", f"{tmp_path / 'file'}: a file lies where a folder must be; move it away"),
        (tmp_path / "file" / "run", "a file lies where a folder must be; move it away"),
        (tmp_path / ("x" * 300), "the name is too long for the file system; give a shorter one"),
    ):
        with pytest.raises(InputError, match=sentence):
            train(world, jobs.distil_job(world, recipe, folder))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_at_a_checkpoint_loses_nothing(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({"train.save_every": 2})
    job = jobs.distil_job(world, recipe, tmp_path / "run")
    saved = torch.save

    def full(value: Any, file: Any, **options: Any) -> None:
        saved(value, "/dev/full" if "step-00000003" in str(file) else file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises((OSError, RuntimeError)) as caught:
            train(world, job)
    assert "the disk is full" in str(storage_problem(caught.value))
    assert [path.name for path in checkpoint.whole(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    assert train(world, job)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {
        "checkpoints",
        "checksums.json",
        "metrics.jsonl",
        "model",
        "recipe.yaml",
        "summary.json",
        "tensorboard",
    }
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
