"""Made-up texts that students of the example study wrote while they were trained."""

from __future__ import annotations

from dataclasses import replace

from llmkd.report.results import Results
from llmkd.report.runs import LogLine, RunRollouts, RunValidations, ShownTexts

WRITERS = ("reverse", "random")
STEPS = range(1, 41)
PROMPT = "name: The Mill\nfood: Italian\narea: riverside"


def with_rollouts(results: Results, text: str = "The Mill is an Italian restaurant\n by the riverside.") -> Results:
    """The study with two strategies whose students wrote, and were validated; `text` is what they wrote in the end."""
    writers = [run.name for run in results.runs if run.strategy in WRITERS]
    return replace(
        results,
        rollouts={name: _written(place, text) for place, name in enumerate(writers)},
        validations={
            name: RunValidations([LogLine(step, {"kl": 1.5 / step + 0.3 + place / 100}) for step in range(4, 41, 4)])
            for place, name in enumerate(writers)
        },
    )


def _written(place: int, text: str) -> RunRollouts:
    """Texts that grow shorter, end more often, and repeat themselves less."""
    lines = [
        LogLine(
            step, {"length": 20 + 80 / step + place, "ended": 1 - 0.9 / step, "repetition": 0.6 / step + place / 1000}
        )
        for step in STEPS
    ]
    repeated = "the the the Mill Mill riverside " * 12
    shown = [
        ShownTexts(step, [PROMPT, "name: Selby", "Write a line."], [written, "Selby is cheap.", ""])
        for step, written in ((1, repeated), (20, "The Mill is is an Italian."), (40, text))
    ]
    return RunRollouts(lines, len(lines), 2560, 81_920, "reverse_kl at temperature 1", shown, 12.5 + place, 0.5, 40.0)
