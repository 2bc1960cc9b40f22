"""The angles of a study's students, their seeds together, as the report shows them: small enough for a page, whatever the depths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from llmkd.evaluation.angle_files import FOLDER, WHEN, tokens_read
from llmkd.files import read
from llmkd.recipe.study_entries import StudyEntry
from llmkd.report.significance import half_width

MOST_STUDENT_BLOCKS = 4  # shown of a strategy, evenly from first to last
MOST_TEACHER_BLOCKS = 12  # along a side of a picture; of a deeper teacher neighbours are taken together
Values = list[list[float | None]]


def angle_findings(folder: Path, entries: Sequence[StudyEntry]) -> dict[str, Any] | None:
    """What `angles/` says of a study's students; None where there is nothing.

    `students`: one per strategy, and per stack of an encoder-decoder, before and after training: means over seeds with half the 95 %
    interval, and by student block the mean cosine of each pair of teacher blocks and the share above zero. `problems`: by name why a
    student has none.
    """
    found = [(entry, read(folder / FOLDER / f"{entry.name}.json")) for entry in entries if entry.train is not None]
    known = [(entry, one) for entry, one in found if one is not None]
    if not known:
        return None
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    problems: dict[str, str] = {}
    for entry, one in known:
        if one["error"] is not None:
            problems[entry.name] = one["error"]
        elif "stacks" not in one:
            problems[entry.name] = f"measured by an earlier llmkd; run llmkd angles {folder}"
        else:
            about = {key: value for key, value in one.items() if key != "stacks"}
            for stack in one["stacks"]:
                groups.setdefault((entry.strategy or entry.name, stack["stack"]), []).append({**about, **stack})
    return {
        "students": [_group(strategy, members) for (strategy, _), members in groups.items()],
        "problems": problems,
    }


def _group(strategy: str, members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = members[0]
    return {
        "strategy": strategy,
        "stack": first["stack"],
        "init": first["init"],
        "seeds": [one["seed"] for one in members],
        "rows": first["rows"],
        "tokens": first["tokens"],
        "final_state": first["final_state"],
        "projector": first["projector"],
        "projector_left_out": first.get("projector_left_out", False),  # files from before it lack it
        "teacher_blocks": grouped(first["teacher_blocks"]),
        **{when: _seen([one[when] for one in members], first["teacher_blocks"]) for when in WHEN},
    }


def _seen(members: Sequence[dict[str, Any]], teacher_blocks: int) -> dict[str, Any]:
    """One strategy's students at one time: numbers over all blocks, and matrices of some of them."""
    sides = grouped(teacher_blocks)
    places = evenly(len(members[0]["blocks"]), MOST_STUDENT_BLOCKS)
    blocks = [
        {
            "block": members[0]["blocks"][place]["block"],
            **{
                key: _over_seeds([coarse(one["blocks"][place][key], sides) for one in members])
                for key in ("mean", "above_zero")
            },
        }
        for place in places
    ]
    return {
        "mean": _cell(members, lambda one: _mean([block["mean_of_pairs"] for block in one["blocks"]])),
        "above_zero": _cell(members, lambda one: _mean([block["above_zero_of_pairs"] for block in one["blocks"]])),
        "paper_code": _cell(members, lambda one: one["paper_code"] and one["paper_code"]["tokens"]["mean"]),
        "paper_code_with_padding": _cell(
            members, lambda one: one["paper_code"] and one["paper_code"]["with_padding"]["mean"]
        ),
        "student_blocks": len(members[0]["blocks"]),
        "blocks": blocks,
    }


def _cell(members: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> dict[str, Any]:
    """Mean over the students that have the number, with half the interval where there are two or more."""
    values = [found for one in members if (found := value(one)) is not None]
    half = half_width(values) if len(set(values)) > 1 else None  # copies of one start are one model
    return {"mean": fmean(values) if values else None, "half_width": half, "n": len(values)}


def grouped(teacher_blocks: int) -> list[list[int]]:
    """The teacher's blocks in order, one to a place while there is room, else neighbours together, evenly."""
    places = min(teacher_blocks, MOST_TEACHER_BLOCKS)
    cuts = [round(place * teacher_blocks / places) for place in range(places + 1)]
    return [list(range(start, stop)) for start, stop in zip(cuts, cuts[1:], strict=False)]


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of so many places, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def coarse(matrix: Values, sides: Sequence[Sequence[int]]) -> Values:
    """The matrix by groups of blocks: the mean over pairs of different blocks, to three digits; a block alone keeps its own number."""

    def value(ones: Sequence[int], others: Sequence[int]) -> float | None:
        pairs = [(i, j) for i in ones for j in others if i != j] or [(ones[0], others[0])]
        found = _mean([matrix[i][j] for i, j in pairs])
        return None if found is None else round(found, 3)

    return [[value(ones, others) for others in sides] for ones in sides]


def _over_seeds(matrices: Sequence[Values]) -> Values:
    return [
        [None if (found := _mean(cells)) is None else round(found, 3) for cells in zip(*rows, strict=True)]
        for rows in zip(*matrices, strict=True)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def sentence(angles: dict[str, Any]) -> str:
    """What was found, in one sentence for both forms of the report."""
    stacks = dict.fromkeys(one["stack"] for one in angles["students"])
    said = [_found([one for one in angles["students"] if one["stack"] == stack], stack) for stack in stacks]
    return (
        f"By strategy, the cosine between the directions from a student's block to two teacher blocks is, as a mean over tokens, pairs "
        f"and blocks, {', '.join(said)}; where it is above zero, a small step towards one teacher block brings the "
        "student's state nearer to the other too."
    )


def _found(students: Sequence[dict[str, Any]], stack: str) -> str:
    """The ranges over strategies before and after, of one stack."""
    said = []
    for when in WHEN:
        means = [one[when]["mean"]["mean"] for one in students if one[when]["mean"]["mean"] is not None]
        shares = [one[when]["above_zero"]["mean"] for one in students if one[when]["above_zero"]["mean"] is not None]
        if means and shares:
            said.append(
                f"{when} training {_range(means, '{:.2f}')} (above zero at {_range(shares, '{:.0%}')} of tokens)"
            )
    where = f"in the {stack} " if stack else ""
    return f"{where}{' and '.join(said) or 'not known'}"


def _range(values: Sequence[float], how: str) -> str:
    low, high = how.format(min(values)), how.format(max(values))
    return low if low == high else f"{low} to {high}"


def setting(angles: dict[str, Any]) -> str:
    """On what the numbers stand, in a sentence or two."""
    first = angles["students"][0]
    of_first = [one for one in angles["students"] if one["strategy"] == first["strategy"]]
    said = (
        f"Over {tokens_read({'stacks': of_first})} of {first['rows']} held-out rows, padding left out; the last blocks' states are "
        f"{_final_states(angles['students'])}. "
        "paper_code is the layer-selection paper's own statistic, cos(T_first - S_first, T_last - S_first), which counts padding; a "
        "first block that is still a copy of the teacher's counts there as 0."
    )
    if any(one["projector"] for one in angles["students"]):
        said += " The widths differ: the students' states are seen through their projectors, as drawn before and as trained after."
    return said + _left_out(angles["students"])


def _left_out(students: Sequence[dict[str, Any]]) -> str:
    """Whose trained projectors at equal width are not looked through, if any are."""
    names = list(dict.fromkeys(one["strategy"] for one in students if one["projector_left_out"]))
    if not names:
        return ""
    return (
        f" {', '.join(names)} learned through projectors at equal width (matching.projector: always), which are left out here: raw "
        "states are compared."
    )


def _final_states(students: Sequence[dict[str, Any]]) -> str:
    """Which states the last blocks' are; where students differ in it, which of them."""
    normed = list(dict.fromkeys(one["strategy"] for one in students if one["final_state"] == "normed"))
    if normed and any(one["final_state"] != "normed" for one in students):
        return f"raw, those of {', '.join(normed)} the ones after the final norm"
    return "those after the final norm" if normed else "raw"


def angle_table(angles: dict[str, Any]) -> list[list[str]]:
    """A line per strategy, stack and time, a header first."""
    named = any(one["stack"] for one in angles["students"])
    head = ["strategy", *["stack"] * named, "init", "students", "training", "mean over pairs", "share above zero"]
    lines = [[*head, "paper_code, tokens", "paper_code, with padding"]]
    for one in angles["students"]:
        for when in WHEN:
            keys = ("mean", "above_zero", "paper_code", "paper_code_with_padding")
            cells = [_cell_text(one[when][key]) for key in keys]
            about = [one["strategy"], *[one["stack"]] * named, one["init"], str(len(one["seeds"])), when]
            lines.append([*about, *cells])
    return lines


def _cell_text(cell: dict[str, Any]) -> str:
    if cell["mean"] is None:
        return "-"
    return f"{cell['mean']:.3f}" + (f" ± {cell['half_width']:.3f}" if cell["half_width"] is not None else "")
