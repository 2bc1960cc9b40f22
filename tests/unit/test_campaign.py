"""The campaign itself: what is wrong on purpose is reported, with the command that repeats it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import click
import pytest

from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import jobs
from tests.campaign import __main__ as main
from tests.campaign import damage, kills, oracle
from tests.campaign.place import SCENARIOS, Place
from tests.tiny import quick


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = load_recipe(tiny / "recipe.yaml").changed({**quick(tiny), "train.save_every": 1})
    assert train(world, jobs.distil_job(world, recipe, folder / "run"))
    return folder


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _log_again(file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[-1]]))


def _log_otherwise(file: Path) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**line, "loss": line["loss"] + 1e-6}) + "\n" for line in lines))


WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "weights": (_flip, "run/model/model.safetensors", "not as undisturbed: run/model/model.safetensors"),
    "a step twice": (_log_again, "run/metrics.jsonl", "run/metrics.jsonl has the steps [1, 2, 3, 3]"),
    "another loss": (_log_otherwise, "run/metrics.jsonl", "not as undisturbed: run/metrics.jsonl"),
    "a stray file": (Path.touch, "run/model.tmp", "left over: run/model.tmp"),
    "a lock": (Path.touch, "run/.lock", "left over: run/.lock"),
    "a file too few": (Path.unlink, "run/model/config.json", "missing: run/model/config.json"),
    "a checkpoint": (_flip, "run/checkpoints/step-00000003/rng-0.pt", "rng-0.pt is damaged"),
    "no checkpoint": (shutil.rmtree, "run/checkpoints/step-00000003", ""),
}


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_what_is_wrong_in_a_run_is_found(undisturbed: Path, tmp_path: Path, wrong: str | None) -> None:
    work = tmp_path / "work"
    shutil.copytree(undisturbed, work)
    if wrong is None or wrong == "no checkpoint":  # the one before it is whole, and only one has to be there
        assert oracle.result(work, undisturbed) == []
        shutil.rmtree(work / "run" / "checkpoints" / "step-00000002")
    spoil, name, fault = WRONG[wrong or "no checkpoint"]
    spoil(work / name)
    assert any(fault in found for found in oracle.result(work, undisturbed))


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("12:00:00 reading\nError: recipe.yaml: train.steps: write a number above 0\n", True),
        ("Usage: llmkd\n\nError: No such option '--no-such'.\n", True),
        ("Error: train.steps is wrong here\nError: train.steps is wrong here\n", False),
        ("Error: rows.jsonl: not there\nError: study: training ended with code 2 (see above); go on\n", True),
        ("Traceback (most recent call last):\nError: train.steps is wrong here\n", False),
        ("Error: \n", False),
        ("nothing\n", False),
    ],
)
def test_a_refusal_is_one_sentence(said: str, right: bool) -> None:
    assert (oracle.refusal(said) == []) is right


def test_a_trial_is_named_by_its_kind_and_number() -> None:
    assert list(main.asked((), None, 0, ("training-17", "cache-2"))) == [("training", 17), ("cache", 2)]
    assert list(main.asked(("cache", "study"), 2, 5, ())) == [("cache", 5), ("study", 5), ("cache", 6), ("study", 6)]
    turn = list(islice(main.asked((), None, 0, ()), 2 * len(main.TURN)))
    assert len(set(turn)) == len(turn) and {kind for kind, _ in turn} == {*main.KINDS}
    for wrong in ("training", "training-", "no-1"):
        with pytest.raises(click.BadParameter):
            main.asked((), None, 0, (wrong,))


def test_a_killed_run_that_is_not_the_undisturbed_one_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Really killed, and resumed to the right end; what is wrong is the one it is compared with, by a bit of its weights."""
    place, scenarios = Place(tmp_path), {"one rank": SCENARIOS["training"]["one rank"]}
    reference = place.reference("one rank", scenarios["one rank"]).result
    _flip(next(reference.glob("**/model.safetensors")))
    monkeypatch.setitem(main.KINDS, "training", lambda place, draw, _: kills.trial(place, draw, scenarios))
    counts, failed = main.campaign(place, 3, [("recipes", 0), ("training", 1)])
    said = capsys.readouterr().out
    ended = {
        key: count for key, count in counts.items() if count and key[1] != "signals"
    }  # how many met is the machine's
    assert failed == ["training-1"] and ended == {("recipes", "refused"): 1, ("training", "FAILED"): 1}, said
    faults = [line for line in said.splitlines() if line.startswith("  ")]
    weights = next(place.work.glob("**/model.safetensors")).relative_to(place.work)
    assert faults == [
        f"  not as undisturbed: {weights}",
        "  again: python -m tests.campaign --seed 3 --trial training-1",
    ]


def test_every_case_of_damage_is_met_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenarios in turn, until their cases are over; the first trials need no other scenario's."""
    cases = {"few": 2, "many": 5, "one": 1}
    asked: list[str] = []

    def known(place: Place, name: str) -> list[str]:
        asked.append(name)
        return [f"{name}{number}" for number in range(cases[name])]

    monkeypatch.setattr(damage, "HARMED", dict.fromkeys(cases))
    monkeypatch.setattr(damage, "_cases", known)
    place = cast(Place, None)
    assert damage._case(place, 1) == ("many", "many0") and asked == ["many"]
    met = [damage._case(place, number) for number in range(8)]
    assert [case for _, case in met] == ["few0", "many0", "one0", "few1", "many1", "many2", "many3", "many4"]
    assert damage._case(place, 8) == met[0] and damage.count(place) == 8
