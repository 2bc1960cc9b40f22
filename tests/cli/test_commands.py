"""The commands: their help is quick and imports nothing heavy, maps are what they say, and train.py runs where it lies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmkd import __version__, cli
from llmkd.files import ROOT
from llmkd.recipe.options import OutputPath

PACKAGE = Path(cli.__file__).parent
COMMANDS = sorted(cli.cli.commands)
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "lm_eval", "numpy", "pydantic", "yaml")


def output(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    cli.main(arguments)
    return capsys.readouterr().out


def test_the_commands_are_those_of_the_readme() -> None:
    assert {"train", "finetune", "study", "evaluate", "generate", "report", "plan", "maps"} <= set(COMMANDS)
    fenced = (ROOT / "README.md").read_text().split("```")[1::2]
    shown = set(re.findall(r"^(?:\$ )?llmkd (\w+)", "".join(fenced), flags=re.MULTILINE))
    assert shown and shown <= set(COMMANDS)


def test_help_of_every_command_in_one_quick_process(tmp_path: Path) -> None:
    """Every help in a fresh interpreter, from a folder of no meaning; what it imported is told at the end."""
    code = f"""
import json, sys
from llmkd.cli import main
for command in {["", *COMMANDS]!r}:
    main([*command.split(), "--help"])
    main([*command.split(), "-h"])
main(["maps", "--student-blocks", "2", "--teacher-blocks", "4"])
print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert done.stdout.count("Usage: ") == 2 * (1 + len(COMMANDS)) and not done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = output([command, "--help"], capsys)
    assert re.search(r"^  [A-Z].*\.", text, flags=re.MULTILINE)
    for line in re.findall(r"^  (?:-\w, )?--[^\n]*(?:\n {4,}[^\n]*)*", text, flags=re.MULTILINE):
        assert re.search(r"  [A-Z\[-]", line.replace("\n", " ")) or "required" in line, line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert __version__ in output(["--version"], capsys)


def _pairs(text: str) -> dict[str, list[tuple[int, int]]]:
    """Strategy -> the pairs of its table."""
    found: dict[str, list[tuple[int, int]]] = {}
    for part in re.split(r"^(?=\w+: \d+ student blocks)", text, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^ *(\d+) \| +(\d+) \| +\d\.\d\d \| +\d\.\d\d$", part, flags=re.MULTILINE)
        found[part.partition(":")[0]] = [(int(s), int(t)) for s, t in rows]
    return found


def test_maps_of_9_blocks_from_36(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(["maps", "--student-blocks", "9", "--teacher-blocks", "36"], capsys)
    pairs = _pairs(text)
    forward = [3, 7, 11, 15, 19, 23, 27, 31, 35]
    assert pairs["forward"] == list(enumerate(forward))
    assert pairs["reverse"] == list(enumerate(reversed(forward)))
    assert pairs["all_to_one"] == [(block, 17) for block in range(9)]
    assert sorted(t for _, t in pairs["random"]) == forward and pairs["none"] == []
    drawn = [t for _, t in pairs["in_order_random"]]
    assert drawn == sorted(set(drawn)) and len(drawn) == 9
    assert list(pairs) == [
        "forward",
        "reverse",
        "all_to_one",
        "random",
        "in_order_random",
        "pkd_skip",
        "pkd_last",
        "none",
    ]
    assert max(map(len, text.splitlines())) <= 100 and text.isascii()


def test_maps_takes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    depths = ["maps", "--student-blocks", "3", "--teacher-blocks", "12"]
    pairs = _pairs(output([*depths, "--strategy", "forward", "--strategy", "reverse"], capsys))
    assert pairs == {"forward": [(0, 3), (1, 7), (2, 11)], "reverse": [(0, 11), (1, 7), (2, 3)]}
    assert _pairs(output([*depths, "--pair", "0:11", "--pair", "2:0"], capsys)) == {"explicit": [(0, 11), (2, 0)]}
    assert _pairs(output([*depths, "--target-block", "4"], capsys))["all_to_one"] == [(0, 4), (1, 4), (2, 4)]
    told = output([*depths, "--strategy", "learned"], capsys)
    assert told.startswith("learned: each student block learns from a mixture of all teacher blocks")
    assert "`llmkd train --strategy learned` logs them" in told and not _pairs(told)
    drawn = [_pairs(output([*depths, "--seed", seed], capsys))["random"] for seed in ("1", "1", "2", "3", "4")]
    assert drawn[0] == drawn[1] and len({str(pairs) for pairs in drawn}) > 1


def test_plan_needs_neither_weights_nor_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(["plan", "qwen3_8b_to_9_blocks", "--ranks", "8"], capsys)
    assert "needed on device" in text and "GiB" in text and "stage 0" not in text


def test_plan_draws_the_run_s_own_cut_of_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    """36 blocks and the embeddings of 3.2 blocks in 8 stages: the run's stages, where equal blocks alone would be others."""
    from llmkd.models.architectures import new_config
    from llmkd.recipe.recipe import load_recipe
    from llmkd.teachers import pipeline_schedule
    from llmkd.teachers.pipeline_stage import teacher_cut

    command = ["plan", "qwen3_8b_to_9_blocks", "--ranks", "8", "--set", "teacher.placement=pipeline"]
    text = output(command, capsys)
    architecture = load_recipe("qwen3_8b_to_9_blocks").teacher.architecture
    assert architecture is not None
    parts = teacher_cut(new_config(architecture.model_dump()), 8)
    assert parts != pipeline_schedule.cut_into_stages([1] * 36, 8)
    assert re.findall(r"blocks (\d+)-(\d+) ", text) == [(str(part.start), str(part.stop - 1)) for part in parts]
    assert "final state -> student 8 and head" in text
    maps = ["maps", "--student-blocks", "9", "--teacher-blocks", "36", "--strategy", "forward", "--stages", "8"]
    assert "blocks of equal cost; embeddings not counted; llmkd plan draws a recipe's own cut" in output(maps, capsys)


def test_train_py_runs_where_it_lies_without_installation(tmp_path: Path) -> None:
    """From another folder that holds files named like its modules; `llmkd/` must not be on the path, where they would shadow."""
    for name in ("records", "metrics", "data", "llmkd"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = str(PACKAGE / "train.py")
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for option in ("--recipe", "--strategy", "--seed", "--set", "--ds-config", "--output", "--teacher-only"):
        assert option in done.stdout
    assert "--local_rank" not in done.stdout  # the deepspeed launcher's own
    assert {file.name for file in tmp_path.iterdir()} == {"records.py", "metrics.py", "data.py", "llmkd.py"}


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["cache", "quickstart"],
        ["generate", "model"],
        ["evaluate", "model"],
        ["compare", "study", "study"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("place", ["", "a\0b"])
def test_an_output_that_names_no_place_is_refused(
    command: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--output", place])
    assert left.value.code == 2
    assert "names no place; name one, or leave the option out" in " ".join(capsys.readouterr().err.split())


def test_an_output_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert OutputPath().convert("~/there", None, None) == tmp_path / "there"
