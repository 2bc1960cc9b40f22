"""Each test item's share of a model's score, so that another draw of items can be scored.

A metric takes part if its items give back the number that the result file reports: as the mean of the items' scores, as
their mean by tokens, or, for corpus metrics such as BLEU, as a function of sums over items. What gives back another
number is left out, and the comparison then says nothing about items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmkd.evaluation import text_metrics
from llmkd.evaluation.class_metrics import class_statistics, f1_scores
from llmkd.files import read_lines
from llmkd.report.files import ScoredEntry, details
from llmkd.report.significance import Array, Score, mean_score

TOLERANCE = 1e-4  # relative: result files may hold rounded numbers
Item = tuple[str, int]  # (task or step, number)
Models = Sequence[tuple[str, int | None]]  # (row's name, seed)


def _each(score: Callable[[np.ndarray], float]) -> Score:
    """A score of one sum `[k]` -> of sums `[..., k]`."""
    return lambda sums: np.apply_along_axis(score, -1, np.rint(sums).astype(int))


CORPUS = {
    "bleu": (text_metrics.bleu_statistics, _each(text_metrics.bleu_of)),
    "chrf": (text_metrics.chrf_statistics, _each(text_metrics.chrf_of)),
}
"""Generation metrics that are no mean over items: an item's statistics of its text and references, and the score of their sum."""


class Sums(NamedTuple):
    """A metric's statistics by item, `[k]` each, and what makes a score of their sum."""

    by_item: Mapping[Item, Any]
    score: Score


def no_items(metric: str, one: Models, other: Models) -> None:
    """In the place of `ItemScores` where nothing is to be said about items."""


class ItemScores:
    """The items' statistics of a study's models. A model's files are read when first asked for, once."""

    def __init__(self, folder: Path, entries: Sequence[ScoredEntry]) -> None:
        self._folder = folder
        self._entries = {(entry.strategy or entry.name, entry.seed): entry for entry in entries}
        self._read: dict[str, dict[str, Sums]] = {}
        self._texts = {
            name: cache(statistics) for name, (statistics, _) in CORPUS.items()
        }  # models often write the same

    def __call__(self, metric: str, one: Models, other: Models) -> tuple[Array, Array, Score] | None:
        """The statistics `[models, items, k]` of two groups of (row, seed), and their score.

        None unless every model has the metric's items, and all have the same.
        """
        found = [self._sums(self._entries[model]).get(metric) for model in (*one, *other)]
        models = [sums for sums in found if sums is not None]
        if len(models) < len(found):
            return None
        items = sorted(models[0].by_item)
        if any(sorted(sums.by_item) != items or sums.score is not models[0].score for sums in models):
            return None
        both = np.array([[sums.by_item[item] for item in items] for sums in models], dtype=float)
        return both[: len(one)], both[len(one) :], models[0].score

    def _sums(self, entry: ScoredEntry) -> dict[str, Sums]:
        name = entry.name
        if name not in self._read:
            read = [self._lines(entry, step) for step in entry.steps if step not in entry.problems]
            candidates = [(metric, sums) for found in read for metric, kinds in found.items() for sums in kinds]
            self._read[name] = {}
            for metric, sums in candidates:
                if metric not in self._read[name] and _gives_back(sums, entry.scores.get(metric)):
                    self._read[name][metric] = sums
        return self._read[name]

    def _lines(self, entry: ScoredEntry, step: str) -> dict[str, list[Sums]]:
        """Metric -> the ways in which its items may make its score, from one step's lines."""
        lines = read_lines(details(self._folder, entry, step))
        values: dict[str, dict[Item, float]] = {}
        tokens: dict[Item, float] = {}
        for line in lines:
            task, scores = (line["task"], line["metrics"]) if step == "lm-eval" else (step, _scores(step, line))
            item = (task, line["item"])
            tokens[item] = line.get("tokens", 0)
            for metric, value in scores.items():
                if isinstance(value, int | float):
                    values.setdefault(f"{task}/{metric}", {})[item] = value
        found = {metric: [_means(there, dict.fromkeys(there, 1.0))] for metric, there in values.items()}
        if step == "agreement":
            for metric, there in values.items():
                found[metric].append(_means(there, tokens))
        if step == "generation" and lines:
            for name, statistics in self._texts.items():
                sums = {(step, line["item"]): statistics(line["text"], tuple(line["references"])) for line in lines}
                found[f"{step}/{name}"] = [Sums(sums, CORPUS[name][1])]
        if step == "classification" and lines:
            classes = lines[0]["classes"]
            counts = {(step, n["item"]): class_statistics(n["label"], n["predicted"], classes) for n in lines}
            found |= {f"{step}/{name}": [Sums(counts, score)] for name, score in f1_scores(classes).items()}
        return found


def _gives_back(sums: Sums, reported: float | None) -> bool:
    with np.errstate(divide="ignore", invalid="ignore"):
        score = float(sums.score(np.array(list(sums.by_item.values()), dtype=float).sum(0)))
    return reported is not None and isclose(score, reported, rel_tol=TOLERANCE, abs_tol=1e-9)


def _scores(step: str, line: dict[str, Any]) -> dict[str, Any]:
    if step in ("generation", "classification"):
        return line["scores"]
    return {key: value for key, value in line.items() if key not in ("item", "tokens")}


def _means(values: dict[Item, float], weights: dict[Item, float]) -> Sums:
    return Sums({item: (weights[item] * value, weights[item]) for item, value in values.items()}, mean_score)
