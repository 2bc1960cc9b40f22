import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd import layer_map as maps
from llmkd.errors import InputError
from llmkd.layer_map import EMBEDDING, MIXED, RULES, compared, layer_map

ROOT = Path(__file__).resolve().parents[2]
unhurried = settings(deadline=None)  # a busy machine is no failure
depths = st.integers(1, 150).flatmap(lambda teacher: st.tuples(st.integers(1, teacher), st.just(teacher)))
seeds = st.integers(0, 2**63)


def teachers(pairs):
    return [teacher for _, teacher in pairs]


# Tables in the public code of arXiv 2502.04499 (LAYER_MAP, LAYERS_TO_SUPERVISE, LAYER_SELECTION): teachers of 12, 28, 36 and 40 blocks.
PAPER = {
    (1, 12): [11],
    (2, 12): [5, 11],
    (3, 12): [3, 7, 11],
    (4, 12): [2, 5, 8, 11],
    (6, 12): [1, 3, 5, 7, 9, 11],
    (9, 12): [1, 2, 3, 5, 6, 7, 9, 10, 11],
    (12, 12): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    (7, 28): [3, 7, 11, 15, 19, 23, 27],
    (9, 36): [3, 7, 11, 15, 19, 23, 27, 31, 35],
    (10, 40): [3, 7, 11, 15, 19, 23, 27, 31, 35, 39],
}


@pytest.mark.parametrize(("blocks", "expected"), PAPER.items(), ids=lambda value: str(value))
def test_the_papers_tables(blocks, expected):
    assert layer_map("forward", *blocks) == tuple(enumerate(expected))
    assert layer_map("reverse", *blocks) == tuple(enumerate(expected[::-1]))
    assert sorted(teachers(layer_map("random", *blocks))) == expected


# (the table in the code, what forward gives): docs/papers.md says so, with strategy explicit as the way to the former.
WITHOUT_RULE = {
    (2, 6): ([3, 5], [2, 5]),
    (3, 6): ([1, 4, 5], [1, 3, 5]),
    (4, 16): ([4, 9, 12, 15], [3, 7, 11, 15]),
}


@pytest.mark.parametrize("blocks", WITHOUT_RULE)
def test_the_papers_tables_that_follow_no_rule(blocks):
    table, ours = WITHOUT_RULE[blocks]
    assert teachers(layer_map("forward", *blocks)) == ours != table
    assert teachers(layer_map("explicit", *blocks, pairs=list(enumerate(table)))) == table


@pytest.mark.parametrize(
    ("blocks", "target"), [((3, 12), 5), ((9, 36), 17), ((1, 1), 0), ((1, 2), 0), ((1, 3), 0), ((7, 28), 13)]
)
def test_all_to_one_goes_to_the_papers_middle_block(blocks, target):
    """hidden_states[6] for 12 blocks and hidden_states[18] for 36 in the paper's code: outputs of blocks 5 and 17."""
    assert layer_map("all_to_one", *blocks) == tuple((j, target) for j in range(blocks[0]))


@unhurried
@given(depths, st.data())
def test_all_to_one_goes_to_a_named_block(blocks, data):
    target = data.draw(st.integers(0, blocks[1] - 1))
    assert layer_map("all_to_one", *blocks, target_block=target) == tuple((j, target) for j in range(blocks[0]))


PATIENT = ("pkd_skip", "pkd_last")  # the student's last block has no pair


@pytest.mark.parametrize("strategy", [name for name in RULES if name not in ("none", *PATIENT)])
@unhurried
@given(depths, seeds)
def test_each_student_block_has_one_teacher_block_in_range(strategy, blocks, seed):
    pairs = layer_map(strategy, *blocks, seed=seed)
    assert [student for student, _ in pairs] == list(range(blocks[0]))
    assert all(0 <= teacher < blocks[1] for teacher in teachers(pairs))


# Patient KD, arXiv 1908.09355, counted from 1 as there: a BERT of 12 blocks and students of 6 and 3.
PATIENT_TABLES: dict[str, dict[tuple[int, int], list[int]]] = {
    "pkd_skip": {(6, 12): [2, 4, 6, 8, 10], (3, 12): [4, 8]},
    "pkd_last": {(6, 12): [7, 8, 9, 10, 11], (3, 12): [10, 11]},
}


@pytest.mark.parametrize("strategy", PATIENT)
def test_patient_tables(strategy):
    for blocks, expected in PATIENT_TABLES[strategy].items():
        assert layer_map(strategy, *blocks) == tuple((j, t - 1) for j, t in enumerate(expected))


deeper = depths.filter(lambda blocks: blocks[0] > 1)


@unhurried
@given(deeper)
def test_patient_maps_rise_and_leave_both_last_blocks_out(blocks):
    student_blocks, teacher_blocks = blocks
    for strategy in PATIENT:
        pairs = layer_map(strategy, *blocks)
        assert [student for student, _ in pairs] == list(range(student_blocks - 1))
        gaps = {b - a for a, b in zip(teachers(pairs), teachers(pairs)[1:], strict=False)}
        assert gaps <= {teacher_blocks // student_blocks if strategy == "pkd_skip" else 1}
        assert teachers(pairs)[-1] < teacher_blocks - 1
    assert teachers(layer_map("pkd_last", *blocks))[-1] == teacher_blocks - 2


@unhurried
@given(st.integers(2, 40), st.integers(1, 5))
def test_pkd_skip_is_forward_without_its_last_pair_where_depths_divide(student_blocks, times):
    blocks = (student_blocks, student_blocks * times)
    assert layer_map("pkd_skip", *blocks) == layer_map("forward", *blocks)[:-1]


@unhurried
@given(depths, seeds, st.integers(0, 10**6))
def test_a_redraw_is_a_draw_of_its_own_fixed_by_seed_and_number(blocks, seed, draw):
    pairs = maps.in_order_random(blocks[0], blocks[1], seed, draw)
    targets = teachers(pairs)
    assert all(a < b for a, b in zip(targets, targets[1:], strict=False)) and targets[-1] < blocks[1]
    assert pairs == maps.in_order_random(blocks[0], blocks[1], seed, draw)
    assert maps.in_order_random(blocks[0], blocks[1], seed, 0) == layer_map("in_order_random", *blocks, seed=seed)


def test_redraws_differ_and_are_even():
    outcomes = [maps.in_order_random(3, 5, 1, draw) for draw in range(6000)]
    counts = [outcomes.count(kind) for kind in set(outcomes)]
    assert len(counts) == 10 and all(0.8 < count * 10 / len(outcomes) < 1.2 for count in counts)


def test_nearest_takes_the_likest_and_of_equals_the_shallower():
    assert maps.nearest([[0.2, 0.9, 0.3], [0.5, 0.1, 0.5], [0.0, 0.0, 0.1]]) == ((0, 1), (1, 0), (2, 2))
    with pytest.raises(InputError, match="student block 1 and teacher block 0 is not a number.*another strategy"):
        maps.nearest([[1.0], [float("nan")]])


@unhurried
@given(depths)
def test_forward_rises_evenly_to_the_last_block(blocks):
    student_blocks, teacher_blocks = blocks
    targets = teachers(layer_map("forward", *blocks))
    gaps = {b - a for a, b in zip([-1, *targets], targets, strict=False)}
    assert targets[-1] == teacher_blocks - 1
    assert gaps <= {teacher_blocks // student_blocks, -(-teacher_blocks // student_blocks)}


@unhurried
@given(st.integers(1, 150))
def test_forward_at_one_depth_is_the_identity(blocks):
    assert layer_map("forward", blocks, blocks) == tuple((j, j) for j in range(blocks))


@unhurried
@given(depths)
def test_reverse_is_forward_turned_round(blocks):
    assert teachers(layer_map("reverse", *blocks)) == teachers(layer_map("forward", *blocks))[::-1]


@unhurried
@given(depths, seeds)
def test_random_reorders_forward_and_is_fixed_by_its_seed(blocks, seed):
    pairs = layer_map("random", *blocks, seed=seed)
    assert sorted(teachers(pairs)) == teachers(layer_map("forward", *blocks))
    assert pairs == layer_map("random", *blocks, seed=seed)


@unhurried
@given(depths, seeds)
def test_in_order_random_rises_without_repeats_and_is_fixed_by_its_seed(blocks, seed):
    pairs = layer_map("in_order_random", *blocks, seed=seed)
    targets = teachers(pairs)
    assert all(a < b for a, b in zip(targets, targets[1:], strict=False))
    assert pairs == layer_map("in_order_random", *blocks, seed=seed)


@pytest.mark.parametrize("draw", [maps.random, maps.in_order_random])
def test_draws_are_even(draw):
    """Every outcome of a small draw comes up about equally often (6 orders of 3 targets, 10 choices of 3 from 5)."""
    outcomes = [draw(3, 5, seed) for seed in range(6000)]
    kinds = 6 if draw is maps.random else 10
    counts = [outcomes.count(kind) for kind in set(outcomes)]
    assert len(counts) == kinds
    assert all(0.8 < count * kinds / len(outcomes) < 1.2 for count in counts)


def test_draws_stay_what_they_were():
    """Written down: a resumed run on another Python must get its map back."""
    assert teachers(layer_map("random", 3, 12, seed=0)) == [11, 3, 7]
    assert teachers(layer_map("random", 3, 12, seed=1)) == [3, 11, 7]
    assert teachers(layer_map("random", 9, 36, seed=0)) == [31, 3, 19, 11, 27, 15, 35, 7, 23]
    assert teachers(layer_map("in_order_random", 9, 36, seed=0)) == [11, 15, 16, 17, 20, 21, 27, 29, 30]


def test_draws_agree_in_another_process():
    code = "from llmkd.layer_map import random, in_order_random as r; print(random(9, 36, 7), r(9, 36, 7))"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    here = f"{maps.random(9, 36, 7)} {maps.in_order_random(9, 36, 7)}"
    assert out.strip() == here


@pytest.mark.parametrize("strategy", ["random", "in_order_random"])
def test_draws_leave_the_global_generator_alone(strategy):
    random.seed(5)
    before = random.getstate()
    first = layer_map(strategy, 9, 36, seed=3)
    assert random.getstate() == before
    random.random()
    assert layer_map(strategy, 9, 36, seed=3) == first


def test_none_has_no_pair_at_any_depth():
    assert layer_map("none", 9, 36) == layer_map("none", 40, 2) == ()


def test_explicit_keeps_pairs_in_order_and_as_tuples():
    """Lists, as YAML gives them. Several teachers of one block and a student deeper than its teacher are allowed."""
    assert layer_map("explicit", 3, 2, pairs=[[2, 1], [0, 0], [2, 0], [1, 0]]) == ((2, 1), (0, 0), (2, 0), (1, 0))


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("revers", 3, 12), {}, ["'revers'", "did you mean 'reverse'", "all_to_one", "explicit"]),
        (("all-to-one", 3, 12), {}, ["did you mean 'all_to_one'"]),
        (("xyz", 3, 12), {}, ["choose from forward, reverse", "nearest, explicit"]),
        (("nearest", 3, 12), {}, ["needs the models' states", "llmkd train --strategy nearest"]),
        (("pkd_skip", 13, 12), {}, ["at most 12"]),
        (("pkd_last", 1, 12), {}, ["'pkd_last' leaves out", "2 blocks or more", "'forward'"]),
        (("forward", 13, 12), {}, ["student has 13", "teacher 12", "at most 12", "explicit"]),
        (("reverse", 13, 12), {}, ["at most 12"]),
        (("all_to_one", 13, 12), {}, ["at most 12"]),
        (("random", 13, 12), {}, ["at most 12"]),
        (("in_order_random", 13, 12), {}, ["at most 12"]),
        (("forward", 0, 12), {}, ["student blocks: 0", "from 1 up"]),
        (("none", 3, -1), {}, ["teacher blocks: -1"]),
        (("explicit", 3, 2.5), {"pairs": [[0, 0]]}, ["teacher blocks: 2.5"]),
        (("all_to_one", 3, 12), {"target_block": 12}, ["target_block 12", "from 0 to 11"]),
        (("all_to_one", 3, 12), {"target_block": -1}, ["target_block -1", "from 0 to 11"]),
        (("all_to_one", 3, 12), {"target_block": True}, ["target_block True"]),
        (("forward", 3, 12), {"target_block": 5}, ["target_block: strategy", "'forward'", "'all_to_one'"]),
        (("explicit", 3, 12), {"target_block": 5, "pairs": [[0, 0]]}, ["target_block: strategy"]),
        (("forward", 3, 12), {"pairs": [[0, 0]]}, ["pairs: strategy", "'forward'", "'explicit'"]),
        (("none", 3, 12), {"pairs": []}, ["pairs: strategy"]),
        (("explicit", 3, 12), {}, ["no pairs", "'none'"]),
        (("explicit", 3, 12), {"pairs": []}, ["no pairs"]),
        (
            ("explicit", 3, 12),
            {"pairs": [[0, 3], [3, 11]]},
            ["pairs[1] is [3, 11]", "student, which has 3", "from 0 to 2"],
        ),
        (("explicit", 3, 12), {"pairs": [[0, 12]]}, ["pairs[0] is [0, 12]", "teacher, which has 12", "from 0 to 11"]),
        (("explicit", 3, 12), {"pairs": [[0, -1]]}, ["pairs[0] is [0, -1]", "from 0 to 11"]),
        (("explicit", 3, 12), {"pairs": [[0, 3], [1, 3], [0, 3]]}, ["pairs[2] is [0, 3]", "pairs[0]", "take one"]),
        (("explicit", 3, 12), {"pairs": [[0, 1, 2]]}, ["pairs[0] is [0, 1, 2]", "two block numbers"]),
        (("explicit", 3, 12), {"pairs": [4]}, ["pairs[0] is 4", "two block numbers"]),
        (("explicit", 3, 12), {"pairs": ["01"]}, ["two block numbers"]),
        (("explicit", 3, 12), {"pairs": [[0, "3"]]}, ["'3' is not a block of the teacher"]),
        (("random", 3, 12), {"seed": -1}, ["seed -1", "from 0 up"]),
        (("in_order_random", 3, 12), {"seed": None}, ["seed None"]),
    ],
)
def test_mistakes_are_named_with_their_cure(arguments, options, words):
    with pytest.raises(InputError) as caught:
        layer_map(*arguments, **options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_learned_map_pairs_each_student_block_with_every_candidate():
    assert layer_map("learned", 2, 3) == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
    assert layer_map("learned", 2, 12, candidates=3) == tuple((j, i) for j in range(2) for i in (3, 7, 11))
    assert compared("learned", ((EMBEDDING, EMBEDDING), (0, 1), (0, 2), (1, 1), (1, 2))) == (
        (EMBEDDING, EMBEDDING),
        (0, MIXED),
        (1, MIXED),
    )
    twice = ((0, 1), (0, 2))
    assert compared("explicit", twice) == twice  # which is compared with each by itself
    for candidates in (1, 13):
        with pytest.raises(InputError, match="write a whole number from 2 to 12"):
            layer_map("learned", 2, 12, candidates=candidates)
