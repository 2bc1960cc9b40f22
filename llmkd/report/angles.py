"""The angles of a study's students, their seeds together, as the report shows them: small enough for a page, whatever the depths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from llmkd.evaluation.angles import results as angle_results
from llmkd.evaluation.angles.results import WHEN, AngleResult, Matrix, StackAngles, StudentView, mean_of_known
from llmkd.evaluation.results import read_result
from llmkd.recipe.scoring_steps import ANGLES
from llmkd.recipe.study_entries import StudyEntry
from llmkd.report import numbers
from llmkd.report.files import row_name, thinned
from llmkd.report.results import Angles, AnglesThen, Average, BlockMap, StrategyAngles
from llmkd.report.significance import half_width
from llmkd.text import Table, fixed

MOST_STUDENT_BLOCKS = 4  # shown of a strategy, evenly from first to last
MOST_TEACHER_BLOCKS = 12  # along a side of a picture; a deeper teacher's neighbours are taken together
Member = tuple[AngleResult, angle_results.MeasuredAngles, StackAngles]


def study_angles(folder: Path, entries: Iterable[StudyEntry]) -> Angles | None:
    """The angles of a study's students by strategy and, of encoder-decoders, by stack; None where none were measured."""
    trained = [entry for entry in entries if entry.train is not None]
    results = [(entry, read_result(folder / ANGLES.folder / f"{entry.name}.json", AngleResult)) for entry in trained]
    if all(result is None for _, result in results):
        return None
    groups: dict[tuple[str, str], list[Member]] = {}
    problems: dict[str, str] = {}
    for entry, result in results:
        if result is None:
            problems[entry.name] = f"not measured yet; run llmkd angles {folder}"
        elif result.error is not None:
            problems[entry.name] = result.error
        elif result.measured is None:
            problems[entry.name] = f"measured by an earlier llmkd; run llmkd angles {folder}"
        else:
            for stack in result.measured.stacks:
                groups.setdefault((row_name(entry), stack.stack), []).append((result, result.measured, stack))
    return Angles([_of_strategy(strategy, members) for (strategy, _), members in groups.items()], problems)


def _of_strategy(strategy: str, members: Sequence[Member]) -> StrategyAngles:
    result, measured, stack = members[0]
    blocks = stack.teacher_blocks
    before, after = (_over_students([stack.view(when) for _, _, stack in members], blocks) for when in WHEN)
    return StrategyAngles(
        strategy=strategy,
        stack=stack.stack,
        init=result.init,
        seeds=[result.seed for result, _, _ in members],
        rows=measured.rows,
        tokens=stack.tokens,
        final_state=measured.final_state,
        projector=measured.projector,
        projector_left_out=measured.projector_left_out,
        teacher_blocks=grouped(blocks),
        before=before,
        after=after,
    )


def _over_students(views: Sequence[StudentView], teacher_blocks: int) -> AnglesThen:
    """One strategy's students at one time: numbers over all blocks, and matrices of some of them."""
    sides, blocks = grouped(teacher_blocks), views[0].blocks
    maps = [
        BlockMap(
            blocks[place].block,
            _mean_matrix([coarse(view.blocks[place].mean, sides) for view in views]),
            _mean_matrix([coarse(view.blocks[place].above_zero, sides) for view in views]),
        )
        for place in thinned(range(len(blocks)), MOST_STUDENT_BLOCKS)
    ]
    return AnglesThen(
        mean=_average(views, lambda view: mean_of_known([block.mean_of_pairs for block in view.blocks])),
        above_zero=_average(views, lambda view: mean_of_known([block.above_zero_of_pairs for block in view.blocks])),
        paper_code=_average(views, lambda view: view.paper_code and view.paper_code.tokens.mean),
        paper_code_with_padding=_average(views, lambda view: view.paper_code and view.paper_code.with_padding.mean),
        student_blocks=len(blocks),
        blocks=maps,
    )


def _average(views: Sequence[StudentView], value: Callable[[StudentView], float | None]) -> Average:
    """Mean over the students that have the number, with half the interval where there are two or more."""
    values = [number for view in views if (number := value(view)) is not None]
    half = half_width(values) if len(set(values)) > 1 else None  # copies of one start are one model
    return Average(fmean(values) if values else None, half, len(values))


def grouped(teacher_blocks: int) -> list[list[int]]:
    """The teacher's blocks in order, one to a place while there is room, else neighbours together, evenly."""
    places = min(teacher_blocks, MOST_TEACHER_BLOCKS)
    edges = [round(place * teacher_blocks / places) for place in range(places + 1)]
    return [list(range(start, stop)) for start, stop in zip(edges, edges[1:], strict=False)]


def coarse(matrix: Matrix, sides: Sequence[Sequence[int]]) -> Matrix:
    """The matrix by groups of blocks: the mean over pairs of different blocks, to three digits; a block alone keeps its own number."""

    def value(rows: Sequence[int], columns: Sequence[int]) -> float | None:
        pairs = [(i, j) for i in rows for j in columns if i != j] or [(rows[0], columns[0])]
        return _rounded(mean_of_known([matrix[i][j] for i, j in pairs]))

    return [[value(rows, columns) for columns in sides] for rows in sides]


def _mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    rows = zip(*matrices, strict=True)
    return [[_rounded(mean_of_known(cells)) for cells in zip(*row, strict=True)] for row in rows]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


# --- In words and as a table


def sentence(angles: Angles) -> str:
    """The ranges over strategies, in one sentence for all forms of the report."""
    stacks = dict.fromkeys(student.stack for student in angles.students)
    ranges = [_ranges([student for student in angles.students if student.stack == stack], stack) for stack in stacks]
    return (
        f"By strategy, the cosine between the directions from a student's block to two teacher blocks is, as a mean over tokens, pairs "
        f"and blocks, {', '.join(ranges)}; where it is above zero, a small step towards one teacher block brings the "
        "student's state nearer to the other too."
    )


def _ranges(students: Sequence[StrategyAngles], stack: str) -> str:
    """The ranges over strategies before and after training, of one stack."""
    parts = []
    for when in WHEN:
        means = [mean for student in students if (mean := student.at(when).mean.mean) is not None]
        shares = [100 * share for student in students if (share := student.at(when).above_zero.mean) is not None]
        if means and shares:
            parts.append(f"{when} training {_range(means, 2)} (above zero at {_range(shares, 0, '%')} of tokens)")
    where = f"in the {stack} " if stack else ""
    return f"{where}{' and '.join(parts) or 'not known'}"


def _range(values: Sequence[float], decimals: int, unit: str = "") -> str:
    low, high = (fixed(value, decimals) + unit for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def setting(angles: Angles) -> str:
    """What the numbers were measured on, in a few sentences."""
    students = angles.students
    tokens = {student.stack: student.tokens for student in students if student.strategy == students[0].strategy}
    parts = [
        f"Over {angle_results.tokens_read(tokens)} of {students[0].rows} held-out rows, padding left out; the last blocks' states are "
        f"{_final_states(students)}.",
        "paper_code is the layer-selection paper's own statistic, cos(T_first - S_first, T_last - S_first), which counts padding; a "
        "first block that is still a copy of the teacher's counts there as 0.",
    ]
    if any(student.projector for student in students):
        parts.append(
            "The widths differ: the students' states are seen through their projectors, as drawn before and as trained after."
        )
    left_out = dict.fromkeys(student.strategy for student in students if student.projector_left_out)
    if left_out:
        parts.append(
            f"{', '.join(left_out)} learned through projectors at equal width (matching.projector: always), which are left out here: "
            "raw states are compared."
        )
    return " ".join(parts)


def _final_states(students: Sequence[StrategyAngles]) -> str:
    """Which states the last blocks' are; where students differ in it, which of them."""
    normed = list(dict.fromkeys(student.strategy for student in students if student.final_state == "normed"))
    if normed and any(student.final_state != "normed" for student in students):
        return f"raw, those of {', '.join(normed)} the ones after the final norm"
    return "those after the final norm" if normed else "raw"


def angle_table(angles: Angles) -> Table:
    """A line per strategy, stack and time."""
    named = any(student.stack for student in angles.students)
    head = ["strategy", *["stack"] * named, "init", "students", "training", "mean over pairs", "share above zero"]
    lines = [[*head, "paper_code, tokens", "paper_code, with padding"]]
    for student in angles.students:
        for when in WHEN:
            then = student.at(when)
            averages = (then.mean, then.above_zero, then.paper_code, then.paper_code_with_padding)
            about = [student.strategy, *[student.stack] * named, student.init, str(len(student.seeds)), when]
            lines.append([*about, *map(numbers.average, averages)])
    return lines
