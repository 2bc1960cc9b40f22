"""The comparisons of a study: every strategy with the reference, and with the students that no layer map taught.

A question is a metric and what is compared with: "which strategies differ from forward in BLEU?". Its strategies are one
family of Holm's correction, for each of the tests. No pair of strategies is in two families of a metric, so none can get
two verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmkd.report.item_scores import Models
from llmkd.report.significance import Array, Score, holm, items_bootstrap, paired, verdict

BASELINES = ("none", "ce_only", "undistilled")
Row = dict[str, Any]
Items = Callable[[str, Models, Models], tuple[Array, Array, Score] | None]


def questions(rows: Sequence[Row], reference: str) -> dict[str, list[str]]:
    """What is compared with -> the strategies that are: the study's reference first, then the baselines that there are.

    With the reference are compared the strategies that match blocks; `none` only where a baseline is the reference.
    """
    names = [row["name"] for row in rows]
    students = [row["name"] for row in rows if row["kind"] == "student"]
    asked = {}
    for base in [reference, *(name for name in BASELINES if name != reference)]:
        others = [name for name in students if name != base and not (name == "none" and base not in BASELINES)]
        if base in names and others:
            asked[base] = others
    return asked


def comparisons(
    rows: Sequence[Row], metrics: Sequence[dict[str, Any]], reference: str, margins: dict[str, float], items: Items
) -> list[dict[str, Any]]:
    """Every comparison of every metric; a strategy without a score that its counterpart has for the same seed is left out."""
    by_name = {row["name"]: row for row in rows}
    made = []
    for metric in (metric["name"] for metric in metrics):
        for base, strategies in questions(rows, reference).items():
            pairs = [(by_name[strategy], by_name[base]) for strategy in strategies]
            found = [_comparison(metric, one, other, margins.get(metric), items) for one, other in pairs]
            made += _family([one for one in found if one is not None])
    return made


def _comparison(metric: str, one: Row, other: Row, margin: float | None, items: Items) -> dict[str, Any] | None:
    """One strategy against another on one metric, before Holm; None if no seed has both scores."""
    if metric not in one["cells"] or metric not in other["cells"]:
        return None
    first, second = (
        dict(zip(row["cells"][metric]["seeds"], row["cells"][metric]["values"], strict=True)) for row in (one, other)
    )
    single = set(second) == {None}  # one model for all seeds, as a student copied from the teacher is before training
    seeds = [seed for seed in first if single or seed in second]
    if not seeds:
        return None
    found = paired([first[seed] for seed in seeds], [second[None if single else seed] for seed in seeds], margin)
    models = [(one["name"], seed) for seed in seeds]
    statistics = items(metric, models, [(other["name"], seed) for seed in ([None] if single else seeds)])
    drawn = items_bootstrap(*statistics) if statistics is not None else None
    return {
        "metric": metric,
        "strategy": one["name"],
        "reference": other["name"],
        "difference": found.difference,
        "interval": found.interval and list(found.interval),
        "seeds": found.seeds,
        "p_different": found.p_different,
        "margin": margin,
        "p_equivalent": found.p_equivalent,
        "items": drawn and drawn.items,
        "items_interval": drawn and list(drawn.interval),
        "items_p": drawn and drawn.p,
    }


def _family(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The members of one family with their adjusted p-values and verdicts."""
    for key in ("p_different", "p_equivalent", "items_p"):
        for member, adjusted in zip(members, holm([member[key] for member in members]), strict=True):
            member[f"{key}_holm"] = adjusted
    return [{**one, "verdict": verdict(one["p_different_holm"], one["p_equivalent_holm"])} for one in members]
