"""vLLM around its engine: the version it lends, the variables of its process, and the list that the environment installs."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from llmkd.errors import InputError
from llmkd.files import ROOT
from llmkd.inference import child, vllm_setup

LENT = """
from importlib import metadata
from llmkd import vllm_backend
vllm_backend.lend_version()
vllm_backend.lend_version()
print(metadata.version("vllm"), vllm_backend.vllm_version(), len(list(metadata.distributions(name="vllm"))))
try:
    print(metadata.version("vllm-of-nobody"))
except metadata.PackageNotFoundError:
    print("unknown")
"""


@pytest.mark.skipif(
    vllm_setup.vllm_version() is None, reason="vLLM is not installed: LLMKD_VLLM=1 bash scripts/environment.sh"
)
def test_the_lent_version_is_that_of_the_cpu_build_and_of_no_other_name() -> None:
    said = subprocess.run(
        [sys.executable, "-c", LENT], env=child.clean_environment(), capture_output=True, text=True, check=True
    )
    ours = vllm_setup.vllm_version()
    assert said.stdout.split() == [ours, ours, "1", "unknown"]


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
