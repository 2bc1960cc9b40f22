"""What the package promises as a package: names, rooms, sizes, quiet imports, what a wheel carries."""

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
# Names and rooms


def test_no_module_is_named_like_one_we_use() -> None:
    # `deepspeed llmkd/train.py` puts llmkd/ itself on sys.path, where such a module would hide the real one.
    assert set(ROOMS) & (set(packages_distributions()) - {"llmkd"}) == set()
    assert set(ROOMS) & sys.stdlib_module_names == set()


def test_every_room_has_its_place_in_the_contract() -> None:
    (layers,) = (c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    named = [name.strip() for line in layers["layers"] for name in line.split("|")]
    assert sorted(named) == sorted(ROOMS) and layers["exhaustive"]


def test_a_room_says_what_it_is_in_one_sentence() -> None:
    for room in {path.parent for path in SOURCES} - {PACKAGE}:
        (only,) = ast.parse((room / "__init__.py").read_text()).body
        assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant), room


def collective_imports(source: str) -> set[str]:
    """What a module uses of deepspeed and torch.distributed: imports of any kind, and torch.distributed by attribute."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return {name for name in names if re.match(r"(deepspeed|torch\.distributed)(\.|$)", name)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_room_distributed_imports_deepspeed_and_torch_distributed(path: Path) -> None:
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
# Sizes, and imports inside functions


def functions(source: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def long_functions(source: str) -> list[str]:
    """The functions of more than 60 lines, their decorators not counted."""
    return [node.name for node in functions(source) if (node.end_lineno or 0) - node.lineno >= 60]


def imports_without_a_reason(source: str) -> list[int]:
    """The lines of imports inside functions with a comment neither beside them nor above their block of imports."""
    lines = source.splitlines()
    nodes = [node for function in functions(source) for node in ast.walk(function)]
    imports = {node.lineno: node.end_lineno or 0 for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)}

    def has_reason(number: int) -> bool:
        above = next((n for n in imports if imports[n] == number - 1), None)
        beside = lines[imports[number] - 1].replace("# type:", "").replace("# noqa", "")
        return "#" in beside or (has_reason(above) if above else lines[number - 2].strip().startswith("#"))

    return [number for number in sorted(imports) if not has_reason(number)]


def test_no_file_is_longer_than_350_lines() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > 350} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    names = {str(path.relative_to(PACKAGE)): long_functions(path.read_text()) for path in SOURCES}
    assert {file: long for file, long in names.items() if long} == {}


def test_no_room_holds_more_than_twenty_files() -> None:
    rooms = {path.parent for path in SOURCES}
    counts = {str(room.relative_to(ROOT)): len({*room.glob("*.py")} - {room / "__init__.py"}) for room in rooms}
    assert {room: files for room, files in counts.items() if files > 20} == {}


def test_an_import_inside_a_function_has_its_reason_beside_it() -> None:
    """Only cli.py needs none: each of its commands imports what it alone uses, so that --help answers at once."""
    files = {path.relative_to(PACKAGE): imports_without_a_reason(path.read_text()) for path in SOURCES}
    assert {str(file): lines for file, lines in files.items() if lines and file != Path("cli.py")} == {}


def test_these_rules_see_what_breaks_them() -> None:
    body = "    pass\n"
    assert long_functions("def f():\n" + 60 * body) == ["f"] and not long_functions("@f\ndef f():\n" + 59 * body)
    assert imports_without_a_reason("import os\n\ndef f():\n    import torch  # type: ignore[x]\n") == [4]
    assert imports_without_a_reason("def f():\n    # slow\n    x = 1\n    import torch\n    import os\n") == [4, 5]
    for reason in (
        "    import torch  # slow\n",
        "    # slow\n    import torch\n    from a import (\n        b,\n    )\n",
    ):
        assert imports_without_a_reason(f"def f():\n{reason}") == []
    nested = "class A:\n    def f(self):\n        if self:\n            import torch\n"
    assert imports_without_a_reason(nested) == [4]


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

import importlib.util
changed = {}
if importlib.util.find_spec("triton") is None:
    MODULES = [name for name in MODULES if "triton" not in name]  # imported where a recipe asks for them and a GPU brings Triton
for name in MODULES:
    before = state()
    __import__(name)
    after = state()
    changed |= {f"{name}: {key}": [before[key], after[key]] for key in before if before[key] != after[key]}
changed |= {"brought": name for name in ("torch._inductor.compile_fx",) if name in sys.modules}  # all of torch's compiler
changed |= {"set": name for name in os.environ if name.startswith("TORCHDYNAMO")}
print("CHANGED" + json.dumps(changed))
"""


def test_imports_change_nothing(tmp_path: Path) -> None:
    output = python(f"MODULES = {MODULES!r}\n{WATCH}", tmp_path)
    printed, changed = output.split("CHANGED")
    assert json.loads(changed) == {}
    assert printed == "", "an import printed something"


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
