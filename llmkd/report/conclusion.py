"""What a study's comparisons allow to conclude: the answer in one sentence, and the notes that belong to it.

The sentence speaks of the main metric only and claims no more than the verdicts do: that no difference is shown is never
called equality, and equality is claimed only within a margin that the recipe states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from llmkd.report import numbers
from llmkd.report.comparisons import BASELINES, questions
from llmkd.report.results import Comparison, Metric, Results
from llmkd.report.significance import ALPHA
from llmkd.text import listed

OUTCOMES = ("within the margin", "better", "worse", "higher", "lower", "undecided", "not tested", "without a score")
Groups = dict[str, list[str]]  # outcome -> the strategies that have it, in the order of OUTCOMES


def conclusion(results: Results) -> str:
    """The answer, in one sentence."""
    answer = _answer(results)
    if results.scored < results.models:
        answer = f"so far ({results.scored} of {results.models} models scored), {answer}"
    return f"{answer[0].upper()}{answer[1:]}."


def _answer(results: Results) -> str:
    if not results.metrics:
        return "nothing can be concluded, since no model has a score"
    main = results.metric(results.primary)
    if main is None:
        name = next(iter(results.margins))
        return f"nothing can be concluded, since no model has a score on {name}, the study's main metric"
    counts = sorted({c.seeds for c in results.comparisons if c.metric == main.name})
    if len(results.seeds) == 1 or counts == [1]:
        return "with one seed nothing can be concluded about strategies"
    clauses = [*_against_reference(results, main), *_against_baselines(results, main)]
    if not counts:
        return "nothing can be concluded: " + "; ".join(clauses or ["the study has nothing to compare"])
    over = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    return f"over {over}, {'; '.join(clauses)}"


def _groups(results: Results, main: Metric, base: str) -> Groups:
    """The strategies compared with `base` on the main metric, by what came out; outcomes that none has are left out."""
    outcomes = {c.strategy: _outcome(c, main) for c in _members(results, main, base)}
    strategies = questions(results.rows, results.reference)[base]
    groups = {kind: [name for name in strategies if outcomes.get(name, OUTCOMES[-1]) == kind] for kind in OUTCOMES}
    return {kind: names for kind, names in groups.items() if names}


def _members(results: Results, main: Metric, base: str) -> list[Comparison]:
    return [c for c in results.comparisons if (c.metric, c.reference) == (main.name, base)]


def _outcome(comparison: Comparison, main: Metric) -> str:
    """A verdict with its direction."""
    if comparison.verdict != "different":
        return comparison.verdict if comparison.verdict in OUTCOMES else "within the margin"
    up = comparison.difference > 0
    if main.higher_is_better is None:
        return "higher" if up else "lower"
    return "better" if up == main.higher_is_better else "worse"


# --- The clauses


def _against_reference(results: Results, main: Metric) -> Iterator[str]:
    """What is known of the strategies beside the reference."""
    base, row = results.reference, results.row(results.reference)
    if row is None or main.name not in row.cells:
        missing = "is not in this study" if row is None else f"has no score in {main.label}"
        yield f"{base}, which strategies are compared with, {missing}"
        return
    if base not in questions(results.rows, base):
        return
    groups, members = _groups(results, main, base), _members(results, main, base)
    margin = results.margins.get(main.name)
    limit = "" if margin is None else f"the margin of {numbers.margin(margin)} {main.label}"
    all_alike = len(groups) == 1 and len(next(iter(groups.values()))) > 1
    for outcome, names in groups.items():
        of_these = [comparison for comparison in members if comparison.strategy in names]
        match outcome:
            case "within the margin":
                who = "no strategy differs" if all_alike else f"{listed(names)} {_do_not(names)} differ"
                small = [c.strategy for c in of_these if c.verdict == "different within the margin"]
                shown = f" (a smaller difference is shown for {listed(small)})" if small else ""
                yield f"{who} from {base} by more than {limit}{shown}"
            case "better" | "worse" | "higher" | "lower":
                yield from (_apart(comparison, outcome, main) for comparison in of_these)
            case "undecided":
                yield _undecided(names, all_alike, base, main.label, limit)
            case "not tested":
                yield f"{listed(names)} can't be tested against {base} ({_why_not(of_these)})"
            case _:
                yield f"{listed(names)} {'has' if len(names) == 1 else 'have'} no score to compare with {base}'s"


def _apart(comparison: Comparison, outcome: str, main: Metric) -> str:
    """A difference that is shown, with its interval."""
    assert comparison.interval is not None
    low, high = (numbers.size(end, main) for end in sorted(comparison.interval, key=abs))
    difference = f"{numbers.size(comparison.difference, main)} {main.label}"
    return f"{comparison.strategy} is {outcome} than {comparison.reference} by {difference} (95 % interval {low} to {high})"


def _undecided(names: Sequence[str], all_alike: bool, base: str, label: str, limit: str) -> str:
    """What is neither shown to differ nor to be within the margin."""
    who = "any strategy" if all_alike else listed(names)
    if not limit:
        return f"no difference in {label} from {base} is shown for {who} (no margin was stated, so equality was not tested)"
    differ = "differs" if all_alike or len(names) == 1 else "differ"
    return f"it is undecided whether {who} {differ} from {base} by more than {limit}"


def _why_not(comparisons: Sequence[Comparison]) -> str:
    if min(comparison.seeds for comparison in comparisons) < 2:
        return "it takes two scored seeds"
    return "all seeds give the same difference, which shows no spread"


def _against_baselines(results: Results, main: Metric) -> Iterator[str]:
    """What is known beside the students that no layer map taught; those with the same outcome share a clause."""
    asked = questions(results.rows, results.reference)
    bases = [base for base in BASELINES if base in asked and base != results.reference]
    groups = {base: _groups(results, main, base) for base in bases}
    for base in bases:
        alike = [other for other in bases if _read_alike(groups[other], groups[base])]
        if alike[0] == base:
            yield _beside(listed(alike), groups[base])
    if results.row("none") is None:
        yield "what matching blocks adds is not known, since none (logits alone) was not trained"


def _read_alike(first: Groups, second: Groups) -> bool:
    """Whether two outcomes read the same: all strategies of one kind, or the same strategies of each kind."""
    return first == second or (len(first) == len(second) == 1 and first.keys() == second.keys())


def _beside(base: str, groups: Groups) -> str:
    """One clause on one or several baselines."""
    if len(groups) > 1:
        return f"against {base}, " + ", ".join(f"{listed(n)} {_are(n)} {outcome}" for outcome, n in groups.items())
    [(outcome, names)] = groups.items()
    who = names[0] if len(names) == 1 else "all"
    match outcome:
        case "better":
            return f"{who} {'beats' if len(names) == 1 else 'beat'} {base}"
        case "undecided":
            return f"no difference from {base} is shown"
        case "without a score":
            return f"no scores are there to compare with {base}"
    return f"against {base}, {who} {_are(names)} {outcome}"


# --- Notes


def notes(results: Results) -> list[str]:
    """What a reader must know to trust the numbers: how they were tested, and what was not alike."""
    sentences = []
    main = results.metric(results.primary)
    if len(results.seeds) == 2:
        sentences.append("Two seeds make wide intervals (12.7 standard errors): only large differences can be shown.")
    sentences += [*_margin_notes(results), *_item_notes(results)]
    if len(results.metrics) > 1 and main is not None:
        sentences.append(
            f"The answer is about {main.label} alone. Each other metric is corrected for its own strategies, not "
            "for the number of metrics: read what they show as hints."
        )
    if results.thoughts:
        counts = ", ".join(f"{count} by {name}" for name, count in results.thoughts.items())
        sentences.append(
            f"Texts were scored without their thoughts (<think>…</think>), as no reference has any: {counts}."
        )
    if total := sum(results.sources.values()):
        shares = ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in results.sources.items())
        sentences.append(f"Trained on a mixture; rows taken from each source: {shares}.")
    for step, backends in results.backends.items():
        if len(backends) > 1:
            parts = [f"{backend} for {listed(names)}" for backend, names in backends.items()]
            sentences.append(f"Not alike: {step} ran on {', '.join(parts)}.")
    for package, versions in results.versions.items():
        if isinstance(versions, list):
            sentences.append(f"Not alike: {package} was {' for some and '.join(map(str, versions))} for others.")
    for task, counts in results.items.items():
        if isinstance(counts, list):
            had = " items for some models and ".join(map(str, counts))
            sentences.append(f"Not alike: {task} had {had} for others.")
    return sentences


def _margin_notes(results: Results) -> Iterator[str]:
    """Margins that were chosen with results in sight, and margins of metrics that are not there."""
    for name in results.margins:
        if results.metrics and results.metric(name) is None:
            yield f"The margin of {name} tests nothing: no model has a score by that name."
    before = None
    for stated in results.margins_history:
        if before is not None and stated.margins != before and stated.results:
            yield (
                f"The margins were changed from {_margins(before)} to {_margins(stated.margins)} when {stated.results} "
                "results were there already: they were not all stated before the run."
            )
        before = stated.margins


def _margins(margins: Mapping[str, float]) -> str:
    return ", ".join(f"{metric} {numbers.margin(margin)}" for metric, margin in margins.items()) or "nothing"


def _item_notes(results: Results) -> Iterator[str]:
    """Whether the differences that the seeds show hang on the choice of test items."""
    members = [c for c in results.comparisons if c.metric == results.primary and c.items]
    shown = [c for c in members if c.verdict in ("different", "different within the margin")]
    frail = [f"{c.strategy} and {c.reference}" for c in shown if c.items_p_holm is not None and c.items_p_holm >= ALPHA]
    if frail:
        yield f"Shown by the seeds, but another draw of test items might not show it: the difference of {'; '.join(frail)}."
    elif shown:
        yield "The differences that the seeds show hold for another draw of test items too (paired bootstrap, Holm)."


# --- Words


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _do_not(names: Sequence[str]) -> str:
    return "does not" if len(names) == 1 else "do not"
