"""Pictures say what the numbers say: rows equal to what came in, marks in proportion, text as text, colours by role."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkd.report.cost import of_students, wall
from llmkd.report.files import Summary, curve
from llmkd.report.page import score_plots, svg, training
from llmkd.report.page.cost import cost
from llmkd.report.page.svg import Picture
from llmkd.report.results import Cell, LayerMap, Row
from llmkd.report.runs import Curve, LogLine
from tests.unit.report.example_results import study, without_scores
from tests.unit.report.page_reader import Page

RESULTS = study(seeds=(0, 1))
METRIC = RESULTS.metrics[0]
COMPARED = [c for c in RESULTS.comparisons if (c.metric, c.reference) == (METRIC.name, "forward")]
CSS = (Path(svg.__file__).with_name("page.css")).read_text()


def groups() -> training.Groups:
    made: training.Groups = {}
    for run in RESULTS.runs:
        curve = RESULTS.curves[run.name]
        if run.strategy and curve.lines[0].pairs:
            made.setdefault(run.strategy, {})[run.name] = curve
    return made


def part(groups: training.Groups, name: str) -> training.Lines:
    """Every run's logged steps with that part of the loss."""
    return training.logged(groups, lambda _, line: line.parts[name])


GROUPS = groups()
DISTANCES = training.logged(GROUPS, training.by_block)
STEPS = of_students(RESULTS.runs, wall)
PICTURES: dict[str, Callable[[], Picture]] = {
    "scores": lambda: score_plots.scores("scores", METRIC, RESULTS.rows, "forward", 0.5),
    "differences": lambda: score_plots.differences("differences", METRIC, COMPARED),
    "map": lambda: score_plots.layer_map("map", RESULTS.maps[0]),
    "kl": lambda: training.curves("kl", "kl", part(GROUPS, "kl"), list(GROUPS), 20),
    "end": lambda: training.distances_at_end("end", DISTANCES, list(GROUPS)),
    "steps": lambda: training.distances_by_step("steps", "forward", DISTANCES["forward"], 2.0),
    "cost": lambda: cost("cost", "seconds", STEPS),
}


def marks(picture: Picture) -> list[tuple[float, float]]:
    """Where the drawing puts a marker, in the order drawn (axis ticks come first)."""
    return [(float(a["x"]), float(a["y"])) for a, _ in Page(picture.svg).all("use")]


def lines(picture: Picture) -> list[list[tuple[float, float]]]:
    """The points of every line that is only stroked."""
    found = [a for a, _ in Page(picture.svg).all("path") if "fill: none" in a.get("style", "")]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", a["d"])] for a in found]


@pytest.mark.parametrize("name", PICTURES)
def test_the_same_numbers_give_the_same_bytes(name: str) -> None:
    first = PICTURES[name]()
    for other in PICTURES.values():
        other()
    assert PICTURES[name]() == first


@pytest.mark.parametrize("name", PICTURES)
def test_colours_are_the_style_sheets(name: str) -> None:
    source = PICTURES[name]().svg
    assert not re.search(r"(?:fill|stroke): ?(?:#|rgb|black|white)", source)
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", source))
    assert used and used <= set(svg.ROLES)
    assert all(f"--{role}: light-dark(" in CSS for role in used)
    assert "font-family" not in source and "<style" not in source and "xmlns" not in source


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_has_a_name_and_a_description_and_ids_of_its_own(name: str) -> None:
    picture = PICTURES[name]()
    page = Page(picture.svg)
    ((drawing, _),) = page.all("svg")
    assert drawing["role"] == "img" and drawing["aria-label"] == picture.title
    ((words, text),) = page.all("desc")
    assert words["id"] == drawing["aria-describedby"] and text == picture.description
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and all(i.startswith(f"{picture.name}-") for i in ids)
    referred = re.findall(r'(?:href="#|url\(#)([^")]+)', picture.svg)
    assert set(referred) <= set(ids)


@pytest.mark.parametrize("name", PICTURES)
def test_rows_fit_their_head(name: str) -> None:
    picture = PICTURES[name]()
    for numbers in (picture.numbers, picture.table):
        assert numbers.rows and all(len(row) == len(numbers.head) for row in numbers.rows)


def test_matplotlibs_settings_are_left_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    for make in PICTURES.values():
        make()
    assert dict(matplotlib.rcParams) == before


def test_names_are_plain_text() -> None:
    name = "a$b$ <i>&"
    rows = [replace(row, name=name) if row.name == "random" else row for row in RESULTS.rows]
    picture = score_plots.scores("x", replace(METRIC, label="<b>$x^2$"), rows, "forward", None)
    page = Page(picture.svg)
    assert not page.all("i") and not page.all("b")
    texts = [text for _, text in page.all("text")]
    assert name in texts and "<b>$x^2$ (higher is better)" in texts


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_scores_rows_are_the_results() -> None:
    picture = PICTURES["scores"]()
    assert picture.numbers.head == ("model", "mean", "interval low", "interval high", "n", "seed 0", "seed 1")
    assert {row[0] for row in picture.numbers.rows} == {row.name for row in RESULTS.rows}
    for name, mean, low, high, n, *seeds in picture.numbers.rows:
        cell = next(row for row in RESULTS.rows if row.name == name).cells[METRIC.name]
        assert (mean, n) == (cell.mean, cell.n)
        if cell.half_width is None:
            assert (low, high, seeds) == (None, None, [None, None])
        else:
            assert (low, high) == (mean - cell.half_width, mean + cell.half_width)
            assert seeds == cell.values


def test_marks_of_differences_are_in_proportion() -> None:
    values = [-1.0, 0.5, 0.0, 2.0]
    made = [replace(COMPARED[0], difference=v, interval=[v - 0.25, v + 0.75]) for v in values]
    picture = score_plots.differences("x", METRIC, made)
    xs = [x for x, _ in marks(picture)[-4:]]
    scale = (xs[3] - xs[0]) / 3
    assert [(x - xs[0]) / scale for x in xs] == pytest.approx([v + 1 for v in values], abs=0.01)
    spans = [(a[0], b[0]) for a, b in (line for line in lines(picture) if len(line) == 2) if a[1] == b[1]][-4:]
    assert [(b - a) / scale for a, b in spans] == pytest.approx([1.0] * 4, abs=0.01)
    assert [(x - a) / scale for x, (a, _) in zip(xs, spans, strict=True)] == pytest.approx([0.25] * 4, abs=0.01)
    assert [row[1] for row in picture.numbers.rows] == values


def test_a_difference_that_was_not_tested_is_named() -> None:
    empty = replace(COMPARED[0], interval=None, verdict="not tested", margin=None)
    picture = score_plots.differences("x", METRIC, [empty])
    assert "not tested" in [text for _, text in Page(picture.svg).all("text")]
    assert "No margin is stated" in picture.description


def test_a_reference_far_away_is_an_arrow_and_does_not_flatten_the_rest() -> None:
    def picture(undistilled: float) -> Picture:
        cell = Cell(undistilled, None, 1, [undistilled], [None])
        rows = [r if r.name != "undistilled" else replace(r, cells={METRIC.name: cell}) for r in RESULTS.rows]
        return score_plots.scores("x", METRIC, rows, "forward", None)

    far, farther = picture(50.0), picture(5.0)
    assert "50.0" in far.svg
    assert far.svg.replace("50.0", "5.0") == farther.svg  # only the number's text differs


def test_a_score_that_is_missing_says_why() -> None:
    def texts(row: Row) -> list[str]:
        rows = [row if r.name == "random" else r for r in RESULTS.rows]
        return [text for _, text in Page(score_plots.scores("x", METRIC, rows, "forward", None).svg).all("text")]

    (row,) = [r for r in RESULTS.rows if r.name == "random"]
    assert "failed" in texts(without_scores(row, "failed: no room"))
    by_step = replace(row, cells={}, problems=["random-s0: agreement not yet"])
    assert "no value" in texts(replace(by_step, missing={"agreement": ["not yet"]}))
    assert "not yet" in texts(replace(by_step, missing={"generation": ["not yet"]}))


def test_a_map_that_follows_depth_is_level() -> None:
    pairs = [[i, i] for i in range(5)]
    found = LayerMap("forward", [], pairs, 5, 5)
    drawn = [line for line in lines(score_plots.layer_map("x", found)) if len(line) == 2]
    assert len(drawn) == 5 and all(a[1] == b[1] for a, b in drawn)
    assert all(above[0][1] < below[0][1] for above, below in pairwise(drawn))  # block 0 on top


@pytest.mark.parametrize(("student_blocks", "teacher_blocks"), [(3, 12), (9, 36), (12, 48)])
def test_a_map_draws_every_pair_and_numbers_its_blocks(student_blocks: int, teacher_blocks: int) -> None:
    pairs = [[i, (7 * i) % teacher_blocks] for i in range(student_blocks)]
    found = LayerMap("x", [], pairs, student_blocks, teacher_blocks)
    picture = score_plots.layer_map("x", found)
    assert list(picture.numbers.rows) == [tuple(pair) for pair in pairs]
    drawn = [line for line in lines(picture) if len(line) == 2]
    tall = {(a[1] - b[1]) for a, b in drawn}
    assert len(drawn) == student_blocks and len(tall) == len({7 * i % teacher_blocks - 4 * i for i, _ in pairs})
    texts = [text for _, text in Page(picture.svg).all("text")]
    assert {str(t) for _, t in pairs} <= set(texts)
    boxes = [a for a, _ in Page(picture.svg).all("path") if "fill: none" not in a.get("style", "")]
    assert len(boxes) >= 2 * student_blocks  # those in a pair are filled, on both sides


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_curves_hold_each_run_and_their_mean() -> None:
    picture = PICTURES["kl"]()
    runs = {run: curve.lines for found in GROUPS.values() for run, curve in found.items()}
    assert picture.numbers.head == ("step", *GROUPS, *runs)
    assert picture.table.head == ("step", *GROUPS)
    for place, row in enumerate(picture.numbers.rows):
        values = dict(zip(picture.numbers.head, row, strict=True))
        assert all(lines[place].step == values["step"] for lines in runs.values())
        assert all(lines[place].parts["kl"] == values[run] for run, lines in runs.items())
        for strategy, found in GROUPS.items():
            assert values[strategy] == fmean(curve.lines[place].parts["kl"] or 0 for curve in found.values())


def test_a_run_that_stopped_early_ends_the_mean_and_not_the_others() -> None:
    found = {
        run: replace(curve, lines=curve.lines[: 5 if run == "forward-s1" else None])
        for run, curve in GROUPS["forward"].items()
    }
    picture = training.curves("x", "kl", part({"forward": found}, "kl"), ["forward"], 20)
    columns = dict(zip(picture.numbers.head, zip(*picture.numbers.rows, strict=True), strict=True))
    assert sum(value is not None for value in columns["forward"]) == 5
    assert None not in columns["forward-s0"]
    assert columns["forward-s1"][5:] == (None,) * 15


def curve_of(pairs: dict[str, float | None], blocks: dict[str, int]) -> Curve:
    return Curve([LogLine(1, {}, pairs)], blocks)


def test_distances_by_block_average_over_a_blocks_pairs() -> None:
    logged: dict[str, float | None] = {"0<3": 1.0, "0<7": 3.0, "e<e": 0.5, "10<11": 2.0, "1<1": None}
    curve = curve_of(logged, {"0<3": 0, "0<7": 0, "e<e": -1, "10<11": 10, "1<1": 1})
    assert training.by_block(curve, curve.lines[0]) == {-1: 0.5, 0: 2.0, 10: 2.0}
    runs = {
        "a": curve_of({"0<0": 1.0, "1<5": 2.0}, {"0<0": 0, "1<5": 1}),
        "b": curve_of({"0<3": 3.0, "1<1": 6.0}, {"0<3": 0, "1<1": 1}),
    }
    picture = training.distances_at_end("x", training.logged({"random": runs}, training.by_block), ["random"])
    assert picture.numbers.head == ("student block", "random", "a", "b")
    assert picture.numbers.rows == (("0", 2.0, 1.0, 3.0), ("1", 4.0, 2.0, 6.0))


def test_a_pairs_block_is_the_summarys_number() -> None:
    """pkd_skip leaves an encoder's last block out: the decoder's blocks are counted after it all the same."""
    names = ["enc e<e", "enc 0<1", "dec e<e", "dec 0<1"]
    log = [LogLine(1, {}, dict.fromkeys(names, 1.0))]
    ended = Summary([[-1, -1], [0, 1], [-2, -2], [2, 5]], done=True)
    assert curve(log, ended).blocks == dict(zip(names, [-1, 0, -2, 2], strict=True))
    assert curve(log, Summary()).blocks == {}  # not known before the run has ended


def test_bars_of_cost_are_the_medians_over_runs() -> None:
    picture = PICTURES["cost"]()
    spans = [(run, value, *ends) for runs in STEPS.values() for run, (value, ends) in runs.items()]
    assert [row[1:] for row in picture.numbers.rows] == spans
    bars = [a["d"] for a, _ in Page(picture.svg).all("path") if "var(--band)" in a.get("style", "")]
    wide = [max(xs) - min(xs) for bar in bars if (xs := [float(x) for x in re.findall(r"[ML] (\S+) \S+", bar)])]
    medians = [median(value for value, _ in runs.values()) for runs in STEPS.values()]
    assert [width / wide[0] for width in wide] == pytest.approx([value / medians[0] for value in medians], abs=0.002)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.3))
def test_labels_keep_their_order_and_their_distance(wanted: list[float], gap: float) -> None:
    places = svg.spread(wanted, gap, 0.0, 1.0)
    room = min(gap, 1 / max(len(wanted) - 1, 1))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    by_place = sorted(places)
    assert all(b - a >= room - 1e-9 for a, b in pairwise(by_place))
    assert [p for _, p in sorted(zip(wanted, places, strict=True), key=lambda pair: pair[0])] == pytest.approx(by_place)


def test_labels_with_room_stand_where_they_should() -> None:
    assert svg.spread([0.9, 0.1, 0.5], 0.1, 0.0, 1.0) == [0.9, 0.1, 0.5]
