"""A run, half done or finished, one of whose files is damaged; then the same commands."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.campaign import oracle
from tests.campaign.outcome import Outcome
from tests.campaign.place import SCENARIOS, Place, Scenario, ended
from tests.distributed.command import Command


def _truncated(file: Path, draw: random.Random, _: Path) -> str:
    length = draw.randrange(file.stat().st_size) if file.stat().st_size else 0
    file.write_bytes(file.read_bytes()[:length])
    return f"cut to {length} bytes"


def _flipped(file: Path, draw: random.Random, _: Path) -> str:
    content = bytearray(file.read_bytes() or b"x")
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def _removed(file: Path, draw: random.Random, _: Path) -> str:
    file.unlink()
    return "removed"


def _swapped(file: Path, draw: random.Random, work: Path) -> str:
    """With another file of its kind, or else with any file."""
    others = [path for path in sorted(work.rglob("*")) if path.is_file() and path != file]
    alike = [path for path in others if oracle.kind_of(path, work) == oracle.kind_of(file, work)]
    other = draw.choice(alike or others)
    ours, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(ours)
    return f"exchanged with {other.relative_to(work)}"


DAMAGES: dict[str, Callable[[Path, random.Random, Path], str]] = {
    "truncated": _truncated,
    "flipped": _flipped,
    "removed": _removed,
    "swapped": _swapped,
}
HARMED: dict[str, Scenario] = {
    name: scenario for kind in SCENARIOS.values() for name, scenario in kind.items() if scenario.harmed
}


def trial(place: Place, draw: random.Random, number: int) -> Outcome:
    """The trials' numbers go through the scenarios in turn, and within one through its states, kinds of file and damages."""
    names = sorted(HARMED)
    name, case = names[number % len(names)], number // len(names)
    scenario = HARMED[name]
    cases = [
        (state, kind, damage)
        for state in place.states(name, scenario)
        for kind in sorted(_by_kind(state, scenario))
        for damage in sorted(DAMAGES)
    ]
    random.Random(0).shuffle(cases)
    state, kind, damage = cases[case % len(cases)]
    place.clear(state)
    file = draw.choice(_by_kind(place.work, scenario)[kind])
    did = DAMAGES[damage](file, draw, place.work)
    what = f"{name}, {state.name}: {file.relative_to(place.work)} {did}"
    return _judged(place, name, scenario, file, what)


def _by_kind(work: Path, scenario: Scenario) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in sorted({path for pattern in scenario.harmed for path in work.glob(pattern) if path.is_file()}):
        files.setdefault(oracle.kind_of(file, work), []).append(file)
    return files


def _judged(place: Place, name: str, scenario: Scenario, file: Path, what: str) -> Outcome:
    """Run the scenario's commands: each is to make good, to refuse or to name the damage."""
    said = ""
    for verb in scenario.commands:
        command = Command(*place.arguments(scenario, verb))
        code, out = ended(command)
        said += out
        faults = [*oracle.orphans(command), *(["a traceback"] if "Traceback" in out else [])]
        if code == 2:
            faults += [
                *oracle.refusal(out),
                *([] if _names(out, file, place.work) else ["the damaged file is not named"]),
            ]
            return Outcome("refused", what, [f"{fault}:\n{out[-3000:]}" for fault in faults])
        if code != 0 or faults:
            return Outcome(
                "made good", what, [f"ended with {code} {fault}:\n{out[-3000:]}" for fault in faults or [""]]
            )
    named = _names(said, file, place.work)
    wrong = oracle.result(place.work, place.reference(name, scenario).result)
    wrong = [fault for fault in wrong if not (named and ".damaged" in fault)]
    if named and all(str(file.relative_to(place.work)) in fault for fault in wrong):
        return Outcome("named and gone on", what)
    return Outcome("harmless", what, [f"silently wrong: {fault}" for fault in wrong])


def _names(said: str, file: Path, work: Path) -> bool:
    """Whether a file, or a folder of it that is its run's alone, is named."""
    parents = [str(parent) for parent in file.parents if len(parent.parts) > len(work.parts) + 1]
    return file.name in said or any(parent in said for parent in parents)
