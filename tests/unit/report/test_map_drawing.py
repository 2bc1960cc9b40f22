"""A map as a table and as a picture."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.layer_map import RULES, layer_map
from llmkd.report.map_drawing import MAX_WIDTH, drawing, table

depths = st.integers(2, 150).flatmap(lambda teacher: st.tuples(st.integers(2, teacher), st.just(teacher)))


def test_table():
    assert table(layer_map("reverse", 2, 12), 2, 12).splitlines() == [
        "block i = output of block i, hidden_states[i+1] in HF's count",
        "",
        "student block | teacher block | student depth | teacher depth",
        "--------------|---------------|---------------|--------------",
        "            0 |            11 |          0.50 |          1.00",
        "            1 |             5 |          1.00 |          0.50",
    ]
    assert table((), 2, 12).splitlines()[-1] == "(no pair)"


def test_drawing():
    assert drawing(layer_map("reverse", 3, 12), 3, 12).splitlines() == [
        "block i = output of block i, hidden_states[i+1] in HF's count",
        "3 of 3 student blocks learn from 3 of 12 teacher blocks; # is a pair",
        "",
        "student <- teacher",
        "           0         5         10",
        "           |         |         |",
        "  0 <- 11  . . . . . . . . . . . #",
        "  1 <-  7  . . . . . . . # . . . .",
        "  2 <-  3  . . . # . . . . . . . .",
    ]


def test_drawing_of_odd_maps():
    several = drawing(layer_map("explicit", 2, 12, pairs=[[0, 9], [0, 1], [0, 4], [0, 11], [0, 2]]), 2, 12).splitlines()
    assert several[-2:] == [
        "  0 <-  1,  2,  4, +2  . # # . # . . . . # . #",
        "  1                    . . . . . . . . . . . .",
    ]
    assert "1 of 2 student blocks learn from 5 of 12" in several[1]
    nothing = drawing((), 2, 3).splitlines()
    assert nothing[1] == "no pair between 2 student and 3 teacher blocks"
    assert nothing[-1] == "  1  . . ."


def grid(text, student_blocks):
    """The drawn picture read back: for each student block, the columns that hold a #."""
    lines = text.splitlines()
    start = lines[-student_blocks - 1].index("|")  # the ticks begin where column 0 does
    rows = [line[start:] for line in lines[-student_blocks:]]
    return [[at for at, mark in enumerate(row) if mark == "#"] for row in rows]


@pytest.mark.parametrize("strategy", list(RULES))
@settings(deadline=None)  # a busy machine is no failure
@given(depths, st.integers(0, 2**63))
def test_drawing_fits_the_terminal_and_shows_the_pairs(strategy, blocks, seed):
    pairs = layer_map(strategy, *blocks, seed=seed)
    text = drawing(pairs, *blocks)
    assert max(map(len, text.splitlines())) <= MAX_WIDTH
    assert text.isascii()
    if blocks[1] > 40:  # two characters to a column up to there
        return
    assert grid(text, blocks[0]) == [[2 * t for s, t in pairs if s == j] for j in range(blocks[0])]


@pytest.mark.parametrize("student_blocks", [1, 12, 101])
@pytest.mark.parametrize("targets", [1, 2, 3, 4, 40])
def test_drawing_fits_the_terminal_at_every_depth(student_blocks, targets):
    for teacher_blocks in range(targets, 400):
        pairs = tuple((0, teacher) for teacher in range(targets))
        assert max(map(len, drawing(pairs, student_blocks, teacher_blocks).splitlines())) <= MAX_WIDTH


def test_drawing_gives_deep_teachers_several_blocks_to_a_column():
    text = drawing(layer_map("forward", 9, 200), 9, 200)
    assert "one column stands for 3 teacher blocks" in text
    assert grid(text, 9) == [[t // 3] for _, t in layer_map("forward", 9, 200)]
    pairs = layer_map("forward", 10, 61)
    assert grid(drawing(pairs, 10, 61), 10) == [[t] for _, t in pairs]
