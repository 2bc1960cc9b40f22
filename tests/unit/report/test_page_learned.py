"""Learned maps on the report's page: means over seeds at three times, told in words and numbers as well as by colour."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmkd.report.page.document import whole_page
from llmkd.report.page.learned import in_words, learned_maps
from llmkd.report.results import Results
from llmkd.report.runs import Curve
from llmkd.report.write import _markdown
from tests.unit.report import example_results as example
from tests.unit.report.page_reader import Page


def _study(lines: int = 5, shift: float = 0.1) -> Results:
    """A study whose `random` students learned their maps: student block 0 moves from teacher block 1 to 0."""
    results = example.study(seeds=(0, 1), log_lines=lines)
    for seed in (0, 1):
        curve = results.curves[f"random-s{seed}"]
        weights = [0.1 + 0.8 * number / (lines - 1) - seed * shift * (number == 0) for number in range(lines)]
        learned = [{"0": {"0": w, "1": 1 - w}, "1": {"0": 0.25, "1": 0.75}} for w in weights]
        logged = [replace(line, learned=of_line) for line, of_line in zip(curve.lines, learned, strict=True)]
        results.curves[f"random-s{seed}"] = Curve(logged, curve.blocks)
    return replace(results, maps=[found for found in results.maps if found.strategy != "random"])


def test_means_over_seeds_at_three_times() -> None:
    (found,) = learned_maps(_study())
    assert (found.strategy, found.runs, found.steps) == ("random", 2, (2, 6, 10))
    assert [weights["0"]["0"] for weights in found.weights] == pytest.approx([0.05, 0.5, 0.9])
    assert all(weights["1"] == {"0": 0.25, "1": 0.75} for weights in found.weights)
    assert in_words(found) == (
        "student block, from which teacher block it learns most at the end (that block's weight): 0 from 0 (0.90), 1 from 1 (0.75)."
    )


def test_runs_that_have_come_to_different_steps_are_not_called_by_one() -> None:
    results = _study()
    short = results.curves["random-s1"]
    results.curves["random-s1"] = Curve(short.lines[:3], short.blocks)
    (found,) = learned_maps(results)
    assert found.times == ["step 2", "middle logged step", "last logged step"]


def test_the_page_shows_the_weights_in_words_numbers_and_a_picture() -> None:
    results = _study()
    read = Page(whole_page(results, [], ""))
    head, *rows = read.csv("learned-0")
    assert head == ["student block", "teacher block", "step 2", "step 6", "step 10"]
    assert [row[:2] for row in rows] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    assert [float(value) for value in rows[0][2:]] == pytest.approx([0.05, 0.5, 0.9])
    assert "0 from 0 (0.90), 1 from 1 (0.75)" in read.text[0] and "Learned maps" in read.text[0]
    # it is no map without pairs
    assert "Without a map, since no block is paired: ce_only, none." in read.text[0]
    assert "**random**: student block, from which teacher block" in _markdown(results, "")


def test_a_study_without_a_learned_map_says_nothing_of_them() -> None:
    results = example.study(seeds=(0, 1))
    assert learned_maps(results) == [] and "Learned maps" not in Page(whole_page(results, [], "")).text[0]


def test_a_deep_map_stays_small() -> None:
    """40 student blocks, 80 teacher blocks: thousands of cells are a few paths."""
    results = _study(lines=3)
    weights = {str(j): {str(i): (i == 2 * j) * 0.6 + 0.005 for i in range(80)} for j in range(40)}
    for seed in (0, 1):
        curve = results.curves[f"random-s{seed}"]
        results.curves[f"random-s{seed}"] = replace(
            curve, lines=[replace(line, learned=weights) for line in curve.lines]
        )
    plain = len(whole_page(example.study(seeds=(0, 1), log_lines=3), [], ""))
    assert len(whole_page(results, [], "")) - plain < 400_000
