"""A user's mistake is one sentence with the cure and exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, OPTConfig

from llmkd import cli, starting
from llmkd.distributed.checksums import write_checksums
from llmkd.errors import InputError
from llmkd.files import ROOT
from llmkd.models import load, make
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import build, jobs
from tests.distributed.runner import start_ranks


@pytest.fixture(autouse=True)
def _same_everywhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets keeps goes with the test, and a machine with flash-attn answers as one without."""
    monkeypatch.setattr(load, "_flash_attention", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A folder with the tiny recipe, its rows and teacher, where a test may spoil one of them."""
    for name in ("rows.jsonl", "recipe.yaml"):
        (tmp_path / name).write_text((tiny / name).read_text().replace(str(tiny), str(tmp_path)))
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    return tmp_path


def tree(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Every file, with size and time of last change, and every folder; not rows kept as tokens, which the corrected recipe finds."""
    tokens = folder / "runs" / "tokens"
    kept = [p for p in folder.rglob("*") if p != tokens and tokens not in p.parents]
    if tokens.is_dir() and [*tokens.parent.iterdir()] == [tokens]:
        kept.remove(tokens.parent)
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) if p.is_file() else None for p in kept}


def refusal(place: Path, world: Any, changes: dict[str, Any]) -> str:
    """The sentence that a training run is refused with; that nothing else was written is checked."""
    before = tree(place)
    with pytest.raises(InputError) as caught:
        recipe = load_recipe(place / "recipe.yaml").changed(changes)
        train(world, jobs.distil_job(world, recipe, place / "run"))
    sentence = str(caught.value)
    assert "\n" not in sentence and not sentence.endswith("."), sentence
    assert tree(place) == before, sorted(tree(place).keys() - before.keys())
    return sentence


def test_the_recipe_that_is_spoilt_below_is_good(place: Path, world: Any) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    job = jobs.distil_job(world, recipe, place / "run")
    assert job.pairs == ((0, 1), (1, 3), (2, 5)) and not (place / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"matching.strategy": "forwards"}, "matching.strategy: 'forwards' is not known; did you mean 'forward'?"),
        ({"train.learnin_rate": 1.0}, "unknown key 'train.learnin_rate'; did you mean 'learning_rate'?"),
        ({"teacher.path": "/nowhere/teacher"}, "teacher.path: no folder '/nowhere/teacher'; give an HF model folder"),
        ({"teacher.path": "no-one/nothing"}, "teacher.path: no folder 'no-one/nothing' here, and the hub did not give"),
        ({"student.init": "checkpoint", "student.path": "/nowhere"}, "student.path: no folder '/nowhere'; give"),
        ({"student.blocks": 7}, "the student has 7 blocks and the teacher 6: give the student at most 6, or"),
        (
            {"matching.distance": ["mse", {"cka": 1.0}]},
            "matching.distance: 2 distances for the 3 pairs 0<1, 1<3, 2<5; write one for each, in this order",
        ),
        (
            {"matching.pair_weights": [1.0, 2.0]},
            "matching.pair_weights: 2 weights for the 3 pairs 0<1, 1<3, 2<5; write one for each, in this order",
        ),
        (
            {
                "matching.strategy": "in_order_random",
                "matching.redraw_every": 5,
                "student.init": "random",
                "student.hidden_size": 24,
            },
            "matching.redraw_every: the student's states have 24 numbers and the teacher's 32, and a projector is learned for one teacher",
        ),
        (
            {"matching.strategy": "in_order_random", "matching.redraw_every": 5, "matching.projector": "always"},
            "matching.redraw_every: projectors are learned for one teacher block; write redraw_every: 0, or a distance",
        ),
        (
            {"matching.compare": "differences", "matching.projector": "always", "train.activation_checkpointing": True},
            "train.activation_checkpointing: not with matching.compare: differences where states pass projectors; write false, or compare",
        ),
        ({"matching.strategy": "pkd_last", "student.blocks": 1}, "strategy 'pkd_last' leaves out the student's last"),
        (
            {"matching.strategy": "learned", "matching.candidates": 7},
            "candidates 7 can't be mixed: write a whole number from 2 to 6, the teacher's depth, or leave it out",
        ),
        (
            {"matching.strategy": "learned", "matching.pair_weights": [1.0, 2.0]},
            "matching.pair_weights: 2 weights for the 3 pairs 0<mix, 1<mix, 2<mix; write one for each, in this order",
        ),
        (
            {"student.blocks": 7, "matching.strategy": "none"},
            "student.blocks: 7 blocks can't be copied from a teacher of 6",
        ),
        ({"student.init": "random", "student.blocks": 7, "matching.strategy": "none"}, "write at most 6"),
        ({"student.copy_blocks": [0, 1, 6]}, "student.copy_blocks: 6 is not a block of the teacher (0 to 5)"),
        (
            {"student.init": "random", "student.num_attention_heads": 3},
            "student.num_key_value_heads: 3 attention heads can't",
        ),
        ({"matching.strategy": "explicit"}, "has no pairs: write some as [student block, teacher block]"),
        (
            {"matching.strategy": "explicit", "matching.pairs": [[0, 6]]},
            "pairs[0] is [0, 6]: 6 is not a block of the teacher, which has 6: write a whole number from 0 to 5",
        ),
        ({"matching.strategy": "explicit", "matching.pairs": [[3, 0]]}, "3 is not a block of the student, which has 3"),
        ({"matching.pairs": [[0, 0]]}, "matching.pairs: strategy 'forward' does not read this option; leave it out"),
        (
            {"matching.strategy": "all_to_one", "matching.target_block": 6},
            "target_block 6 is not a block of the teacher",
        ),
        ({"loss.ce": 0.0, "loss.kl": 0.0, "loss.hidden": 0.0}, "nothing to learn from; give one of them a weight"),
        ({"data.source": "/nowhere/rows.jsonl"}, "data.source: no file or folder '/nowhere/rows.jsonl'; give a .jsonl"),
        (
            {"data.source": "no-one/nothing"},
            "data.source: 'no-one/nothing' is not a file here and could not be loaded from the hub",
        ),
        ({"data.format": "text"}, "data.format: text needs the column 'text', the data has prompt, completion; rename"),
        ({"data.format": "messages"}, "data.format: messages needs the column 'messages'"),
        (
            {"data.rows": 5},
            "train.batch_size: 8 rows per step, but the data has only 5 (packed: sequences of rows); write a smaller batch, or",
        ),
        ({"data.max_length": 2}, "data.max_length: no row has a token to train within 2 tokens; the rows have"),
        ({"data.max_length": 65}, "data.max_length: 65 tokens are more than the 64 positions of"),
        ({"train.deepspeed": "zero4"}, "train.deepspeed: no DeepSpeed configuration 'zero4'; write one of"),
        (
            {"teacher.offload_states": True},
            "teacher.offload_states: there is no GPU here whose memory it would spare; write false",
        ),
        (
            {"train.kernels": "liger"},
            "train.kernels: Liger's kernels run on GPUs alone, and there is none here; write none",
        ),
        (
            {"teacher.attention": "flash_attention_2"},
            "teacher.attention: flash_attention_2 needs a GPU and the package",
        ),
        (
            {"student.attention": "flash_attention_2"},
            "student.attention: flash_attention_2 needs a GPU and the package",
        ),
    ],
)
def test_mistakes_in_a_recipe(place: Path, world: Any, changes: dict[str, Any], expected: str) -> None:
    assert expected in refusal(place, world, changes)


def test_data_that_cannot_be_used(place: Path, world: Any) -> None:
    (place / "rows.jsonl").write_text("")
    assert "rows.jsonl' has no rows; give data with some" in refusal(place, world, {})
    (place / "rows.jsonl").write_text('{"prompt": "one", "completion": null}\n' * 9)
    assert "data row 0: completion must be text, it is NoneType; make it text" in refusal(place, world, {})


def test_world_size_that_does_not_divide_the_batch(place: Path, world: Any) -> None:
    sentence = refusal(place, replace(world, size=3), {})
    assert (
        "train.batch_size: 8 rows can't be shared by 3 ranks x micro_batch_size 4; write a multiple of 12" in sentence
    )
    assert sentence.endswith("or use 1 or 2 ranks")


def _other_tokens(place: Path) -> tuple[dict[str, Any], str]:
    student = Path(shutil.copytree(place / "teacher", place / "student"))
    make.new_tokenizer(["some other words than the teacher's own words"], 300).save_pretrained(student)
    return {"student.init": "checkpoint", "student.path": str(student)}, "tokenizers differ, first at token"


def _no_tokenizer(place: Path) -> tuple[dict[str, Any], str]:
    for file in (place / "teacher").glob("tokenizer*"):
        file.unlink()
    return {}, "its tokenizer has no vocabulary; copy the model's tokenizer files into the folder"


def _pickled(place: Path) -> tuple[dict[str, Any], str]:
    (place / "teacher" / "model.safetensors").rename(place / "teacher" / "pytorch_model.bin")
    return {}, "holds no .safetensors file; convert it (pickled weights are never loaded)"


def _cut_short(place: Path) -> tuple[dict[str, Any], str]:
    file = place / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return {}, "model.safetensors is not whole ("


def _short_student(place: Path) -> tuple[dict[str, Any], str]:
    student = Path(shutil.copytree(place / "teacher", place / "student"))
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    return {"student.init": "checkpoint", "student.path": str(student)}, "more than the 32 positions of"


def _capped_logits(place: Path) -> tuple[dict[str, Any], str]:
    _replace_teacher(
        place,
        Gemma2Config(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        ),
    )  # fmt: skip
    return {}, "changes its logits after the head (final_logit_softcapping), which is not supported yet; give another"


def _crossing_when_packed(place: Path) -> tuple[dict[str, Any], str]:
    _replace_teacher(
        place,
        OPTConfig(
            vocab_size=320,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        ),
    )
    return {
        "data.batching": "packed"
    }, "data.batching: packed rows of a 'opt' model might see each other; write grouped"


def _replace_teacher(place: Path, config: Any) -> None:
    for file in ("model.safetensors", "config.json"):
        (place / "teacher" / file).unlink()
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place / "teacher")


@pytest.mark.parametrize(
    "spoil",
    [_other_tokens, _no_tokenizer, _pickled, _cut_short, _short_student, _capped_logits, _crossing_when_packed],
)
def test_models_that_do_not_fit(place: Path, world: Any, spoil: Callable[[Path], tuple[dict[str, Any], str]]) -> None:
    changes, expected = spoil(place)
    assert expected in refusal(place, world, changes)


def test_checkpoint_and_model_of_another_recipe(place: Path, world: Any) -> None:
    inputs = jobs.student_inputs(load_recipe(place / "recipe.yaml"))
    saved = place / "run" / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"step": 2, "world_size": 1, "inputs": inputs}))
    write_checksums(world, saved)
    sentence = refusal(place, world, {"train.learning_rate": 0.1})
    assert (
        f"{saved} was made by another recipe: train.learning_rate was 0.003, now 0.1; put the recipe back" in sentence
    )
    model = place / "run" / "model"
    model.mkdir()
    (model / "llmkd.json").write_text(json.dumps({"inputs": inputs}))
    sentence = refusal(place, world, {"matching.strategy": "reverse"})
    assert (
        f"{place / 'run'} was made by another recipe: matching.strategy was 'forward' (the default), now 'reverse'"
        in sentence
    )


def _another_row(place: Path) -> None:
    with (place / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"prompt": "red", "completion": " blue"}) + "\n")


def _trained_on(place: Path) -> None:
    file = place / "teacher" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] *= 1.001
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "key"), [(_another_row, "data.source"), (_trained_on, "teacher.path")])
def test_a_run_is_not_gone_on_with_when_a_file_has_changed(
    place: Path, world: Any, change: Callable[[Path], None], key: str
) -> None:
    saved = place / "run" / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    inputs = jobs.student_inputs(load_recipe(place / "recipe.yaml"))
    (saved / "state.json").write_text(json.dumps({"step": 2, "world_size": 1, "inputs": inputs}))
    write_checksums(world, saved)
    change(place)
    assert f"{saved} was made by another recipe: {key}:contents was" in refusal(place, world, {})


# ---------------------------------------------------------------------------------------------------------------------
# Through the command line


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that fails says: one line, on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out, (caught.value.code, out)
    assert err.startswith("Error: ") and err.count("\n") == 1, err
    return err


def test_commands_refuse_a_recipe_before_anything_starts(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    monkeypatch.setattr(starting, "get_ready", lambda: None)  # imports that begin meanwhile start nothing of a study
    before, recipe = tree(place), str(place / "recipe.yaml")
    for command in (["train", "-r", recipe], ["finetune", recipe], ["study", recipe], ["plan", recipe, "--ranks", "2"]):
        assert "unknown key 'lossy'; did you mean 'loss'?" in told([*command, "--set", "lossy=1"], capsys)
        assert "write key.sub=value" in told([*command, "--set", "seed"], capsys)
    for command in (["train", "-r", "nope"], ["finetune", "nope"], ["study", "nope"], ["plan", "nope", "--ranks", "2"]):
        assert "recipe 'nope': no such file; give the path of a YAML file, or one of" in told(command, capsys)
    assert "matching.strategy: 'revers' is not known; did you mean 'reverse'?" in told(
        ["train", "-r", recipe, "--strategy", "revers"], capsys
    )
    assert "study.strategies: name at least one, e.g. [none, forward" in told(["study", recipe], capsys)
    assert "no finetune section" in told(["finetune", recipe], capsys)
    assert "MODEL: no folder 'nowhere'; give an HF model folder" in told(["evaluate", "nowhere", "-r", recipe], capsys)
    assert "nowhere" in told(["report", "nowhere"], capsys)
    assert tree(place) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--strategy", "revers"], "strategy 'revers' is not known: did you mean 'reverse'?"),
        (
            ["--strategy", "forward", "--target-block", "3"],
            "target_block: strategy 'forward' does not read this option",
        ),
        (["--target-block", "36"], "target_block 36 is not a block of the teacher, which has 36"),
        (["--pair", "0-3"], "--pair '0-3': write STUDENT:TEACHER, e.g. --pair 0:3"),
        (["--pair", "0:36"], "36 is not a block of the teacher"),
        (["--seed", "-1"], "seed"),
        (["--pair", "0:1", "--strategy", "forward"], "pairs: strategy 'forward' does not read this option"),
        (["--pair", "0:1", "--strategy", "nearest"], "pairs: strategy 'nearest' does not read this option"),
        (["--pair", "0:1", "--strategy", "none", "--strategy", "nearest"], "pairs: strategy 'none' does not read"),
        (["--pair", "0:1", "--target-block", "2"], "target_block: strategy 'explicit' does not read this option"),
        (["--target-block", "1", "--strategy", "nearest"], "target_block: strategy 'nearest' does not read"),
        (["--strategy", "forward", "--strategy", "revers"], "strategy 'revers' is not known"),
    ],
)
def test_maps_refuses(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["maps", "--student-blocks", "9", "--teacher-blocks", "36", *options])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and expected in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["maps", "--student-blocks", "100000000", "--teacher-blocks", "4"],
            "100000000 is not in the range 1<=x<=4096",
        ),
        (["maps", "--student-blocks", "4", "--teacher-blocks", "4097"], "4097 is not in the range 1<=x<=4096"),
        (["plan", "quickstart", "--ranks", "2", "--device-gib", "nan"], "--device-gib': 'nan' is not a number"),
        (["plan", "quickstart", "--ranks", "2", "--device-gib", "inf"], "--device-gib': inf is not in the range"),
        (["plan", "quickstart", "--ranks", "2", "--device-gib", "-1"], "--device-gib': -1.0 is not in the range"),
    ],
)
def test_numbers_out_of_bounds(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(options)
    assert caught.value.code == 2 and expected in capsys.readouterr().err


def test_the_largest_maps_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["maps", "--student-blocks", "4096", "--teacher-blocks", "4096"])
    assert "4096 student blocks" in capsys.readouterr().out


def test_student_deeper_than_its_teacher_in_maps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["maps", "--student-blocks", "9", "--teacher-blocks", "6"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("Error: ") and "9" in err and "6" in err


def test_on_two_ranks_one_rank_speaks(place: Path) -> None:
    """Through the launcher, with the batch that two ranks can't share, and from a folder that is not the repository's."""
    before = tree(place)
    code = "import sys; from llmkd.cli import main; main(sys.argv[1:])"
    command = ["train", "--recipe", str(place / "recipe.yaml"), "--ranks", "2", "--set", "train.batch_size=4"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    assert len(errors) == 1 and errors[0].startswith("Error: train.batch_size: 4 rows can't be shared by 2 ranks"), (
        errors
    )
    assert "Traceback" not in done.stderr and tree(place) == before


def test_a_mistake_that_only_another_rank_meets_is_told(place: Path) -> None:
    """A file that one node lacks, say: here rank 1 is given a batch that does not fit. Rank 0 has no mistake to tell."""
    arguments = [["--recipe", str(place / "recipe.yaml"), "--set", f"train.batch_size={batch}"] for batch in (8, 4)]
    (place / "arguments.json").write_text(json.dumps(arguments))
    processes = start_ranks(2, "tests.distributed.train_command", place / "arguments.json", place)
    codes = [process.wait(240) for process in processes]
    said = [(place / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert codes[1] == 2 and "Error: train.batch_size: 4 rows can't be shared by 2 ranks" in said[1]
    assert codes[0] != 0 and "Error: train" not in said[0]


def test_a_start_that_another_recipe_left_is_not_used(place: Path, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed before its first checkpoint leaves `initial`; with other blocks asked for, it is made again."""
    make.copied_student(place / "teacher", (5,), place / "run" / "initial", dtype=torch.float32)
    seen: list[int] = []

    def watch(job: jobs.Job, *_: Any) -> None:
        seen.append(load.load_config(job.initial).num_hidden_layers)
        raise InputError("far enough")

    monkeypatch.setattr(build, "load_student", watch)
    with pytest.raises(InputError, match="far enough"):
        train(world, jobs.distil_job(world, load_recipe(place / "recipe.yaml"), place / "run"))
    assert seen == [3]
