"""A run, half done or finished, one of whose files is damaged; then the same commands."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import count as numbers
from pathlib import Path

from tests.campaign import oracle
from tests.campaign.outcome import Outcome
from tests.campaign.place import SCENARIOS, Place, Scenario, ended
from tests.distributed.command import Command


def _truncated(file: Path, draw: random.Random, other: Path) -> str:
    length = draw.randrange(file.stat().st_size) if file.stat().st_size else 0
    file.write_bytes(file.read_bytes()[:length])
    return f"cut to {length} bytes"


def _flipped(file: Path, draw: random.Random, other: Path) -> str:
    content = bytearray(file.read_bytes() or b"x")
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def _removed(file: Path, draw: random.Random, other: Path) -> str:
    file.unlink()
    return "removed"


def _swapped(file: Path, draw: random.Random, other: Path) -> str:
    ours, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(ours)
    return f"exchanged with {other.name}"


DAMAGES: dict[str, Callable[[Path, random.Random, Path], str]] = {
    "truncated": _truncated,
    "flipped": _flipped,
    "removed": _removed,
    "swapped": _swapped,
}
RESULTS = (
    "*/model/*",
    "*/metrics.jsonl",
    "*/summary.json",
    "*/generations/*",
    "*/agreement/*",
    "*/angles/*",
    "*/results.*",
    "*/report.*",
)
"""What a user or a study reads of a finished run. All else that is damaged and not read again does no harm: what reads it names it."""
SHOWS = ("tiny/results.", "tiny/report.")
"""Files of a study's folder that only show what others hold."""
Case = tuple[Path, str, str]
"""A copy of a run half done or finished, a kind of file, and the name of a damage."""
HARMED: dict[str, Scenario] = {
    name: scenario for kind in SCENARIOS.values() for name, scenario in kind.items() if scenario.harmed
}


def trial(place: Place, draw: random.Random, number: int) -> Outcome:
    """The trials' numbers go through the scenarios in turn, and within one through its states, kinds of file and damages."""
    name, (state, kind, damage) = _case(place, number)
    scenario = HARMED[name]
    place.clear(state)
    files = _by_kind(place.work, scenario)
    file = draw.choice(files[kind])
    others = [path for path in files[kind] if path != file] or [
        path for path in file.parent.iterdir() if path.is_file() and path != file
    ]
    other = draw.choice(others or [file])
    what = f"{name}, {state.name}: {file.relative_to(place.work)} {DAMAGES[damage](file, draw, other)}"
    return _judged(place, name, scenario, [file, other] if damage == "swapped" else [file], what)


def count(place: Place) -> int:
    """How many cases there are: each kind of file of each state of each scenario with each damage."""
    return sum(len(_cases(place, name)) for name in HARMED)


def _case(place: Place, number: int) -> tuple[str, Case]:
    """The trial's scenario and case; a scenario whose cases are over is left out of the turn, and after all cases they begin again."""
    names = sorted(HARMED)
    if number < len(names):  # the others' cases are not counted before they are needed
        return names[number], _cases(place, names[number])[0]
    number %= count(place)
    for turn in numbers():
        present = [name for name in names if len(_cases(place, name)) > turn]
        if number < len(present):
            return present[number], _cases(place, present[number])[turn]
        number -= len(present)
    raise AssertionError("the turns have no end")


@functools.cache
def _cases(place: Place, name: str) -> list[Case]:
    scenario = HARMED[name]
    cases = [
        (state, kind, damage)
        for state in place.states(name, scenario)
        for kind in sorted(_by_kind(state, scenario))
        for damage in sorted(DAMAGES)
    ]
    random.Random(0).shuffle(cases)
    return cases


def _by_kind(work: Path, scenario: Scenario) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in sorted({path for pattern in scenario.harmed for path in work.glob(pattern) if path.is_file()}):
        files.setdefault(oracle.kind_of(file, work), []).append(file)
    return files


def _judged(place: Place, name: str, scenario: Scenario, files: list[Path], what: str) -> Outcome:
    """Run the scenario's commands: each is to make good, to refuse or to name the damage."""
    said = ""
    for verb in scenario.commands:
        command = Command(*place.arguments(scenario, verb))
        code, out = ended(command)
        said += out
        faults = [*oracle.orphans(command), *(["a traceback"] if "Traceback" in out else [])]
        if code == 2:
            faults += oracle.refusal(out)
            faults += [] if _refused_by_name(out, files, place.work) else ["the damaged file is not named"]
            return Outcome("refused", what, [f"{fault}:\n{out[-3000:]}" for fault in faults])
        if code != 0 or faults:
            return Outcome("", what, [f"ended with {code} {fault}:\n{out[-3000:]}" for fault in faults or [""]])
    named = _names(said, files, place.work)
    wrong = oracle.result(place.work, place.reference(name, scenario).result)
    wrong = [fault for fault in wrong if not (named and ".damaged" in fault)]
    if not wrong:
        return Outcome("named, made good" if named else "made good or not read", what)
    shown = SHOWS if named else ()  # the log says that what a report shows of a damaged file may be wrong
    own = all(
        any(part in fault for part in (*(_within(file, place.work) for file in files), *shown)) for fault in wrong
    )
    read = [str(file.relative_to(place.work)) for file in files if file.suffix != ".log" and file.name != "README.md"]
    results = any(fnmatch(name, result) for name in read for result in RESULTS)  # logs and cards are for people
    if own and (named or not results):  # all else is as undisturbed
        return Outcome("named, left" if named else "left, not read", what)
    return Outcome("", what, [f"silently wrong: {fault}" for fault in wrong])


def _within(file: Path, work: Path) -> str:
    """The name by which a fault tells of a damaged file: of a checkpoint's the checkpoint's."""
    name = file.relative_to(work)
    return next(
        (str(parent) for parent in name.parents if parent.name.startswith("step-")),
        oracle.kind_of(file, work, hashes=True),
    )


def _names(said: str, files: list[Path], work: Path) -> bool:
    """Whether one of the files is named, or the checkpoint that it is of is said to be set aside."""
    checkpoints = {parent.name for file in files for parent in file.parents if parent.name.startswith("step-")}
    return any(str(file) in said or (file.name in said and file.suffix != ".yaml") for file in files) or any(
        f"{name}.damaged" in said for name in checkpoints
    )


def _refused_by_name(out: str, files: list[Path], work: Path) -> bool:
    """As `_names`, of a refusal: a folder below the run's own is enough."""
    parents = [str(parent) for file in files for parent in file.parents if len(parent.parts) > len(work.parts) + 1]
    return _names(out, files, work) or any(parent in out.splitlines()[-1] for parent in parents)
