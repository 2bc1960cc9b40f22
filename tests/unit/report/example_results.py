"""A made-up study in the form of results.json, for tests of the page and for looking at it.

    python -m tests.unit.report.example_results report.html

writes the page of five strategies over five seeds with two baselines and 200 generated items.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import exp, sqrt
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

from llmkd.data import records
from llmkd.layer_map import RULES, layer_map

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
) -> dict[str, Any]:
    """Results of a whole study; the same arguments give the same numbers."""
    random = Random(7)
    metrics = [
        dict(zip(("name", "label", "higher_is_better", "percent", "step"), metric[:5], strict=True))
        for metric in METRICS
    ]
    rows = [_row("teacher", "teacher", None, random), _row("undistilled", "baseline", None, random)]
    rows.append(_row("ce_only", "baseline", seeds, random))
    rows += [_row(strategy, "student", seeds, random) for strategy in strategies]
    runs = [_run("teacher", None, None, random)]
    runs += [_run(f"{s}-s{seed}", s, seed, random) for s in ("ce_only", *strategies) for seed in seeds]
    maps = _maps(strategies, seeds, student_blocks, teacher_blocks)
    pairs = {name: found["pairs"] for found in maps for name in found["runs"]}
    names = [run["name"] for run in runs]
    asked = {"forward": [name for name in strategies if name not in ("forward", "none")]}
    asked |= {base: [name for name in strategies if name != base] for base in ("none", "ce_only", "undistilled")}
    comparisons = [
        _comparison(metric["name"], strategy, base, rows, 0.5 if metric["name"] == "generation/bleu" else None)
        for metric in metrics
        for base, others in asked.items()
        for strategy in others
    ]
    return {
        "name": "quickstart",
        "models": 2 + len(seeds) * (len(strategies) + 1),
        "scored": 2 + len(seeds) * (len(strategies) + 1),
        "seeds": list(seeds),
        "reference": "forward",
        "margins": {"generation/bleu": 0.5},
        "primary": "generation/bleu",
        "metrics": metrics,
        "rows": rows,
        "comparisons": comparisons,
        "conclusion": _conclusion(comparisons, len(seeds)),
        "notes": ["The numbers of this page are made up."],
        "problems": {},
        "items": {"generation": 200, "records_choice": 200},
        "maps": [found for found in maps if found["pairs"]],
        "runs": runs,
        "curves": {
            name: _curve(pairs.get(name, []), log_lines, random, SHIFTS.get(name.rpartition("-s")[0], 0.0))
            for name in names
        },
        "backends": {"generation": {"hf": names}, "lm-eval": {"hf": names}},
        "versions": {"llmkd": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0", "lm_eval": "0.4.13"},
        "hardware": {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_gib": 24.0, "gpus": []},
        "commit": "0123456789ab",
    }


def _row(name: str, kind: str, seeds: Sequence[int] | None, random: Random) -> dict[str, Any]:
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
        cells[metric] = {
            "mean": fmean(values),
            "half_width": width,
            "n": count,
            "values": values,
            "seeds": list(seeds or []),
        }
    return {"name": name, "kind": kind, "models": count, "seeds": list(seeds or []), "problems": [], "cells": cells}


def _comparison(
    metric: str, strategy: str, base: str, rows: Sequence[dict[str, Any]], margin: float | None
) -> dict[str, Any]:
    values, reference = (next(r for r in rows if r["name"] == n)["cells"][metric]["values"] for n in (strategy, base))
    gaps = [one - other for one, other in zip(values, reference * (len(values) // len(reference)), strict=True)]
    difference, count = fmean(gaps), len(gaps)
    found = {"metric": metric, "strategy": strategy, "reference": base, "difference": difference}
    if count < 2:
        empty = ("interval", "p_different", "p_different_holm", "p_equivalent", "p_equivalent_holm")
        return {**found, **_items(), **dict.fromkeys(empty), "seeds": count, "margin": margin, "verdict": "not tested"}
    width = T_975[count] * stdev(gaps) / sqrt(count)
    low, high = difference - width, difference + width
    apart, inside = low > 0 or high < 0, margin is not None and -margin < low and high < margin
    verdict = {(True, True): "different within the margin", (True, False): "different", (False, True): "equivalent"}
    return {
        **found,
        **_items(),
        "interval": [low, high],
        "seeds": count,
        "p_different": 0.012 if apart else 0.34,
        "p_different_holm": 0.048 if apart else 0.71,
        "margin": margin,
        "p_equivalent": None if margin is None else 0.011 if inside else 0.21,
        "p_equivalent_holm": None if margin is None else 0.022 if inside else 0.42,
        "verdict": verdict.get((apart, inside), "undecided"),
    }


def _conclusion(comparisons: Sequence[dict[str, Any]], seeds: int) -> str:
    main = [found for found in comparisons if (found["metric"], found["reference"]) == ("generation/bleu", "forward")]
    named = {
        verdict: ", ".join(found["strategy"] for found in main if found["verdict"] == verdict)
        for verdict in ("equivalent", "different", "different within the margin", "undecided", "not tested")
    }
    said = "; ".join(f"{verdict}: {names}" for verdict, names in named.items() if names)
    return f"Over {seeds} seeds, compared with forward by BLEU and the margin 0.5: {said}."


def _items() -> dict[str, Any]:
    return dict.fromkeys(("items", "items_interval", "items_p", "items_p_holm"))


def _maps(
    strategies: Sequence[str], seeds: Sequence[int], student_blocks: int, teacher_blocks: int
) -> list[dict[str, Any]]:
    found: dict[tuple[Any, ...], list[str]] = {}
    for strategy in strategies:
        for seed in seeds:
            rule = strategy if strategy in RULES else "forward"
            pairs = tuple(layer_map(rule, student_blocks, teacher_blocks, seed=seed))
            found.setdefault((strategy, pairs), []).append(f"{strategy}-s{seed}")
    return [
        {
            "strategy": strategy,
            "runs": runs,
            "pairs": [list(pair) for pair in pairs],
            "student_blocks": student_blocks,
            "teacher_blocks": teacher_blocks,
        }
        for (strategy, pairs), runs in found.items()
    ]


def _run(name: str, strategy: str | None, seed: int | None, random: Random) -> dict[str, Any]:
    speed = random.uniform(1500, 1700) * (0.6 if strategy is None else 1.0)
    tokens = 500_000 if strategy is None else 54_000
    return {
        "name": name,
        "strategy": strategy,
        "seed": seed,
        "state": "done",
        "last_step": 300 if strategy is None else 40,
        "steps": 300 if strategy is None else 40,
        "seconds": tokens / speed,
        "tokens": tokens,
        "tokens_per_second": speed,
        "memory_gib": random.uniform(0.9, 1.0),
        "world_size": 2,
        "resumed_from_step": None,
    }


def _curve(pairs: Sequence[Sequence[int]], lines: int, random: Random, shift: float) -> list[dict[str, Any]]:
    """Falling losses with noise; a run without pairs has no hidden distance."""
    pace, found = 4 + 2 * shift + random.uniform(-0.2, 0.2), []
    for number in range(1, lines + 1):
        done = number / lines
        parts = {
            part: (first - last) * exp(-pace * done) + last * (1 - shift) * random.uniform(0.95, 1.05)
            for part, (first, last) in PARTS.items()
        }
        distances = {f"{s}<{t}": parts["hidden"] * (0.6 + 0.3 * s) * random.uniform(0.97, 1.03) for s, t in pairs}
        parts["hidden"] = fmean(distances.values()) if distances else 0.0
        loss = parts["ce"] + parts["kl"] + 3 * parts["hidden"]
        found.append({"step": 2 * number, "loss": loss, **parts, "pairs": distances})
    return found


def generations(results: dict[str, Any], items: int = 200) -> list[dict[str, Any]]:
    """What the study's models wrote for the built-in task's first test rows: right, with a slot wrong, or cut off."""
    entries = [run["name"] for run in results["runs"]]
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
        found.append(
            {
                "item": number,
                "prompt": row["prompt"],
                "references": row["references"],
                "outputs": outputs,
                "scores": scores,
            }
        )
    return found


def _spoiled(text: str, random: Random) -> str:
    words = text.split()
    place = random.randrange(1, len(words))
    words[place] = random.choice(("the", "Thai", "hotel", "welcomes", "lake"))
    return " ".join(words if random.random() < 0.8 else words[: place + 3] + words[place : place + 3])


def partial(results: dict[str, Any]) -> dict[str, Any]:
    """The same study stopped on the way: one strategy not run, another failed, no comparison, no map or curve of either."""
    lost = {"reverse": "not run", "random": "failed: OutOfMemoryError: no room for 3 GiB on <device> & its neighbour"}
    rows = []
    for row in results["rows"]:
        problem = lost.get(row["name"])
        rows.append({**row, "problems": [problem] * row["models"], "cells": {}} if problem else row)
    gone = [run["name"] for run in results["runs"] if run["strategy"] in lost]
    runs = [
        {**run, **dict.fromkeys(("steps", "seconds", "tokens", "tokens_per_second", "memory_gib", "world_size"))}
        | {"state": "unfinished" if run["strategy"] == "random" else "not run", "last_step": None}
        if run["name"] in gone
        else run
        for run in results["runs"]
    ]
    scored = results["scored"] - len(gone)
    return {
        **results,
        "scored": scored,
        "rows": rows,
        "runs": runs,
        "comparisons": [c for c in results["comparisons"] if c["strategy"] not in lost],
        "conclusion": f"This report is partial: {scored} of {results['models']} models have scores.",
        "problems": {name: lost[name.rpartition("-s")[0]] for name in gone},
        "maps": [found for found in results["maps"] if found["strategy"] not in lost],
        "curves": {name: curve for name, curve in results["curves"].items() if name not in gone},
    }


def nothing(results: dict[str, Any]) -> dict[str, Any]:
    """A study that was planned and not begun."""
    rows = [{**row, "problems": ["not run"] * row["models"], "cells": {}} for row in results["rows"]]
    empty_lists = dict.fromkeys(("metrics", "comparisons", "maps"), [])
    empty_dicts = dict.fromkeys(("items", "curves", "backends", "versions", "hardware"), {})
    return {
        **results,
        **empty_lists,
        **empty_dicts,
        "scored": 0,
        "primary": None,
        "rows": rows,
        "runs": [],
        "commit": None,
        "problems": {row["name"]: "not run" for row in rows},
        "conclusion": "This report is partial: nothing can be concluded, no model has a score.",
    }


if __name__ == "__main__":
    from llmkd.report.page.document import html

    whole = study()
    recipe = (Path(__file__).parents[3] / "recipes/quickstart.yaml").read_text()
    Path(sys.argv[1]).write_text(html(whole, generations(whole), recipe))
