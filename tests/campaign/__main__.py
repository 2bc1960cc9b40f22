"""`python -m tests.campaign`: trials until the time is over, then the counts; exit code 1 where one trial failed."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count as numbers
from itertools import cycle, islice, product
from pathlib import Path

import click

from llmkd import starting
from llmkd.text import aligned
from tests.campaign import damage, kills, words
from tests.campaign.outcome import Outcome
from tests.campaign.place import SCENARIOS, Place
from tests.distributed import warm

Trial = Callable[[Place, random.Random, int], Outcome]
Counts = Counter[tuple[str, str]]
"""By kind of trial and how it ended; and the signals that met a process."""


def _killed(scenarios: str, place: Place, draw: random.Random, number: int) -> Outcome:
    return kills.trial(place, draw, SCENARIOS[scenarios])


KINDS: dict[str, Trial] = {
    **{kind: partial(_killed, kind) for kind in SCENARIOS},
    "damage": damage.trial,
    "recipes": words.recipes,
    "commands": words.commands,
}
TURN = ("training", "damage", "recipes", "cache", "recipes", "damage", "commands", "training", "tokens", "damage", "recipes", "rollouts",
        "commands", "damage", "training", "recipes", "damage", "study")  # fmt: skip
"""The order of kinds where none is asked for: quick ones and those with many cases come more often."""


def asked(kinds: tuple[str, ...], count: int | None, first: int, trials: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """(kind, number) of the trials, in their order."""
    if trials:
        parts = [trial.rpartition("-") for trial in trials]
        if not all(kind in KINDS and number.isdigit() for kind, _, number in parts):
            raise click.BadParameter(f"write KIND-NUMBER, with one of {', '.join(KINDS)}", param_hint="--trial")
        return iter([(kind, int(number)) for kind, _, number in parts])
    if count is not None:
        return iter((kind, number) for number, kind in product(range(first, first + count), kinds or KINDS))
    counters = {kind: numbers(first) for kind in KINDS}
    return ((kind, next(counters[kind])) for kind in cycle(kinds or TURN))


@click.command()
@click.option("--minutes", type=float, default=10.0, show_default=True, help="No trial begins after so many minutes.")
@click.option("--seed", type=int, help="Of all that is drawn [default: drawn, and printed].")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Only trials of these kinds [default: all]."
)
@click.option("--count", type=click.IntRange(min=1), help="So many trials of each kind, whatever the time.")
@click.option("--first", type=int, default=0, show_default=True, help="The first trial's number.")
@click.option("--trial", "named", multiple=True, help="One trial alone, KIND-NUMBER, as a failure names it.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Also write the counts into this file.")
def main(
    minutes: float,
    seed: int | None,
    kinds: tuple[str, ...],
    count: int | None,
    first: int,
    named: tuple[str, ...],
    file: Path | None,
) -> None:
    """Disturb tiny runs at random, and compare each with an undisturbed one."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    print(f"campaign: seed {seed}", flush=True)
    trials = asked(kinds, count, first, named)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmkd-campaign-") as folder:
        _prepare(Path(folder))
        place = Place(Path(folder))
        counts, failed = campaign(place, seed, trials if count or named else _until(began + 60 * minutes, trials))
    _show(counts, seed, time.monotonic() - began, failed, file)
    sys.exit(int(bool(failed)))


def _prepare(folder: Path) -> None:
    """Set what the commands' server reads while it imports: no GPU, no network, small shards."""
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_CACHE=str(folder / "datasets"))
    starting.IMPORTS = (*warm.MODULES, "tests.campaign.small")


def campaign(place: Place, seed: int, trials: Iterable[tuple[str, int]]) -> tuple[Counts, list[str]]:
    """Do the trials: (how many of each kind ended how, the names of those that failed)."""
    counts, failed = Counts(), list[str]()
    for kind, number in trials:
        name, began = f"{kind}-{number}", time.monotonic()
        outcome = KINDS[kind](place, random.Random(f"{seed}/{kind}/{number}"), number)
        ending = "FAILED" if outcome.faults else outcome.ending
        counts[kind, ending] += 1
        counts[kind, "signals"] += outcome.strikes
        print(f"{name}: {ending}, {time.monotonic() - began:.1f} s: {outcome.did}", flush=True)
        if outcome.faults:
            failed.append(name)
            print("\n".join(f"  {fault}" for fault in outcome.faults))
            print(f"  again: python -m tests.campaign --seed {seed} --trial {name}", flush=True)
    return counts, failed


def _until(end: float, trials: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    while time.monotonic() < end:
        yield from islice(trials, 1)


def _show(counts: Counts, seed: int, seconds: float, failed: list[str], file: Path | None) -> None:
    endings = sorted({ending for _, ending in counts})
    rows = [
        [kind, *(str(counts[kind, ending] or "") for ending in endings)]
        for kind in KINDS
        if any(counts[kind, e] for e in endings)
    ]
    print(aligned([["trials", *endings], *rows]))
    values = {"seed": seed, "seconds": round(seconds), "failed": failed}
    values["counts"] = {kind: {e: counts[kind, e] for e in endings if counts[kind, e]} for kind in KINDS}
    print(json.dumps(values))
    if file is not None:
        file.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
