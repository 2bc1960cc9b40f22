"""Metrics of texts: against sacrebleu and rouge-score themselves, and against values that can be counted by hand."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from llmkd.data import records
from llmkd.evaluation import text_metrics
from llmkd.evaluation.text_metrics import Items

STATISTICS = {
    "bleu": (text_metrics.bleu, sacrebleu.corpus_bleu),
    "chrf": (text_metrics.chrf, sacrebleu.corpus_chrf),
}


def spoilt_records(count: int, seed: int = 0) -> list[tuple[str, list[str]]]:
    """Texts that lose, double and swap some words of a right sentence; an item has from 1 to 12 references."""
    draw, items = random.Random(seed), []
    for example in records.examples("test", seed, 0, count):
        said = example["completion"].split()
        kept = [word for word in said for _ in range(draw.choices((0, 1, 2), (1, 8, 1))[0])]
        items.append((" ".join(kept), example["references"][: draw.randint(1, 12)]))
    return [*items, ("", ["There is an inn."]), ("no word of it right", ["There is an inn.", "An inn."])]


def by_sacrebleu(score: Callable[..., Any], items: Items) -> float:
    """Corpus score with the references as sacrebleu takes them: k-th of every item together, None where there is none."""
    most = max(len(references) for _, references in items)
    streams = [[list(refs)[k] if k < len(refs) else None for _, refs in items] for k in range(most)]
    return score([text for text, _ in items], streams).score


@pytest.mark.parametrize("metric", STATISTICS)
def test_the_sums_of_items_give_sacrebleus_corpus_score(metric: str) -> None:
    ours, theirs = STATISTICS[metric]
    items = spoilt_records(40)
    rows = np.stack([ours.statistics(text, references) for text, references in items])
    assert ours.of(rows.sum(0)) == ours(items) == by_sacrebleu(theirs, items)
    draw = np.random.default_rng(0)
    for _ in range(5):  # a bootstrap's resample, some items many times
        drawn = draw.integers(len(items), size=len(items))
        assert ours.of(rows[drawn].sum(0)) == by_sacrebleu(theirs, [items[i] for i in drawn])


@pytest.mark.parametrize("metric", STATISTICS)
def test_a_corpus_of_empty_texts_scores_zero_and_its_own_references_score_a_hundred(metric: str) -> None:
    whole, _ = STATISTICS[metric]
    items = spoilt_records(5)[:5]
    assert whole([("", references) for _, references in items]) == 0
    assert whole([(references[-1], references) for _, references in items]) == pytest.approx(100)


def test_rouge_l_is_the_librarys_own_on_ascii_and_knows_other_scripts() -> None:
    theirs = rouge_scorer.RougeScorer(["rougeL"])
    for text, references in spoilt_records(40, seed=1):
        assert text_metrics.rouge_l(text, references) == theirs.score_multi(references, text)["rougeL"].fmeasure
    assert text_metrics.rouge_l("Ein größeres Haus", ["ein großes Haus"]) == pytest.approx(2 / 3)
    assert text_metrics.rouge_l("добрый день", ["добрый день"]) == 1


def subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by its definition's recursion."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + subsequence(a[1:], b[1:])
    return max(subsequence(a[1:], b), subsequence(a, b[1:]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
def test_rouge_l_is_f1_of_the_longest_common_subsequence(text: list[str], reference: list[str]) -> None:
    common = subsequence(text, reference)
    expected = 2 * common / (len(text) + len(reference))  # F1 of common / len(text) and common / len(reference)
    assert text_metrics.rouge_l(" ".join(text), [" ".join(reference)]) == pytest.approx(expected)


def test_length_ratio_takes_the_reference_nearest_in_length() -> None:
    items = [("one two three", ["a b", "a b c d e"]), ("one", ["a b c", "a b"]), ("", ["a"])]
    assert text_metrics.length_ratio(items) == 4 / (2 + 2 + 1)
    assert text_metrics.length_ratio([("one two three", ["a b c d", "a b"])]) == 3 / 2  # of two as near, the shorter


def test_repetition_and_distinct_are_shares_of_ngrams() -> None:
    assert text_metrics.repetition("a b c d") == 0 and text_metrics.repetition("a b c") == 0
    assert text_metrics.repetition("a b c d a b c d") == 1 / 5  # abcd bcda cdab dabc abcd
    assert text_metrics.repetition("no " * 9) == 5 / 6
    assert text_metrics.distinct(["a b a", "a b"], 1) == 2 / 5
    assert text_metrics.distinct(["a b a", "a b"], 2) == 2 / 3  # ab ba ab
    assert text_metrics.distinct(["", "a"], 2) == 0


@pytest.mark.parametrize(
    ("text", "reference", "answer"),
    [
        ("<think>\n\n</think>\n\nAn inn.", "A farm.", "An inn."),
        ("<think>an inn, so</think> An inn.", "A farm.", "An inn."),
        ("an inn, so\n</think>\n\nAn inn.", "A farm.", "An inn."),  # the prompt had begun the thoughts
        ("<think>an inn, and", "A farm.", ""),  # cut off
        ("An inn.", "A farm.", "An inn."),
        ("<think>x</think>An inn.", "<think>y</think>A farm.", "<think>x</think>An inn."),
    ],
)
def test_thoughts_that_no_reference_has_are_no_part_of_the_answer(text: str, reference: str, answer: str) -> None:
    assert text_metrics.answer_in(text, [reference]) == answer


def test_corpus_metrics_are_means_of_the_items_scores() -> None:
    made = records.examples("test", 3, 0, 12)
    wrong = {"price": "low"}
    texts = [e["completion"] if i % 3 else "A cheap thing." for i, e in enumerate(made)]
    items = [(text, e["references"]) for text, e in zip(texts, made, strict=True)]
    told = [e["record"] if i else wrong for i, e in enumerate(made)]
    found, scores = text_metrics.corpus_metrics(items, [True] * 9 + [False] * 3, told)
    assert list(found) == list(text_metrics.METRICS)
    for name in ("rouge_l", "slots", "slots_exact", "repetition"):
        assert found[name] == pytest.approx(np.mean([score[name] for score in scores]))
    assert found["eos_rate"] == 0.75 and found["slots_exact"] == 9 / 12  # item 0 tells its record, items 3, 6, 9 don't
    plain, _ = text_metrics.corpus_metrics(items, [True] * 12)
    assert plain == {name: value for name, value in found.items() if not name.startswith("slots")} | {"eos_rate": 1.0}
