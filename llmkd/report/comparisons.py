"""The comparisons of a study: every strategy with the reference, and with the students that no layer map taught.

A question is a metric and what is compared with: "which strategies differ from forward in BLEU?". Its strategies are one
family of Holm's correction, for each of the tests. No pair of strategies is in two families of a metric, so none can get
two verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmkd.report.item_scores import ItemScores
from llmkd.report.results import Comparison, Results, Row
from llmkd.report.significance import holm, items_bootstrap, paired, verdict

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
    by_seed = paired(
        [scores[seed] for seed in seeds], [base_scores[None if single else seed] for seed in seeds], margin
    )
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
