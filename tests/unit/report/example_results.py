"""A made-up study's results, for tests of the page and for looking at it.

    python -m tests.unit.report.example_results report.html

writes the page of five strategies over five seeds with two baselines and 200 generated items.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from math import exp, sqrt
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

from llmkd.data import records
from llmkd.layer_map import RULES, layer_map
from llmkd.report.files import GeneratedItem
from llmkd.report.results import Cell, Comparison, LayerMap, Metric, Results, Row
from llmkd.report.runs import Curve, LogLine, StepTimes, TrainingRun

STRATEGIES = ("none", "forward", "reverse", "all_to_one", "random")
STUDENT_BLOCKS, TEACHER_BLOCKS = 3, 12
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95 %, by the number of seeds

# name, label, higher is better, percent, step, then what the teacher, the undistilled student and a strategy get
METRICS: tuple[tuple[Any, ...], ...] = (
    ("generation/bleu", "BLEU", True, True, "generation", 99.8, 65.5, 94.4),
    ("generation/chrf", "chrF", True, True, "generation", 99.9, 67.9, 97.0),
    ("generation/rouge_l", "ROUGE-L", True, False, "generation", 0.998, 0.71, 0.962),
    ("generation/slots_exact", "all slots right", True, False, "generation", 1.0, 0.005, 0.655),
    ("generation/repetition", "repetition", False, False, "generation", 0.002, 0.184, 0.004),
    ("agreement/token_agreement", "token agreement", True, False, "agreement", 1.0, 0.412, 0.871),
    ("agreement/kl", "KL to the teacher", False, False, "agreement", 0.0, 1.83, 0.214),
    ("records_choice/acc", "records choice accuracy", True, False, "lm-eval", 1.0, 0.65, 0.99),
)
SHIFTS = {"ce_only": -0.3, "none": 0.0, "forward": 0.15, "reverse": -0.35, "all_to_one": -0.1, "random": 0.05}
PARTS = {"ce": (2.6, 0.12), "kl": (2.2, 0.10), "hidden": (1.1, 0.31)}  # a loss part at the first step and at the last


def study(
    strategies: Sequence[str] = STRATEGIES,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    student_blocks: int = STUDENT_BLOCKS,
    teacher_blocks: int = TEACHER_BLOCKS,
    log_lines: int = 20,
) -> Results:
    """Results of a whole study; the same arguments give the same numbers."""
    random = Random(7)
    metrics = [Metric(*metric[:5]) for metric in METRICS]
    rows = [_row("teacher", "teacher", None, random), _row("undistilled", "baseline", None, random)]
    rows.append(_row("ce_only", "baseline", seeds, random))
    rows += [_row(strategy, "student", seeds, random) for strategy in strategies]
    runs = [_run("teacher", None, None, random)]
    runs += [_run(f"{s}-s{seed}", s, seed, random) for s in ("ce_only", *strategies) for seed in seeds]
    maps = _maps(strategies, seeds, student_blocks, teacher_blocks)
    pairs = {name: layer_map.pairs for layer_map in maps for name in layer_map.runs}
    names = [run.name for run in runs]
    asked = {"forward": [name for name in strategies if name not in ("forward", "none")]}
    asked |= {base: [name for name in strategies if name != base] for base in ("none", "ce_only", "undistilled")}
    comparisons = [
        _comparison(metric.name, strategy, base, rows, 0.5 if metric.name == "generation/bleu" else None)
        for metric in metrics
        for base, others in asked.items()
        for strategy in others
    ]
    return Results(
        name="quickstart",
        models=2 + len(seeds) * (len(strategies) + 1),
        scored=2 + len(seeds) * (len(strategies) + 1),
        seeds=list(seeds),
        reference="forward",
        margins={"generation/bleu": 0.5},
        margins_history=[],
        primary="generation/bleu",
        metrics=metrics,
        rows=rows,
        problems={},
        items={"generation": 200, "records_choice": 200},
        maps=[layer_map for layer_map in maps if layer_map.pairs],
        runs=runs,
        curves={
            name: _curve(pairs.get(name, []), log_lines, random, SHIFTS.get(name.rpartition("-s")[0], 0.0))
            for name in names
        },
        angles=None,
        backends={"generation": {"hf": names}, "lm-eval": {"hf": names}},
        conditions={},
        versions={"llmkd": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0", "lm_eval": "0.4.13"},
        hardware={"cpu": "AMD EPYC 7B13", "cores": 2, "memory_gib": 24.0, "gpus": []},
        commit="0123456789ab",
        comparisons=comparisons,
        conclusion=_conclusion(comparisons, len(seeds)),
        notes=["The numbers of this page are made up."],
    )


def _row(name: str, kind: str, seeds: Sequence[int] | None, random: Random) -> Row:
    count = len(seeds) if seeds is not None else 1
    cells = {}
    for metric, _, better, _, _, best, worst, middle in METRICS:
        if name == "teacher" and metric.startswith("agreement/"):
            continue
        if seeds is None:
            values = [best if name == "teacher" else worst]
        else:
            unit = abs(best - middle) * (1 if better else -1)
            values = [middle + unit * (SHIFTS.get(name, 0.0) * 0.15 + random.gauss(0, 0.03)) for _ in range(count)]
        width = T_975[count] * stdev(values) / sqrt(count) if count > 1 else None
        cells[metric] = Cell(fmean(values), width, count, values, list(seeds or [None] * count))
    return Row(name, kind, count, list(seeds or []), cells=cells)


def _comparison(metric: str, strategy: str, base: str, rows: Sequence[Row], margin: float | None) -> Comparison:
    values, reference = (next(row for row in rows if row.name == n).cells[metric].values for n in (strategy, base))
    gaps = [one - other for one, other in zip(values, reference * (len(values) // len(reference)), strict=True)]
    difference, count = fmean(gaps), len(gaps)
    untested = Comparison(
        metric=metric,
        strategy=strategy,
        reference=base,
        difference=difference,
        interval=None,
        seeds=count,
        p_different=None,
        margin=margin,
        p_equivalent=None,
        items=None,
        items_interval=None,
        items_p=None,
        verdict="not tested",
    )
    if count < 2:
        return untested
    width = T_975[count] * stdev(gaps) / sqrt(count)
    low, high = difference - width, difference + width
    apart, inside = low > 0 or high < 0, margin is not None and -margin < low and high < margin
    verdict = {(True, True): "different within the margin", (True, False): "different", (False, True): "equivalent"}
    return replace(
        untested,
        interval=[low, high],
        p_different=0.012 if apart else 0.34,
        p_different_holm=0.048 if apart else 0.71,
        p_equivalent=None if margin is None else 0.011 if inside else 0.21,
        p_equivalent_holm=None if margin is None else 0.022 if inside else 0.42,
        verdict=verdict.get((apart, inside), "undecided"),
    )


def _conclusion(comparisons: Sequence[Comparison], seeds: int) -> str:
    main = [c for c in comparisons if (c.metric, c.reference) == ("generation/bleu", "forward")]
    named = {
        verdict: ", ".join(comparison.strategy for comparison in main if comparison.verdict == verdict)
        for verdict in ("equivalent", "different", "different within the margin", "undecided", "not tested")
    }
    clauses = "; ".join(f"{verdict}: {names}" for verdict, names in named.items() if names)
    return f"Over {seeds} seeds, compared with forward by BLEU and the margin 0.5: {clauses}."


def _maps(strategies: Sequence[str], seeds: Sequence[int], student_blocks: int, teacher_blocks: int) -> list[LayerMap]:
    runs: dict[tuple[Any, ...], list[str]] = {}
    for strategy in strategies:
        for seed in seeds:
            rule = strategy if strategy in RULES else "forward"
            pairs = tuple(layer_map(rule, student_blocks, teacher_blocks, seed=seed))
            runs.setdefault((strategy, pairs), []).append(f"{strategy}-s{seed}")
    return [
        LayerMap(strategy, names, [list(pair) for pair in pairs], student_blocks, teacher_blocks)
        for (strategy, pairs), names in runs.items()
    ]


def _run(name: str, strategy: str | None, seed: int | None, random: Random) -> TrainingRun:
    speed = random.uniform(1500, 1700) * (0.6 if strategy is None else 1.0)
    tokens = 500_000 if strategy is None else 54_000
    steps = 300 if strategy is None else 40
    return TrainingRun(
        name=name,
        strategy=strategy,
        seed=seed,
        state="done",
        last_step=steps,
        steps=steps,
        seconds=tokens / speed,
        tokens=tokens,
        tokens_per_second=speed,
        memory_gib=random.uniform(0.9, 1.0),
        world_size=2,
        step=StepTimes(
            steps - 3,
            tokens / speed / steps,
            (0.9 * tokens / speed / steps, 1.2 * tokens / speed / steps),
            0.5,
            (0.5, 0.5),
        ),
    )


def _curve(pairs: Sequence[Sequence[int]], count: int, random: Random, shift: float) -> Curve:
    """Falling losses with noise; a run without pairs has no hidden distance."""
    pace, lines = 4 + 2 * shift + random.uniform(-0.2, 0.2), []
    for number in range(1, count + 1):
        done = number / count
        parts = {
            part: (first - last) * exp(-pace * done) + last * (1 - shift) * random.uniform(0.95, 1.05)
            for part, (first, last) in PARTS.items()
        }
        distances = {f"{s}<{t}": parts["hidden"] * (0.6 + 0.3 * s) * random.uniform(0.97, 1.03) for s, t in pairs}
        parts["hidden"] = fmean(distances.values()) if distances else 0.0
        loss = parts["ce"] + parts["kl"] + 3 * parts["hidden"]
        lines.append(LogLine(2 * number, {"loss": loss, **parts}, dict(distances)))
    return Curve(lines, {f"{s}<{t}": s for s, t in pairs})


def generations(results: Results, items: int = 200) -> list[GeneratedItem]:
    """What the study's models wrote for the built-in task's first test rows: right, with a slot wrong, or cut off."""
    entries = [run.name for run in results.runs]
    entries.insert(1, "undistilled")
    chance = {"teacher": 1.0, "undistilled": 0.3}
    random, found = Random(11), []
    for number, row in enumerate(records.examples("test", 0, 0, items)):
        outputs, scores = {}, {}
        for entry in entries:
            text = random.choice(row["references"][:3]) if random.random() > 0.85 else row["references"][0]
            if random.random() > chance.get(entry, 0.9):
                text = _spoiled(text, random)
            outputs[entry] = text
            right = text in row["references"]
            scores[entry] = {"slots_exact": float(right), "rouge_l": 1.0 if right else round(random.uniform(0.5, 1), 4)}
        found.append(GeneratedItem(number, row["prompt"], row["references"], outputs, scores))
    return found


def _spoiled(text: str, random: Random) -> str:
    words = text.split()
    place = random.randrange(1, len(words))
    words[place] = random.choice(("the", "Thai", "hotel", "welcomes", "lake"))
    return " ".join(words if random.random() < 0.8 else words[: place + 3] + words[place : place + 3])


def partial(results: Results) -> Results:
    """The same study stopped on the way: one strategy not begun, another failed, no comparison, no map or curve of either."""
    lost = {"reverse": "not yet", "random": "failed: OutOfMemoryError: no room for 3 GiB on <device> & its neighbour"}
    gone = [run.name for run in results.runs if run.strategy in lost]
    runs = []
    for run in results.runs:
        state = "unfinished" if run.strategy == "random" else "not yet"
        runs.append(TrainingRun(run.name, run.strategy, run.seed, state, None) if run.name in gone else run)
    scored = results.scored - len(gone)
    return replace(
        results,
        scored=scored,
        rows=[without_scores(row, lost[row.name]) if row.name in lost else row for row in results.rows],
        runs=runs,
        comparisons=[c for c in results.comparisons if c.strategy not in lost],
        conclusion=f"This report is partial: {scored} of {results.models} models have scores.",
        problems={name: lost[name.rpartition("-s")[0]] for name in gone},
        maps=[layer_map for layer_map in results.maps if layer_map.strategy not in lost],
        curves={name: curve for name, curve in results.curves.items() if name not in gone},
    )


def without_scores(row: Row, problem: str) -> Row:
    """The row with this problem in the place of every score."""
    problems = [problem] * row.models
    missing = {step: problems for step in ("generation", "agreement", "lm-eval")}
    return replace(row, problems=problems, missing=missing, cells={})


def nothing(results: Results) -> Results:
    """A study that was planned and not begun."""
    return replace(
        results,
        metrics=[],
        comparisons=[],
        maps=[],
        items={},
        curves={},
        backends={},
        versions={},
        hardware={},
        scored=0,
        primary=None,
        rows=[without_scores(row, "not yet") for row in results.rows],
        runs=[],
        commit=None,
        problems={row.name: "not yet" for row in results.rows},
        conclusion="This report is partial: nothing can be concluded, no model has a score.",
    )


if __name__ == "__main__":
    from llmkd.report.page.document import whole_page

    whole = study()
    recipe = (Path(__file__).parents[3] / "recipes/quickstart.yaml").read_text()
    Path(sys.argv[1]).write_text(whole_page(whole, generations(whole), recipe))
