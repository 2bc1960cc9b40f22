"""Cuts against all cuts tried by hand, and the schedule against a walk through it."""

from __future__ import annotations

import itertools
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkd import cli
from llmkd.errors import InputError
from llmkd.layer_map import EMBEDDING, RULES, OtherState, Pairs, State, layer_map
from llmkd.teachers.pipeline_schedule import (
    Route,
    cut_into_stages,
    last_tick,
    pipeline_drawing,
    routes,
    stage_count,
    states_per_item,
    transfers,
)


def teachers(pairs: Pairs) -> list[int]:
    return [teacher for _, teacher in pairs]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 7), st.integers(0, 20))
def test_no_cut_has_a_faster_slowest_stage_nor_then_an_evener_memory(
    costs: list[int], stages: int, embedding: int
) -> None:
    stages = min(stages, len(costs))

    def judge(ends: tuple[int, ...]) -> tuple[int, int]:
        work = [sum(costs[a:b]) for a, b in itertools.pairwise((0, *ends, len(costs)))]
        return max(work), sum((w + (embedding if s == 0 else 0)) ** 2 for s, w in enumerate(work))

    parts = cut_into_stages(costs, stages, embedding=embedding)
    assert [block for part in parts for block in part] == list(range(len(costs)))
    assert len(parts) == stages and all(parts)
    best = min(judge(ends) for ends in itertools.combinations(range(1, len(costs)), stages - 1))
    assert judge(tuple(part.start for part in parts[1:])) == best


def test_embeddings_make_the_first_stage_shorter_only_where_that_costs_no_time() -> None:
    assert [len(part) for part in cut_into_stages([10] * 36, 8, embedding=32)] == [1, 5, 5, 5, 5, 5, 5, 5]
    assert [len(part) for part in cut_into_stages([10] * 36, 4, embedding=32)] == [9, 9, 9, 9]


@pytest.mark.parametrize("strategy", RULES)
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_every_state_asked_for_leaves_its_own_stage_once(strategy: str, stages: int) -> None:
    pairs = ((EMBEDDING, EMBEDDING), *layer_map(strategy, 9, 36, seed=3))
    parts = cut_into_stages([1] * 36, stages)
    sent = routes(teachers(pairs), parts, final=True, normed_last=False)
    *states, last = [route.state for route in sent]
    assert states == sorted({block for _, block in pairs}) and last is OtherState.FINAL
    assert all(r.state in parts[r.stage] for r in sent[1:-1])
    assert sent[0] == Route(0, EMBEDDING) and sent[-1] == Route(stages - 1, OtherState.FINAL)


def test_a_normed_last_pair_takes_the_final_state_even_without_a_divergence() -> None:
    pairs, parts = layer_map("forward", 3, 6), cut_into_stages([1] * 6, 2)
    kept = routes(teachers(pairs), parts, final=False, normed_last=True)
    assert [r.state for r in kept] == [1, 3, OtherState.FINAL]
    assert [r.state for r in routes(teachers(pairs), parts, final=False, normed_last=False)] == [1, 3, 5]
    assert routes([], parts, final=False, normed_last=True) == ()


@given(st.integers(1, 5), st.lists(st.lists(st.booleans(), min_size=5, max_size=5), max_size=5))
def test_the_schedule_delivers_all_once_in_one_order_per_pair(stages: int, rounds: list[list[bool]]) -> None:
    """Walk through the ticks as the members do, with owners that have no micro-batch in some rounds."""
    items = {k * stages + m for k, members in enumerate(rounds) for m in range(stages) if members[m]}
    parts = cut_into_stages([1] * 8, stages)
    sent = routes(teachers(layer_map("reverse", 4, 8)), parts, final=True, normed_last=False)
    wires: dict[tuple[int, int], deque[tuple[int, State]]] = {}
    worked: set[tuple[int, int]] = set()
    got: Counter[tuple[int, State]] = Counter()
    for tick in range(last_tick(len(rounds), stages) + 1):
        for stage in range(stages):
            if (item := tick - stage) in items:
                assert stage == 0 or (item, stage - 1) in worked  # its state arrived at the tick before
                worked.add((item, stage))
                got.update((item, r.state) for r in sent if r.stage == stage == item % stages)
        moved = transfers(tick, items.__contains__, sent, stages)
        for t in moved:
            assert t.source != t.target and (t.item, t.source) in worked
            wires.setdefault((t.source, t.target), deque()).append((t.item, t.state))
        for (
            t
        ) in moved:  # the other side reads the same list, so each pair's queue is emptied in the order it was filled
            assert wires[t.source, t.target].popleft() == (t.item, t.state)
            if t.state is not OtherState.NEXT:
                assert t.target == t.item % stages
                got[t.item, t.state] += 1
    assert worked == {(item, stage) for item in items for stage in range(stages)}
    assert got == Counter({(item, r.state): 1 for item in items for r in sent})


def test_an_item_is_whole_when_its_round_is_asked_for() -> None:
    """The ticks up to round * P + 2P - 2 hold the round's last item at the last stage, and no stage is idle but at the ends."""
    stages, rounds = 4, 3
    for k in range(rounds):
        assert (k * stages + stages - 1) + (stages - 1) == last_tick(k + 1, stages)
    busy = [0 <= tick - 2 < rounds * stages for tick in range(last_tick(rounds, stages) + 1)]
    assert busy == [False] * 2 + [True] * (rounds * stages) + [False]


@pytest.mark.parametrize("stages", [1, 2, 4, 6])
def test_states_on_the_wire_are_those_of_the_schedule(stages: int) -> None:
    sent = routes(teachers(layer_map("forward", 3, 6)), cut_into_stages([1] * 6, stages), final=True, normed_last=False)
    ticks = range(last_tick(5, stages) + 1)
    moved = sum(len(transfers(t, range(5 * stages).__contains__, sent, stages)) for t in ticks)
    assert moved == pytest.approx(5 * stages * states_per_item(sent, stages))


def test_stages_default_to_a_node_and_must_share_the_ranks() -> None:
    assert stage_count(None, 32, 8, 36) == 8
    assert stage_count(None, 2, 8, 36) == 2
    assert stage_count(4, 32, 8, 36) == 4
    with pytest.raises(InputError, match=r"teacher\.stages.*write 1 or 2 or 4 or 8"):
        stage_count(3, 8, 8, 36)
    with pytest.raises(InputError, match=r"6 blocks.*write 1 or 2 or 4$"):
        stage_count(None, 8, 8, 6)


def test_the_drawing_shows_every_stage_block_and_arrow(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["maps", "--student-blocks", "9", "--teacher-blocks", "36", "--stages", "4"]
    cli.main([*options, "--strategy", "reverse"])
    text = capsys.readouterr().out
    assert "stage 0   blocks 0-8     . . . # . . . # .   3 -> student 8; 7 -> student 7" in text
    assert "\nper micro-batch 10.5 states" in text
    cli.main(options)
    text = capsys.readouterr().out
    assert text.count("token ids") == len(RULES) and text.count("final state -> head") == len(RULES)
    assert max(len(line) for line in text.splitlines()) <= 120
    with pytest.raises(SystemExit):
        cli.main([*options[:-1], "37"])


def test_a_normed_final_state_goes_to_student_and_head() -> None:
    shown = pipeline_drawing(layer_map("forward", 3, 6), cut_into_stages([1] * 6, 2), normed_last=True)
    assert "final state -> student 2 and head" in shown and "5 -> " not in shown
    assert "embeddings -> student embeddings" in pipeline_drawing(((-1, -1),), cut_into_stages([1] * 6, 2))
