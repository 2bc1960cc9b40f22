"""A run whose processes are killed, asked to end or held still, at any moment or in a phase; then the same command."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.campaign import oracle
from tests.campaign.outcome import Outcome
from tests.campaign.place import AIMS, HANG_SECONDS, Place, Scenario, ended, matches
from tests.distributed.command import Command

STILL_SECONDS = 8
"""`train.timeout_seconds` of a run with a rank that is held still for good."""
KILLED = (
    "; the same command resumes from",  # a study, of a run that it started
    ": a process that made tokens was killed, most likely for want of memory; the same command goes on",
)
"""What a command that ends with 2 says of a process of its own that was killed."""
SENTENCE = "The same command resumes from the last checkpoint."


class Strike(NamedTuple):
    """What is done to a command, and when."""

    aim: str | None
    """The files whose appearance it waits for; None: none, the moment is counted from the start."""
    delay: float
    signal: signal.Signals
    victim: float
    """Which of the processes, as a share of their list; above 1: all."""
    still: float | None
    """After how many seconds one that is held still goes on; None: never."""


def trial(place: Place, draw: random.Random, scenarios: dict[str, Scenario]) -> Outcome:
    """One scenario, struck one to three times and then left alone."""
    name = draw.choice(sorted(scenarios))
    scenario = scenarios[name]
    struck = draw.randrange(len(scenario.commands))
    reference = place.reference(name, scenario)
    verb = scenario.commands[struck]
    aims = (*AIMS[verb], *(() if struck else scenario.aims))
    strikes = [_drawn(draw, scenario, aims, reference.seconds[struck]) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
    place.clear(reference.after[struck - 1] if struck else None)
    did, faults = [f"{name}: {verb}"], list[str]()
    for strike in strikes:
        did.append(_strike(place, scenario, verb, strike, faults))
    for command in scenario.commands[struck:]:
        again = Command(*place.arguments(scenario, command))
        code, out = ended(again)
        if code != 0:
            faults.append(f"the same command ended with {code}:\n{out[-3000:]}")
        faults += [*oracle.orphans(again), *(["a traceback:\n" + out[-3000:]] if "Traceback" in out else [])]
    met = sum("to nobody" not in what for what in did[1:])
    right = "bit-equal" if met else "not met"
    return Outcome(right, "; ".join(did), faults or oracle.result(place.work, reference.result), met)


def _drawn(draw: random.Random, scenario: Scenario, aims: tuple[str, ...], length: float) -> Strike:
    aim = draw.choice(aims) if draw.random() < 0.5 else None
    delay = draw.uniform(0, length) if aim is None else draw.choice((0.0, draw.uniform(0, 0.03), draw.uniform(0, 0.3)))
    kind = draw.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP), (14, 4, 2))[0]
    still = None if scenario.ranks > 1 and draw.random() < 0.3 else draw.uniform(0.1, 2)
    return Strike(aim, delay, kind, draw.uniform(0, 1.2) if kind == signal.SIGKILL else draw.random(), still)


def _strike(place: Place, scenario: Scenario, verb: str, strike: Strike, faults: list[str]) -> str:
    """Start the command and strike it; what was done, in words. Faults are added to the list."""
    held = strike.signal == signal.SIGSTOP and strike.still is None
    command = Command(*place.arguments(scenario, verb, **({"train.timeout_seconds": STILL_SECONDS} if held else {})))
    when = _wait(place.work, command, strike)
    victims = _victims(command, strike, ranks_only=held)
    names = [oracle._name(victim) for victim in victims]
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim, strike.signal)
    if strike.signal == signal.SIGSTOP and strike.still is not None:
        time.sleep(strike.still)
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGCONT)
    code, out = ended(command)
    what = f"{strike.signal.name} to {', '.join(names) or 'nobody, it had ended'} {when}, code {code}"
    if code is None:
        faults.append(f"after {what} it did not end within {HANG_SECONDS} s:\n{out[-3000:]}")
    last = out.rstrip().rpartition("\n")[2]
    if (code == 2 and not any(said in last for said in KILLED)) or "Traceback" in out:
        faults.append(f"after {what} it said:\n{out[-3000:]}")
    if held and victims and code != 0 and SENTENCE not in out:
        faults.append(f"after {what} no rank said who is silent:\n{out[-3000:]}")
    return what + "".join(f" ({fault})" for fault in oracle.orphans(command) if not faults.append(fault))


def _wait(work: Path, command: Command, strike: Strike) -> str:
    """Wait for the moment of a strike, or for the command's end."""
    if strike.aim is not None:
        before = matches(work, strike.aim)
        while command.poll() is None and not matches(work, strike.aim) - before:
            time.sleep(0.001)
    deadline = time.monotonic() + strike.delay
    while command.poll() is None and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.005))
    return f"{strike.delay:.3f} s after " + ("its start" if strike.aim is None else strike.aim)


def _victims(command: Command, strike: Strike, *, ranks_only: bool) -> list[int]:
    """Those of the command's processes that are struck, the same ones of the same list."""
    running = sorted(
        command.running("llmkd rank" if ranks_only else ""), key=lambda number: (oracle._name(number), number)
    )
    if not running or strike.victim > 1:
        return running
    return [running[int(strike.victim * len(running))]]
