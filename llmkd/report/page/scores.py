"""The report page's sections about scores: tables, pictures with intervals, comparisons and layer maps."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from llmkd.report.page import score_plots
from llmkd.report.page.html import csv_link, details, figure, hidden, missing, paragraph, scrolling
from llmkd.report.page.score_plots import number, signed

Results = dict[str, Any]
Row = dict[str, Any]

LONGEST_REASON = 40  # characters of a failure inside a table; the whole sentence stands below it
SIGNS = {"equivalent": "≈", "different": "≠", "different within the margin": "≠", "undecided": "?", "not tested": "–"}


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def _ordered(results: Results) -> list[Row]:
    """The metrics step by step, the main one and its step first."""
    main = next((metric for metric in results["metrics"] if metric["name"] == results["primary"]), None)
    steps = list(dict.fromkeys(metric["step"] for metric in ([main] if main else []) + results["metrics"]))
    return sorted(results["metrics"], key=lambda metric: (steps.index(metric["step"]), metric is not main))


def score_section(results: Results) -> list[str]:
    """The table of all scores, and why some are missing."""
    metrics = _ordered(results)
    problems = results["problems"]
    models: dict[str, list[str]] = {}
    for name, why in problems.items():
        models.setdefault(why, []).append(name)
    listed = "".join(f"<li><code>{escape(', '.join(names))}</code> {escape(why)}</li>" for why, names in models.items())
    without = f'<h3>Without scores</h3>\n<ul class="problems">{listed}</ul>' if problems else ""
    if not metrics:
        return [missing("No model has a score yet, so there is no table."), without]
    seeds = results["seeds"]
    said = (
        f"Mean over {len(seeds)} seeds ± half the 95 % interval of that mean. "
        if len(seeds) > 1
        else "One seed, so no interval. "
    )
    said += "★ marks the best mean below the teacher in each column; whether a difference is shown stands under Comparisons."
    items = ", ".join(f"{step} {count}" for step, count in results["items"].items())
    head = ("model", "kind", *(f"{metric['name']}{what}" for metric in metrics for what in ("", " half width", " n")))
    rows = [
        (
            row["name"],
            row["kind"],
            *((row["cells"].get(m["name"]) or {}).get(what) for m in metrics for what in ("mean", "half_width", "n")),
        )
        for row in results["rows"]
    ]
    return [
        paragraph(said),
        _score_table(results["rows"], metrics, results["primary"]),
        f'<p class="small">{csv_link("scores", head, rows)}{escape(f" Test items: {items}." if items else "")}</p>',
        without,
    ]


def _score_table(rows: Sequence[Row], metrics: Sequence[Row], primary: str | None) -> str:
    steps: list[list[Any]] = []
    for metric in metrics:
        if not steps or steps[-1][0] != metric["step"]:
            steps.append([metric["step"], 0])
        steps[-1][1] += 1
    groups = "".join(f'<th scope="colgroup" colspan="{count}">{escape(step)}</th>' for step, count in steps)
    heads = "".join(_score_head(metric, primary) for metric in metrics)
    best = {metric["name"]: _best(rows, metric) for metric in metrics}
    lines = "\n".join(
        f'<tr class="{row["kind"]}"><th scope="row">{escape(row["name"])}</th><td>{escape(row["kind"])}</td>'
        + "".join(_score_cell(row, metric, best[metric["name"]], primary) for metric in metrics)
        + "</tr>"
        for row in rows
    )
    name = "Every strategy, baseline and the teacher by every metric"
    return scrolling(
        name,
        f'<table class="scores sortable"><caption>{name}</caption>\n<thead><tr><th colspan="2"></th>{groups}</tr>\n'
        f'<tr><th scope="col">model</th><th scope="col">kind</th>{heads}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table>",
    )


def _score_head(metric: Row, primary: str | None) -> str:
    main, words = " main" if metric["name"] == primary else "", ""
    if metric["higher_is_better"] is not None:
        way, arrow = ("higher", "↑") if metric["higher_is_better"] else ("lower", "↓")
        words = f' <span class="way" title="{way} is better">{arrow}{hidden(f"{way} is better")}</span>'
    return f'<th scope="col" class="number{main}">{escape(metric["label"])}{words}</th>'


def _best(rows: Sequence[Row], metric: Row) -> float | None:
    """The best mean of all models but the teacher; None where they all have the same, or neither end is the better one."""
    cells = [row["cells"].get(metric["name"]) for row in rows if row["kind"] != "teacher"]
    means = [cell["mean"] for cell in cells if cell is not None]
    if len(set(means)) < 2 or metric["higher_is_better"] is None:
        return None
    return max(means) if metric["higher_is_better"] else min(means)


def _score_cell(row: Row, metric: Row, best: float | None, primary: str | None) -> str:
    cell, main = row["cells"].get(metric["name"]), " main" if metric["name"] == primary else ""
    if cell is None:
        whole = score_plots.problem(row, metric)
        if whole is None:
            return f'<td class="number missing{main}">–{hidden("no value")}</td>'
        reason = whole if len(whole) <= LONGEST_REASON else whole[: LONGEST_REASON - 1] + "…"
        return f'<td class="missing{main}" title="{escape(whole)}">{escape(reason)}</td>'
    half = cell["half_width"]
    shown = number(cell["mean"], metric)
    if row["kind"] != "teacher" and cell["mean"] == best:
        shown = f'<strong><span aria-hidden="true">★</span>{hidden("best: ")}{shown}</strong>'
    if half is not None:
        shown += f' <span class="half" data-value="{half!r}">± {number(half, metric)}</span>'
    if cell["n"] < row["models"]:
        shown += f' <span class="few">n = {cell["n"]} of {row["models"]}</span>'
    return f'<td class="number{main}" data-value="{cell["mean"]!r}">{shown}</td>'


def interval_section(results: Results) -> list[str]:
    """Each metric as a picture, the main one and those with a margin first."""

    def drawn(place: int, metric: Row) -> str:
        margin = results["margins"].get(metric["name"])
        picture = score_plots.scores(f"scores-{place}", metric, results["rows"], results["reference"], margin)
        return figure(picture, f"<b>{escape(metric['label'])}</b> ({escape(metric['name'])})")

    metrics = _ordered(results)
    if not metrics:
        return [missing("No model has a score yet, so there is nothing to draw.")]
    said = (
        "Diamonds are means, bars their 95 % intervals, rings the single seeds. Dashed lines are baselines, the solid line is the "
        "teacher; an arrow says that a value lies outside the picture."
    )
    if results["margins"]:
        said += f" The shaded band is the margin around {results['reference']}."
    first = [
        metric for metric in metrics if metric["name"] == results["primary"] or metric["name"] in results["margins"]
    ]
    first = first or metrics[:1]
    rest = [metric for metric in metrics if metric not in first]
    shown = [drawn(place, metric) for place, metric in enumerate(first)]
    more = "".join(drawn(place, metric) for place, metric in enumerate(rest, start=len(first)))
    return [
        f'<div class="pictures">{paragraph(said)}{"".join(shown)}</div>',
        details(f"The other {len(rest)} metrics", f'<div class="pictures">{more}</div>') if rest else "",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons and maps


def comparison_section(results: Results) -> list[str]:
    """Differences to the reference: pictures, then all numbers with their verdicts."""
    found = results["comparisons"]
    if not found:
        return [missing("Nothing can be compared yet: it takes two strategies with scores, one of them the reference.")]
    metrics = _ordered(results)
    first = {metric["name"] for metric in metrics if metric["name"] in (results["primary"], *results["margins"])}
    first = first or {metrics[0]["name"]}
    groups = _families(found, metrics)
    main = [group for group in groups if group[0]["name"] in first]
    rest = [group for group in groups if group[0]["name"] not in first]
    drawn = "".join(
        figure(
            score_plots.differences(f"differences-{place}", metric, family),
            f"<b>{escape(metric['label'])}</b>, difference to {escape(family[0]['reference'])}",
        )
        for place, (metric, family) in enumerate(main)
    )
    said = (
        "Differences are paired by seed and stand with their 95 % intervals. Different: told from zero. Equivalent: shown to "
        "lie within the margin that was stated before the run, by two one-sided tests. Undecided: neither. Corrected "
        "p-values are Holm's, over the strategies compared with the same reference."
    )
    if any(one["items_interval"] for one in found):
        said += " The thin grey lines, and the last columns of the table, are a paired bootstrap over the test items."
    more = f"Comparisons by the other {len({metric['name'] for metric, _ in rest})} metrics"
    rows = [[_joined(value) for value in one.values()] for one in found]
    return [
        f'<div class="pictures">{paragraph(said)}{drawn}</div>',
        _comparison_table("Comparisons by " + ", ".join(dict.fromkeys(metric["label"] for metric, _ in main)), main),
        details(more, _comparison_table("Comparisons by the other metrics", rest)) if rest else "",
        f'<p class="small">{csv_link("comparisons", tuple(found[0]), rows)}</p>',
    ]


def _families(found: Sequence[Row], metrics: Sequence[Row]) -> list[tuple[Row, list[Row]]]:
    """The comparisons of each metric with each reference, in the metrics' order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for one in found:
        groups.setdefault((one["metric"], one["reference"]), []).append(one)
    return [(metric, group) for metric in metrics for (name, _), group in groups.items() if name == metric["name"]]


def _joined(value: Any) -> Any:
    return " to ".join(str(end) for end in value) if isinstance(value, list) else value


def _comparison_table(name: str, groups: Sequence[tuple[Row, list[Row]]]) -> str:
    with_items = any(one["items_interval"] for _, group in groups for one in group)
    heads = ("metric", "strategy", "compared with", "difference", "95 % interval", "verdict", "seeds")
    heads += ("p different (corrected)", "margin", "p equivalent (corrected)")
    heads += ("over items", "p over items (corrected)") if with_items else ()
    lines = []
    for metric, group in groups:
        for one in group:
            verdict = f'<span class="sign" aria-hidden="true">{SIGNS[one["verdict"]]}</span> {escape(one["verdict"])}'
            cells = [
                ("", escape(one["strategy"])),
                ("", escape(one["reference"])),
                ("number", "" if one["difference"] is None else signed(one["difference"], metric)),
                ("number", _interval(one["interval"], metric)),
                ("verdict", verdict),
                ("number", str(one["seeds"])),
                ("number", _p(one["p_different"], one["p_different_holm"])),
                ("number", "–" if one["margin"] is None else f"{one['margin']:g}"),
                ("number", _p(one["p_equivalent"], one["p_equivalent_holm"])),
            ]
            if with_items:
                cells += [
                    ("number", _interval(one["items_interval"], metric)),
                    ("number", _p(one["items_p"], one["items_p_holm"])),
                ]
            difference = "" if one["difference"] is None else f' data-difference="{one["difference"]!r}"'
            inner = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in cells)
            lines.append(f'<tr{difference}><th scope="row">{escape(metric["label"])}</th>{inner}</tr>')
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in heads)
    return scrolling(
        name,
        f'<table class="comparisons"><caption>{escape(name)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table>",
    )


def _interval(ends: Sequence[float] | None, metric: Row) -> str:
    return "–" if ends is None else f"{signed(ends[0], metric)} to {signed(ends[1], metric)}"


def _p(plain: float | None, corrected: float | None) -> str:
    if plain is None:
        return "–"
    return _p_text(plain) + ("" if corrected is None else f" ({_p_text(corrected)})")


def _p_text(value: float) -> str:
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def map_section(results: Results) -> list[str]:
    """Each strategy's layer map; one per seed where the seeds' maps differ."""
    maps = [
        found for found in results["maps"] if found["pairs"] and found["student_blocks"] and found["teacher_blocks"]
    ]
    mapped = {found["strategy"] for found in results["maps"] if found["pairs"]}
    done = [run["strategy"] for run in results["runs"] if run["strategy"] is not None and run["state"] == "done"]
    unpaired = [strategy for strategy in dict.fromkeys(done) if strategy not in mapped]
    unknown = [found for found in results["maps"] if found["pairs"] and found not in maps]
    said = [f"Without a map, since no block is paired: {', '.join(unpaired)}."] if unpaired else []
    said += [
        f"{found['strategy']}: the depth of its models is not at hand; student from teacher block "
        + ", ".join(f"{student} from {teacher}" for student, teacher in found["pairs"])
        + "."
        for found in unknown
    ]
    if not mapped and not unpaired:
        return [missing("No trained student with a layer map yet.")]
    seeds = {run["name"]: run["seed"] for run in results["runs"]}
    drawn = "".join(
        figure(
            score_plots.layer_map(f"map-{place}", found),
            f"<b>{escape(found['strategy'])}</b> {escape(_whose(found, seeds))}",
        )
        for place, found in enumerate(maps)
    )
    words = (
        "Left the student's blocks, right the teacher's, block 0 (next to the embeddings) on top; a line is a pair whose "
        "states are compared."
    )
    return [
        paragraph(words) if maps else "",
        f'<div class="pictures maps">{drawn}</div>' if maps else "",
        *(paragraph(one) for one in said),
    ]


def _whose(found: Row, seeds: dict[str, int | None]) -> str:
    """Which seeds share a map; runs without one are named."""
    known = [seeds.get(run) for run in found["runs"]]
    if None in known or not known:
        return ", ".join(found["runs"])
    return ("seed " if len(known) == 1 else "seeds ") + ", ".join(str(seed) for seed in known)
