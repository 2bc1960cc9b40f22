"""The printed tables of a benchmark, and their place in RESULTS.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.contestants import MATCHED, REFERENCES, STRATEGIES
from benchmarks.measure import Memory

PEAKS: dict[str, Callable[[Memory], float]] = {
    "both passes": lambda found: found.passes,
    "the whole step": lambda found: found.peak,
}
RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [header, *rows]
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def ratios(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> list[float]:
    """How many times as fast as the reference, round by round: what slows a whole round down drops out."""
    return [theirs / own for own, theirs in zip(seconds[name], seconds[reference], strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def speed_table(seconds: Mapping[str, Sequence[float]], tokens: Mapping[str, Sequence[int]]) -> str:
    """Tokens per second, and the ratios to the references that took part."""
    present = {letter: name for letter, name in REFERENCES.items() if name in seconds}
    rows = []
    for name, taken in seconds.items():
        rates = [count / second for count, second in zip(tokens[name], taken, strict=True)]
        cells = [spread(ratios(seconds, name, reference)) for reference in present.values()]
        rows.append([_lettered(name), spread(rates, 0), f"{median(taken):.3f}", *cells])
    return table(["step", "tokens/s", "s/step", *(f"÷ ({letter})" for letter in present)], rows)


def memory_table(bytes_of: Mapping[str, Memory]) -> str:
    """MiB of a step and of what rests between steps."""
    present = {letter: name for letter, name in REFERENCES.items() if name in bytes_of}
    rows = [
        [
            _lettered(name),
            f"{found.passes:.1f}",
            *(f"{found.passes / bytes_of[reference].passes:.2f}" for reference in present.values()),
            f"{found.peak:.1f}",
            *(f"{found.peak / bytes_of[reference].peak:.2f}" for reference in present.values()),
            f"{found.resting:.1f}",
            f"{found.process:.0f}",
        ]
        for name, found in bytes_of.items()
    ]
    by = [f"÷ ({letter})" for letter in present]
    header = ["step", "both passes", *by, "whole step", *by, "models and optimizer", "process grew by"]
    return table(header, rows)


def phase_table(phases: Mapping[str, Mapping[str, float]], communication: Mapping[str, float]) -> str:
    """Milliseconds of each phase."""
    names = list(next(iter(phases.values())))
    rows = [
        [
            _lettered(name),
            *(f"{spent[phase] * 1000:.0f}" for phase in names),
            f"{sum(spent.values()) * 1000:.0f}",
            f"{communication[name]:.1%}",
        ]
        for name, spent in phases.items()
    ]
    return table(["ms per step", *names, "sum", "communication"], rows)


def goals(seconds: Mapping[str, Sequence[float]], bytes_of: Mapping[str, Memory]) -> list[str]:
    """Each goal that this run can judge, with its figure and whether it is met."""
    lines = []
    strategies = [f"llmkd/{strategy}" for strategy in STRATEGIES if f"llmkd/{strategy}" in seconds]

    def speed(reference: str, names: Sequence[str], least: float) -> None:
        if reference not in seconds or not names:
            return
        found = {name: median(ratios(seconds, name, reference)) for name in names}
        worst = min(found, key=lambda name: found[name])
        lines.append(_goal(f"tokens/s ≥ {least} of {_lettered(reference)}", found[worst], worst, found[worst] >= least))

    def size(reference: str, names: Sequence[str], most: float) -> None:
        names = [name for name in names if name in bytes_of]
        if reference not in bytes_of or not names:
            return
        for what, of in PEAKS.items():
            found = {name: of(bytes_of[name]) / of(bytes_of[reference]) for name in names}
            worst = max(found, key=lambda name: found[name])
            goal = f"peak of {what} ≤ {most} of {_lettered(reference)}"
            lines.append(_goal(goal, found[worst], worst, found[worst] <= most))

    alone = [name for name in seconds if name == "llmkd/none kl alone"]
    speed("unavoidable", strategies, 0.9)
    speed("trl/gkd", alone, 1.5)
    speed("trl/distillation", alone, 1.5)
    speed("plain", strategies, 2.0)
    size("trl/gkd", alone, 0.5)
    size("trl/distillation", alone, 0.5)
    size("plain", strategies, 0.35)
    matched = [f"llmkd/{strategy}" for strategy in MATCHED if f"llmkd/{strategy}" in seconds]
    if len(matched) > 1:
        relative = [median(ratios(seconds, name, matched[0])) for name in matched]
        apart = max(relative) / min(relative) - 1
        lines.append(_goal("step times of the matched strategies within 5 %", apart, "apart", apart <= 0.05))
    return lines


def _goal(what: str, figure: float, where: str, met: bool) -> str:
    return f"- {'met' if met else '**not met**'}: {what}: {figure:.3f} ({_lettered(where)})"


def _lettered(name: str) -> str:
    letter = next((letter for letter, reference in REFERENCES.items() if reference == name), None)
    return name if letter is None else f"({letter}) {name}"


def put(text: str, section: str, title: str, body: str) -> str:
    """The results with `### title` under `## section` replaced, or added at the section's end; the section is made where it is missing."""
    opening = f"## {section}\n"
    if opening not in text:
        text = text.rstrip("\n") + f"\n\n{opening}"
    before, rest = text.split(opening, 1)
    own, *others = re.split(r"(?m)^(?=## )", rest, maxsplit=1)
    parts = [part for part in re.split(r"(?m)^(?=### )", own) if part.strip()]
    fresh = f"### {title}\n\n{body.strip()}\n"
    kept = [fresh if part.startswith(f"### {title}\n") else part for part in parts]
    parts = kept if fresh in kept else [*kept, fresh]
    own = "\n".join(part.strip("\n") + "\n" for part in parts)
    return f"{before}{opening}\n{own}\n{''.join(others)}".rstrip("\n") + "\n"
