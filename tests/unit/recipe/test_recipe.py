"""The recipe: what it refuses, in which words; what it reads, and that it is read back as it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from llmkd.errors import InputError
from llmkd.files import ROOT
from llmkd.recipe.inputs import fingerprint, input_text, training_inputs
from llmkd.recipe.placements import PLACEMENTS, PlacementName, WithWeights
from llmkd.recipe.recipe import Recipe, dump_recipe, load_recipe
from llmkd.recipe.study_entries import entry_recipe, study_entries
from llmkd.training.build import accumulation_steps, total_steps

SMALL: dict[str, Any] = {
    "name": "small",
    "teacher": {"path": "somewhere"},
    "student": {"blocks": 3},
    "train": {"steps": 4, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 0.003},
    "data": {"source": "rows.jsonl"},
}
ARCHITECTURE = dict.fromkeys(
    (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ),
    8,
)
FINETUNE = {"architecture": ARCHITECTURE, "train": SMALL["train"]}
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    return file


def refusal(file: Path, *overrides: str) -> str:
    """The sentence a recipe is refused with: one line, one sentence."""
    with pytest.raises(InputError) as caught:
        load_recipe(file, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence and not sentence.endswith("."), sentence
    assert ". " not in sentence.replace("e.g. ", ""), sentence
    return sentence


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("studnet.blocks=3", "unknown key 'studnet'; did you mean 'student'?"),
        ("train.learning_rat=1", "unknown key 'train.learning_rat'; did you mean 'learning_rate'?"),
        ("train.lr=1", "unknown key 'train.lr'; known here: steps, epochs, batch_size"),
        ("teacher.architecture={vocab: 8}", "unknown key 'teacher.architecture.vocab'; did you mean"),
        ("finetune.train.step=3", "unknown key 'finetune.train.step'; did you mean 'steps'?"),
        ("finetune.data.max_len=3", "unknown key 'finetune.data.max_len'; did you mean 'max_length'?"),
        ("matching.stratagy=reverse", "unknown key 'matching.stratagy'; did you mean 'strategy'?"),
    ],
)
def test_unknown_key_names_the_nearest(recipe: Path, override: str, expected: str) -> None:
    assert expected in refusal(
        recipe, *([f"finetune={FINETUNE}", "teacher.path="] if "finetune" in override else []), override
    )


def test_a_misspelt_key_is_named_rather_than_the_one_it_should_be(tmp_path: Path) -> None:
    train = {"learning_rat" if key == "learning_rate" else key: value for key, value in SMALL["train"].items()}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**SMALL, "train": train}))
    assert "unknown key 'train.learning_rat'; did you mean 'learning_rate'?" in refusal(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "not valid YAML at line 2 (key 'name' is written twice)"),
        ("name: a\ntrain:\n  steps: 3\n  steps: 4\n", "line 4 (key 'steps' is written twice)"),
        ("name: [a\n", "not valid YAML at line"),
        ("? [a]\n: b\n", "a key must be one word"),
        ("", "a recipe is a mapping of sections; write"),
        ("- a\n", "a recipe is a mapping of sections; write"),
        ("name: a\n", "key 'student' is missing; add it"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_broken_file_is_refused_in_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    sentence = refusal(file)
    assert expected in sentence and str(file) in sentence


def test_file_that_is_no_text_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x02\xff\xfe")
    assert "can't be read as text" in refusal(tmp_path / "model.bin")
    assert "'nowhere': no such file; give the path of a YAML file, or one of" in refusal(Path("nowhere"))
    assert "papers/distances, " in refusal(Path("nowhere")) and load_recipe("papers/distances").name == "distances"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["matching.strategy=revers"], "matching.strategy: 'revers' is not known; did you mean 'reverse'? choose from"),
        (["matching.distance=l2"], "matching.distance: 'l2' is not known; choose from"),
        (["loss.divergence=kl"], "loss.divergence: 'kl' is not known;"),
        (["loss.temperature=0"], "loss.temperature: input should be greater than or equal to 0.01 (got 0)"),
        (["matching.distance={mse: 1.0, l2: 1.0}"], "matching.distance: 'l2' is not known; choose from"),
        (["matching.distance={mse: 0}"], "matching.distance.mse: a weight of 0.0; write a number above 0, or leave"),
        (
            ["loss.schedules.distances={mse: {final: 0.0}}"],
            "loss.schedules.distances.mse: normalized_mse is the only distance, so it has no weight relative to another; write "
            "loss.schedules.hidden",
        ),
        (
            ["matching.distance=[mse, cka]", "loss.schedules.distances={gram: {final: 0.0}}"],
            "loss.schedules.distances.gram: the recipe uses mse, cka; name one of these, or leave it out",
        ),
        (
            ["loss.schedules.distances={mse: {shap: linear}}"],
            "unknown key 'loss.schedules.distances.mse.shap'; did you mean 'shape'?",
        ),
        (
            ["loss.schedules.divergences={tvd: 3}"],
            "loss.schedules.divergences.tvd: a section is a mapping of keys (got 3)",
        ),
        (
            ["loss.schedules.temperature={shape: dynamic, until: 0.5}"],
            "loss.schedules.temperature.until: shape dynamic does not read it; leave it out",
        ),
        (
            ["loss.schedules.temperature={shape: linear, final: 2.0, every: 5}"],
            "loss.schedules.temperature.every: shape linear does not read it; leave it out, or write shape: dynamic",
        ),
        (["loss.schedules.distances={l2: {final: 0.0}}"], "loss.schedules.distances: 'l2' is not known; choose from"),
        (
            ["loss.divergence={tvd: 1, jsd: 1}", "loss.schedules.divergences={akl: {final: 0.0}}"],
            "loss.schedules.divergences.akl: the recipe uses tvd, jsd; name one of these, or leave it out",
        ),
        (
            ["loss.schedules.stones={final: 0.0}"],
            "loss.schedules.stones: there are no stones; add the section stones, or leave the schedule out",
        ),
        (
            ["matching.distance=[mse, cka]", "loss.schedules.distances={mse: {final: 0.0}}", "loss.hidden=0"],
            "loss.schedules.distances: no states are compared, as loss.hidden is 0; give it a weight, or leave",
        ),
        (["matching.distance=[mse, l2]"], "matching.distance[1]: 'l2' is not known; choose from"),
        (
            ["matching.distance=[]"],
            "matching.distance: the list is empty; write a distance for each pair, or one for all",
        ),
        (["matching.distance={}"], "matching.distance: is empty; write one of mse, "),
        *(
            ([f"matching.distance={wrong}"], "write e.g. procrustes or {mse: 0.1, procrustes: 1.0}")
            for wrong in ("3", "{mse: high}")
        ),
        (["stones.pairs=[0, 1]"], "stones.pairs: [0, 1] can't be read; write e.g. from_map or [[0, 3], [1, 7]]"),
        (["stones.pairs=[[0, 1, 2]]"], "stones.pairs: [[0, 1, 2]] can't be read; write e.g. from_map or [[0, 3], "),
        (["matching.pairs=[0, 1]"], "matching.pairs: [0, 1] can't be read; write e.g. [[0, 3], [1, 7]]"),
        (
            ["loss.divergence={forward_kl: x}"],
            "loss.divergence: {'forward_kl': 'x'} can't be read; write e.g. jsd or {",
        ),
        (["matching.scope=batch"], "matching.scope: normalized_mse compares token by token, wherever the tokens are"),
        (
            ["matching.distance=cka", "matching.projector=always"],
            "matching.projector: cka compares states as they are; add another distance, or leave it out",
        ),
        (["matching.tokens=1"], "matching.tokens: input should be greater than 1 (got 1)"),
        (["matching.pair_weights=[0, 0]"], "matching.pair_weights: [0.0, 0.0]; write numbers from 0 up, one of them"),
        (["matching.pair_weights=[1, -1]"], "matching.pair_weights: [1.0, -1.0]; write numbers from 0 up"),
        (
            ["matching.redraw_every=5"],
            "matching.redraw_every: strategy 'forward' does not read this option; leave it out, or use strategy 'in_order_random'",
        ),
        (
            ["matching.target_block=1", "study.strategies=[reverse, none]"],
            "matching.target_block: no strategy of forward, reverse, none reads this option; leave it out, or use strategy 'all_to_one'",
        ),
        (
            ["matching.pairs=[[0, 1]]", "study.variants={mse: {matching.distance: mse}}"],
            "matching.pairs: strategy 'forward' does not read this option; leave it out, or use strategy 'explicit'",
        ),
        (
            ["matching.strategy=in_order_random", "matching.redraw_every=5", "teacher.placement=pipeline"],
            "matching.redraw_every: a teacher with placement pipeline has the blocks of one map, fixed before training; write teacher."
            "placement: replicated or zero3, or redraw_every: 0",
        ),
        (
            ["matching.strategy=in_order_random", "matching.redraw_every=5", "teacher.share_cache=true"],
            "matching.redraw_every: a teacher with share_cache has the blocks of one map",
        ),
        (
            ["matching.strategy=nearest", "teacher.placement=cache"],
            "matching.strategy: nearest is measured, but a teacher with placement cache has the blocks of one map, fixed before training; "
            "write teacher.placement: replicated or zero3, or measure with one",
        ),
        (
            ["matching.entropy=0.1"],
            "matching.entropy: strategy 'forward' does not read this option; leave it out, or use strategy 'learned'",
        ),
        (["matching.strategy=learned", "matching.temperature=0"], "matching.temperature: input should be greater than"),
        (["matching.strategy=learned", "matching.start=reverse"], "matching.start: input should be 'forward' or 'unif"),
        (
            ["matching.strategy=learned", "matching.compare=differences"],
            "matching.compare: strategy learned has no one teacher block for a student block, so that nothing lies between two; write",
        ),
        (
            ["matching.strategy=learned", "matching.distance=logit_lens"],
            "matching.distance: strategy learned has no one teacher block for a student block that logit_lens could read; write another",
        ),
        (
            ["matching.strategy=learned", "stones.kl=1"],
            "stones.pairs: strategy learned has no one teacher block for a student block; write the stones, e.g. [[0, 3], [1, 7]]",
        ),
        (
            ["matching.strategy=learned", "teacher.offload_states=true"],
            "teacher.offload_states: strategy learned takes all states back for its first student block and keeps them to the last; write",
        ),
        (["loss.divergence={forward_kl: 0.5, kl: 0.5}"], "loss.divergence: 'kl' is not known;"),
        (["loss.schedules.kl={shape: linear}"], "loss.schedules.kl.final: shape linear needs it; write the last value"),
        (
            ["loss.schedules.kl={shape: constant, final: 1}"],
            "loss.schedules.kl.final: shape constant does not read it; leave it out",
        ),
        (["loss.schedules.hiden={final: 0}"], "unknown key 'loss.schedules.hiden'; did you mean 'hidden'?"),
        (
            ["loss.ce=0", "loss.schedules.ce={final: 1}"],
            "loss.schedules.ce: it starts at loss.ce, which is 0, and a part that starts at 0 is left out of the run",
        ),
        (
            ["loss.schedules.temperature={final: 2, minimum: 1}"],
            "loss.schedules.temperature.minimum: shape cosine does not read it; leave it out, or write shape: dynamic",
        ),
        (
            ["loss.schedules.temperature={shape: dynamic, minimum: 3}"],
            "loss.schedules.temperature.minimum: 3.0 is above the maximum, 1.0; write both, the smaller one as minimum",
        ),
        (
            ["loss.schedules.temperature={shape: dynamic, final: 3}"],
            "temperature.final: shape dynamic does not read it",
        ),
        (
            ["loss.schedules.temperature={shape: dynamic}", "teacher.placement=cache", "cache.top_k=8"],
            "loss.schedules.temperature: dynamic reads the teacher's own cross-entropy, which a cache of the likeliest tokens",
        ),
        (["loss.beta=0.3"], "loss.beta: forward_kl does not read it; leave it out, or write divergence: jsd"),
        (
            ["loss.divergence=jsd", "loss.skew=0.3"],
            "loss.skew: jsd does not read it; leave it out, or write divergence: skew_kl",
        ),
        (["loss.divergence=jsd", "loss.beta=1.5"], "loss.beta: input should be less than or equal to 1 (got 1.5)"),
        (["loss.divergence=skew_kl", "loss.skew=1.0"], "loss.skew: input should be less than 1 (got 1.0)"),
        (["train.learning_rate=.nan"], "train.learning_rate: input should be a finite number"),
        (["train.learning_rate=.inf"], "train.learning_rate: input should be a finite number"),
        (["train.learning_rate='1e-4'"], "train.learning_rate: input should be a valid number (got '1e-4')"),
        (["train.clip=false"], "train.clip: input should be a valid number (got False)"),
        (["train.log_every=true"], "train.log_every: input should be a valid integer (got True)"),
        (["train.steps=1.5"], "train.steps: input should be a valid integer"),
        (["train.schedule=cosin"], "train.schedule: input should be 'cosine', 'linear' or 'constant' (got 'cosin')"),
        (["train.dtype=bf16"], "train.dtype: input should be 'float32' or 'bfloat16' (got 'bf16')"),
        (["name=2024"], "name: input should be a valid string (got 2024); write it in quotes"),
        (["name=a/b"], "name: "),
        (["train=5"], "train: a section is a mapping of keys (got 5); write at least one of steps, epochs"),
        (["student="], "student: a section is a mapping of keys (got None); write at least one of init"),
        (["train.epochs=1"], "train.steps: give exactly one of steps and epochs"),
        (
            ["train.batch_size=7"],
            "train.batch_size: 7 rows are no multiple of micro_batch_size 4; write a multiple of 4",
        ),
        (["teacher.offload=cpu"], "teacher.offload: only a zero3 teacher can be offloaded; write placement: zero3"),
        (["student.blocks="], "student.blocks: not given; write how many blocks the student has"),
        (["student.init=checkpoint"], "student.path: init checkpoint needs one; write the HF folder"),
        (["student.path=x"], "student.path: only init checkpoint reads it (now teacher); write init: checkpoint"),
        (["student.head_dim=4"], "student.head_dim: copied heads keep the teacher's; leave it out, or write init: r"),
        (
            ["student.init=checkpoint", "student.path=x", "student.hidden_size=8"],
            "student.hidden_size: a checkpoint has its own width; leave it out, or write init: teacher or random",
        ),
        (
            ["student.copy_blocks=[0, 1]"],
            "student.copy_blocks: 2 blocks for a student of 3 (student.blocks); make them equal",
        ),
        (
            ["student.copy_blocks=sprad"],
            "student.copy_blocks: 'sprad' can't be read; write e.g. spread or matched or [0",
        ),
        (["data.source=records"], "data.rows: the built-in task is endless; write how many"),
        (["study.seeds=[0, 0]"], "study.seeds: [0, 0] has one twice; write each once"),
        (["study.strategies=[forwards]"], "study.strategies: 'forwards' is not known; did you mean 'forward'?"),
        (["teacher.path="], "teacher.path: give exactly one of teacher.path"),
        ([f"finetune={FINETUNE}"], "teacher.path: give exactly one of teacher.path"),
        (
            [f"finetune={FINETUNE}", "teacher.path=", "finetune.path=x"],
            "finetune: give exactly one of path",
        ),
        ([f"finetune={FINETUNE}", "teacher.path=", "finetune.data.source=records"], "finetune.data.rows: the built-in"),
        (
            [f"finetune={FINETUNE}", "teacher.path=", "finetune.train.batch_size=9"],
            "finetune.train.batch_size: 9 rows are no multiple",
        ),
    ],
)
def test_bad_value_names_the_key_and_the_cure(recipe: Path, overrides: list[str], expected: str) -> None:
    assert expected in refusal(recipe, *overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "--set 'train.steps': no value is given; write key.sub=value"),
        ("=3", "write key.sub=value"),
        ("train.steps=[", "--set 'train.steps=[': not valid YAML at line 1 ("),
        ("data={source: a, source: b}", "key 'source' is written twice"),
        ("name.sub=3", "--set name.sub: name is a value, not a section; set name as a whole"),
        ("data.source.x=3", "--set data.source.x: source is a value, not a section; set data.source as a whole"),
    ],
)
def test_set_refuses(recipe: Path, override: str, expected: str) -> None:
    assert expected in refusal(recipe, override)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=1E-4", 1e-4),
        ("train.learning_rate=2.5e-05", 2.5e-5),
        ("train.learning_rate=.5e-3", 5e-4),
        ("train.learning_rate=1", 1.0),
        ("train.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("train.wandb=null", None),
        ("train.wandb=", None),
        ("student.copy_blocks=[0, 1, 5]", (0, 1, 5)),
        ("matching.pairs=[[0, 1], [2, 3]]", ((0, 1), (2, 3))),
        ("matching.strategy=none", "none"),
        ("study.strategies=[none, forward]", ("none", "forward")),
        ("data.source=a=b:c", "a=b:c"),
        ("teacher.architecture.vocab_size=8", 8),
        ("train.activation_checkpointing=true", True),
    ],
)
def test_set_takes_yaml(recipe: Path, override: str, value: Any) -> None:
    full = [f"teacher.architecture={ARCHITECTURE}"] if "architecture" in override else []
    full += ["matching.strategy=explicit"] if "matching.pairs" in override else []
    read: Any = load_recipe(recipe, [*full, override])
    for part in override.partition("=")[0].split("."):
        read = getattr(read, part)
    assert read == value and type(read) is type(value)


def test_later_set_wins_and_whole_sections_can_be_set(recipe: Path) -> None:
    changed = load_recipe(
        recipe, ["seed=1", "seed=2", "teacher.path=null", f"finetune={FINETUNE}", "finetune.train.steps=9"]
    )
    assert changed.seed == 2
    assert changed.finetune is not None and changed.finetune.train.steps == 9
    assert changed.teacher_path == "runs/small/teacher/model"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_of_the_repository_loads_and_reads_back_as_it_was(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe and dump_recipe(again) == dump_recipe(recipe)


def test_there_are_recipes() -> None:
    assert RECIPES


def test_dump_and_load_are_inverse_for_what_yaml_mistakes(recipe: Path, tmp_path: Path) -> None:
    awkward = [
        "name='1e5'",
        "data.source='no'",
        "data.split='1.0'",
        "train.epsilon=1e-12",
        "train.learning_rate=1e-30",
    ]
    before = load_recipe(recipe, [*awkward, "student.copy_blocks=[2, 1, 0]", "train.wandb='null'"])
    (tmp_path / "again.yaml").write_text(dump_recipe(before))
    again = load_recipe(tmp_path / "again.yaml")
    assert again == before
    assert (again.name, again.data.source, again.data.split, again.train.wandb) == ("1e5", "no", "1.0", "null")


def test_frozen_and_closed(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    for section, key in ((loaded, "seed"), (loaded.train, "steps"), (loaded.matching, "strategy")):
        with pytest.raises(ValidationError):
            setattr(section, key, 1)
    for section in (loaded.teacher, loaded.student, loaded.train, loaded.evaluation):
        hash(section)  # nothing in it can be changed in place either


def test_changed_is_checked_again_and_leaves_the_first_alone(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    reversed_ = loaded.changed({"matching.strategy": "reverse", "matching.pairs": None, "seed": 3})
    assert (reversed_.matching.strategy, reversed_.seed) == ("reverse", 3)
    assert (loaded.matching.strategy, loaded.seed) == ("forward", 0)
    with pytest.raises(InputError, match=r"matching\.strategy: 'nope' is not known"):
        loaded.changed({"matching.strategy": "nope"})


@pytest.mark.parametrize(
    "schedule",
    [
        "temperature={shape: dynamic}",
        "temperature={shape: constant}",
        "temperature={shape: linear, final: 2.0}",
        "kl={shape: constant}",
        "hidden={final: 0.0, until: 0.5}",
    ],
)
def test_a_recipe_written_out_with_every_key_reads_as_it_was(recipe: Path, tmp_path: Path, schedule: str) -> None:
    loaded = load_recipe(recipe, [f"loss.schedules.{schedule}", "stones.kl=1.0"])
    (tmp_path / "again.yaml").write_text(dump_recipe(loaded))
    assert load_recipe(tmp_path / "again.yaml") == loaded


IGNORED = ["name=other", "output=elsewhere", "study.seeds=[1]", "evaluation.limit=3", "train.save_every=7"]
IGNORED += [
    "teacher.offload_states=true",
    f"teacher.architecture={ARCHITECTURE}",
    "train.keep_checkpoints=9",
    "train.log_every=1",
    "train.timeout_seconds=5",
    "train.wandb=project",
    "loss.report_norms_every=5",
    "matching.scope=micro_batch",
    "matching.redraw_every=0",
    "matching.projector=if_needed",
]
NOTICED = ["seed=1", "student.blocks=2", "matching.strategy=none", "loss.hidden=1.0", "data.rows=3", "train.steps=5"]
NOTICED += ["loss.divergence=jsd", "loss.divergence=tvd", "matching.tokens=9", "matching.pair_weights=[1,2]"]
NOTICED += ["matching.distance=[mse, cka]"]
NOTICED += ["matching.projector=always"]
NOTICED += [
    "train.learning_rate=0.1",
    "train.warmup_steps=1",
    "train.batch_size=16",
    "teacher.path=other",
    "train.clip=0",
]
NOTICED += ["data.max_length=9", "loss.temperature=2.0", "student.init=random", "matching.distance=mse"]


def test_training_inputs_notice_what_is_computed_and_nothing_else(recipe: Path) -> None:
    same = training_inputs(load_recipe(recipe))
    for override in IGNORED:
        assert training_inputs(load_recipe(recipe, [override])) == same, override
    for override in NOTICED:
        key = override.partition("=")[0]
        other = training_inputs(load_recipe(recipe, [override]))
        assert {k for k in same.keys() | other.keys() if same.get(k) != other.get(k)} == {key}
        assert fingerprint(other) != fingerprint(same)


def test_a_teacher_that_the_recipe_makes_counts_by_how_it_is_made(recipe: Path) -> None:
    made = [f"finetune={FINETUNE}", "teacher.path="]
    inputs = training_inputs(load_recipe(recipe, made))
    for override in ("output=elsewhere", "name=other", "finetune.train.log_every=3"):
        assert training_inputs(load_recipe(recipe, [*made, override])) == inputs, override
    for override in ("finetune.train.steps=5", "finetune.architecture.hidden_size=16"):
        assert training_inputs(load_recipe(recipe, [*made, override])) != inputs, override


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stones.weight=1"], "unknown key 'stones.weight'; "),
        (
            ["loss.kl=0", "stones={kl: 0, ce: 1}", "loss.schedules.temperature={shape: linear, final: 2.0}"],
            "loss.schedules.temperature: loss.kl is 0, and so are stones.kl and stones.cross, so nothing is",
        ),
        (
            ["loss.kl=0", "loss.ce=0", "stones={kl: 1}", "loss.schedules.temperature={shape: dynamic}"],
            "loss.schedules.temperature: dynamic reads the student's own cross-entropy, which is not computed with loss.ce and",
        ),
        (
            ["stones.kl=1", "matching.strategy=in_order_random", "matching.redraw_every=2"],
            "stones.pairs: a connector is trained for one teacher block, and a redrawn map",
        ),
        (
            ["loss.kl=0", "loss.schedules.temperature={shape: cosine, final: 2.0}"],
            "loss.schedules.temperature: loss.kl is 0, so nothing is compared at a temperature; give one a weight, or leave the",
        ),
        (["stones.kl=-1"], "stones.kl: "),
        (["stones={kl: 0, ce: 0}"], "stones: ce, kl and cross are all 0; give one of them a weight"),
        (["stones={sample: one, cross: 0.1}"], "stones.sample: the cross term needs every stone's logits; write all"),
        (["stones.pairs=[[0, 1], [0, 2]]"], "stones.pairs: [[0, 1], [0, 2]] must hold at least one pair, and each"),
        (["stones.pairs=[]"], "stones.pairs: [] must hold at least one pair"),
        (["stones.pairs=forward"], "stones.pairs"),
        (
            ["stones.kl=1", "teacher.placement=pipeline"],
            "which is not possible with placement pipeline; write teacher.placement: ",
        ),
        (
            ["stones.kl=1", "teacher.placement=cache"],
            "which is not possible with placement cache; write teacher.placement: ",
        ),
        (
            ["stones.kl=1", "teacher.share_cache=true"],
            "which is not possible with share_cache; write teacher.placement: ",
        ),
        (
            ["stones.checkpoint=false", "teacher.placement=zero3"],
            "stones.checkpoint: a zero3 teacher's blocks are released",
        ),
    ],
)
def test_stones_that_can_not_be_are_refused(recipe: Path, overrides: list[str], expected: str) -> None:
    assert expected in refusal(recipe, *overrides)


def test_stones_are_off_unless_asked_for_and_then_decide_the_result(recipe: Path) -> None:
    plain, with_stones = load_recipe(recipe), load_recipe(recipe, ["stones.kl=0.5"])
    assert plain.stones is None and not any(key.startswith("stones") for key in training_inputs(plain))
    at_defaults = training_inputs(load_recipe(recipe, ["stones={}"]))
    assert at_defaults == {**training_inputs(plain), "stones": {}}  # the section itself counts
    assert plain.changed({"loss.kl": 0.0}).logits is False and with_stones.changed({"loss.kl": 0.0}).logits is True
    assert training_inputs(with_stones) == {**training_inputs(plain), "stones.kl": 0.5}
    (recipe.parent / "again.yaml").write_text(dump_recipe(with_stones.changed({"stones.pairs": [[0, 2], [1, 3]]})))
    again = load_recipe(recipe.parent / "again.yaml").stones
    assert again is not None and again.pairs == ((0, 2), (1, 3))


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (["loss.hidden=0"], "loss: ce, kl and hidden are all 0, so there is nothing to learn from; give one"),
        (
            ["matching.strategy=none"],
            "loss: ce and kl are 0, and strategy none matches no pair for loss.hidden to weigh",
        ),
    ],
)
def test_a_recipe_without_an_objective_is_refused(recipe: Path, sets: list[str], sentence: str) -> None:
    silent = ["loss.ce=0", "loss.kl=0"]
    with pytest.raises(InputError, match=sentence):
        load_recipe(recipe, [*silent, *sets])
    for learns in (["loss.ce=0.1"], ["loss.kl=0.1"], ["stones={}"]):
        load_recipe(recipe, [*silent, *sets, *learns])
    load_recipe(recipe, silent)  # the states are matched


def test_a_map_is_measured_for_whatever_asks_for_it(recipe: Path) -> None:
    nearest = load_recipe(recipe, ["matching.strategy=nearest"])
    assert nearest.measures_map and not load_recipe(recipe).measures_map
    assert not nearest.changed({"loss.hidden": 0.0}).measures_map
    assert nearest.changed({"loss.hidden": 0.0, "stones": {"kl": 1.0}}).measures_map
    assert not nearest.changed({"loss.hidden": 0.0, "stones": {"pairs": [[0, 1]]}}).measures_map
    load_recipe(recipe, ["loss.kl=0", "stones.kl=1", "loss.schedules.temperature={shape: linear, final: 2.0}"])
    written = {"stones": {"pairs": [[0, 1]]}, "matching.strategy": "in_order_random", "matching.redraw_every": 2}
    load_recipe(recipe).changed(written)


def test_a_key_at_its_default_counts_as_absent(recipe: Path) -> None:
    """So that a key which is added to the recipe later leaves the runs of before as they were."""
    inputs = training_inputs(load_recipe(recipe))
    written_out = recipe.parent / "written.yaml"
    written_out.write_text(dump_recipe(load_recipe(recipe)))
    assert training_inputs(load_recipe(written_out)) == inputs
    assert not {"matching.scope", "loss.kl", "student.classifier", "cache.dtype"} & inputs.keys()
    assert inputs["train.steps"] == 4 and inputs["student.blocks"] == 3


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.learning_rate", "0.003"),
        ("loss.temperature", "1.0 (the default)"),
        ("train.betas", "[0.9, 0.999] (the default)"),
        ("finetune.seed", "0 (the default)"),
        ("student.path", "unset"),
        ("train.steps.unknown", "unset"),
        ("data.source:contents", "unset"),
        ("gone.key", "unset"),
        ("loss.schedules.distances.mse.shape", "'cosine' (the default)"),
    ],
)
def test_a_key_that_is_not_among_the_inputs_is_shown_by_its_default(recipe: Path, key: str, text: str) -> None:
    assert input_text(training_inputs(load_recipe(recipe)), key) == text


def test_a_cache_counts_where_it_is_read(recipe: Path) -> None:
    stored = ["cache.dtype=int8", "cache.path=elsewhere"]
    same = training_inputs(load_recipe(recipe))
    assert training_inputs(load_recipe(recipe, stored)) == same
    read = training_inputs(load_recipe(recipe, [*stored, "teacher.placement=cache"]))
    assert read == {**same, "teacher.placement": "cache", "cache.dtype": "int8"}


def test_a_studys_option_is_for_the_strategies_that_read_it(recipe: Path) -> None:
    given = ["matching.redraw_every=5", "study.strategies=[forward, in_order_random]", "study.baselines=[ce_only]"]
    study = load_recipe(recipe, given)
    redraws = {entry.name: entry_recipe(study, entry).matching.redraw_every for entry in study_entries(study)[1:]}
    assert redraws == {"ce_only-s0": 0, "forward-s0": 0, "in_order_random-s0": 5}


def test_every_key_is_named_once(recipe: Path) -> None:
    """Flat keys are what a refusal of another recipe names; a key with a dot of its own would make two of one."""
    changed = ["loss.schedules.distances={mse: {final: 0.5}}", "matching.distance={mse: 1, cka: 2}", "stones.kl=0.5"]
    inputs = training_inputs(load_recipe(recipe, changed))
    assert all(not isinstance(value, dict) for value in inputs.values())
    assert {"loss.schedules.distances.mse.final", "matching.distance.cka", "stones.kl"} <= inputs.keys()


def test_mixes_and_schedules_are_read_and_noticed(recipe: Path) -> None:
    same = training_inputs(load_recipe(recipe))
    mixed = load_recipe(
        recipe,
        [
            "matching.distance={procrustes: 1, mse: 0.1}",
            "loss.divergence={forward_kl: 0.5, reverse_kl: 0.5}",
            "loss.schedules.hidden={shape: linear, final: 0.0, until: 0.5}",
        ],
    )
    assert mixed.matching.mixes == ({"procrustes": 1.0, "mse": 0.1},) and mixed.matching.projects(24, 32)
    assert not mixed.matching.projects(32, 32)
    assert load_recipe(recipe, ["matching.projector=always"]).matching.projects(32, 32)
    assert not load_recipe(recipe, ["matching.distance={procrustes: 1, cka: 2}"]).matching.projects(24, 32)
    other = training_inputs(mixed)
    named = {key for key in same.keys() | other.keys() if same.get(key) != other.get(key)}
    assert {"matching.distance.mse", "loss.divergence.reverse_kl", "loss.schedules.hidden.until"} <= named
    assert load_recipe_again(mixed, recipe.parent) == mixed


def test_a_schedule_is_noticed_by_the_keys_that_it_sets(recipe: Path) -> None:
    begun = ["matching.distance={cka: 1, mse: 1}", "loss.schedules.hidden={final: 0.0}"]
    before = training_inputs(load_recipe(recipe, begun))
    assert {key for key in before if key.startswith("loss.schedules.")} == {"loss.schedules.hidden.final"}
    after = training_inputs(load_recipe(recipe, [*begun, "loss.schedules.distances.mse={final: 2.0}"]))
    assert after == {**before, "loss.schedules.distances.mse.final": 2.0}


def test_a_list_of_distances_is_one_for_each_pair(recipe: Path) -> None:
    listed = load_recipe(recipe, ["matching.distance=[cka, normalized_mse, {procrustes: 1, mse: 0.1}]"])
    matching = listed.matching
    assert matching.mixes_of(3) == ({"cka": 1.0}, {"normalized_mse": 1.0}, {"procrustes": 1.0, "mse": 0.1})
    assert matching.mixes_of(0) == () and matching.distances == ("cka", "normalized_mse", "procrustes", "mse")
    assert matching.unprojected(3) == (0,) and matching.projects(24, 32) and not matching.projects(32, 32)
    assert load_recipe_again(listed, recipe.parent) == listed
    one = load_recipe(recipe, ["matching.distance=cka"]).matching
    assert one.mixes_of(2) == ({"cka": 1.0},) * 2 and one.unprojected(2) == (0, 1)


def load_recipe_again(recipe: Recipe, folder: Path) -> Recipe:
    (folder / "again.yaml").write_text(dump_recipe(recipe))
    return load_recipe(folder / "again.yaml")


def test_every_placement_has_its_capabilities_and_a_cache_is_written_by_one_with_weights() -> None:
    assert set(get_args(PlacementName)) == PLACEMENTS.keys()
    assert {name for name, placement in PLACEMENTS.items() if placement.has_weights} == set(get_args(WithWeights))
    assert [name for name, placement in PLACEMENTS.items() if placement.is_whole] == ["replicated"]
    shared = load_recipe("quickstart", ["teacher.share_cache=true", "teacher.placement=zero3"]).teacher
    assert shared.placed.is_sharded and not shared.serving.has_weights and shared.serving_name == "share_cache"


PACKED: dict[str, Any] = {"data.batching": "packed", "data.max_length": 128}


@pytest.fixture
def sizeless(tmp_path: Path) -> Path:
    """The quickstart without train.batch_size."""
    values = load_recipe("quickstart").model_dump(mode="json")
    del values["train"]["batch_size"]
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    return tmp_path / "recipe.json"


def test_tokens_of_a_step_are_whole_sequences(sizeless: Path) -> None:
    recipe, packing = load_recipe("quickstart"), ["data.batching=packed", "data.max_length=128"]
    packed = recipe.changed({**PACKED, "train.batch_size": 64, "train.batch_tokens": 8192})
    assert packed.train.batch_size == 64 and packed.changed({"seed": 1}).train.batch_tokens == 8192
    assert packed.changed({"data.max_length": 256}).train.batch_size == 32
    assert load_recipe(sizeless, ["train.batch_tokens=4096", *packing]).train.batch_size == 32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train.batch_tokens": 8192}, r"train\.batch_tokens: rows that are not packed .*; write data\.batching: packed"),
        ({**PACKED, "train.batch_tokens": 8000}, r"train\.batch_tokens: 8000 is no whole number of sequences of data\.max_length 128"),
        ({**PACKED, "train.batch_tokens": 8192, "train.batch_size": 32}, r"8192 tokens are 64 sequences of 128, .* says 32; give"),
        ({**PACKED, "train.batch_tokens": "8192"}, r"train\.batch_tokens: '8192' is no number of tokens; write a multiple of"),
        ({**PACKED, "train.batch_tokens": 0}, r"train\.batch_tokens: 0 is no number of tokens"),
        ({**PACKED, "train.batch_tokens": 128}, r"tokens: 128 tokens \(1 sequence\) are no multiple .* a multiple of 1024 \(8 seq"),
        ({**PACKED, "finetune.data": None, "finetune.train.batch_tokens": 8000}, r"finetune\.train\.batch_tokens: 8000 is no whole"),
    ],
)  # fmt: skip
def test_tokens_of_a_step_that_can_t_be(sizeless: Path, changes: dict[str, Any], sentence: str) -> None:
    """Said in the key that was written."""
    with pytest.raises(InputError, match=sentence):
        load_recipe(sizeless, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def test_a_step_without_a_size_names_both_keys(sizeless: Path) -> None:
    missing = r"key 'train\.batch_size' is missing; add it, or where rows are packed batch_tokens$"
    with pytest.raises(InputError, match=missing):
        load_recipe(sizeless)


def test_a_batch_in_tokens_is_refused_in_tokens() -> None:
    train = load_recipe("quickstart").changed({**PACKED, "train.batch_size": 64, "train.batch_tokens": 8192}).train
    with pytest.raises(
        InputError, match=r"^train\.batch_tokens: 8192 tokens \(64 sequences\) can't be shared by 3 ranks"
    ):
        accumulation_steps(train, 3)
    with pytest.raises(
        InputError, match=r"^train\.batch_tokens: 8192 tokens \(64 sequences\) per step, .* fill only 63"
    ):
        total_steps(train, 63)


def test_a_mixture_has_its_sources_and_nothing_beside_them() -> None:
    sources = [{"source": "a.jsonl", "weight": 2}, {"source": "b/a.jsonl", "split": "validation", "weight": 1}]
    place = {"data.source": "records", "data.rows": None, "data.split": "train", "data.validation": None}
    looking = {"train.validate_every": 0, "train.keep": "last"}
    recipe = load_recipe("quickstart").changed(
        {**place, **looking, "data.sources": sources, "evaluation.generation.source": "a.jsonl"}
    )
    assert recipe.data.names == ("a", "a-validation") and recipe.data.weights == (2.0, 1.0)
    with pytest.raises(
        InputError, match=r"data\.sources\.1\.weight: other sources have one; give every source a weight"
    ):
        recipe.changed({"data.sources": [sources[0], {"source": "c.jsonl"}]})
    with pytest.raises(InputError, match=r"data\.rows: sources says where the rows are .*; write rows there"):
        recipe.changed({"data.rows": 5})
    for unread in ({"format": "text"}, {"columns": {"a": "text"}}, {"template_options": {"enable_thinking": False}}):
        (key,) = unread
        with pytest.raises(InputError, match=rf"data\.{key}: sources says .* how they are read; write {key} there"):
            recipe.changed({f"data.{key}": unread[key]})
    with pytest.raises(InputError, match=r"data\.sources\.0\.rows: the built-in task is endless"):
        recipe.changed({"data.sources": [{"source": "records", "weight": 1}]})
    with pytest.raises(InputError, match=r"evaluation\.generation\.source: the data has several sources; name the one"):
        recipe.changed({"evaluation.generation.source": None})


def test_validation_of_another_source_is_read_as_it_says() -> None:
    recipe = load_recipe("quickstart")
    place = {"data.source": "a.jsonl", "data.rows": None, "data.template_options": {"enable_thinking": False}}
    plain = recipe.changed({**place, "data.validation": {"source": "b.jsonl"}}).data.held_out
    assert plain is not None and plain.template_options == {"enable_thinking": False}
    own = {"source": "b.jsonl", "template_options": {"thinking_budget": 5}}
    told = recipe.changed({**place, "data.validation": own}).data.held_out
    assert told is not None and told.template_options == {"thinking_budget": 5}
    with pytest.raises(InputError, match=r"data\.validation\.template_options: it belongs to a source of its own"):
        recipe.changed({"data.validation": {"share": 0.1, "template_options": {"thinking_budget": 5}}})
    with pytest.raises(InputError, match=r"template_options: 'tokenize' is set by llmkd itself"):
        recipe.changed({**place, "data.validation": {"source": "b.jsonl", "template_options": {"tokenize": True}}})


STREAM = "data.streaming=true"
STREAMED = {"source": "a.jsonl", "streaming": True}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train={epochs: 2, batch_size: 8, micro_batch_size: 4, learning_rate: 0.1}"], "train.epochs: nobody knows how long"),
        (["teacher.placement=cache"], "data.streaming: a teacher with placement cache has seen all rows before training"),
        (["teacher.share_cache=true"], "data.streaming: a teacher with share_cache has seen all rows before training"),
        (["data.validation.share=0.1"], "validation.share: a stream's rows are not counted"),
        (["data.rows=100"], "rows: a stream is read as far as train.steps takes it; leave rows out"),
        (["data.source=records", "data.rows=100"], "streaming: the built-in task is made in memory"),
        (["data={streaming: true, sources: [{source: a.jsonl}, {source: b.jsonl}]}"], "several sources can't be mixed as streams"),
        (
            ["teacher.path=null", f"finetune={json.dumps(FINETUNE)}"],
            "data.streaming: a new model's tokenizer is trained on all rows; write data.streaming: false, or start from a checkpoint",
        ),
        (
            ["teacher.path=null", f"finetune={json.dumps({**FINETUNE, 'data': STREAMED})}", "data.streaming=false"],
            "finetune.data.streaming: a new model's tokenizer is trained on all rows",
        ),
        (["data.streaming=false", "data.shuffle_rows=5"], "shuffle_rows: all rows are shuffled where they are tokenized first"),
    ],
)  # fmt: skip
def test_what_a_stream_can_not_do_is_refused(recipe: Path, overrides: list[str], expected: str) -> None:
    assert expected in refusal(recipe, STREAM, *overrides)


def test_a_streams_validation_is_no_stream(recipe: Path) -> None:
    apart = load_recipe(recipe, [STREAM, "data.validation.source=b.jsonl"]).data.held_out
    assert apart is not None and not apart.streaming and apart.rows == 256


def test_models_are_scored_in_the_dtype_of_the_training_unless_the_recipe_names_one(tmp_path: Path) -> None:
    """And all of a study's models in one, whatever a variant is trained in."""
    file = tmp_path / "recipe.yaml"
    train = {key: value for key, value in SMALL["train"].items() if key != "dtype"}
    file.write_text(yaml.safe_dump({**SMALL, "train": train}))
    assert load_recipe(file).evaluation.dtype == "bfloat16"  # train.dtype's own default
    assert load_recipe(file, ["train.dtype=float32"]).evaluation.dtype == "float32"
    assert load_recipe(file, ["evaluation.dtype=float32"]).evaluation.dtype == "float32"
    assert load_recipe(file).changed({"train.dtype": "float32"}).evaluation.dtype == "bfloat16"
    with pytest.raises(InputError, match=r"train\.dtype: input should be 'float32' or 'bfloat16'"):
        load_recipe(file, ["train.dtype=half"])
    assert load_recipe("quickstart").evaluation.dtype == load_recipe("quickstart").train.dtype == "float32"
