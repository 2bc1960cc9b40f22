"""What a study's comparisons allow to be said: the answer in one sentence, and the notes that belong to it.

The sentence speaks of the main metric only and says no more than the verdicts do: that no difference is shown is never
called equality, and equality is claimed only within a margin that the recipe states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkd.report.comparisons import BASELINES, questions
from llmkd.report.significance import ALPHA

Results = dict[str, Any]
Comparison = dict[str, Any]
KINDS = ("within the margin", "better", "worse", "higher", "lower", "undecided", "not tested", "without a score")


def conclusion(results: Results) -> str:
    """The answer, in one sentence."""
    said = _answer(results)
    if results["scored"] < results["models"]:
        said = f"so far ({results['scored']} of {results['models']} models scored), {said}"
    return f"{said[0].upper()}{said[1:]}."


def _answer(results: Results) -> str:
    if not results["metrics"]:
        return "nothing can be concluded, since no model has a score"
    if results["primary"] is None:
        main = next(iter(results["margins"]))
        return f"nothing can be concluded, since no model has a score on {main}, the study's main metric"
    counts = sorted({c["seeds"] for c in results["comparisons"] if c["metric"] == results["primary"]})
    if len(results["seeds"]) == 1 or counts == [1]:
        return "with one seed nothing can be concluded about strategies"
    clauses = [*_against_reference(results), *_against_baselines(results)]
    if not counts:
        return "nothing can be concluded: " + "; ".join(clauses or ["the study has nothing to compare"])
    over = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    return f"over {over}, {'; '.join(clauses)}"


def _groups(results: Results, base: str) -> dict[str, list[str]]:
    """Kind of outcome -> the strategies compared with `base` that have it, on the main metric; empty kinds are left out."""
    strategies = questions(results["rows"], results["reference"])[base]
    found = {c["strategy"]: _kind(results, c) for c in _members(results, base)}
    kinds = {kind: [name for name in strategies if found.get(name, KINDS[-1]) == kind] for kind in KINDS}
    return {kind: names for kind, names in kinds.items() if names}


def _members(results: Results, base: str) -> list[Comparison]:
    return [c for c in results["comparisons"] if (c["metric"], c["reference"]) == (results["primary"], base)]


def _kind(results: Results, comparison: Comparison) -> str:
    """A verdict with its direction."""
    said = comparison["verdict"]
    if said == "different":
        up, best = comparison["difference"] > 0, _about(results)["higher_is_better"]
        if best is None:  # neither end is the better one
            return "higher" if up else "lower"
        return "better" if up == best else "worse"
    return said if said in KINDS else "within the margin"


def _about(results: Results) -> dict[str, Any]:
    return next(metric for metric in results["metrics"] if metric["name"] == results["primary"])


# ---------------------------------------------------------------------------------------------------------------------
# The clauses


def _against_reference(results: Results) -> list[str]:
    """What is known of the strategies beside the reference."""
    base, label = results["reference"], _about(results)["label"]
    row = next((row for row in results["rows"] if row["name"] == base), None)
    if row is None or results["primary"] not in row["cells"]:
        missing = "is not in this study" if row is None else f"has no score in {label}"
        return [f"{base}, which strategies are compared with, {missing}"]
    if base not in questions(results["rows"], base):
        return []
    groups = _groups(results, base)
    margin = results["margins"].get(results["primary"])
    limit = "" if margin is None else f"the margin of {margin:g} {label}"
    everyone = len(groups) == 1 and len(next(iter(groups.values()))) > 1
    clauses = []
    for kind, names in groups.items():
        if kind == "within the margin":
            clauses.append(_equal(results, names, everyone, limit))
        elif kind in ("better", "worse", "higher", "lower"):
            clauses += [_apart(results, c, kind) for c in _members(results, base) if c["strategy"] in names]
        elif kind == "undecided":
            clauses.append(_open(names, everyone, base, label, limit))
        elif kind == "not tested":
            clauses.append(f"{_listed(names)} can't be tested against {base} ({_why_not(results, names)})")
        else:
            clauses.append(f"{_listed(names)} {'has' if len(names) == 1 else 'have'} no score to compare with {base}'s")
    return clauses


def _equal(results: Results, names: Sequence[str], everyone: bool, limit: str) -> str:
    """Equivalence, and which differences are shown though they lie within the margin."""
    base = results["reference"]
    who = "no strategy differs" if everyone else f"{_listed(names)} {_do_not(names)} differ"
    small = [c["strategy"] for c in _members(results, base) if c["verdict"] == "different within the margin"]
    within = f" (a smaller difference is shown for {_listed(small)})" if small else ""
    return f"{who} from {base} by more than {limit}{within}"


def _apart(results: Results, comparison: Comparison, kind: str) -> str:
    """A difference that is shown, with its interval."""
    about = _about(results)
    digits = 2 if about["percent"] else 4  # as many as the table of comparisons gives
    size = abs(comparison["difference"])
    low, high = sorted(abs(bound) for bound in comparison["interval"])
    interval = f"95 % interval {low:.{digits}f} to {high:.{digits}f}"
    return f"{comparison['strategy']} is {kind} than {comparison['reference']} by {size:.{digits}f} {about['label']} ({interval})"


def _open(names: Sequence[str], everyone: bool, base: str, label: str, limit: str) -> str:
    """What is neither shown to differ nor to be within the margin."""
    who = "any strategy" if everyone else _listed(names)
    if not limit:
        return f"no difference in {label} from {base} is shown for {who} (no margin was stated, so equality was not tested)"
    differ = "differs" if everyone or len(names) == 1 else "differ"
    return f"it is undecided whether {who} {differ} from {base} by more than {limit}"


def _why_not(results: Results, names: Sequence[str]) -> str:
    seeds = [c["seeds"] for c in _members(results, results["reference"]) if c["strategy"] in names]
    return (
        "it takes two scored seeds" if min(seeds) < 2 else "all seeds give the same difference, which shows no spread"
    )


def _against_baselines(results: Results) -> list[str]:
    """What is known beside the students that no layer map taught; those with the same outcome share a clause."""
    asked = questions(results["rows"], results["reference"])
    bases = [base for base in BASELINES if base in asked and base != results["reference"]]
    outcomes = {base: _groups(results, base) for base in bases}
    clauses = []
    for base in bases:
        alike = [other for other in bases if _alike(outcomes[other], outcomes[base])]
        if alike[0] == base:
            clauses.append(_beside(_listed(alike), outcomes[base]))
    if not any(row["name"] == "none" for row in results["rows"]):
        clauses.append("what matching blocks adds is not known, since none (logits alone) was not trained")
    return clauses


def _alike(one: dict[str, list[str]], other: dict[str, list[str]]) -> bool:
    """Whether two outcomes read the same: all strategies of one kind, or the same strategies of each kind."""
    return one == other or (len(one) == len(other) == 1 and one.keys() == other.keys())


def _beside(base: str, groups: dict[str, list[str]]) -> str:
    """One clause on one or several baselines."""
    if len(groups) > 1:
        return f"against {base}, " + ", ".join(f"{_listed(n)} {_are(n)} {kind}" for kind, n in groups.items())
    kind, names = next(iter(groups.items()))
    one = len(names) == 1
    who = names[0] if one else "all"
    match kind:
        case "better":
            return f"{who} {'beats' if one else 'beat'} {base}"
        case "undecided":
            return f"no difference from {base} is shown"
        case "without a score":
            return f"no scores are there to compare with {base}"
    return f"against {base}, {who} {_are(names)} {kind}"


# ---------------------------------------------------------------------------------------------------------------------
# Notes


def notes(results: Results) -> list[str]:
    """What a reader must know to trust the numbers: how they were tested, and what was not alike."""
    said = []
    if len(results["seeds"]) == 2:
        said.append("Two seeds make wide intervals (12.7 standard errors): only large differences can be shown.")
    said += _margin_notes(results)
    said += _item_notes(results)
    if len(results["metrics"]) > 1 and results["primary"] is not None:
        said.append(
            f"The answer is about {_about(results)['label']} alone. Each other metric is corrected for its own strategies, not "
            "for the number of metrics: read what they show as hints."
        )
    for step, backends in results["backends"].items():
        if len(backends) > 1:
            parts = [f"{backend} for {_listed(names)}" for backend, names in backends.items()]
            said.append(f"Not alike: {step} ran on {', '.join(parts)}.")
    for package, found in results["versions"].items():
        if isinstance(found, list):
            said.append(f"Not alike: {package} was {' for some and '.join(map(str, found))} for others.")
    for task, found in results["items"].items():
        if isinstance(found, list):
            said.append(f"Not alike: {task} had {' items for some models and '.join(map(str, found))} for others.")
    return said


def _margin_notes(results: Results) -> list[str]:
    """Margins that were chosen with results in sight, and margins of metrics that are not there."""
    known = [metric["name"] for metric in results["metrics"]]
    said = [
        f"The margin of {metric} tests nothing: no model has a score by that name."
        for metric in results["margins"]
        if known and metric not in known
    ]
    history = results["margins_history"]
    before = history[0]["margins"] if history else results["margins"]
    for stated in history[1:]:
        if stated["margins"] != before and stated["results"]:
            said.append(
                f"The margins were changed from {_margins(before)} to {_margins(stated['margins'])} when {stated['results']} "
                "results were there already: they were not all stated before the run."
            )
        before = stated["margins"]
    return said


def _margins(margins: dict[str, float]) -> str:
    return ", ".join(f"{metric} {margin:g}" for metric, margin in margins.items()) or "nothing"


def _item_notes(results: Results) -> list[str]:
    """Whether the differences that the seeds show hang on the choice of test items."""
    members = [c for c in results["comparisons"] if c["metric"] == results["primary"] and c["items"]]
    shown = [c for c in members if c["verdict"] in ("different", "different within the margin")]
    if not shown:
        return []
    frail = [f"{c['strategy']} and {c['reference']}" for c in shown if c["items_p_holm"] >= ALPHA]
    if not frail:
        return ["The differences that the seeds show hold for another draw of test items too (paired bootstrap, Holm)."]
    return [
        f"Shown by the seeds, but another draw of test items might not show it: the difference of {'; '.join(frail)}."
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Words


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _do_not(names: Sequence[str]) -> str:
    return "does not" if len(names) == 1 else "do not"
