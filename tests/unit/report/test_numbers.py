"""One form for each number, wherever it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkd import text
from llmkd.report import numbers
from llmkd.report.results import Average, Cell, Metric
from llmkd.report.write import report, terminal_text
from tests.unit.report.page_reader import Page
from tests.unit.report.study_folder import Folder

OF_100 = Metric("generation/bleu", "BLEU", True, True, "generation")
OTHER = Metric("web/word_perplexity", "web/word_perplexity", False, False, "lm-eval")


def test_a_value_is_printed_alike_in_terminal_markdown_html_and_pictures(tmp_path: Path) -> None:
    """523.4 was 523.400 in one and 523.40 in another; a difference had a hyphen in one and a minus sign in another."""
    study = Folder(tmp_path, margins={OTHER.name: 0.5})
    for strategy, values in {"forward": (522.4, 524.4), "reverse": (411.2, 415.2)}.items():
        for seed, value in enumerate(values):
            name = study.entry("student", strategy, seed)
            study.score(name, None, tasks={"web": {"word_perplexity": value}})
            costs = {"steps": 60, "seconds": 1234.5, "tokens": 54321, "tokens_per_second": 44.03, "memory_gib": 0.512}
            study.write(f"students/{name}/summary.json", costs)
    page = Page(report(tmp_path).page.read_text())
    cells = [text for tag in ("td", "th") for _, text in page.all(tag)]
    drawn = [text for _, text in page.all("text")]
    markdown = [cell.strip() for line in (tmp_path / "report.md").read_text().splitlines() for cell in line.split("|")]
    # 522.4 and 524.4: standard error 1, t(1) 12.706; reverse - forward is -111.2 and -109.2
    mean, difference, interval = "523.40 ± 12.71", "−110.200", "−122.906 to −97.4938"
    assert mean in terminal_text(study.results()) and mean in markdown
    assert mean in cells and mean in drawn
    assert mean.replace("±", "plus or minus") in " ".join(text for _, text in page.all("desc"))
    for value in (difference, interval):
        assert value in markdown and value in cells
        assert value in " ".join(text for _, text in page.all("desc"))
    assert difference in drawn
    p = study.comparison(OTHER.name, "reverse", "forward").p_different
    assert p is not None and f"{p:.3f} ({p:.3f})" in markdown and f"{p:.3f} ({p:.3f})" in cells
    for cost in ("1,234", "54,321", "44", "0.512"):
        assert cost in markdown and cost in cells


@pytest.mark.parametrize(
    ("value", "metric", "score", "difference"),
    [
        (94.44, OF_100, "94.4", "+94.44"),
        (0.6549, OTHER, "0.655", "+0.6549"),
        (-1.5, OTHER, "−1.500", "−1.5000"),
        (99.9994, OTHER, "99.999", "+99.9994"),
        (523.4, OTHER, "523.40", "+523.400"),
        (12345.6, OTHER, "12,346", "+12,345.6"),
    ],
)
def test_scores_and_differences(value: float, metric: Metric, score: str, difference: str) -> None:
    assert (numbers.score(value, metric), numbers.signed(value, metric)) == (score, difference)


def test_half_an_interval_has_the_decimals_of_its_mean() -> None:
    assert numbers.mean(Cell(523.4, 1234.5, 2, [], []), OTHER) == "523.40 ± 1,234.50"
    assert numbers.mean(Cell(0.5, None, 1, [], []), OTHER) == "0.500"


def test_what_is_not_there_is_a_dash() -> None:
    assert {numbers.p_value(None), numbers.margin(None), numbers.interval(None, OF_100)} == {"–"}
    assert numbers.average(Average(None, None, 0)) == "–"


def test_other_numbers() -> None:
    assert [numbers.p_value(p) for p in (0.0004, 0.001, 0.25)] == ["< 0.001", "0.001", "0.250"]
    amounts = [text.amount(value) for value in (None, 60, 54321, 0.5123, 33.44, 999.6, -0.25)]
    assert amounts == ["", "60", "54,321", "0.512", "33.4", "1,000", "−0.25"]
    assert numbers.average(Average(-0.25, 0.125, 3)) == "−0.250 ± 0.125"
    assert (text.figures(-0.1234567, 5), numbers.margin(0.5)) == ("−0.12346", "0.5")
