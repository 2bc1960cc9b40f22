"""The report page's sections about scores: tables, pictures with intervals, comparisons and layer maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from markupsafe import Markup

from llmkd.report import numbers
from llmkd.report.page import html, score_plots
from llmkd.report.page.learned import learned_maps, learned_part
from llmkd.report.results import Comparison, LayerMap, Metric, Results, Row
from llmkd.report.tables import comparison_table
from llmkd.text import ABSENT, shortened

LONGEST_REASON = 40  # characters of a failure inside a table; the whole sentence stands below it
SIGNS = {"equivalent": "≈", "different": "≠", "different within the margin": "≠", "undecided": "?", "not tested": "–"}


# --- Scores


def _ordered(results: Results) -> list[Metric]:
    """The metrics step by step, the main one and its step first."""
    main = results.metric(results.primary)
    steps = list(dict.fromkeys(metric.step for metric in ([main] if main else []) + results.metrics))
    return sorted(results.metrics, key=lambda metric: (steps.index(metric.step), metric is not main))


def score_section(results: Results) -> list[html.Content]:
    """The table of all scores, and why some are missing."""
    metrics = _ordered(results)
    if not metrics:
        return [html.missing("No model has a score yet, so there is no table."), *_problems(results.problems)]
    seeds = len(results.seeds)
    averaged = f"Mean over {seeds} seeds ± half the 95 % interval of that mean. "
    items = ", ".join(f"{task} {count}" for task, count in results.items.items())
    head, rows = _score_numbers(results.rows, metrics)
    best = "★ marks the best mean below the teacher in each column; whether a difference is shown stands under Comparisons."
    below = [html.csv_link("scores", head, rows), f" Test items: {items}." if items else ""]
    return [
        html.paragraph((averaged if seeds > 1 else "One seed, so no interval. ") + best),
        _score_table(results.rows, metrics, results.primary),
        html.paragraph(html.join(below), "small"),
        *_problems(results.problems),
    ]


def _problems(problems: Mapping[str, str]) -> list[html.Content]:
    """Why models have no scores, those with the same problem together."""
    models: dict[str, list[str]] = {}
    for name, why in problems.items():
        models.setdefault(why, []).append(name)
    lines = [html.tag("li", html.tag("code", ", ".join(names)), f" {why}") for why, names in models.items()]
    return [html.tag("h3", "Without scores"), html.tag("ul", *lines, class_="problems")] if lines else []


def _score_numbers(rows: Sequence[Row], metrics: Sequence[Metric]) -> tuple[list[str], list[list[Any]]]:
    """Every cell's numbers, for the CSV."""
    head = ["model", "kind", *(f"{metric.name}{what}" for metric in metrics for what in ("", " half width", " n"))]
    lines = []
    for row in rows:
        cells = [row.cells.get(metric.name) for metric in metrics]
        values = [(None,) * 3 if cell is None else (cell.mean, cell.half_width, cell.n) for cell in cells]
        lines.append([row.name, row.kind, *(value for three in values for value in three)])
    return head, lines


def _score_table(rows: Sequence[Row], metrics: Sequence[Metric], primary: str | None) -> Markup:
    steps = [(step, len(list(group))) for step, group in groupby(metrics, lambda metric: metric.step)]
    groups = [html.tag("th", step, scope="colgroup", colspan=count) for step, count in steps]
    heads = [html.tag("th", name, scope="col") for name in ("model", "kind")]
    heads += [_score_head(metric, primary) for metric in metrics]
    best = {metric.name: _best(rows, metric) for metric in metrics}
    lines = []
    for row in rows:
        cells = [_score_cell(row, metric, best[metric.name], primary) for metric in metrics]
        about = [html.tag("th", row.name, scope="row"), html.tag("td", row.kind)]
        lines.append(html.tag("tr", *about, *cells, class_=row.kind))
    caption = "Every strategy, baseline and the teacher by every metric"
    head = [html.tag("tr", html.tag("th", colspan=2), *groups), html.tag("tr", *heads)]
    return html.whole_table(caption, head, lines, "scores sortable")


def _score_head(metric: Metric, primary: str | None) -> Markup:
    parts: list[html.Content] = [metric.label]
    if metric.higher_is_better is not None:
        way, arrow = ("higher", "↑") if metric.higher_is_better else ("lower", "↓")
        parts += [" ", html.tag("span", arrow, html.hidden(f"{way} is better"), class_="way", title=f"{way} is better")]
    return html.tag("th", *parts, scope="col", class_="number main" if metric.name == primary else "number")


def _best(rows: Sequence[Row], metric: Metric) -> float | None:
    """The best mean of all models but the teacher; None where they all have the same, or neither end is the better one."""
    means = [row.cells[metric.name].mean for row in rows if row.kind != "teacher" and metric.name in row.cells]
    if len(set(means)) < 2 or metric.higher_is_better is None:
        return None
    return max(means) if metric.higher_is_better else min(means)


def _score_cell(row: Row, metric: Metric, best: float | None, primary: str | None) -> Markup:
    score, main = row.cells.get(metric.name), " main" if metric.name == primary else ""
    if score is None:
        why = row.problem(metric.step)
        if why is None:
            return html.tag("td", ABSENT, html.hidden("no value"), class_=f"number missing{main}")
        return html.tag("td", shortened(why, LONGEST_REASON), class_=f"missing{main}", title=why)
    mean = numbers.score(score.mean, metric)
    parts: list[html.Content] = [mean]
    if row.kind != "teacher" and score.mean == best:
        parts = [html.tag("strong", html.tag("span", "★", aria_hidden="true"), html.hidden("best: "), mean)]
    if score.half_width is not None:
        half = f"± {numbers.half_width(score, metric)}"
        parts += [" ", html.tag("span", half, class_="half", data_value=repr(score.half_width))]
    if score.n < row.models:
        far = " so far" if row.waits(metric.step) else ""
        parts += [" ", html.tag("span", f"n = {score.n} of {row.models}{far}", class_="few")]
    return html.tag("td", *parts, class_=f"number{main}", data_value=repr(score.mean))


def interval_section(results: Results) -> list[html.Content]:
    """Each metric as a picture, the main one and those with a margin first."""
    metrics = _ordered(results)
    if not metrics:
        return [html.missing("No model has a score yet, so there is nothing to draw.")]
    text = (
        "Diamonds are means, bars their 95 % intervals, rings the single seeds. Dashed lines are baselines, the solid line is the "
        "teacher; an arrow shows that a value lies outside the picture."
    )
    if results.margins:
        text += f" The shaded band is the margin around {results.reference}."
    first = [metric for metric in metrics if metric.name in results.main_metrics] or metrics[:1]
    others = [metric for metric in metrics if metric not in first]
    figures = []
    for place, metric in enumerate([*first, *others]):
        margin = results.margins.get(metric.name)
        picture = score_plots.scores(f"scores-{place}", metric, results.rows, results.reference, margin)
        figures.append(html.figure(picture, metric.label, f" ({metric.name})"))
    parts: list[html.Content] = [html.pictures([html.paragraph(text), *figures[: len(first)]])]
    if others:
        parts.append(html.details(f"The other {len(others)} metrics", html.pictures(figures[len(first) :])))
    return parts


# --- Comparisons and maps


def comparison_section(results: Results) -> list[html.Content]:
    """Differences to the reference: pictures, then all numbers with their verdicts."""
    if not results.comparisons:
        text = "Nothing can be compared yet: it takes two strategies with scores, one of them the reference."
        return [html.missing(text)]
    metrics = {metric.name: metric for metric in _ordered(results)}
    main_names = [name for name in metrics if name in results.main_metrics] or list(metrics)[:1]
    families = _families(results.comparisons, list(metrics))
    main = [family for family in families if family[0].metric in main_names]
    others = [family for family in families if family[0].metric not in main_names]
    figures = []
    for place, family in enumerate(main):
        metric = metrics[family[0].metric]
        picture = score_plots.differences(f"differences-{place}", metric, family)
        figures.append(html.figure(picture, metric.label, f", difference to {family[0].reference}"))
    text = (
        "Differences are paired by seed and stand with their 95 % intervals. Different: shown not to be zero. Equivalent: shown to "
        "lie within the margin that was stated before the run, by two one-sided tests. Undecided: neither. Corrected "
        "p-values are Holm's, over the strategies compared with the same reference."
    )
    if any(comparison.items_interval for comparison in results.comparisons):
        text += " The thin grey lines, and the last columns of the table, are a paired bootstrap over the test items."
    labels = dict.fromkeys(metrics[family[0].metric].label for family in main)
    parts: list[html.Content] = [html.pictures([html.paragraph(text), *figures])]
    parts.append(_comparison_table("Comparisons by " + ", ".join(labels), main, metrics))
    if others:
        count = len({family[0].metric for family in others})
        below = _comparison_table("Comparisons by the other metrics", others, metrics)
        parts.append(html.details(f"Comparisons by the other {count} metrics", below))
    values = [asdict(comparison) for comparison in results.comparisons]
    rows = [[_joined(value) for value in comparison.values()] for comparison in values]
    return [*parts, html.paragraph(html.csv_link("comparisons", list(values[0]), rows), "small")]


def _families(comparisons: Sequence[Comparison], metrics: Sequence[str]) -> list[list[Comparison]]:
    """The comparisons of each metric with each reference, in the metrics' order."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.metric, comparison.reference), []).append(comparison)
    return [family for name in metrics for (metric, _), family in groups.items() if metric == name]


def _joined(value: Any) -> Any:
    return " to ".join(map(str, value)) if isinstance(value, list) else value


def _comparison_table(caption: str, families: Sequence[Sequence[Comparison]], metrics: Mapping[str, Metric]) -> Markup:
    comparisons = [comparison for family in families for comparison in family]
    head, *rows = comparison_table(comparisons, metrics)
    verdict = head.index("verdict")
    lines = []
    for comparison, (label, *values) in zip(comparisons, rows, strict=True):
        cells = [html.cell(value) for value in values]
        sign = html.tag("span", SIGNS[comparison.verdict], class_="sign", aria_hidden="true")
        cells[verdict - 1] = html.tag("td", sign, f" {comparison.verdict}", class_="verdict")
        difference = repr(comparison.difference)
        lines.append(html.tag("tr", html.tag("th", label, scope="row"), *cells, data_difference=difference))
    return html.whole_table(caption, [html.row_of_heads(head)], lines, "comparisons")


def map_section(results: Results) -> list[html.Content]:
    """Each strategy's layer map; one per seed where the seeds' maps differ."""
    maps = [layer_map for layer_map in results.maps if layer_map.pairs]
    mapped = {layer_map.strategy for layer_map in maps}
    done = dict.fromkeys(run.strategy for run in results.runs if run.strategy is not None and run.state == "done")
    learned = {found.strategy for found in learned_maps(results)}
    unpaired = [strategy for strategy in done if strategy not in mapped | learned]
    if not mapped and not unpaired and not learned:
        return [html.missing("No trained student with a layer map yet.")]
    seeds = {run.name: run.seed for run in results.runs}
    without = f"Without a map, since no block is paired: {', '.join(unpaired)}." if unpaired else ""
    figures, parts = [], [html.paragraph(without)]
    for layer_map in maps:
        if layer_map.student_blocks and layer_map.teacher_blocks:
            picture = score_plots.layer_map(f"map-{len(figures)}", layer_map)
            figures.append(html.figure(picture, layer_map.strategy, f" {_whose(layer_map, seeds)}"))
        else:
            pairs = ", ".join(f"{student} from {teacher}" for student, teacher in layer_map.pairs)
            unknown = "the depth of its models is not at hand; student from teacher block"
            parts.append(html.paragraph(f"{layer_map.strategy}: {unknown} {pairs}."))
    text = (
        "Left the student's blocks, right the teacher's, block 0 (next to the embeddings) on top; a line is a pair whose "
        "states are compared."
    )
    drawn = [html.paragraph(text if figures else ""), html.pictures(figures, "maps"), *parts]
    return [*drawn, *learned_part(results)]


def _whose(layer_map: LayerMap, seeds: Mapping[str, int | None]) -> str:
    """Which seeds share a map; runs without one are named."""
    known = [seeds.get(run) for run in layer_map.runs]
    if None in known or not known:
        return ", ".join(layer_map.runs)
    return ("seed " if len(known) == 1 else "seeds ") + ", ".join(map(str, known))
