"""A teacher cut into stages: which blocks a rank holds, what it sends to whom, and when. Whole numbers only.

A pipeline has P members; member s holds stage s and owns a micro-batch of each round. Items, that is micro-batches, are numbered
round * P + owner, and stage s works on item i at tick i + s. So every stage has one item at every tick but the first and last
P - 1 of a stream; what is sent at a tick follows from its number alone, in an order that all members share.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llmkd.errors import InputError
from llmkd.layer_map import EMBEDDING, OtherState, Pairs, State

PipelineCut = tuple[range, ...]
"""Each stage's blocks."""


@dataclass(frozen=True)
class Route:
    """A state that a stage sends to the owner of every item: a block's output, EMBEDDING or the final state."""

    stage: int
    state: State


@dataclass(frozen=True)
class Transfer:
    """One state on the wire: what of which item, from which member to which."""

    item: int
    state: State
    source: int
    target: int


# ---------------------------------------------------------------------------------------------------------------------
# Who holds what


def stage_count(setting: int | None, ranks: int, ranks_per_node: int, depth: int) -> int:
    """How many stages a teacher of `depth` blocks is cut into; by default as many as there are ranks on a node.

    Raises InputError where the ranks can't be divided into pipelines of that many, or a stage would have no block.
    """
    stages = setting or min(ranks, ranks_per_node)
    fitting = [str(n) for n in range(1, min(ranks, depth) + 1) if ranks % n == 0]
    if ranks % stages or stages > depth:
        why = (
            f"a teacher of {depth} blocks has no more stages"
            if stages > depth
            else f"{ranks} ranks cannot be divided into pipelines of that size"
        )
        raise InputError(
            f"teacher.stages: pipelines of {stages} stages are not possible, {why}; write {' or '.join(fitting)}"
        )
    return stages


def cut_into_stages(costs: Sequence[int], stages: int, *, embedding: int = 0) -> PipelineCut:
    """Contiguous stages of at least one block each. `costs`: each block's weights, which are also its work per token.

    The slowest stage sets the pace, so its work is as small as possible. Of the cuts with that pace, the one with the most even weights
    is taken; the embeddings', which cost memory and no time, count with stage 0.
    """
    assert 1 <= stages <= len(costs), (stages, len(costs))
    pace = max(sum(costs[i] for i in part) for part in _best_cut(costs, stages, lambda stage, work: work, max))

    def unevenness(stage: int, work: float) -> float:
        return math.inf if work > pace else (work + (embedding if stage == 0 else 0)) ** 2

    return _best_cut(costs, stages, unevenness, lambda a, b: a + b)


def _best_cut(
    costs: Sequence[int],
    stages: int,
    value: Callable[[int, float], float],
    join: Callable[[float, float], float],
) -> PipelineCut:
    """The cut of least value, by the best cuts of every beginning into fewer stages; of equals, the one whose stages begin earliest."""
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best: list[float] = [0.0] + [math.inf] * len(costs)
    starts: list[list[int]] = []
    for stage in range(stages):
        candidates = [
            min(
                ((join(best[start], value(stage, sums[end] - sums[start])), start) for start in range(stage, end)),
                default=(math.inf, 0),
            )
            for end in range(len(costs) + 1)
        ]
        best, chosen = [value for value, _ in candidates], [start for _, start in candidates]
        starts.append(chosen)
    parts: list[range] = []
    end = len(costs)
    for chosen in reversed(starts):
        parts.insert(0, range(chosen[end], end))
        end = chosen[end]
    return tuple(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Who sends what to whom, and when


def routes(uses: Iterable[int], parts: PipelineCut, *, final: bool, normed_last: bool) -> tuple[Route, ...]:
    """The states that leave their stage for the owner, each once however often it is used, from the first block to the last.

    `final`: the divergence needs the final state. `normed_last`: the last block's pairs compare it after the final norm, so that
    they take the final state, too.
    """
    depth = parts[-1].stop
    wanted = set(uses)
    if normed_last and depth - 1 in wanted:
        wanted, final = wanted - {depth - 1}, True
    routes = [Route(0, EMBEDDING)] if EMBEDDING in wanted else []
    routes += [Route(stage, block) for stage, part in enumerate(parts) for block in part if block in wanted]
    return (*routes, Route(len(parts) - 1, OtherState.FINAL)) if final else tuple(routes)


def transfers(tick: int, exists: Callable[[int], bool], sent: Sequence[Route], stages: int) -> list[Transfer]:
    """What crosses the wire after a tick, in the order that every member keeps. An owner's own stage sends it nothing."""
    planned: list[Transfer] = []
    for stage in range(stages):
        item = tick - stage
        if not exists(item):
            continue
        if stage + 1 < stages:
            planned.append(Transfer(item, OtherState.NEXT, stage, stage + 1))
        owner = item % stages
        planned += [Transfer(item, r.state, stage, owner) for r in sent if r.stage == stage and owner != stage]
    return planned


def last_tick(rounds: int, stages: int) -> int:
    """The tick in which the last stage works on the last item of so many rounds; -1 where there is none."""
    return rounds * stages + stages - 2 if rounds else -1


def states_per_item(sent: Sequence[Route], stages: int) -> float:
    """States on the wire for one micro-batch, which each member sends per round on average.

    P - 1 from stage to stage, and each route's for all owners but the one whose own stage it leaves.
    """
    return (stages - 1) * (1 + len(sent) / stages)


def states_held(sent: Sequence[Route], parts: PipelineCut) -> int:
    """The most states [B, T, H] that a member holds at a time, with the sends of one earlier tick still under way.

    All routes' states of its own micro-batch, those of its next one that have come early, the state that enters the stage, and
    twice the outputs of the stage.
    """
    stages = len(parts)
    most = 0
    for member, part in enumerate(parts):
        early = sum(r.stage + member <= stages - 2 for r in sent)
        # the last block's output is the next stage's input
        outputs = {r.state for r in sent if r.stage == member} - {part.stop - 1} | {OtherState.NEXT}
        most = max(most, len(sent) + early + (stages > 1) * (1 + 2 * len(outputs)))
    return most


# ---------------------------------------------------------------------------------------------------------------------
# The drawing


LINE = 120
"""Columns of a drawing, unless its arrows need more."""


def pipeline_drawing(pairs: Pairs, parts: PipelineCut, *, final: bool = True, normed_last: bool = False) -> str:
    """The stages from top to bottom, a column per block of a stage, # where a student block learns from it, and what goes where."""
    sent = routes([teacher for _, teacher in pairs], parts, final=final, normed_last=normed_last)
    widest = max(len(part) for part in parts)
    between = " " if 2 * widest <= 60 else ""
    names = [f"stage {stage}   blocks {part.start}-{part.stop - 1}" for stage, part in enumerate(parts)]
    width = max(len(name) for name in names)
    lines = ["token ids", "  |"]
    for stage, part in enumerate(parts):
        here = [route.state for route in sent if route.stage == stage]
        cells = between.join("#" if block in here else "." for block in part).ljust(widest * (len(between) + 1) - 1)
        arrows = [_arrow(state, pairs, parts[-1].stop, normed_last) for state in here]
        goals = "; ".join(arrow.replace(" ", "\0") for arrow in arrows)  # an arrow stays on its line
        drawn = f"{names[stage].ljust(width)}   {cells}   "
        first, *further = textwrap.wrap(goals, max(LINE - len(drawn), 30)) or [""]
        lines.append(f"{drawn}{first}".replace("\0", " ").rstrip())
        lines += [f"{'  |'.ljust(len(drawn))}{more}".replace("\0", " ") for more in further]
        if stage + 1 < len(parts):
            lines.append("  v")
    per_item = states_per_item(sent, len(parts))
    to_owners = per_item - len(parts) + 1
    lines += [
        "",
        f"per micro-batch {per_item:g} states [B, T, H] cross the wire: {len(parts) - 1} from stage to stage, {to_owners:g} on "
        "average to the rank that owns it",
    ]
    return "\n".join(lines)


def _arrow(state: State, pairs: Pairs, depth: int, normed_last: bool) -> str:
    final = state is OtherState.FINAL
    name = "final state" if final else "embeddings" if state == EMBEDDING else str(state)
    teacher = depth - 1 if final and normed_last else state
    students = [s for s, t in pairs if t == teacher]
    shown = ", ".join("embeddings" if s == EMBEDDING else str(s) for s in students)
    goals = [f"student {shown}"] if students else []
    return f"{name} -> {' and '.join([*goals, 'head'] if final else goals)}"
