"""What DeepSpeed compiles is announced, and refused with the cure where it can't be."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from llmkd.distributed import compiled
from llmkd.errors import InputError

CHECKS: list[Callable[[], None]] = [compiled.check_cpu_adam, lambda: compiled.check_asynchronous_io("teacher.offload")]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing has been compiled yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


@pytest.mark.parametrize(("check", "name"), [(CHECKS[0], "cpu_adam"), (CHECKS[1], "async_io")], ids=("adam", "io"))
def test_a_lock_that_a_killed_compilation_left_is_named(root: Path, check: Callable[[], None], name: str) -> None:
    lock = root / name / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    before = time.time() - 3600
    os.utime(lock, (before, before))
    with pytest.raises(
        InputError, match=f"{lock}: left by a compilation that was killed, .*; remove that file and start again"
    ):
        check()


@pytest.mark.parametrize("check", CHECKS, ids=("adam", "io"))
def test_no_compiler_or_one_that_fails_is_one_sentence(
    check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(InputError, match="is compiled on first use, and there is no C.. compiler; install"):
        check()


def test_a_compilation_is_announced_and_its_failure_has_a_cure(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: object, verbose: bool = True) -> None:
        raise RuntimeError("Error building extension 'cpu_adam'\nninja: build stopped")

    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(compiled.deepspeed.ops.op_builder.CPUAdamBuilder, "load", fail)
    with (
        caplog.at_level("INFO"),
        pytest.raises(
            InputError,
            match=r"could not be \(ninja: build stopped\); install a C.. compiler .*, or use a configuration",
        ),
    ):
        compiled.check_cpu_adam()
    assert "DeepSpeed compiles its cpu_adam, at the first use on a machine" in caplog.text


class Clock:
    """In place of `time`: sleeping moves it on, and `at` happens where its moment has come."""

    def __init__(self, *, ahead: float = 0.0, at: dict[float, Callable[[], None]] | None = None) -> None:
        self.slept, self.ahead, self.at = 0.0, ahead, at or {}

    def time(self) -> float:
        return time.time() - self.ahead + self.slept

    def monotonic(self) -> float:
        return self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        for moment in [moment for moment in self.at if moment <= self.slept]:
            self.at.pop(moment)()
        assert self.slept < 10 * compiled.STALE_SECONDS, "waits without end"


@pytest.mark.parametrize("ahead", [0.0, 1e6], ids=("same clock", "a lock from the future"))
def test_a_fresh_lock_is_waited_for_and_then_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ahead: float
) -> None:
    clock = Clock(ahead=ahead)
    monkeypatch.setattr(compiled, "time", clock)
    lock = root / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with (
        caplog.at_level("INFO"),
        pytest.raises(InputError, match=f"{lock}: left by a compilation that was killed, .*; remove that file and"),
    ):
        compiled.check_cpu_adam()
    assert clock.slept == pytest.approx(compiled.STALE_SECONDS, abs=5)
    assert caplog.messages == [f"waits for {lock}, made by another compilation; if none runs, remove it"]


def test_a_lock_that_is_released_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = root / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    clock = Clock(at={60.0: lock.unlink})
    monkeypatch.setattr(compiled, "time", clock)
    loaded: list[float] = []
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(
        compiled.deepspeed.ops.op_builder.CPUAdamBuilder, "load", lambda self, verbose: loaded.append(clock.slept)
    )
    compiled.check_cpu_adam()
    assert loaded == [60.0]


def test_asynchronous_io_beside_a_gpu_asks_for_the_toolkit_and_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it DeepSpeed fails on a path of None, which libaio does not cure."""
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    asked: list[str] = []
    builder = compiled.deepspeed.ops.op_builder.AsyncIOBuilder
    monkeypatch.setattr(builder, "load", lambda self, verbose: asked.append(self.name))
    sentence = r"^teacher\.offload: nvme needs .* CUDA toolkit, and there is none at CUDA_HOME; install the toolkit of CUDA 13\.0 and set"
    for home in (None, str(tmp_path / "nowhere")):
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
        with pytest.raises(InputError, match=sentence) as refusal:
            compiled.check_asynchronous_io("teacher.offload")
        assert "libaio" not in str(refusal.value) and asked == []
    (tmp_path / "include").mkdir()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    compiled.check_asynchronous_io("teacher.offload")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a CPU it needs no toolkit
    compiled.check_asynchronous_io("teacher.offload")
    assert asked == ["async_io"] * 2


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton" in (compiled.lacking_to_compile() or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "C compiler" in (compiled.lacking_to_compile() or "")
    monkeypatch.setattr("shutil.which", lambda name: name if name == "my-cc" else None)
    monkeypatch.setenv("CC", "my-cc")
    assert compiled.lacking_to_compile() is None
