"""The report page: its numbers are those of the results, nothing a study says becomes markup, half a study is a page too."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from markupsafe import Markup
from matplotlib.figure import Figure

from llmkd.report import numbers
from llmkd.report.files import GeneratedItem
from llmkd.report.page import document, svg
from llmkd.report.page.document import packed, whole_page
from llmkd.report.results import Cell, Results
from tests.unit.report import example_results as example
from tests.unit.report.page_reader import Page

ROOT = Path(__file__).parents[3]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' & <!-- \u2028 $x$"


@pytest.fixture(scope="module")
def results() -> Results:
    return example.study(seeds=(0, 1, 2))


@pytest.fixture(scope="module")
def texts(results: Results) -> list[GeneratedItem]:
    return example.generations(results, 12)


@pytest.fixture(scope="module")
def source(results: Results, texts: list[GeneratedItem]) -> str:
    return whole_page(results, texts, "name: quickstart\n")


@pytest.fixture(scope="module")
def read(source: str) -> Page:
    return Page(source)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_the_page_opens_with_the_answer(results: Results, read: Page) -> None:
    assert [text for _, text in read.all("h1")] == ["quickstart"]
    assert read.all("p", "answer")[0][1] == results.conclusion
    assert results.notes[0] in read.all("ul", "notes")[0][1]
    assert not read.all("p", "partial")


def test_every_score_is_the_results(results: Results, source: str, read: Page) -> None:
    table = re.findall(r'<tr class="(?:teacher|baseline|student)">(.*)</tr>', source)
    found = {
        re.findall(r'<th scope="row">(\w+)</th>', line)[0]: [
            (float(mean), float(half) if half else None)
            for mean, half in re.findall(
                r'<td class="number[^>]* data-value="([^"]+)">(?:(?!<td).)*?(?:data-value="([^"]+)"|</td>)', line
            )
        ]
        for line in table
    }
    main_first = sorted(results.metrics, key=lambda metric: metric.name != results.primary)
    expected = {
        row.name: [(cell.mean, cell.half_width) for metric in main_first if (cell := row.cells.get(metric.name))]
        for row in results.rows
    }
    assert found == expected
    head, *lines = read.csv("scores")
    for line in lines:
        cells = next(row for row in results.rows if row.name == line[0]).cells
        for name, value in zip(head[2:], line[2:], strict=True):
            metric, _, what = name.partition(" ")
            cell = cells.get(metric)
            wanted = cell and getattr(cell, {"": "mean", "half width": "half_width", "n": "n"}[what])
            assert value == ("" if wanted is None else repr(wanted)), name


def test_the_best_below_the_teacher_is_marked_by_more_than_colour(results: Results, read: Page) -> None:
    marked = [a["data-value"] for a, text in read.all("td", "number") if "★" in text and "best:" in text]
    wanted = []
    for metric in results.metrics:
        means = [row.cells[metric.name].mean for row in results.rows if row.kind != "teacher"]
        wanted.append(max(means) if metric.higher_is_better else min(means))
    assert sorted(map(float, marked)) == sorted(wanted)


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_best_where_all_tie_or_neither_end_is_better(results: Results) -> None:
    neither = replace(results.metrics[0], name="generation/length_ratio", label="length ratio", higher_is_better=None)
    tied = replace(results.metrics[0], name="generation/eos_rate", label="ended by itself")
    rows = []
    for number, row in enumerate(results.rows):
        means = {neither.name: 1 + number / 10, tied.name: 1.0}
        rows.append(replace(row, cells={name: Cell(mean, None, row.models, [], []) for name, mean in means.items()}))
    changed = replace(results, metrics=[neither, tied], rows=rows, comparisons=[], primary=None, margins={})
    table = whole_page(changed, [], "").partition('<table class="scores')[2].partition("</table>")[0]
    assert "best: " not in table and "length ratio</th>" in table and "ended by itself <span" in table


def test_every_comparison_is_the_results(results: Results, read: Page) -> None:
    head, *lines = read.csv("comparisons")
    assert len(lines) == len(results.comparisons)
    for line, found in zip(lines, results.comparisons, strict=True):
        values = dict(zip(head, line, strict=True))
        assert float(values["difference"]) == found.difference
        assert [float(end) for end in values["interval"].split(" to ")] == found.interval
        assert values["verdict"] == found.verdict
    shown = [(a["data-difference"], text) for a, text in read.all("tr") if "data-difference" in a]
    assert sorted(float(value) for value, _ in shown) == sorted(c.difference for c in results.comparisons)
    labels = {metric.name: metric for metric in results.metrics}
    for found in results.comparisons:
        metric = labels[found.metric]
        names = f"{metric.label}{found.strategy}{found.reference}"
        (line,) = [text for value, text in shown if float(value) == found.difference and text.startswith(names)]
        assert found.verdict in line
        assert found.interval is not None and numbers.interval(found.interval, metric) in line


def test_every_picture_has_its_numbers_as_table_and_csv(results: Results, read: Page) -> None:
    pictures = len(read.all("svg"))
    assert pictures == len(read.all("figure")) == len(read.all("details", "figure-numbers"))
    assert pictures == len(results.metrics) + 4 + len(results.maps) + 4 + 4 + 3
    names = [a["download"].removesuffix(".csv") for a, _ in read.all("a", "csv")]
    assert len(names) == len(set(names)) == pictures + 3  # the tables of scores, comparisons and cost have one too
    head, *lines = read.csv("cost-step")
    assert {line[1]: tuple(map(float, line[2:])) for line in lines} == {
        run.name: (run.step.median_seconds, *run.step.quartiles) for run in results.runs if run.strategy and run.step
    }
    head, *lines = read.csv("curve-kl")
    for name in ("forward-s0", "ce_only-s2"):
        drawn = [float(line[head.index(name)]) for line in lines]
        assert drawn == [line.parts["kl"] for line in results.curves[name].lines]


@pytest.mark.usefixtures("undrawn")
def test_a_part_without_a_weight_is_not_shown_as_part_of_the_loss() -> None:
    results = example.study(seeds=(0, 1), log_lines=60)
    for name in ("ce_only-s0", "ce_only-s1"):
        for line in results.curves[name].lines:
            line.parts["kl"] = None
    for name in ("forward-s0", "forward-s1"):
        lines = results.curves[name].lines
        results.curves[name] = replace(
            results.curves[name], lines=[replace(line, not_in_loss=("ce",)) for line in lines]
        )
    read = Page(whole_page(results, [], ""))
    head, *_ = read.csv("curve-kl")
    assert "forward-s0" in head and "ce_only" not in head and "ce_only-s0" not in head
    captions = [text for _, text in read.all("figcaption")]
    (kl,) = [text for text in captions if text.startswith("kl, divergence")]
    (ce,) = [text for text in captions if text.startswith("ce,")]
    assert kl.endswith("; not computed for ce_only") and ce.endswith("; measured, but not in the loss, of forward")


@pytest.mark.usefixtures("undrawn")
def test_what_only_some_runs_log_has_pictures_too() -> None:
    """A temperature that moves, and the norms of gradients, which few lines report."""
    results = example.study(seeds=(0, 1), log_lines=60)
    for number, line in enumerate(results.curves["forward-s1"].lines):
        line.parts["temperature"] = 2.0 - number / 60
        if number % 20 == 0:
            line.parts.update({"norm of ce": 0.5 + number, "norm of 0<3 kl": 0.25})
    read = Page(whole_page(results, [], ""))
    assert (
        len(read.all("svg")) == len(Page(whole_page(example.study(seeds=(0, 1), log_lines=60), [], "")).all("svg")) + 3
    )
    head, *lines = read.csv("curve-norm-of-ce")
    assert [float(line[head.index("forward-s1")]) for line in lines] == [0.5, 20.5, 40.5]
    head, *lines = read.csv("curve-temperature")
    assert head == ["step", "forward", "forward-s1"] and len(lines) == 40


@pytest.mark.usefixtures("undrawn")
def test_runs_whose_blocks_are_not_known_yet_are_named() -> None:
    """An encoder-decoder's log counts the decoder's blocks by themselves; which they are is known when the run has ended."""
    results = example.study(seeds=(0, 1))
    pictures = len(Page(whole_page(results, [], "")).all("svg"))
    waiting = "Not drawn by block before the run has ended: the hidden distances of forward-s1."
    results.curves["forward-s1"] = replace(results.curves["forward-s1"], blocks={})
    read = Page(whole_page(results, [], ""))
    assert waiting in read.text[0] and len(read.all("svg")) == pictures
    assert "forward-s0" in read.csv("distance-end")[0] and "forward-s1" not in read.csv("distance-end")[0]
    assert "forward-s1" in read.csv("curve-hidden")[0]


@pytest.mark.usefixtures("undrawn")
def test_a_long_curve_is_thinned_with_a_note() -> None:
    results = example.study(seeds=(0, 1), log_lines=1000)
    read = Page(whole_page(results, [], ""))
    head, *lines = read.csv("curve-ce")
    steps = [int(line[0]) for line in lines]
    assert len(steps) == 40 and (steps[0], steps[-1]) == (2, 2000)
    assert "Of the 1000 logged steps 40 are drawn" in read.text[0]


# ---------------------------------------------------------------------------------------------------------------------
# Safety


def test_nothing_a_study_says_becomes_markup(results: Results, texts: list[GeneratedItem], read: Page) -> None:
    evil = replace(
        example.study(("none", "forward", "reverse", EVIL, "random"), seeds=(0, 1, 2)),
        name=EVIL,
        conclusion=EVIL,
        notes=[EVIL],
        problems={EVIL: EVIL},
        commit=EVIL,
        versions={EVIL: EVIL},
        hardware={"cpu": EVIL},
        items={EVIL: 3},
        scored=1,
        metrics=[replace(metric, label=EVIL) for metric in results.metrics],
    )
    evil.rows[-1] = example.without_scores(evil.rows[-1], EVIL)
    written = [replace(item, prompt=EVIL, references=[EVIL], outputs={**item.outputs, EVIL: EVIL}) for item in texts]
    source = whole_page(evil, written, EVIL)
    found = Page(source)
    assert len(found.all("script")) == 2 and not found.all("img") and source.count("<!--") == 0
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    data = json.loads(found.all("script")[0][1])
    assert data["items"][0]["p"] == EVIL and EVIL in data["models"]
    assert [EVIL, 1, [None, None]] in data["items"][0]["t"]
    assert EVIL in found.all("h1")[0][1] and EVIL in found.all("pre")[0][1] and EVIL in found.all("p", "answer")[0][1]
    assert {tag for tag, _ in found.tags} == {tag for tag, _ in read.tags} | {"h3", "ul"}


def test_only_the_pages_own_script_may_run(source: str, read: Page) -> None:
    (policy,) = [a["content"] for a, _ in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    script = read.all("script")[1][1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and policy.startswith("default-src 'none'")
    assert script == (ROOT / "llmkd/report/page/page.js").read_text()


def test_nothing_is_fetched(source: str, read: Page) -> None:
    assert not {"src", "srcset", "action", "formaction"} & {name for _, attributes in read.tags for name in attributes}
    links = [a["href"] for _, a in read.tags if "href" in a]
    assert all(link.startswith(("#", "data:text/csv")) for link in links)
    assert "://" not in source and "@import" not in source
    assert not re.search(r"url\((?!#)", source)


def test_script_writes_text_and_never_markup() -> None:
    script = (ROOT / "llmkd/report/page/page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", script)


# ---------------------------------------------------------------------------------------------------------------------
# Half a study, sizes, order


def test_half_a_study_is_a_page_that_names_what_is_missing(results: Results, texts: list[GeneratedItem]) -> None:
    half = example.partial(results)
    read = Page(whole_page(half, texts, ""))
    assert "Partial." in read.all("p", "partial")[0][1]
    listed = read.all("ul", "problems")[0][1]
    for name, why in half.problems.items():
        assert name in listed and why in listed
    cells = [text for _, text in read.all("td", "missing")]
    assert cells.count("not yet") == len(results.metrics)
    assert sum(text.startswith("failed: OutOfMemoryError") for text in cells) == len(results.metrics)
    assert "recipe.yaml is not at hand" in read.text[0]
    for picture in ("scores-0", "curve-ce", "cost-step"):
        assert len(read.csv(picture)) > 1
    assert "random" not in {line[0] for line in read.csv("cost-step")}


def test_a_study_not_begun_has_no_picture(results: Results, read: Page) -> None:
    found = Page(whole_page(example.nothing(results), [], ""))
    assert not found.all("svg") and not found.all("figure")
    assert [text for _, text in found.all("h2")] == [text for _, text in read.all("h2")]
    assert len(found.all("p", "missing-part")) == 9  # one in each section, two in the last


def test_one_seed_has_no_interval() -> None:
    results = example.study(seeds=(0,))
    read = Page(whole_page(results, [], ""))
    assert "One seed, so no interval" in read.text[0]
    assert not read.all("span", "half")
    assert {found.verdict for found in results.comparisons} == {"not tested"}


def test_the_same_study_gives_the_same_bytes(results: Results, texts: list[GeneratedItem], source: str) -> None:
    whole_page(example.study(seeds=(5,)), [], "")
    results, texts = copy.deepcopy((results, texts))
    assert whole_page(results, texts, "name: quickstart\n") == source


def test_a_whole_study_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five strategies over five seeds and 200 items; then with every text of every model its own, beside the same pictures."""
    pictures: dict[str, Markup] = {}
    inline = svg.inline

    def drawn_once(figure: Figure, name: str, title: str, description: str) -> Markup:
        if name not in pictures:
            pictures[name] = inline(figure, name, title, description)
        return pictures[name]

    monkeypatch.setattr(svg, "inline", drawn_once)
    results = example.study(student_blocks=9, teacher_blocks=36, log_lines=1000)
    texts = example.generations(results)
    usual = len(whole_page(results, texts, "").encode())
    for item in texts:
        item.outputs.update({model: f"{text} {model}" for model, text in item.outputs.items()})
    worst = whole_page(results, texts, "")
    print(f"\n[page] {usual / 1e6:.2f} MB; {len(worst.encode()) / 1e6:.2f} MB where no two models write the same")
    assert usual < 2_000_000 and len(worst.encode()) < 2_000_000
    (data,) = [json.loads(text) for a, text in Page(worst).all("script") if a.get("id") == "texts-data"]
    assert 0 < len(data["items"]) < 200
    assert f"The first {len(data['items'])} of 200 items are on this page" in worst


def test_headings_landmarks_and_names(read: Page) -> None:
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(len(read.all(landmark)) == 1 for landmark in ("header", "nav", "main", "footer"))
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a[key] for _, a in read.tags for key in ("aria-labelledby", "aria-describedby") if key in a]
    assert set(named) <= set(ids)
    assert {a["href"][1:] for a, _ in read.all("a") if a["href"].startswith("#")} <= set(ids)
    assert all(a.get("role") == "img" and a.get("aria-label") for a, _ in read.all("svg"))
    assert len(read.all("caption")) == len(read.all("table"))
    assert all(a.get("scope") for a, text in read.all("th") if text)
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a, _ in read.all("div", "scroll"))


# ---------------------------------------------------------------------------------------------------------------------
# Texts side by side


def test_packed_texts_are_the_models(results: Results, texts: list[GeneratedItem]) -> None:
    strategies = {run.name: run.strategy for run in results.runs}
    data = packed(texts, strategies)
    assert data["total"] == len(data["items"]) == len(texts)
    assert data["groups"][data["models"].index("forward-s2")] == "forward"
    assert data["groups"][data["models"].index("undistilled")] == "undistilled"
    for smaller, item in zip(data["items"], texts, strict=True):
        assert (smaller["n"], smaller["p"], smaller["r"]) == (item.item, item.prompt, item.references)
        assert len({json.dumps(text) for text in smaller["t"]}) == len(smaller["t"])
        for model, place in zip(data["models"], smaller["m"], strict=True):
            text, right, scores = smaller["t"][place]
            assert text == item.outputs[model]
            assert right == item.scores[model]["slots_exact"]
            assert dict(zip(data["scores"], scores, strict=True)) == item.scores[model]


def test_without_scores_a_reference_is_right_and_a_model_may_be_missing() -> None:
    item = GeneratedItem(3, "p", ["one", "two"], {"a": " two\n", "b-s1": "three"})
    other = replace(item, item=4, references=[], outputs={"b-s1": "x"})
    data = packed([item, other], {})
    assert data["groups"] == ["a", "b"]
    assert data["items"][0]["t"] == [(" two\n", 1, []), ("three", 0, [])]
    assert data["items"][1]["m"] == [-1, 0] and data["items"][1]["t"] == [("x", None, [])]


def test_an_endless_text_is_cut_with_a_note() -> None:
    item = GeneratedItem(0, "p", ["r"], {"a": "x" * 5000})
    ((text, right, _),) = packed([item], {})["items"][0]["t"]
    assert text == "x" * 4000 + " … [cut here; 5,000 characters in all]" and right == 0


# ---------------------------------------------------------------------------------------------------------------------
# Contrast


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_both_themes() -> None:
    """WCAG 2 AA: 4.5 to 1 for every colour that text is written in, on each ground that it may stand on."""
    found = re.findall(r"--([a-z0-9-]+): light-dark\((#\w{6}), (#\w{6})\)", document._asset("page.css"))
    assert len(found) >= 16
    for theme in (1, 2):
        colours = {entry[0]: entry[theme] for entry in found}
        for ground in ("paper", "shade", "band"):
            for name in colours.keys() - {"paper", "shade", "band", "rule"}:
                if ground == "band" and name not in ("ink", "accent"):
                    continue
                lighter, darker = sorted((_luminance(colours[name]), _luminance(colours[ground])), reverse=True)
                ratio = (lighter + 0.05) / (darker + 0.05)
                assert ratio >= 4.5, (name, ground, theme, round(ratio, 2))
