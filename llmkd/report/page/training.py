"""The report page's sections about training: loss curves, hidden distances and cost."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from llmkd.report.page import training_plots
from llmkd.report.page.html import csv_link, details, figure, missing, paragraph, table
from llmkd.report.page.training_plots import Groups

Results = dict[str, Any]
Row = dict[str, Any]

LOG_LINES = 40  # of one run's curve that the page draws, evenly spaced
MOST_BLOCKS = 12  # student blocks whose distances are drawn step by step
PARTS = {
    "ce": "cross-entropy with the data",
    "kl": "divergence from the teacher's distribution",
    "hidden": "distance between paired states",
}
STEERED = {
    "temperature": "of both distributions",
    "stones": "the stepping stones' part of the loss",
    "weight of": "in the loss",
    "norm of": "gradient of this part of the loss where it enters the student's states",
}
"""What some runs log besides, by the beginning of its name."""
COSTS = {
    "tokens_per_second": "tokens per second",
    "seconds": "seconds of training",
    "memory_gib": "peak memory per rank, GiB",
}


def training_section(results: Results) -> list[str]:
    """The loss parts by step, then the hidden distance by student block."""
    groups, longest = _curves(results)
    if not groups:
        return [missing("No student has logged a training step yet.")]
    drawn = [
        figure(
            training_plots.curves(f"curve-{re.sub('[^a-z0-9]+', '-', part)}", part, having, list(groups), longest),
            f"<b>{escape(part)}</b>, {escape(words)}",
        )
        for part, words in {**PARTS, **_steered(groups)}.items()
        if (having := _having(groups, part))
    ]
    paired = _having(groups, "pairs")
    if paired:
        end = training_plots.distances_at_end("distance-end", paired, list(groups))
        drawn.append(figure(end, "<b>hidden distance</b> of each student block, last logged step"))
    said = "Thick lines are means over seeds, thin ones the single seeds."
    if longest > LOG_LINES:
        said += f" Of the {longest} logged steps {LOG_LINES} are drawn, evenly spaced, the last among them."
    return [
        paragraph(said),
        f'<div class="pictures">{"".join(drawn)}</div>',
        _steps(paired) if paired else missing("No run has a pair of blocks, so there is no hidden distance."),
    ]


def _steps(paired: Groups) -> str:
    """The hidden distance of every block by step, a picture per strategy on one scale."""
    found = [
        training_plots.by_block(line["pairs"]) for runs in paired.values() for run in runs.values() for line in run
    ]
    most = max(len(there) for there in found)
    if most > MOST_BLOCKS:
        return paragraph(f"Distances step by step are not drawn for {most} student blocks; the log files hold them.")
    top = max(value for there in found for value in there.values())
    drawn = "".join(
        figure(training_plots.distances_by_step(f"distance-{place}", strategy, runs, top), f"<b>{escape(strategy)}</b>")
        for place, (strategy, runs) in enumerate(paired.items())
    )
    words = "Hidden distance by step, a line per student block (its number at the right), mean over seeds; one scale for all."
    return f'<h3>Hidden distance by block and step</h3>\n{paragraph(words)}\n<div class="pictures maps">{drawn}</div>'


def _curves(results: Results) -> tuple[Groups, int]:
    """The students' log lines by strategy and run; and how many lines the longest run wrote."""
    groups: Groups = {}
    longest = 0
    for run in results["runs"]:
        lines = results["curves"].get(run["name"])
        if run["strategy"] is None or not lines:
            continue
        longest = max(longest, len({line["step"] for line in lines}))
        # a resumed run may have logged a step twice
        groups.setdefault(run["strategy"], {})[run["name"]] = list({line["step"]: line for line in lines}.values())
    return groups, longest


def _steered(groups: Groups) -> dict[str, str]:
    """What any run logs besides the parts of the loss, in the order of `STEERED`, each with its words."""
    keys = {key: None for runs in groups.values() for lines in runs.values() for line in lines for key in line}
    return {key: words for begin, words in STEERED.items() for key in keys if key.startswith(begin)}


def _thinned(lines: list[Row]) -> list[Row]:
    """At most `LOG_LINES` of the lines: the first, the last, and as evenly spaced as can be between."""
    if len(lines) <= LOG_LINES:
        return lines
    return [lines[round(place * (len(lines) - 1) / (LOG_LINES - 1))] for place in range(LOG_LINES)]


def _having(groups: Groups, part: str) -> Groups:
    """The runs and lines in whose logs the part is a number, thinned; without a pair there is no hidden loss and no distance."""

    def has(line: Row) -> bool:
        paired = bool(training_plots.by_block(line["pairs"]))
        return paired if part == "pairs" else line.get(part) is not None and (part != "hidden" or paired)

    kept = {
        strategy: {
            run: lines for run, found in runs.items() if (lines := _thinned([line for line in found if has(line)]))
        }
        for strategy, runs in groups.items()
    }
    return {strategy: runs for strategy, runs in kept.items() if runs}


def cost_section(results: Results) -> list[str]:
    """Speed, time and memory of every run."""
    runs = results["runs"]
    if not runs:
        return [missing("No training run has begun yet.")]
    drawn = []
    for key, label in COSTS.items():
        known = [run for run in runs if run["strategy"] is not None and run.get(key) is not None]
        if known:
            drawn.append(figure(training_plots.cost(f"cost-{key}", key, label, known), f"<b>{escape(label)}</b>"))
    keys = ("world_size", "steps", "seconds", "tokens", *(key for key in COSTS if key != "seconds"))
    head = ("run", "state", "ranks", "steps", "seconds", "tokens", "tokens per second", "peak memory per rank, GiB")
    rows = [(run["name"], _state(run), *(run.get(key) for key in keys)) for run in runs]
    shown = [(name, state, *(_number(value) for value in values)) for name, state, *values in rows]
    said = "Bars are means over runs, rings the runs." + (
        " The teacher's own training is in the table only." if any(run["strategy"] is None for run in runs) else ""
    )
    return [
        paragraph(said) if drawn else missing("No student has finished its training yet, so no cost is drawn."),
        f'<div class="pictures three">{"".join(drawn)}</div>' if drawn else "",
        details(f"All {len(runs)} runs", table("Cost of every training run", head, shown, "sortable")),
        f'<p class="small">{csv_link("cost", head, rows)}</p>',
    ]


def _state(run: Row) -> str:
    state = run["state"]
    if state == "unfinished" and run["last_step"] is not None:
        state += f", at step {run['last_step']}"
    if run.get("resumed_from_step"):
        state += f", resumed from step {run['resumed_from_step']}: its last part's seconds and tokens"
    return state


def _number(value: float | None) -> float | str | None:
    """Three figures for what is below a thousand, whole numbers with separators above."""
    if value is None or isinstance(value, int) and value < 1000:
        return value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
