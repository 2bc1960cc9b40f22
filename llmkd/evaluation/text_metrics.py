"""Scores of generated texts against references: pure functions of strings and token ids, fit for a bootstrap.

A corpus BLEU or chrF is a function of sums over items, so that any resample of items costs one sum:

    rows = np.stack([bleu.statistics(text, references) for text, references in items])   # [items, statistics]
    bleu.of(rows[drawn].sum(0))
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llmkd.data import records
from llmkd.data.turns import THOUGHTS, THOUGHTS_END


class Metric(NamedTuple):
    """How a metric is shown."""

    label: str
    higher_is_better: bool | None  # None: neither end is the better one
    percent: bool  # the score is on a scale of 0 to 100


METRICS: dict[str, Metric] = {
    "bleu": Metric("BLEU", True, True),
    "chrf": Metric("chrF", True, True),
    "rouge_l": Metric("ROUGE-L", True, False),
    "slots_exact": Metric("all slots right", True, False),
    "slots": Metric("slots right", True, False),
    "length_ratio": Metric("length ratio", None, False),
    "eos_rate": Metric("ended by itself", True, False),
    "repetition": Metric("repeated 4-grams", False, False),
    "distinct_1": Metric("distinct words", True, False),
    "distinct_2": Metric("distinct word pairs", True, False),
}
"""Every metric of a generated corpus, in the order of a table."""

Items = Sequence[tuple[str, Sequence[str]]]
"""(text, its references), one per item; how many references there are may differ."""

SEEN = 2**14
"""Texts whose scores are kept: students of one teacher write the same for two items of three."""


def corpus_metrics(
    items: Items, finished: Sequence[bool], slots: Sequence[dict[str, str]] | None = None
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """All metrics of a corpus, and the scores of each item.

    A metric of that name is the mean of its items' scores. `slots` are the records of the built-in task, where it is one.
    """
    scores = [{"rouge_l": rouge_l(text, references), "repetition": repetition(text)} for text, references in items]
    for number, record in enumerate(slots or ()):
        share = records.slots_right(record, items[number][0])
        scores[number] |= {"slots_exact": float(share == 1.0), "slots": share}
    texts = [text for text, _ in items]
    found = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    found |= {
        "bleu": bleu(items),
        "chrf": chrf(items),
        "length_ratio": length_ratio(items),
        "eos_rate": sum(finished) / len(finished),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }
    return {name: found[name] for name in METRICS if name in found}, scores


def answer_in(text: str, references: Sequence[str]) -> str:
    """A text without the thoughts before its answer, `<think>...</think>`; the text itself where a reference has thoughts too.

    Of thoughts that were cut off no answer is left. A prompt may have begun the thoughts.
    """
    if any(THOUGHTS in reference or THOUGHTS_END in reference for reference in references):
        return text
    _, ended, answer = text.rpartition(THOUGHTS_END)
    if ended:
        return answer.strip()
    return "" if text.lstrip().startswith(THOUGHTS) else text


# --- BLEU and chrF, by sacrebleu


class CorpusScore:
    """A corpus score of sacrebleu, 0 to 100, that is a function of sums over items; an item may have several references."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, items: Items) -> float:
        """The score of whole items."""
        return self.of(np.sum([self.statistics(text, references) for text, references in items], axis=0))

    def statistics(self, text: str, references: Sequence[str]) -> np.ndarray:
        """What one item adds. BLEU [10]: lengths of text and reference, n-grams matched, n-grams in all; against all references.

        chrF [18]: per n-gram order the text's, the nearest reference's and the matched.
        """
        return np.array(self._counts(text, tuple(references)), dtype=int)

    def of(self, total: np.ndarray) -> float:
        """The score of items whose statistics have this sum."""
        return float(self._metric._compute_score_from_stats(total.tolist()).score)

    @functools.cached_property
    def _counts(self) -> Callable[[str, tuple[str, ...]], list[int]]:
        # An inner method of sacrebleu, because it has no public one that gives chrF's counts; the version is bounded.
        extract = self._metric._extract_corpus_statistics
        return functools.lru_cache(SEEN)(lambda text, references: extract([text], [[r] for r in references])[0])

    @functools.cached_property
    def _metric(self) -> Any:
        from sacrebleu import metrics  # heavy; a report without texts reads this module too

        return getattr(metrics, self._name)()


bleu, chrf = CorpusScore("BLEU"), CorpusScore("CHRF")


# --- Words


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


class _Words:
    """`words`, in the form that rouge-score takes: its own knows ASCII alone."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # heavy, as above

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(text: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, 0 to 1, with the reference where it is highest (Lin 2004, eq. 2-4)."""
    return _rouge_l(text, tuple(references))


@functools.lru_cache(SEEN)
def _rouge_l(text: str, references: tuple[str, ...]) -> float:
    return max(_rouge().score(reference, text)["rougeL"].fmeasure for reference in references)


def length_ratio(items: Items) -> float:
    """Words of all texts over words of their references, of each the one nearest in length (of two, the shorter)."""
    ours = theirs = 0
    for text, references in items:
        length = len(words(text))
        ours += length
        theirs += min((len(words(reference)) for reference in references), key=lambda n: (abs(n - length), n))
    return ours / theirs if theirs else float(ours == 0)


def repetition(text: str, n: int = 4) -> float:
    """The share of a text's n-grams of words that stood in it before; 0 where it has none."""
    grams = _grams(words(text), n)
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all of them, in all texts together (Li et al. 2016); 0 where there are none."""
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
