"""What a training run would refuse hours into a study is refused by the study itself: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import yaml

from llmkd.cli import main
from llmkd.errors import InputError
from llmkd.recipe.recipe import load_recipe
from llmkd.recipe.study_entries import entry_recipe, study_entries
from llmkd.study import check
from llmkd.training import jobs
from tests.cli.conftest import MADE

NARROW = {"student.init": "random", "student.hidden_size": 24}
NARROW |= {"student.num_attention_heads": 3, "student.num_key_value_heads": 1}
REDRAWN = {"matching.strategy": "in_order_random", "matching.redraw_every": 5}
SILENT = {"loss.ce": 0.0, "loss.kl": 0.0}


def refused(file: Path, capsys: pytest.CaptureFixture[str], *sets: str) -> str:
    """What `llmkd study` says; that it wrote nothing is checked."""
    before = sorted(file.parent.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(["study", str(file), *(word for one in sets for word in ("--set", one))])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out, (caught.value.code, out)
    *_, said = err.splitlines()  # before it stands how far the rows were read
    assert said.startswith("Error: ") and err.count("Error") == 1, err
    assert sorted(file.parent.rglob("*")) == before
    return said


def test_a_stream_is_not_read_to_its_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe whose teacher is there is good; its rows begin again before anything else is looked at."""
    recipe = load_recipe(file)
    if recipe.finetune is not None:
        return
    rows = file.parent / "long.jsonl"
    with rows.open("w") as lines:
        lines.writelines(json.dumps({"prompt": "a", "completion": str(number)}) + "\n" for number in range(5000))
        lines.write("the end, which is no JSON\n")
    monkeypatch.setattr(jobs, "load_rows", lambda *_, **__: pytest.fail("all rows were read"))
    streamed = recipe.changed({"data.source": str(rows), "data.streaming": True})
    check(streamed, study_entries(streamed), 1)
    rows.write_text("")
    with pytest.raises(InputError, match="has no rows"):
        check(streamed, study_entries(streamed), 1)


def variant(**changes: Any) -> str:
    return f"study.variants={json.dumps({'other': changes})}"


def test_the_study_that_is_spoilt_below_is_good(file: Path) -> None:
    recipe = load_recipe(file)
    check(recipe, study_entries(recipe), 1)
    check(recipe.changed({"teacher.placement": "pipeline"}), study_entries(recipe), 2)


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        ([variant(**{**NARROW, **REDRAWN})], "matching.redraw_every: the student's states have 24 numbers and the"),
        (
            [variant(**{**NARROW, "matching.compare": "differences", "train.activation_checkpointing": True})],
            "train.activation_checkpointing: not with matching.compare: differences where states pass projectors; write false, or compare",
        ),
        ([variant(**{**SILENT, "loss.hidden": 0.0})], "so there is nothing to learn from"),
        (
            [variant(**{**SILENT, "matching.strategy": "none"})],
            "loss: ce and kl are 0, and strategy none matches no pair",
        ),
        (
            ["loss.ce=0", "loss.kl=0", "study.strategies=[forward, none]"],
            "loss: ce and kl are 0, and strategy none matches",
        ),
        (
            ["matching.pair_weights=[1, 2, 3]", "study.strategies=[forward, none, pkd_skip]"],
            "matching.pair_weights: forward has 3 pairs, pkd_skip has 2 pairs, and one list can't weigh them all; take it out, and write "
            "under study.variants a student for each strategy",
        ),
        (
            ["matching.pair_weights=[1, 2]"],
            "matching.pair_weights: 2 weights for the 3 pairs 0<1, 1<3, 2<5; write one for",
        ),
        (
            ["matching.strategy=in_order_random", "matching.redraw_every=5", "study.strategies=[forward, reverse]"],
            "matching.redraw_every: no strategy of forward, reverse reads this option; leave it out, or use strategy",
        ),
        (["student.copy_blocks=[0, 1, 9]"], "student.copy_blocks: 9 is not a block of the teacher (0 to 5)"),
        ([variant(**{"student.copy_blocks": [0, 1, 9]})], "student.copy_blocks: 9 is not a block of the teacher"),
        (["data.max_length=100"], "data.max_length: 100 tokens are more than the 64 positions of "),
        (["teacher.offload_states=true"], "teacher.offload_states: there is no GPU here"),
        (["teacher.placement=pipeline", "teacher.stages=2"], "teacher.stages: pipelines of 2 stages are not possible"),
        (["teacher.share_cache=true", "student.copy_blocks=[0, 1, 9]"], "student.copy_blocks: 9 is not a block of"),
    ],
)
def test_what_a_run_refuses_is_refused_before_the_study(
    file: Path, capsys: pytest.CaptureFixture[str], sets: list[str], sentence: str
) -> None:
    assert sentence in refused(file, capsys, *sets)


def test_variants_with_weights_of_their_own_are_the_cure(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the sentence says to write is a good study."""
    said = refused(file, capsys, "matching.pair_weights=[1, 2, 3]", "study.strategies=[forward, pkd_skip]")
    cure = yaml.safe_load(said.rpartition("e.g. ")[2])
    recipe = load_recipe(file, [f"study.variants={json.dumps(cure)}", "study.strategies=[forward]"])
    assert recipe.study.variants and recipe.matching.pair_weights is None
    check(recipe, study_entries(recipe), 1)
    weighted = recipe.changed({"matching.pair_weights": [1.0, 2.0, 3.0]})
    check(weighted, study_entries(weighted), 1)


@pytest.mark.parametrize("file", ["there"], indirect=True)
def test_a_study_of_another_recipe_is_given_a_cure_that_a_study_has(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(file)
    [entry] = [entry for entry in study_entries(recipe) if entry.train]
    model = recipe.folder / entry.model
    model.mkdir(parents=True)
    (model / "llmkd.json").write_text(json.dumps({"inputs": jobs.student_inputs(entry_recipe(recipe, entry))}))
    sentence = refused(file, capsys, "train.learning_rate=0.1")
    cure = (
        "put the recipe back, remove .*, or choose another folder \\(`output` or `name` in the recipe, or --output of"
    )
    assert re.search(f"train.learning_rate was .*, now 0.1; {cure} llmkd train\\)$", sentence), sentence


@pytest.mark.parametrize("file", ["there"], indirect=True)
def test_the_run_itself_refuses_in_the_same_words(file: Path, world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Each entry of a good study is a good run, and a spoilt one says one sentence to both."""
    recipe = load_recipe(file)
    [entry] = [one for one in study_entries(recipe) if one.train]
    jobs.distil_job(world, entry_recipe(recipe, entry), file.parent / "run")
    for change in ("student.copy_blocks=[0, 1, 9]", "data.max_length=100", "teacher.offload_states=true"):
        with pytest.raises(InputError) as caught:
            jobs.distil_job(world, entry_recipe(load_recipe(file, [change]), entry), file.parent / "run")
        assert refused(file, capsys, change) == f"Error: {caught.value}"


def test_stones_of_a_teacher_that_has_none(
    file: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An OLMo, there, or the start of the teacher to be made."""
    folder = tmp_path / "olmo"
    shutil.copytree(tiny / "teacher", folder)
    hf.OlmoConfig(**{k: v for k, v in MADE.items() if k != "head_dim"}).save_pretrained(folder)
    made = load_recipe(file).finetune is not None
    where = ["finetune.architecture=null", f"finetune.path={folder}"] if made else [f"teacher.path={folder}"]
    said = refused(file, capsys, *where, variant(stones={"kl": 1.0}))
    assert "stones: a 'olmo' teacher has not been shown to work from one of its blocks on" in said


def test_a_students_own_checkpoint_is_asked_too(
    file: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each variant's by itself: one deeper than its teacher, and one that knows other tokens."""
    student = tmp_path / "student"
    shutil.copytree(tiny / "teacher", student)
    shape = json.loads((student / "config.json").read_text())
    own = {"student.init": "checkpoint", "student.path": str(student), "student.blocks": None}
    deeper = hf.Qwen3Config(**{**shape, "num_hidden_layers": 7, "layer_types": ["full_attention"] * 7})
    hf.Qwen3ForCausalLM(deeper).save_pretrained(student)
    assert "the student has 7 blocks and the teacher 6" in refused(file, capsys, variant(**own))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / "teacher" / name, student / name)
    tokens = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    (one, two), *_ = [pair for pair in zip(list(vocabulary)[100:], list(vocabulary)[101:], strict=False)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (student / "tokenizer.json").write_text(json.dumps(tokens))
    recipe = load_recipe(file, [variant(**own)])
    if recipe.finetune is not None:  # no tokenizer yet to compare with
        check(recipe, study_entries(recipe), 1)
    else:
        assert "teacher and student tokenizers differ, first at token" in refused(file, capsys, variant(**own))


@pytest.mark.parametrize("where", ["train", "finetune", "variant"])
def test_a_deepspeed_file_that_can_not_be_used_is_refused_before_the_study(
    file: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    if where == "finetune" and load_recipe(file).finetune is None:
        pytest.skip("the teacher is there")
    mine = file.parent / "mine.json"
    mine.write_text(json.dumps({"zero_optimization": {"stage": 1, "foo": 1}, "tensor_parallel": {"autotp_size": 2}}))
    sets = {
        "train": f"train.deepspeed={mine}",
        "finetune": f"finetune.train.deepspeed={mine}",
        "variant": variant(**{"train.deepspeed": str(mine)}),
    }
    key = "finetune.train.deepspeed" if where == "finetune" else "train.deepspeed"
    reason = "tensor_parallel can't be used here (the student's tensors are split by ZeRO alone); remove it"
    assert refused(file, capsys, sets[where]) == f"Error: {key} ({mine}): {reason}"
    mine.write_text(json.dumps({"zero_optimization": {"stage": 1, "foo": 1}}))
    reason = "zero_optimization.foo: DeepSpeed has no such key; remove it"
    assert refused(file, capsys, sets[where]) == f"Error: {key} ({mine}): {reason}"


@pytest.mark.parametrize("key", ["train.deepspeed", "finetune.train.deepspeed"])
def test_a_deepspeed_file_that_can_not_be_used_is_refused_before_a_rank_starts(
    file: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    if load_recipe(file).finetune is None:
        pytest.skip("a recipe that makes its teacher has both files")
    mine = file.parent / "mine.json"
    mine.write_text(json.dumps({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}))
    for command in (["train", "--recipe", str(file)], ["finetune", str(file)]):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--set", f"{key}={mine}"])
        assert caught.value.code == 2
        assert f"Error: {key} ({mine}): zero_optimization.elastic_checkpoint can't be used" in capsys.readouterr().err
