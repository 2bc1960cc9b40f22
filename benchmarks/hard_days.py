"""Hard days, counted: runs that are killed, checkpoints that are damaged, recipes and command lines that are wrong.

    python -m benchmarks.hard_days kills --count 30          kill -9 at any moment, then the same command at once
    python -m benchmarks.hard_days damage                    every file of a checkpoint flipped, cut, emptied, removed
    python -m benchmarks.hard_days recipes --count 300       one to three keys of a right recipe changed
    python -m benchmarks.hard_days commands --count 150      arguments dropped, doubled, exchanged, replaced

Each prints one line of JSON with its counts and exits with 1 where one fault was silent: a traceback, a hang, another result. The model
is the tests' tiny teacher, on the CPU. docs/reliability.md has the counts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import yaml
from safetensors.torch import load_file

from llmkd.cli import main as llmkd
from tests.tiny import make, recipe_values

HANG_SECONDS = 240
VALUES: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 0.5, 1.5, -0.5, 1e-320, 1e40, 2**31, 2**48, 10**30, float("inf"), float("nan")),
    *(
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
    ),
    *(
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
    ),
]
COMMANDS = [
    ["plan", "RECIPE", "--ranks", "2"],
    ["doctor", "RECIPE"],
    ["maps", "--student-blocks", "3", "--teacher-blocks", "6"],
    ["maps", "--student-blocks", "3", "--teacher-blocks", "6", "--strategy", "explicit", "--pair", "0:1"],
    ["report", "FOLDER"],
    ["angles", "FOLDER", "--rows", "4"],
    ["compare", "FOLDER", "FOLDER"],
]
PIECES = [
    *(
        "--ranks",
        "--set",
        "--strategy",
        "--seed",
        "--pair",
        "--rows",
        "--output",
        "--help",
        "--no-such",
        "--device-gib",
    ),
    *(
        "RECIPE",
        "FOLDER",
        "-1",
        "0",
        "²:1",
        "nan",
        "1e9",
        "",
        "=",
        "a.b.c=1",
        "train=3",
        "train.steps=0",
        "explicit",
        "forward",
    ),
    *("99999999999999999999", "/dev/zero"),
]


@click.group()
def cli() -> None:
    """Count what hard days do."""


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="llmkd-hard-days-"))
    try:
        make(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _finish(counts: Counter[str], *silent: str) -> None:
    print(json.dumps(dict(sorted(counts.items()))))
    sys.exit(int(any(counts[name] for name in silent)))


# --- Runs


def _start(folder: Path, run: str, ranks: int) -> subprocess.Popen[str]:
    options = {"train.steps": 12, "train.save_every": 3, "train.micro_batch_size": 2, "train.timeout_seconds": 60}
    sets = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    recipe = str(folder / "recipe.yaml")
    command = ["train", "--recipe", recipe, "--output", str(folder / run), "--ranks", str(ranks), *sets]
    code = "import sys; from llmkd.cli import main; main(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _ended(process: subprocess.Popen[str]) -> tuple[int | None, str]:
    """(exit code, or None for a hang; what it printed)."""
    try:
        out, _ = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[0]
    return process.returncode, out


def _same(ours: Path, theirs: Path) -> bool:
    """Whether two runs have the same weights and logged the same steps, each once."""
    weights = [load_file(run / "model" / "model.safetensors") for run in (ours, theirs)]
    steps = [
        [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().split("\n") if line]
        for run in (ours, theirs)
    ]
    return steps[0] == steps[1] and all(weights[0][key].equal(weights[1][key]) for key in weights[1])


@cli.command()
@click.option("--count", default=30, show_default=True, help="Kills.")
@click.option("--ranks", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
def kills(count: int, ranks: int, seed: int) -> None:
    """Kill a run's launcher or one of its ranks at a random moment, and start it again at once."""
    draw, counts = random.Random(seed), Counter[str]()
    with _place() as folder:
        began = time.monotonic()
        code, out = _ended(_start(folder, "whole", ranks))
        assert code == 0, out
        length = time.monotonic() - began
        run, kill = 0, 0
        process = _start(folder, "0", ranks)
        while kill < count:
            time.sleep(draw.uniform(0, length))
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            victim = int(draw.choice(children)) if children and draw.random() < 0.5 else process.pid
            kill += process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            code, out = _ended(process)
            counts["hangs"] += code is None
            counts["tracebacks"] += "Traceback" in out
            if code == 0:  # it was done before
                run = _compared(folder, run, counts)
            process = _start(folder, str(run), ranks)
        code, out = _ended(process)
        counts["hangs"] += code is None
        counts["tracebacks"] += "Traceback" in out
        counts["refused"] += code == 2
        if code == 0:
            _compared(folder, run, counts)
        counts["kills"] = kill
    _finish(counts, "hangs", "tracebacks", "refused", "another result")


def _compared(folder: Path, run: int, counts: Counter[str]) -> int:
    """Compare a finished run with the uninterrupted one; the number of the next."""
    counts["runs finished"] += 1
    counts["another result"] += not _same(folder / str(run), folder / "whole")
    counts["left over"] += len([path for path in (folder / str(run)).rglob("*.tmp")])
    return run + 1


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.Random(len(content)).randrange(len(content))] ^= 4
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": _flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "removed": Path.unlink,
}


@cli.command()
@click.option("--ranks", default=2, show_default=True)
def damage(ranks: int) -> None:
    """Damage each file of a run's last checkpoint in each way, with and without a checkpoint before it, and start the run again."""
    counts = Counter[str]()
    with _place() as folder:
        code, out = _ended(_start(folder, "whole", ranks))
        assert code == 0, out
        shutil.rmtree(folder / "whole" / "model")
        shutil.copytree(folder / "whole", folder / "again")
        code, _ = _ended(_start(folder, "whole", ranks))
        assert code == 0
        last = sorted((folder / "again" / "checkpoints").iterdir())[-1]
        for number, file in enumerate(path.relative_to(last) for path in sorted(last.rglob("*")) if path.is_file()):
            for name, harm in DAMAGES.items():
                run = f"{name}-{number}"
                shutil.copytree(folder / "again", folder / run)
                harm(folder / run / "checkpoints" / last.name / file)
                alone = number % 2
                if alone:
                    shutil.rmtree(sorted((folder / run / "checkpoints").iterdir())[0])
                code, out = _ended(_start(folder, run, ranks))
                counts["damaged"] += 1
                counts["hangs"] += code is None
                counts["tracebacks"] += "Traceback" in out
                counts["refused, naming it"] += bool(alone and code == 2 and last.name in out)
                right = not alone and code == 0 and last.name in out and _same(folder / run, folder / "whole")
                counts["gone on from the one before"] += right
                counts["unnoticed"] += not right and not (alone and code == 2)
                shutil.rmtree(folder / run)
    _finish(counts, "hangs", "tracebacks", "unnoticed")


# --- Words


def _called(arguments: list[str], counts: Counter[str]) -> None:
    """Run a command in this process and count how it ended."""
    printed = io.StringIO()

    def expired(number: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, expired)
    signal.alarm(60)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            llmkd(arguments)
        ended = "accepted"
    except SystemExit as end:
        ended = (
            "accepted"
            if end.code in (0, None)
            else "refused"
            if end.code == 2 and printed.getvalue().strip()
            else "silent"
        )
    except TimeoutError:
        ended = "hangs"
    except BaseException as error:
        ended = "tracebacks"
        print(arguments, type(error).__name__, str(error)[:200], file=sys.stderr)
    finally:
        signal.alarm(0)
    if ended in ("hangs", "silent"):
        print(ended, arguments, file=sys.stderr)
    counts[ended] += 1


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a mapping, of sections and of values."""
    inside = [key for name, part in values.items() if isinstance(part, dict) for key in _keys(part, f"{prefix}{name}.")]
    return [*inside, *(f"{prefix}{name}" for name in values)]


@cli.command()
@click.option("--count", default=300, show_default=True)
@click.option("--seed", default=0, show_default=True)
def recipes(count: int, seed: int) -> None:
    """Change one to three keys of a right recipe, and ask plan and doctor about it."""
    from llmkd.recipe.recipe import load_recipe

    draw, counts = random.Random(seed), Counter[str]()
    with _place() as folder:
        right = load_recipe(folder / "recipe.yaml").model_dump(mode="json")
        keys = _keys(right)
        for number in range(count):
            values = json.loads(json.dumps(recipe_values(folder)))
            for key in draw.sample(keys, draw.choice((1, 1, 2, 3))):
                *parents, last = key.split(".")
                section: Any = values
                for parent in parents:
                    section = section.setdefault(parent, {}) if isinstance(section, dict) else {}
                if isinstance(section, dict):
                    # mostly of the kind that is right: another is refused at once
                    now = _at(right, key)
                    alike = [value for value in VALUES if type(value) is type(now) and now is not None]
                    section[last] = draw.choice(alike if alike and draw.random() < 0.8 else VALUES)
            file = folder / f"{number}.yaml"
            file.write_text(yaml.safe_dump(values, allow_unicode=True))
            _called(["doctor", str(file)] if number % 3 == 0 else ["plan", str(file), "--ranks", "2"], counts)
    _finish(counts, "hangs", "tracebacks", "silent")


@cli.command()
@click.option("--count", default=150, show_default=True)
@click.option("--seed", default=0, show_default=True)
def commands(count: int, seed: int) -> None:
    """Drop, double, exchange and replace arguments of right command lines."""
    draw, counts = random.Random(seed), Counter[str]()
    with _place() as folder:
        names = {"RECIPE": str(folder / "recipe.yaml"), "FOLDER": str(folder)}
        for _ in range(count):
            line = list(draw.choice(COMMANDS))
            for _ in range(draw.randint(1, 2)):
                place = draw.randrange(len(line))
                change = draw.choice(("drop", "double", "exchange", "replace", "add"))
                if change == "drop":
                    del line[place]
                elif change == "double":
                    line.insert(place, line[place])
                elif change == "exchange":
                    other = draw.randrange(len(line))
                    line[place], line[other] = line[other], line[place]
                elif change == "replace":
                    line[place] = draw.choice(PIECES)
                else:
                    line.insert(place, draw.choice(PIECES))
                if not line:
                    break
            _called([names.get(word, word) for word in line], counts)
    _finish(counts, "hangs", "tracebacks", "silent")


if __name__ == "__main__":
    cli()
