"""A whole small study by its command: trained, evaluated, reported; a second call does only what is missing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkd import study as module
from llmkd.cli import main
from llmkd.distributed.launch import Ending, Launch
from llmkd.errors import InputError
from llmkd.evaluation import generation
from llmkd.planning import parts
from llmkd.processes import only_one_in
from llmkd.recipe.options import Part
from llmkd.recipe.recipe import load_recipe
from llmkd.recipe.study_entries import entry_recipe, study_entries
from llmkd.report.write import report
from llmkd.study import study
from llmkd.train import train, train_in_turn
from llmkd.training import jobs
from tests.few_tasks import few_tasks
from tests.tiny import recipe_values

SCORED = ("generations", "evaluations", "agreement", "angles")


@pytest.fixture(scope="module")
def recipe_file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(tiny / "teacher", folder / "teacher")
    shape = json.loads((folder / "teacher" / "config.json").read_text())
    shape["max_position_embeddings"] = 512  # the built-in task's prompts are long in the tiny tokenizer
    (folder / "teacher" / "config.json").write_text(json.dumps(shape))
    values = recipe_values(tiny)
    values.update(
        teacher={"path": str(folder / "teacher"), "dtype": "float32"},
        output=str(folder / "runs"),
        evaluation={
            "tasks": ["records_choice"],
            "limit": 3,
            "batch_size": 12,
            "generation": {"source": "records", "items": 4, "max_new_tokens": 8},
            "agreement_rows": 4,
            "angles_rows": 4,
        },
        study={
            "strategies": ["all_to_one"],
            "seeds": [0],
            "ranks": 1,
            "margins": [{"metric": "generation/bleu", "within": 0.5}],
        },
    )
    values["data"]["max_length"] = 256
    values["train"].update(steps=2, micro_batch_size=8, warmup_steps=0)
    values["matching"] = {"target_block": 1, "strategy": "all_to_one"}
    (folder / "study.yaml").write_text(yaml.safe_dump(values))
    return folder / "study.yaml"


def test_study_is_run_once_and_reported(
    recipe_file: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, inside: list[Any]
) -> None:
    """Trained by real launches. Each scoring step's own tests start its child as a study does."""
    with caplog.at_level(logging.INFO):
        main(["study", str(recipe_file)])
    folder = recipe_file.parent / "runs" / "tiny"
    out, err = capfd.readouterr()
    said = [
        f"reading recipe {recipe_file}; what is imported for it takes some seconds",
        "study: checking what 4 models need, before any is trained",
        "study 1/2: training ce_only-s0 on 1 rank",
        "study: writing the report",
    ]
    assert [line for line in caplog.messages if line in said] == said, "what is being done is said before it takes long"
    assert "Generating" not in err and "metadata" not in caplog.text, (
        "what libraries say to those who program with them"
    )
    assert f"Report: {folder / 'report.html'}" in out and "all_to_one" in out
    entries = json.loads((folder / "study.json").read_text())["entries"]
    assert [e["name"] for e in entries] == ["teacher", "undistilled", "ce_only-s0", "all_to_one-s0"]
    for entry in entries:
        result = json.loads((folder / entry["evaluation"]).read_text())
        assert result["error"] is None and 0 <= result["tasks"]["records_choice"]["acc"] <= 1
        written = json.loads((folder / entry["generation"]).read_text())
        assert written["error"] is None and written["items"] == 4 and 0 <= written["metrics"]["bleu"] <= 100
        if entry["kind"] == "teacher":
            assert entry["agreement"] is None
        else:
            agreed = json.loads((folder / entry["agreement"]).read_text())
            assert agreed["error"] is None and agreed["rows"] == 4 and agreed["metrics"]["kl"] > 0
        if entry["train"] is not None:
            seen = json.loads((folder / "angles" / f"{entry['name']}.json").read_text())
            assert seen["error"] is None and seen["rows"] == 4 and len(seen["stacks"][0]["after"]["blocks"]) == 3
    trained = folder / "students" / "all_to_one-s0"
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["pairs"] == [[0, 1], [1, 1], [2, 1]] and summary["world_size"] == 1
    assert not (trained / "initial").exists() and (trained / "model" / "model.safetensors").is_file()
    report = (folder / "report.md").read_text()
    assert "With one seed nothing can be concluded" in report and "undistilled" in report
    assert "## Angles between teacher blocks" in report

    results = [*folder.glob("students/*/model/*"), *folder.glob("evaluations/*.json*")]
    made = {path: path.stat().st_mtime_ns for path in results}
    main(["study", str(recipe_file)])
    assert all(p.stat().st_mtime_ns == when for p, when in made.items())

    with pytest.raises(InputError, match="made by another recipe: train.learning_rate was 0.003, now 0.1"):
        study(load_recipe(recipe_file, ["train.learning_rate=0.1"]))
    with pytest.raises(InputError, match="train.batch_size: 8 rows can't be shared by 3 ranks"):
        study(load_recipe(recipe_file), ranks=3)


def test_two_parts_on_machines_that_share_the_folder_are_the_whole_study(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    inside: list[Any],
) -> None:
    """The study above, in two parts; the second, which is started first, waits until the first has the teacher's texts."""
    recipe, whole = load_recipe(recipe_file, [f"output={tmp_path}"]), recipe_file.parent / "runs" / "tiny"

    class Waiting(Exception): ...

    def waits(seconds: float) -> None:
        raise Waiting

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO), pytest.raises(Waiting):
        patch.setattr(parts.time, "sleep", waits)
        study(recipe, 1, Part(2, 2))
    assert "waiting for part 1/2, which makes and scores the teacher; it is not running: start it" in caplog.text
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO), pytest.raises(Waiting):
        patch.setattr(parts.time, "sleep", waits)
        with only_one_in(recipe.folder / "parts" / "1-of-2"):
            study(recipe, 1, Part(2, 2))
    assert f"process {os.getpid()} on {socket.gethostname()}" in caplog.text and "is at it" in caplog.text
    assert not list(recipe.folder.rglob("*.json")), "what parts share, the first alone writes"
    assert study(recipe, 1, Part(1, 2)) is None
    trained = [[folder.name for folder in sorted((recipe.folder / "students").iterdir())]]
    assert study(recipe, 1, Part(2, 2)) is None
    trained.append([folder.name for folder in sorted((recipe.folder / "students").iterdir())])
    assert trained == [["all_to_one-s0"], ["all_to_one-s0", "ce_only-s0"]]
    assert sum(order["model"]["name"] == "teacher" for order in inside) == 2, "its texts and lm-eval, once each"
    results = sorted(file.relative_to(whole) for name in SCORED for file in (whole / name).glob("*.json"))
    assert len(results) == 4 + 4 + 3 + 2
    for file in results:
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (recipe.folder, whole))
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-6, nan_ok=True) and ours["error"] is None, file
    for student in ("all_to_one-s0", "ce_only-s0"):
        weights = Path("students") / student / "model" / "model.safetensors"
        assert (recipe.folder / weights).read_bytes() == (whole / weights).read_bytes()
    assert report(recipe.folder).results.problems == {}
    with pytest.raises(InputError, match="works in this folder"), only_one_in(recipe.folder / "parts" / "2-of-2"):
        study(recipe, 1, Part(2, 2))


def numbers(result: dict[str, Any]) -> list[float]:
    """All scores and angles of a result file, in the file's order."""
    left: list[Any] = [result.get(key) for key in ("metrics", "tasks", "stacks")]
    found: list[float] = []
    while left:
        value = left.pop()
        left += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        found += [value] if isinstance(value, float | int) else []
    assert found
    return found


@pytest.mark.parametrize("given", ["0/2", "3/2", "2", "1/2/3", "a/b", "-1/2"])
def test_a_part_that_there_is_not_is_refused(given: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["study", "quickstart", "--shard", given])
    assert ending.value.code == 2 and "1/4, 2/4, 3/4 and 4/4" in capfd.readouterr().err


def test_a_step_that_can_not_be_done_costs_the_others_nothing(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inside: list[Any]
) -> None:
    """The study above, scored again after its texts are lost, when generation meets a mistake: the rest of the report is made."""
    folder = tmp_path / "tiny"
    shutil.copytree(recipe_file.parent / "runs" / "tiny", folder)
    shutil.rmtree(folder / "generations")

    def refuse(*_: object, **__: object) -> None:
        raise InputError("evaluation.generation.backend: vLLM is not installed here; write hf")

    monkeypatch.setattr(generation, "generate", refuse)
    recipe = load_recipe(recipe_file, [f"output={tmp_path}", "study.margins=[{metric: generation/bleu, within: 2}]"])
    with pytest.raises(InputError, match="vLLM is not installed here; write hf .the report of all else"):
        study(recipe)
    results = json.loads((folder / "results.json").read_text())
    assert any(metric["step"] == "lm-eval" for metric in results["metrics"])
    assert all("generation not yet" in why for why in results["problems"].values()) and results["problems"]
    changed = json.loads((folder / "study.json").read_text())["margins_history"]
    assert [line["margins"]["generation/bleu"] for line in changed] == [0.5, 2] and changed[-1]["results"] > 0
    assert any("margin" in note for note in results["notes"])


def test_margins_whose_time_is_lost_count_as_set_now(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe(recipe_file, [f"output={tmp_path}"])
    entries = study_entries(recipe)
    assert module._study_file(recipe, entries).margins_history[-1].results == 0 and "is gone" not in caplog.text
    (tmp_path / "tiny" / "generations").mkdir(parents=True)
    (tmp_path / "tiny" / "generations" / "teacher.json").write_text("{}")
    assert module._study_file(recipe, entries).margins_history[-1].results == 1
    assert f"{tmp_path / 'tiny' / 'study.json'} is gone, and with it when margins were set" in caplog.text


def test_every_entry_has_a_recipe_of_its_own(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["study.seeds=[3, 4]", "study.strategies=[none, forward, all_to_one]"])
    entries = {e.name: e for e in study_entries(recipe)}
    assert len(entries) == 2 + 2 + 6
    one = entry_recipe(recipe, entries["all_to_one-s4"])
    assert (one.seed, one.matching.strategy, one.matching.target_block) == (4, "all_to_one", 1)
    assert entry_recipe(recipe, entries["forward-s3"]).matching.target_block is None
    ce_only = entry_recipe(recipe, entries["ce_only-s3"])
    assert (ce_only.loss.kl, ce_only.loss.hidden, ce_only.loss.ce) == (0, 0, 1)
    assert entries["undistilled"].seed is None
    random = recipe.changed({"student.init": "random"})
    assert [e.name for e in study_entries(random)][1:3] == ["undistilled-s3", "undistilled-s4"]


def test_a_variant_is_a_student_with_keys_of_its_own(recipe_file: Path) -> None:
    cosine = {"matching.distance": "cosine", "loss.hidden": 0.5}
    recipe = load_recipe(recipe_file, [f"study.variants={json.dumps({'cosine': cosine})}", "study.strategies=[none]"])
    entries = {e.name: e for e in study_entries(recipe) if e.kind == "student"}
    assert list(entries) == [f"{name}-s{seed}" for name in ("none", "cosine") for seed in recipe.study.seeds]
    one = entry_recipe(recipe, entries[f"cosine-s{recipe.study.seeds[0]}"])
    assert (one.matching.distance, one.loss.hidden, one.matching.strategy) == ("cosine", 0.5, recipe.matching.strategy)
    assert entry_recipe(recipe, entries[f"none-s{recipe.study.seeds[0]}"]).matching.distance == recipe.matching.distance
    assert recipe.changed({"study.reference": "cosine"}).study.compared_with == "cosine"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("study.variants={forward: {loss.hidden: 1.0}}", "study.variants: 'forward' can't name a student"),
        ("study.variants={a: {}}", "study.variants.a: nothing is changed"),
        ("study.variants={a: {data.rows: 7}}", "study.variants.a: data.rows is the same for all students"),
        ("study.variants={a: {loss.hiden: 7}}", "hiden.*hidden"),
        ("study.variants={a: {matching.strategy: forwrd}}", "matching.strategy.*forwrd.*forward"),
        ("evaluation.tasks=[records_choise]", "no task 'records_choise'.*did you mean records_choice"),
        ("student.blocks=9", "student.blocks: 9 blocks can't be copied from a teacher of 6"),
        ("matching.target_block=6", "target"),
        ("teacher.path=/nowhere", "teacher.path: no folder '/nowhere'"),
        ("data.source=/nowhere.jsonl", "data.source: no file or folder '/nowhere.jsonl'"),
        ("data.rows=5", "train.batch_size: 8 rows per step, but the data has only 5"),
        ("study.strategies=[]", "study.strategies: name at least one"),
        ("evaluation.generation.source=null", "evaluation.generation.source: the students are trained on all of"),
        ("study.reference=reverse", "study.reference: 'reverse' is not known"),
    ],
)
def test_what_would_stop_a_study_is_said_before_anything_is_written(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, sentence: str
) -> None:
    few_tasks(monkeypatch)
    with pytest.raises(InputError, match=sentence):
        study(load_recipe(recipe_file, [f"output={tmp_path}", override]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_study_makes_one_cache_and_teaches_all_students_from_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ["study.strategies=[forward, random]", "study.baselines=[]", "data.rows=24", "matching.target_block=null"]
    recipe = load_recipe(recipe_file, [*sets, f"output={tmp_path}", "teacher.share_cache=true", "cache.shard_mib=0.1"])
    launched: list[Any] = []
    launch_each = module.launch_each

    def noted(launches: list[Launch], *given: Any) -> Any:
        launched.extend(one.arguments for one in launches)
        return launch_each(launches, *given)

    monkeypatch.setattr(module, "launch_each", noted)
    monkeypatch.setattr(module, "_score", lambda *_: [])  # what is made of the students is another test's
    study(recipe)
    assert ["--cache-only" in given for given in launched] == [True, False, False]
    contents = json.loads((recipe.folder / "cache" / "manifest.json").read_text())["contents"]
    for name in ("forward-s0", "random-s0"):
        meta = json.loads((recipe.folder / "students" / name / "model" / "llmkd.json").read_text())
        assert meta["inputs"]["teacher.placement"] == "cache" and "cache.dtype" not in meta["inputs"]
        assert {block for _, block in meta["pairs"]} <= set(contents["blocks"])

    study(recipe)
    assert len(launched) == 3  # every student is there, so no cache is asked for
    files = [*(recipe.folder / "cache").iterdir()]
    made = {file: file.stat().st_mtime_ns for file in files}
    shutil.rmtree(recipe.folder / "students" / "random-s0")
    study(recipe)
    assert ["--cache-only" in given for given in launched[3:]] == [True, False]
    assert {file: file.stat().st_mtime_ns for file in files} == made  # it is whole, and is kept
    assert (recipe.folder / "students" / "random-s0" / "model").is_dir()


def test_a_student_that_was_killed_before_its_summary_is_finished_by_the_study(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Any
) -> None:
    from llmkd import study as module

    study_sets = ["study.strategies=[none]", "study.baselines=[]", "matching.target_block=null"]
    recipe = load_recipe(
        recipe_file, [*study_sets, f"output={tmp_path}", "evaluation.tasks=[]", "matching.strategy=none"]
    )
    [entry] = [entry for entry in study_entries(recipe) if entry.train]
    run = entry.run_folder(recipe.folder)
    launched: list[list[str]] = []

    def launch_here(_: int, arguments: list[str]) -> Ending:
        launched.append(arguments)
        train(world, jobs.distil_job(world, entry_recipe(recipe, entry), run))
        return Ending(0, False)

    monkeypatch.setattr(
        module, "launch_each", lambda launches, *_: [launch_here(one.ranks, one.arguments) for one in launches]
    )
    monkeypatch.setattr(module, "_score", lambda *_: [])
    study(recipe)
    weights = (run / "model" / "model.safetensors").read_bytes()
    (run / "summary.json").unlink()
    (run / "initial").mkdir()
    written = study(recipe)
    assert written is not None and [training.state for training in written.results.runs] == ["done"]
    assert len(launched) == 2 and (run / "summary.json").is_file() and not (run / "initial").exists()
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    study(recipe)
    assert len(launched) == 2


@pytest.mark.slow
def test_students_in_turn_and_beside_each_other_are_those_of_one_after_another(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups at a time, each of two students of a seed in one process."""
    monkeypatch.setattr(module, "_score", lambda *_: [])
    sets = [
        "study.strategies=[forward, none]",
        "study.seeds=[0, 1]",
        "study.baselines=[]",
        "matching.target_block=null",
    ]
    folders = []
    for name, further in (("plain", []), ("at_once", ["study.together=2", "study.parallel=2"])):
        recipe = load_recipe(recipe_file, [*sets, f"output={tmp_path / name}", "matching.strategy=none", *further])
        study(recipe)
        folders.append(recipe.folder)
    plain, at_once = folders
    assert sorted(file.name for file in (at_once / "logs").iterdir()) == ["forward-s0.log", "forward-s1.log"]
    assert "none-s1: step 1/" in (at_once / "logs" / "forward-s1.log").read_text()
    for name in ("forward-s0", "none-s0", "forward-s1", "none-s1"):
        ours, theirs = (f / "students" / name for f in (at_once, plain))
        weights = "model/model.safetensors"
        assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
        assert json.loads((ours / "summary.json").read_text())["students_in_turn"] == 2


def test_what_failed_before_a_study_was_stopped_is_told(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One student of three at two a time failed, one saved at the signal, one was not begun; without the first, all is kept."""
    monkeypatch.setattr(module, "_score", lambda *_: [])
    monkeypatch.setattr(module.jobs, "is_finished", lambda _: False)
    sets = [
        "study.strategies=[none, forward, reverse]",
        "study.baselines=[]",
        "study.parallel=2",
        "matching.target_block=null",
    ]
    sets += ["matching.strategy=none", f"output={tmp_path}"]
    command = ["study", str(recipe_file), *[part for change in sets for part in ("--set", change)]]
    endings: list[Ending | None] = [Ending(3, False), Ending(0, True), None]
    monkeypatch.setattr(module, "launch_each", lambda *_: endings)
    with pytest.raises(SystemExit) as exit:
        main(command)
    *_, stopped, mistake = capfd.readouterr().err.splitlines()
    assert exit.value.code == 2 and stopped.startswith("Stopped: all that is trained and scored so far is kept")
    assert (
        mistake.startswith("Error: study: training none-s0 ended with code 3 (see ")
        and "none-s0.log); the same" in mistake
    )
    assert "forward" not in mistake and "reverse" not in mistake
    endings[0] = Ending(143, True)
    main(command)
    assert capfd.readouterr().err.splitlines()[-1] == stopped


def test_a_student_that_diverges_costs_the_others_nothing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Any
) -> None:
    """Alone or in turn with others: they are trained, scored and reported, and the mistake is told at the end."""
    spoilt = "study.variants={bad: {train.learning_rate: 1.0e+30, train.weight_decay: 1.0e+20}}"
    sets = ["study.strategies=[none]", "study.baselines=[]", "study.seeds=[0, 1]", "study.together=2", spoilt]
    sets += ["matching.target_block=null", "matching.strategy=none", "train.steps=2", "train.warmup_steps=0"]
    recipe = load_recipe(recipe_file, [*sets, f"output={tmp_path}"])
    scored: list[list[str]] = []
    groups: list[int] = []

    def launches_here(launches: list[Launch], *_: Any) -> list[Ending]:
        endings = []
        for one in launches:
            given = iter(one.arguments)
            pairs = [(next(given), next(given)) if flag == "--beside" else next(given) for flag in given]
            files = [(pairs[0], pairs[1]), *pairs[2:]]
            todo = [jobs.distil_job(world, load_recipe(file), Path(folder)) for file, folder in files]
            groups.append(len(todo))
            try:
                train_in_turn(world, todo)
                endings.append(Ending(0, False))
            except InputError:
                endings.append(Ending(2, False))
        return endings

    monkeypatch.setattr(module, "launch_each", launches_here)
    monkeypatch.setattr(module, "_score", lambda recipe, entries, ours: scored.append([e.name for e in ours]) or [])
    told = r"study: training bad-s0 ended .*; study: training bad-s1 ended .* \(the report of all else: .*report.html\)"
    with pytest.raises(InputError, match=told):
        study(recipe)
    assert groups == [2, 2] and scored == [["teacher", "none-s0", "none-s1"]]
    with pytest.raises(InputError, match=told):
        study(recipe)
    assert groups == [2, 2, 1, 1]
