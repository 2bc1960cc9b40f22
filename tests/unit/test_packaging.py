"""What the package promises as a package: names, floors, quiet imports, what a wheel carries."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llmkd"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"})
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES)
SHIPPED = ("ds_configs", "recipes", "eval")


def python(code: str, cwd: Path) -> str:
    """The output of `code` in a fresh interpreter."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Names and floors


def test_no_module_is_named_like_one_we_use() -> None:
    # `deepspeed llmkd/train.py` puts llmkd/ itself on sys.path, where such a module would hide the real one.
    assert set(ROOMS) & (set(packages_distributions()) - {"llmkd"}) == set()
    assert set(ROOMS) & sys.stdlib_module_names == set()


def test_every_room_has_its_floor() -> None:
    (layers,) = (c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    named = [name.strip() for floor in layers["layers"] for name in floor.split("|")]
    assert sorted(named) == sorted(ROOMS) and layers["exhaustive"]


def test_a_room_says_what_it_is_in_one_sentence_and_holds_at_most_twenty_files() -> None:
    for room in {path.parent for path in SOURCES} - {PACKAGE}:
        assert len(list(room.glob("*.py"))) <= 21, room  # with __init__.py
        (only,) = ast.parse((room / "__init__.py").read_text()).body
        assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant), room


def collective_imports(source: str) -> set[str]:
    """What a module uses of deepspeed and torch.distributed: imports of any kind, and torch.distributed by attribute."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.add("torch.distributed")
    return {name for name in found if re.match(r"(deepspeed|torch\.distributed)(\.|$)", name)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_room_distributed_knows_of_ranks(path: Path) -> None:
    if path.parent != PACKAGE / "distributed":
        assert collective_imports(path.read_text()) == set()


@pytest.mark.parametrize(
    "line",
    [
        "import deepspeed",
        "import torch.distributed as dist",
        "from torch import nn, distributed",
        "from torch.distributed import barrier",
        "def f():\n    from deepspeed.ops import adam",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_such_an_import_is_seen(line: str) -> None:
    assert collective_imports(line)
    assert not collective_imports(
        "import torch\nfrom llmkd.distributed.ranks import barrier\nfrom . import distributed"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Imports do nothing

WATCH = """
import json, os, sys, threading
import numpy, torch, transformers, datasets

def state():
    return {
        "threads": sorted(t.name for t in threading.enumerate()),
        "torch": [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(),
                  torch.are_deterministic_algorithms_enabled()],
        "random": hash((torch.get_rng_state().numpy().tobytes(), str(numpy.random.get_state()))),
        "cwd": os.getcwd(),
        "files": sorted(os.listdir()),
        "path": list(sys.path),
        "group": torch.distributed.is_initialized(),
    }

changed = {}
for name in MODULES:
    before = state()
    __import__(name)
    after = state()
    changed |= {f"{name}: {key}": [before[key], after[key]] for key in before if before[key] != after[key]}
print("CHANGED" + json.dumps(changed))
"""


def test_imports_change_nothing(tmp_path: Path) -> None:
    output = python(f"MODULES = {MODULES!r}\n{WATCH}", tmp_path)
    said, changed = output.split("CHANGED")
    assert json.loads(changed) == {}
    assert said == "", "an import printed something"


def test_the_command_starts_without_torch(tmp_path: Path) -> None:
    heavy = python(
        "import sys, llmkd, llmkd.cli\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'lm_eval', 'datasets', 'pandas') if m in sys.modules])",
        tmp_path,
    )
    assert heavy.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# What is installed


def test_the_scripts_and_the_project_name_the_same_torch() -> None:
    script = (ROOT / "scripts" / "environment.sh").read_text()
    version = re.search(r"^ *llmkd_torch=(\S+)$", script, re.MULTILINE)
    pin = next(d for d in PYPROJECT["project"]["dependencies"] if d.startswith("torch=="))
    assert version and version[1].startswith(pin.removeprefix("torch==").removesuffix("*"))


def test_one_version() -> None:
    import llmkd

    assert llmkd.__version__ == PYPROJECT["project"]["version"]


def test_a_wheel_carries_what_the_code_reads(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    read = [*SOURCES, *PACKAGE.rglob("*.js"), *PACKAGE.rglob("*.css")]
    expected = {path.relative_to(ROOT).as_posix() for path in read} | {
        f"llmkd/_shipped/{path.relative_to(ROOT).as_posix()}"
        for folder in SHIPPED
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= names
    assert {name for name in names - expected if ".dist-info/" not in name} == set()
    assert all(any(f"_shipped/{folder}/" in name for name in names) for folder in SHIPPED)
