"""The bytes of a model whose blocks' linear maps are kept in 4 bits."""

from __future__ import annotations

from llmkd.models.four_bit import kept_bytes
from llmkd.planning.rows import Part, Phase, Place, Row, millions
from llmkd.planning.shapes import Trained


def whole_rows(
    who: str, plain: int, linear: int, largest: int, size: int, phases: tuple[Phase, ...], part: Part = "student"
) -> list[Row]:
    """The weights of a model that every rank has whole, and its largest map while it is computed with.

    `plain`: numbers of `size` bytes; `linear`: weights of the blocks' linear maps; `largest`: those of the largest map.
    """
    how = f"{millions(plain)} x {size} B, and {millions(linear)} in 4 bits (0.516 B each, scales and all)"
    made = f"{millions(largest)} x {size} B, for each product"
    return [
        Row(f"{who} weights", plain * size + kept_bytes(linear), how, part=part),
        Row(f"{who}, one map made plain", largest * size, made, phases),
    ]


def student_weights(student: Trained, trained: int, counted: tuple[int, str], size: int, place: Place) -> list[Row]:
    """A student's weights on a rank. `trained`: numbers that are; `counted`: how many a rank holds of these and the frozen, and how so."""
    if not student.quantized:
        return [Row("student weights", counted[0] * size, f"{counted[1]} {size} B", place=place)]
    plain = trained + student.frozen - student.quantized
    return whole_rows("student", plain, student.quantized, student.largest_map, size, ("head", "backward"))
