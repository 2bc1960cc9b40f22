"""The report's tables as text, the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmkd.report import cost, numbers
from llmkd.report.results import Comparison, Metric, Results, Row
from llmkd.report.runs import TrainingRun
from llmkd.text import ABSENT, Table, aligned, amount, escaped, shortened

LONGEST_REASON = 60  # characters of a failure inside a table; the whole sentence stands below it
LONGEST_IN_TERMINAL = 20
COLUMNS = 100  # of a terminal


def fitting(table: Table, columns: int, where: str) -> list[str]:
    """As many of a table's first columns as fit into a terminal, at least four, and `where` the others are."""
    shown = len(table[0])
    while shown > 4 and max(map(len, aligned([line[:shown] for line in table]).splitlines())) > columns:
        shown -= 1
    left_out = len(table[0]) - shown
    note = [f"{left_out} more metrics are in the {where}."] if left_out else []
    return [aligned([line[:shown] for line in table]), *note]


def markdown(table: Table) -> str:
    """A table in Markdown; its cells are text."""
    lines = ["| " + " | ".join(escaped(cell).replace("|", "\\|") for cell in line) + " |" for line in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def score_table(results: Results, metrics: Sequence[Metric], longest: int = LONGEST_REASON) -> Table:
    """A line per strategy, baseline and teacher; without metrics, why there are none."""
    lines = [["model", "kind", "n", *([metric.label for metric in metrics] or ["scores"])]]
    steps = {metric.step for metric in metrics}
    of_step = next(iter(steps)) if len(steps) == 1 else None
    for row in results.rows:
        cells = [score_cell(row, metric, longest) for metric in metrics] or [_reason(row, None, longest)]
        lines.append([row.name, row.kind, row.scored(of_step), *cells])
    return lines


def score_cell(row: Row, metric: Metric, longest: int = LONGEST_REASON) -> str:
    """A mean with its interval, or why there is none."""
    cell = row.cells.get(metric.name)
    if cell is None:
        return _reason(row, metric.step, longest)
    text = numbers.mean(cell, metric)
    return text if cell.n == row.models else f"{text} (n={cell.n})"


def _reason(row: Row, step: str | None, longest: int) -> str:
    """Why a row has no number: the step's problem, or that it gave none, or that it was not asked for."""
    return shortened(row.problem(step) or ("no value" if step in row.steps else ABSENT), longest)


def comparison_table(comparisons: Sequence[Comparison], metrics: Mapping[str, Metric]) -> Table:
    """A line per comparison; the columns of the test items only where any has them."""
    with_items = any(comparison.items for comparison in comparisons)
    head = ["metric", "strategy", "compared with", "difference", "95 % interval", "verdict", "seeds"]
    head += ["p different (corrected)", "margin", "p equivalent (corrected)"]
    lines = [head + ["items", "95 % interval over items", "p over items (corrected)"] * with_items]
    for comparison in comparisons:
        metric = metrics[comparison.metric]
        cells = [metric.label, comparison.strategy, comparison.reference, numbers.signed(comparison.difference, metric)]
        cells += [numbers.interval(comparison.interval, metric), comparison.verdict, str(comparison.seeds)]
        cells += [_p(comparison.p_different, comparison.p_different_holm), numbers.margin(comparison.margin)]
        cells.append(_p(comparison.p_equivalent, comparison.p_equivalent_holm))
        if with_items:
            cells += [ABSENT if comparison.items is None else str(comparison.items)]
            cells += [numbers.interval(comparison.items_interval, metric)]
            cells += [_p(comparison.items_p, comparison.items_p_holm)]
        lines.append(cells)
    return lines


def _p(plain: float | None, corrected: float | None) -> str:
    """A p-value and the corrected one."""
    return numbers.p_value(plain) + ("" if corrected is None else f" ({numbers.p_value(corrected)})")


COST_HEAD = [
    "run",
    "state",
    "ranks",
    "steps",
    "seconds per step",
    "spread of seconds",
    "CPU seconds per step",
    "spread of CPU seconds",
]
COST_HEAD += ["seconds in all", "tokens", "tokens per second", "peak memory per rank, GiB"]


def costs(run: TrainingRun) -> list[int | float | None]:
    """The numbers of a run's line, in the order of `COST_HEAD` after its first two; a spread is between quartiles."""
    spans = [None if run.step is None else kind(run.step) for kind in (cost.wall, cost.cpu)]
    times = [part for span in spans for part in ((None, None) if span is None else (span[0], span[1][1] - span[1][0]))]
    return [run.world_size, run.steps, *times, run.seconds, run.tokens, run.tokens_per_second, run.memory_gib]


def cost_table(runs: Sequence[TrainingRun]) -> Table:
    """A line per training run."""
    return [COST_HEAD, *([run.name, run_state(run), *map(amount, costs(run))] for run in runs)]


def run_state(run: TrainingRun) -> str:
    """How far a run has come, and whether its numbers are those of its last part alone."""
    state = run.state
    if state == "unfinished" and run.last_step is not None:
        state += f", at step {run.last_step}"
    if run.resumed_from_step:
        state += f", resumed from step {run.resumed_from_step}: its last part's seconds and tokens"
    return state


def plain(value: object) -> str:
    """A JSON value in words: `cpu EPYC, cores 2`; values that differ between models with a slash."""
    if isinstance(value, Mapping):
        known = {name: inner for name, inner in value.items() if inner not in (None, [], {})}
        return ", ".join(f"{name.replace('_gib', ' in GiB')} {plain(inner)}" for name, inner in known.items())
    if isinstance(value, list | tuple):
        return " / ".join(plain(inner) for inner in value)
    return "" if value is None else str(value)
