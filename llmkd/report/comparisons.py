"""The comparisons of a study: every strategy with the reference, and with the students that no layer map taught.

A question is a metric and what is compared with: "which strategies differ from forward in BLEU?". Its strategies are one
family of Holm's correction, for each of the tests. No pair of strategies is in two families of a metric, so none can get
two verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from llmkd.report.item_scores import Seeds
from llmkd.report.results import Comparison, Metric, Row
from llmkd.report.significance import Array, Score, holm, items_bootstrap, paired, verdict

BASELINES = ("none", "ce_only", "undistilled")
Items = Callable[[str, Seeds, Seeds], tuple[Array, Array, Score] | None]


def questions(rows: Sequence[Row], reference: str) -> dict[str, list[str]]:
    """What is compared with -> the strategies that are: the study's reference first, then the baselines that there are.

    With the reference are compared the strategies that match blocks; `none` only where a baseline is the reference.
    """
    names = [row.name for row in rows]
    students = [row.name for row in rows if row.kind == "student"]
    asked = {}
    for base in [reference, *(name for name in BASELINES if name != reference)]:
        others = [name for name in students if name != base and not (name == "none" and base not in BASELINES)]
        if base in names and others:
            asked[base] = others
    return asked


def comparisons(
    rows: Sequence[Row], metrics: Sequence[Metric], reference: str, margins: Mapping[str, float], items: Items
) -> list[Comparison]:
    """Every comparison of every metric; a strategy without a score that its counterpart has for the same seed is left out."""
    by_name = {row.name: row for row in rows}
    compared = []
    for metric in metrics:
        for base, strategies in questions(rows, reference).items():
            margin = margins.get(metric.name)
            family = [_compare(metric.name, by_name[name], by_name[base], margin, items) for name in strategies]
            compared += _corrected([comparison for comparison in family if comparison is not None])
    return compared


def _compare(metric: str, strategy: Row, base: Row, margin: float | None, items: Items) -> Comparison | None:
    """One strategy against another on one metric, before Holm; None if no seed has both scores."""
    if metric not in strategy.cells or metric not in base.cells:
        return None
    scores, base_scores = (
        dict(zip(row.cells[metric].seeds, row.cells[metric].values, strict=True)) for row in (strategy, base)
    )
    single = set(base_scores) == {
        None
    }  # one model for all seeds, as a student copied from the teacher is before training
    seeds = [seed for seed in scores if single or seed in base_scores]
    if not seeds:
        return None
    by_seed = paired(
        [scores[seed] for seed in seeds], [base_scores[None if single else seed] for seed in seeds], margin
    )
    models = [(strategy.name, seed) for seed in seeds]
    statistics = items(metric, models, [(base.name, seed) for seed in ([None] if single else seeds)])
    by_item = items_bootstrap(*statistics) if statistics is not None else None
    return Comparison(
        metric=metric,
        strategy=strategy.name,
        reference=base.name,
        difference=by_seed.difference,
        interval=by_seed.interval and list(by_seed.interval),
        seeds=by_seed.seeds,
        p_different=by_seed.p_different,
        margin=margin,
        p_equivalent=by_seed.p_equivalent,
        items=by_item and by_item.items,
        items_interval=by_item and list(by_item.interval),
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
