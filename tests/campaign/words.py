"""Recipes and command lines that are wrong, or that may be: each is refused in one sentence with nothing written, or works."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import yaml

from llmkd.recipe.recipe import load_recipe
from tests.campaign import oracle
from tests.campaign.outcome import Outcome
from tests.campaign.place import HANG_SECONDS, Place
from tests.distributed.command import Command
from tests.tiny import recipe_values

WORKS = ("step 1/", "writing shard", "cache:", "study 1/")
"""What a command says once it has accepted its recipe and works, which may take it long."""
_NUMBERS = [0, 1, -1, 2, 3, 7, 0.5, 1.5, -0.5, 1e-320, 1e40, 2**31, 2**48, 10**30, float("inf"), float("nan")]
_TEXTS = [
    "",
    " ",
    "none",
    "forward",
    "forwards",
    "auto",
    "true",
    "/dev/zero",
    "/dev/null",
    "../..",
    "x" * 300,
    "a/b",
    "²",
    "\u2028",
    "1:30",
]
_OTHERS = [
    None,
    True,
    False,
    [],
    [0],
    [0, 0],
    [[0, 1]],
    [[0, 99]],
    [None],
    {},
    {"a": 1},
    {"": 0},
    {"forward": {"seed": 1}},
    ["forward", "none"],
]
VALUES: list[Any] = [*_NUMBERS, *_TEXTS, *_OTHERS]
NO_ONES: list[Any] = [{"no such key": 1}, [{"no": ["such"]}, "value"], "no such value, of any key"]
"""Values that no key of a recipe takes but for texts and free mappings (`_takes_any`)."""
_TAKES_TEXT = ("path", "source", "name", "output", "revision", "split", "tokens", "wandb", "include", "adapter", "strategies", "tasks",
               "columns", "variants", "template_options", "reference")  # fmt: skip


def recipes(place: Place, draw: random.Random, number: int) -> Outcome:
    """A right recipe with one to three keys changed. Three in four have a change that nothing could accept."""
    right = load_recipe(place.folder / "recipe.yaml").model_dump(mode="json")
    values, keys = json.loads(json.dumps(recipe_values(place.folder))), _keys(right)
    changed = [_change(values, right, key, draw) for key in draw.sample(keys, draw.choice((0, 1, 1, 2)))]
    wrong = draw.random() < 0.75 or not changed
    if wrong:
        changed.append(_spoil(values, keys, draw))
    values["output"] = values["output"] if "output" in values and draw.random() < 0.1 else str(place.work)
    place.clear()
    file = place.folder / "mutated.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True))
    verb = draw.choice(
        (
            ["plan", "RECIPE", "--ranks", "2"],
            ["doctor", "RECIPE"],
            ["train", "-r", "RECIPE"],
            ["cache", "RECIPE"],
            ["study", "RECIPE"],
        )
    )
    line = [str(file) if word == "RECIPE" else word for word in verb]
    return _called(place, line, f"{' '.join(verb)}, {', '.join(changed)}", must_refuse=wrong)


def _change(values: dict[str, Any], right: dict[str, Any], key: str, draw: random.Random) -> str:
    """Give a key another value, mostly of its own kind."""
    now: Any = right
    for part in key.split("."):
        now = now[part]
    alike = [value for value in VALUES if type(value) is type(now) and now is not None]
    value = draw.choice(alike if alike and draw.random() < 0.8 else VALUES)
    _put(values, key, value)
    return f"{key}: {value!r}"


def _spoil(values: dict[str, Any], keys: list[str], draw: random.Random) -> str:
    """Write what no recipe has: a key that there is not, or a value that its key can't have."""
    key = draw.choice([key for key in keys if not set(key.split(".")) & set(_TAKES_TEXT)])
    if draw.random() < 0.4:
        key = key[:-1] + draw.choice("qxz") + key[-1:]
        value: Any = draw.choice(VALUES)
    else:
        value = draw.choice(NO_ONES)
    _put(values, key, value)
    return f"{key}: {value!r}"


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[last] = value


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a mapping, of sections and of values."""
    inside = [key for name, part in values.items() if isinstance(part, dict) for key in _keys(part, f"{prefix}{name}.")]
    return [*inside, *(f"{prefix}{name}" for name in values)]


COMMANDS = [
    ["plan", "RECIPE", "--ranks", "2"],
    ["doctor", "RECIPE", "--rows", "3"],
    ["maps", "--student-blocks", "3", "--teacher-blocks", "6"],
    ["maps", "--student-blocks", "3", "--teacher-blocks", "6", "--strategy", "explicit", "--pair", "0:1"],
    ["report", "FOLDER"],
    ["angles", "FOLDER", "--rows", "4"],
    ["compare", "FOLDER", "FOLDER"],
    ["train", "--recipe", "RECIPE", "--ranks", "2", "--set", "train.steps=4"],
    ["train", "--recipe", "RECIPE", "--strategy", "reverse", "--output", "WORK"],
    ["finetune", "RECIPE", "--ranks", "1"],
    ["cache", "RECIPE", "--output", "WORK", "--ranks", "1"],
    ["study", "RECIPE", "--shard", "1/2"],
    ["generate", "TEACHER", "--recipe", "RECIPE", "--items", "4", "--backend", "hf", "--output", "WORK"],
    ["evaluate", "TEACHER", "--recipe", "RECIPE", "--output", "WORK"],
]  # fmt: skip
PIECES = [
    *("--ranks", "--set", "--strategy", "--seed", "--pair", "--rows", "--output", "--help", "--no-such", "--device-gib", "--shard"),
    *("RECIPE", "FOLDER", "TEACHER", "-1", "0", "²:1", "nan", "1e9", "", "=", "a.b.c=1", "train=3", "train.steps=0", "explicit"),
    *("99999999999999999999", "/dev/zero", "3/2", "0/0"),
]  # fmt: skip


def commands(place: Place, draw: random.Random, number: int) -> Outcome:
    """A right command line with one or two arguments dropped, doubled, exchanged, replaced or added."""
    line = list(draw.choice(COMMANDS))
    for _ in range(draw.randint(1, 2)):
        spot, change = draw.randrange(len(line)), draw.choice(("drop", "double", "exchange", "replace", "add"))
        if change == "drop" and len(line) > 1:
            del line[spot]
        elif change == "double":
            line.insert(spot, line[spot])
        elif change == "exchange":
            other = draw.randrange(len(line))
            line[spot], line[other] = line[other], line[spot]
        elif change == "replace":
            line[spot] = draw.choice(PIECES)
        else:
            line.insert(spot, draw.choice(PIECES))
    place.clear()
    file = place.folder / "mutated.yaml"
    file.write_text(yaml.safe_dump({**recipe_values(place.folder), "output": str(place.work)}))
    names = {"RECIPE": file, "FOLDER": place.folder, "TEACHER": place.folder / "teacher", "WORK": place.work / "out"}
    return _called(place, [str(names.get(word, word)) for word in line], " ".join(line), must_refuse=False)


def _called(place: Place, line: list[str], what: str, *, must_refuse: bool) -> Outcome:
    """Run the command until it has refused, is done or works."""
    before = _listing(place.folder)
    command = Command(*line)
    deadline = time.monotonic() + HANG_SECONDS
    while (
        command.poll() is None and time.monotonic() < deadline and not any(word in command.output() for word in WORKS)
    ):
        time.sleep(0.01)
    works = command.poll() is None and time.monotonic() < deadline
    if works:
        command.send_signal(signal.SIGTERM)
        while command.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    code, out = command.poll(), command.output()
    faults = oracle.orphans(command)
    if code is None:
        faults.append(f"it did not end within {HANG_SECONDS} s")
    if "Traceback" in out:
        faults.append("a traceback")
    if code == 2:
        changed = sorted(before.items() ^ _listing(place.folder).items())
        faults += [*oracle.refusal(out), *([f"written: {changed[:4]}"] if changed else [])]
        return Outcome("refused", what, [f"{fault}:\n{out[-3000:]}" for fault in faults])
    if must_refuse:
        faults.append(f"not refused, code {code}")
    elif code != 0 and not works:
        faults.append(f"ended with {code}")
    return Outcome("accepted", what, [f"{fault}:\n{out[-3000:]}" for fault in faults])


def _listing(folder: Path) -> dict[str, int]:
    """Every file and folder of the place, each file with its time of change."""
    return {
        str(path): path.stat().st_mtime_ns if path.is_file() else 0
        for path in folder.rglob("*")
        if "references" not in path.parts
    }
