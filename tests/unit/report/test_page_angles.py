"""Angles in the report: means over seeds, pictures that hold their numbers, and a page that stays small at any depth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llmkd.evaluation.angles.cosines import pairs_of
from llmkd.report.angles import coarse, grouped, sentence
from llmkd.report.files import thinned
from llmkd.report.page.angles import angle_section, cosine_maps
from llmkd.report.results import Angles, AnglesThen, Average, BlockMap, StrategyAngles
from llmkd.report.write import report
from tests.unit.report.page_reader import Page
from tests.unit.report.study_folder import Folder

EVIL = "</script><img src=x onerror=alert(1)> & <b>"


def seen(draw: Random, student_blocks: int, teacher_blocks: int, low: float = -0.5) -> dict[str, Any]:
    """Made-up angles of one model."""
    blocks = []
    for block in range(student_blocks):
        values = [draw.uniform(low, 1) for _ in pairs_of(teacher_blocks)]
        mean: list[list[float | None]] = [[1.0] * teacher_blocks for _ in range(teacher_blocks)]
        for (i, j), value in zip(pairs_of(teacher_blocks), values, strict=True):
            mean[i][j] = mean[j][i] = value
        above = [[None if value is None else (value + 1) / 2 for value in row] for row in mean]
        one = {"block": block, "mean": mean, "above_zero": above, "mean_of_pairs": sum(values) / len(values)}
        blocks.append({**one, "above_zero_of_pairs": 0.75})
    return {"blocks": blocks, "paper_code": {"tokens": {"mean": 0.25}, "with_padding": {"mean": 0.125}}}


def angles_of(folder: Folder, name: str, before: Any, after: Any, teacher_blocks: int, **more: Any) -> None:
    entry = next(entry for entry in folder.study["entries"] if entry["name"] == name)
    shape = {"stack": "", "tokens": 1234, "teacher_blocks": teacher_blocks, "student_blocks": len(before["blocks"])}
    about = {"name": name, "seed": entry["seed"], "init": "teacher", "error": None, "rows": 20, "final_state": "raw"}
    stacks = more.pop("stacks", [{**shape, "before": before, "after": after}])
    folder.write(f"angles/{name}.json", {**about, "projector": None, "stacks": stacks, **more})


def students(folder: Folder) -> list[StrategyAngles]:
    angles = folder.results().angles
    assert angles is not None
    return angles.students


def section(folder: Folder) -> str:
    return "\n".join(angle_section(folder.results().angles))


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    """Two strategies over two seeds, 3 and 6 blocks; one model failed."""
    folder, draw = Folder(tmp_path), Random(0)
    folder.students({"forward": [90.0, 91.0], "reverse": [90.0, 92.0]})
    start = seen(draw, 3, 6, low=0.2)
    start["blocks"][0]["mean"][0] = [None] * 6
    for name in ("forward-s0", "forward-s1", "reverse-s0"):
        angles_of(folder, name, start, seen(draw, 3, 6), 6)
    folder.write("angles/reverse-s1.json", {"name": "reverse-s1", "seed": 1, "error": EVIL})
    return folder


def test_a_study_without_angles_has_no_such_section(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.students({"forward": [90.0]})
    assert folder.results().angles is None
    page = report(tmp_path).page.read_text()
    assert "Angles" not in page and "Angles" not in (tmp_path / "report.md").read_text()


def test_the_report_says_whose_projectors_are_left_out(study: Folder) -> None:
    said = (
        "reverse learned through projectors at equal width (matching.projector: always), which are left out here: raw"
    )
    report(study.folder)
    assert "left out here" not in (study.folder / "report.md").read_text()
    file = study.folder / "angles" / "reverse-s0.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "projector_left_out": True}))
    page = report(study.folder).page.read_text()
    assert said in page and said in (study.folder / "report.md").read_text()


def test_the_page_shows_the_means_over_seeds(study: Folder) -> None:
    read = Page(report(study.folder).page.read_text())
    assert read.csv("angles-0")[0][0] == "student block" and len(read.csv("angles-0")) == 1 + 3 * 21
    written = [json.loads((study.folder / f"angles/forward-s{seed}.json").read_text()) for seed in (0, 1)]
    files = [one["stacks"][0] for one in written]
    for block, i, j, before, _, after, share in read.csv("angles-0")[1:]:
        for shown, when, key in ((before, "before", "mean"), (after, "after", "mean"), (share, "after", "above_zero")):
            values = [one[when]["blocks"][int(block)][key][int(i)][int(j)] for one in files]
            known = [value for value in values if value is not None]
            assert shown == "" if not known else float(shown) == pytest.approx(sum(known) / len(known), abs=2e-3)
    (table,) = [text for _, text in read.all("table") if "Angles by strategy" in text]
    found = students(study)
    assert [(one.strategy, one.seeds) for one in found] == [("forward", [0, 1]), ("reverse", [0])]
    cell = found[0].after.mean
    wanted = [sum(block["mean_of_pairs"] for block in one["after"]["blocks"]) / 3 for one in files]
    assert cell.mean == pytest.approx(sum(wanted) / 2) and cell.half_width is not None and cell.half_width > 0
    assert f"{cell.mean:.3f} ± {cell.half_width:.3f}" in table
    assert found[0].before.mean.half_width is None  # one start, copied twice
    assert f"{cell.mean:.3f} ±" in (study.folder / "report.md").read_text()


def test_a_picture_is_read_without_colour_and_by_ear(study: Folder) -> None:
    """Below zero has a dot, no direction a stroke; each picture has its words and numbers."""
    read = Page(section(study))
    assert len(read.all("svg")) == len(read.all("figure")) == len(read.all("details", "figure-numbers")) == 2
    assert all(a["role"] == "img" and "Mean cosine" in a["aria-label"] for a, _ in read.all("svg"))
    described = [text for _, text in read.all("desc")]
    assert all(
        re.search(r"student block 2: mean 0\.\d\d before and −?0\.\d\d after, lowest", text) for text in described
    )
    dots, strokes = (
        [a["d"].count("M") for a, _ in read.all("path") if wanted in a.get("style", "")]
        for wanted in ("stroke: var(--ink); stroke-width: 7.2", "stroke: var(--muted)")
    )
    below = [
        sum(value is not None and value < 0 for block in then.blocks for row in block.mean for value in row)
        for then in (student.after for student in students(study))
    ]
    assert below == dots and min(below) > 0
    assert strokes == [6, 6]
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_a_cells_colour_stands_at_its_place() -> None:
    """One cell of each strength: a line as wide as the cell, from its left edge to its right."""
    matrix: list[list[float | None]] = [[1.0, 0.5], [-0.3, 0.0]]
    average = Average(0.5, None, 1)
    then = AnglesThen(average, average, average, average, 1, [BlockMap(0, matrix, matrix)])
    about: Any = ("forward", "", "teacher", [0], 1, 1, "raw", None, False, [[0], [1]])
    drawing = cosine_maps("x", StrategyAngles(*about, before=then, after=then))
    paths = [a for a, _ in Page(drawing.svg).all("path") if "stroke-width: 72;" in a.get("style", "")]
    shown = {}
    for path in paths:
        colour, opacity = (re.search(p, path["style"]) for p in (r"series-(\d)", r"opacity: ([\d.]+)"))
        assert colour is not None
        numbers = [float(number) for number in re.findall(r"[\d.]+", path["d"])]
        shown[colour[1], float(opacity[1]) if opacity else 1.0] = numbers
    assert shown == {
        ("1", 1.0): [46, 60, 118, 60, 216, 60, 288, 60],
        ("1", 0.5): [118, 60, 190, 60, 288, 60, 360, 60],
        ("2", 0.3): [46, 132, 118, 132, 216, 132, 288, 132],
    }


def test_what_failed_is_named_and_becomes_no_markup(study: Folder) -> None:
    source = report(study.folder).page.read_text()
    assert not Page(source).all("img") and f"reverse-s1: {EVIL}." in Page(source).text[0]
    assert "reverse-s1: " in (study.folder / "report.md").read_text()
    assert students(study)[1].seeds == [0]
    for name in ("forward-s0", "forward-s1", "reverse-s0"):
        study.write(f"angles/{name}.json", {"name": name, "seed": 0, "error": "no"})
    assert "No student's angles could be measured." in Page(section(study)).text[0]
    assert report(study.folder).page.is_file()


def test_two_stacks_have_a_line_and_a_picture_each(tmp_path: Path) -> None:
    folder, draw = Folder(tmp_path), Random(2)
    folder.students({"forward": [90.0]})
    stacks = []
    for stack, students, teachers, tokens in (("encoder", 2, 4, 1200), ("decoder", 3, 6, 34)):
        shape = {"stack": stack, "tokens": tokens, "teacher_blocks": teachers, "student_blocks": students}
        stacks.append({**shape, "before": seen(draw, students, teachers), "after": seen(draw, students, teachers)})
    angles_of(folder, "forward-s0", stacks[0]["before"], None, 0, stacks=stacks)
    read = Page(report(folder.folder).page.read_text())
    assert [len(read.csv(f"angles-{n}")) - 1 for n in (0, 1)] == [2 * 10, 3 * 21]
    for number, one in enumerate(stacks):
        shown = {(int(b), int(i), int(j)): after for b, i, j, _, _, after, _ in read.csv(f"angles-{number}")[1:]}
        for block in one["after"]["blocks"]:
            assert float(shown[block["block"], 0, 2]) == pytest.approx(block["mean"][0][2], abs=1e-3)
    labels = [a["aria-label"] for a, _ in read.all("svg") if "cosine" in a.get("aria-label", "")]
    assert labels == [f"Mean cosine between teacher blocks, forward, {stack}" for stack in ("encoder", "decoder")]
    markdown = (folder.folder / "report.md").read_text()
    assert "1,200 tokens in the encoder and 34 in the decoder of 20 held-out rows" in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("| forward | ") and " before " in line]
    assert ["encoder" in line for line in lines] == [True, False] and "| decoder |" in lines[1]


def test_angles_that_are_not_there_yet_are_named_with_the_cure(study: Folder) -> None:
    (study.folder / "angles" / "reverse-s0.json").unlink()
    found = study.results().angles
    assert found is not None and [one.strategy for one in found.students] == ["forward"]
    assert found.problems["reverse-s0"] == f"not measured yet; run llmkd angles {study.folder}"
    assert "reverse-s0: not measured yet" in (report(study.folder).page.parent / "report.md").read_text()


def test_angles_of_an_earlier_form_are_named_with_the_cure(study: Folder) -> None:
    study.write("angles/reverse-s0.json", {"name": "reverse-s0", "seed": 0, "error": None, "before": {}, "after": {}})
    found = study.results().angles
    assert found is not None and [one.strategy for one in found.students] == ["forward"]
    assert found.problems["reverse-s0"] == f"measured by an earlier llmkd; run llmkd angles {study.folder}"


def test_at_any_depth_the_section_stays_small(tmp_path: Path) -> None:
    """Five strategies of 16 blocks, as a teacher of 64 was seen from them."""
    folder, draw = Folder(tmp_path), Random(1)
    folder.students({name: [90.0] for name in ("none", "forward", "reverse", "all_to_one", "random")})
    for entry in folder.study["entries"]:
        angles_of(folder, entry["name"], seen(draw, 16, 64), seen(draw, 16, 64), 64)
    source = section(folder)
    print(f"\n[angles] {len(source) / 1e3:.0f} kB")
    assert len(source) < 200_000 and "4 of 16 student blocks are shown; neighbouring teacher blocks" in source
    assert [line[0] for line in Page(source).csv("angles-0")[1::78]] == ["0", "5", "10", "15"]


def test_the_sentence_says_the_range_over_strategies() -> None:
    def student(before: float, after: float, stack: str = "") -> StrategyAngles:
        times = []
        for mean in (before, after):
            averages = [Average(value, None, 1) for value in (mean, (mean + 1) / 2, None, None)]
            times.append(AnglesThen(*averages, student_blocks=1, blocks=[]))
        return StrategyAngles("forward", stack, "teacher", [0], 1, 1, "raw", None, False, [[0]], *times)

    text = sentence(Angles([student(0.5, 0.25), student(0.5, -0.125)], {}))
    assert "before training 0.50 (above zero at 75% of tokens)" in text
    assert "after training −0.12 to 0.25 (above zero at 44% to 62% of tokens)" in text and "in the" not in text
    text = sentence(Angles([student(0.5, 0.25, "encoder"), student(0.75, 0.0, "decoder")], {}))
    assert re.search("in the encoder before training 0.50 .*, in the decoder before training 0.75 .* 0.00 ", text)


def test_blocks_are_taken_together_evenly() -> None:
    assert grouped(3) == [[0], [1], [2]]
    sides = grouped(36)
    assert sides == [[3 * place, 3 * place + 1, 3 * place + 2] for place in range(12)]
    assert [block for side in grouped(17) for block in side] == list(range(17)) and len(grouped(17)) == 12
    assert [list(thinned(range(count), 4)) for count in (3, 9)] == [[0, 1, 2], [0, 3, 5, 8]]
    matrix = [[1.0, 0.5, None], [0.5, 1.0, 0.0], [None, 0.0, 1.0]]
    assert coarse(matrix, [[0, 1], [2]]) == [[0.5, 0.0], [0.0, 1.0]]
