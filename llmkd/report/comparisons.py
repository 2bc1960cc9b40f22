"""The comparisons of a study: every strategy with the reference, and with the students that no layer map taught.

A question is a metric and what is compared with: "which strategies differ from forward in BLEU?". Its strategies are one
family of Holm's correction, for each of the tests. No pair of strategies is in two families of a metric, so none can get
two verdicts.

The second check asks the test items: each item's share of a model's score is read, so that another draw of items can be scored. A
metric takes part if its items give back the number that the result file reports: as the mean of the items' scores, as their mean by
tokens, or, for corpus metrics such as BLEU, as a function of sums over items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isclose
from pathlib import Path

import numpy as np

from llmkd.evaluation import text_metrics
from llmkd.evaluation.class_metrics import class_statistics, f1_scores
from llmkd.evaluation.results import RESULT_CLASSES, ClassifiedRow, ComparedItem, GeneratedText, TaskItem, read_items
from llmkd.recipe.study_entries import StudyEntry
from llmkd.report.files import items_file, row_name
from llmkd.report.results import Comparison, Results, Row
from llmkd.report.significance import Array, Score, holm, items_bootstrap, mean_score, paired, verdict

TOLERANCE = 1e-4  # relative: result files may hold rounded numbers
Item = tuple[str, int]  # (task or step, number)
Seeds = Sequence[tuple[str, int | None]]  # (row's name, seed)
BASELINES = ("none", "ce_only", "undistilled")


def questions(rows: Sequence[Row], reference: str) -> dict[str, list[str]]:
    """Reference or baseline -> the strategies that are compared with it; the study's reference first, then the baselines it has.

    `none` is compared with baselines alone.
    """
    names = [row.name for row in rows]
    students = [row.name for row in rows if row.kind == "student"]
    strategies = {}
    for base in [reference, *(name for name in BASELINES if name != reference)]:
        others = [name for name in students if name != base and not (name == "none" and base not in BASELINES)]
        if base in names and others:
            strategies[base] = others
    return strategies


def comparisons(results: Results, items: ItemScores | None) -> list[Comparison]:
    """Every comparison of every metric; a strategy that shares no scored seed with its counterpart is left out.

    `items`: for the second check; it is left out where they are None.
    """
    rows = {row.name: row for row in results.rows}
    corrected = []
    for metric in results.metrics:
        margin = results.margins.get(metric.name)
        for base, strategies in questions(results.rows, results.reference).items():
            family = [_uncorrected(metric.name, rows[name], rows[base], margin, items) for name in strategies]
            corrected += _corrected([comparison for comparison in family if comparison is not None])
    return corrected


def _uncorrected(
    metric: str, strategy: Row, base: Row, margin: float | None, items: ItemScores | None
) -> Comparison | None:
    """One strategy against another on one metric, before Holm; None if no seed has both scores."""
    if metric not in strategy.cells or metric not in base.cells:
        return None
    scores, base_scores = strategy.cells[metric].by_seed, base.cells[metric].by_seed
    # One model for all seeds, as the undistilled student is where it is copied from the teacher.
    single = set(base_scores) == {None}
    seeds = [seed for seed in scores if single or seed in base_scores]
    if not seeds:
        return None
    other = [base_scores[None if single else seed] for seed in seeds]
    by_seed = paired([scores[seed] for seed in seeds], other, margin)
    by_item = None
    if items is not None:
        base_models = [(base.name, seed) for seed in ([None] if single else seeds)]
        statistics = items.of(metric, [(strategy.name, seed) for seed in seeds], base_models)
        by_item = None if statistics is None else items_bootstrap(*statistics)
    return Comparison(
        metric=metric,
        strategy=strategy.name,
        reference=base.name,
        margin=margin,
        **vars(by_seed),
        items=by_item and by_item.items,
        items_interval=by_item and by_item.interval,
        items_p=by_item and by_item.p,
    )


def _corrected(family: Sequence[Comparison]) -> list[Comparison]:
    """The members of one family with their corrected p-values and verdicts."""
    different = holm([member.p_different for member in family])
    equivalent = holm([member.p_equivalent for member in family])
    items = holm([member.items_p for member in family])
    return [
        replace(member, p_different_holm=p, p_equivalent_holm=q, items_p_holm=items_p, verdict=verdict(p, q))
        for member, p, q, items_p in zip(family, different, equivalent, items, strict=True)
    ]


# --- Test items


def _each(score: Callable[[np.ndarray], float]) -> Score:
    """A score of one sum `[k]` -> of sums `[..., k]`."""
    return lambda sums: np.apply_along_axis(score, -1, np.rint(sums).astype(int))


CORPUS = {
    "bleu": (cache(text_metrics.bleu.statistics), _each(text_metrics.bleu.of)),
    "chrf": (cache(text_metrics.chrf.statistics), _each(text_metrics.chrf.of)),
}
"""Generation metrics that are no mean over items: an item's statistics of its text and references, and the score of their
sum. Models often write the same text, so its statistics are kept."""


@dataclass(frozen=True)
class Statistics:
    """A metric's statistics by item, `[k]` each, and what makes a score of their sum."""

    by_item: Mapping[Item, Sequence[float] | np.ndarray]
    score: Score

    def give_back(self, reported: float | None) -> bool:
        """Whether the items' sum has the score that the result file reports."""
        with np.errstate(divide="ignore", invalid="ignore"):
            score = float(self.score(np.array(list(self.by_item.values()), dtype=float).sum(0)))
        return reported is not None and isclose(score, reported, rel_tol=TOLERANCE, abs_tol=1e-9)


class ItemScores:
    """The items' statistics of a study's models. A model's files are read once, at its first comparison.

    `scores`: model's name -> metric -> what its result files report; `failed`: its name -> the steps that failed.
    """

    def __init__(
        self,
        folder: Path,
        entries: Iterable[StudyEntry],
        scores: Mapping[str, Mapping[str, float]],
        failed: Mapping[str, Iterable[str]],
    ) -> None:
        self._folder = folder
        self._entries = {(row_name(entry), entry.seed): entry for entry in entries}
        self._scores, self._failed = scores, failed
        self._read: dict[str, dict[str, Statistics]] = {}

    def of(self, metric: str, first: Seeds, second: Seeds) -> tuple[Array, Array, Score] | None:
        """The statistics `[models, items, k]` of two groups of (row, seed), and their score.

        None unless every model has the metric's items, and all have the same.
        """
        models = [self._by_metric(self._entries[model]).get(metric) for model in (*first, *second)]
        whole = [statistics for statistics in models if statistics is not None]
        if len(whole) < len(models):
            return None
        items, score = sorted(whole[0].by_item), whole[0].score
        if any(sorted(statistics.by_item) != items or statistics.score is not score for statistics in whole):
            return None
        values = np.array([[statistics.by_item[item] for item in items] for statistics in whole], dtype=float)
        return values[: len(first)], values[len(first) :], score

    def _by_metric(self, entry: StudyEntry) -> dict[str, Statistics]:
        """A model's metrics, each by the first way to score its items that gives back the reported number."""
        if entry.name not in self._read:
            reported, chosen = self._scores[entry.name], self._read.setdefault(entry.name, {})
            for step in entry.steps:
                if step in self._failed[entry.name]:
                    continue
                for metric, ways in _ways_to_score(items_file(self._folder, entry, step), step).items():
                    right = next((way for way in ways if way.give_back(reported.get(metric))), None)
                    if right is not None:
                        chosen.setdefault(metric, right)
        return self._read[entry.name]


def _ways_to_score(file: Path, step: str) -> dict[str, list[Statistics]]:
    """Metric -> the ways in which its items may make its score, from one step's lines."""
    lines = read_items(file, RESULT_CLASSES[step].ITEM)
    values: dict[str, dict[Item, float]] = {}
    tokens: dict[Item, float] = {}
    for line in lines:
        item = (line.task if isinstance(line, TaskItem) else step, line.item)
        tokens[item] = line.tokens if isinstance(line, ComparedItem) else 0
        for metric, value in line.scores.items():
            if isinstance(value, int | float):
                values.setdefault(f"{item[0]}/{metric}", {})[item] = value
    ways = {metric: [_means(by_item, dict.fromkeys(by_item, 1.0))] for metric, by_item in values.items()}
    if step == "agreement":
        for metric, by_item in values.items():
            ways[metric].append(_means(by_item, tokens))
    texts = [line for line in lines if isinstance(line, GeneratedText)]
    if texts:
        for name, (statistics, score) in CORPUS.items():
            sums = {(step, line.item): statistics(line.answer, tuple(line.references)) for line in texts}
            ways[f"{step}/{name}"] = [Statistics(sums, score)]
    rows = [line for line in lines if isinstance(line, ClassifiedRow)]
    if rows:
        classes = rows[0].classes
        counts = {(step, row.item): class_statistics(row.label, row.predicted, classes) for row in rows}
        ways |= {f"{step}/{name}": [Statistics(counts, score)] for name, score in f1_scores(classes).items()}
    return ways


def _means(values: Mapping[Item, float], weights: Mapping[Item, float]) -> Statistics:
    return Statistics({item: (weights[item] * value, weights[item]) for item, value in values.items()}, mean_score)
