"""Which teacher block teaches which student block: a strategy is a function that gives pairs, and pairs are plain data.

`layer_map("reverse", 9, 36)` gives `((0, 35), (1, 31), ..., (8, 3))`; `llmkd.report.map_drawing` shows it in a terminal. Blocks are
0-based and stand for their output: block i's is `hidden_states[i+1]` in Hugging Face's count. Definitions: Yu, Wen & Mou, arXiv 2502.04499,
and its public code; pkd_skip and pkd_last: Sun et al., arXiv 1908.09355.
"""

import difflib
import inspect
import random as python_random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from llmkd.errors import InputError

DECODER_EMBEDDING = -2
"""The embeddings that an encoder-decoder's decoder reads; its encoder's are EMBEDDING (-1)."""
EMBEDDING = -1
"""The "block" number of the embeddings' output, where the embedding pair is asked for."""
MIXED = -3
"""In place of a teacher block: a mixture of all those that a student block is paired with."""


class OtherState(Enum):
    """A teacher's states that no pair can name; being no numbers, they equal no block and neither embedding."""

    FINAL = "final"
    """The state after the last block and the final norm."""
    NEXT = "next"
    """The state that a pipeline's stage hands to the next one."""


State = int | OtherState
"""A block's output or an embedding, by its number, or one of the others."""
Pairs = tuple[tuple[int, int], ...]


def forward(student_blocks: int, teacher_blocks: int) -> Pairs:
    """Student block j learns from the last teacher block of the j-th of `student_blocks` even groups.

    `M[j] = ceil((j+1) * L_t / L_s) - 1`: the tables in the code of arXiv 2502.04499 for teachers of 12, 28, 36 and 40 blocks. Those for 6
    and 16 follow no such rule (docs/papers.md).
    Raises InputError on depths below 1 or a student deeper than its teacher.
    """
    _check_depths(student_blocks, teacher_blocks)
    # -(-a // b) is ceil(a / b) in whole numbers; by floats, (j+1) * (21/19) at j = 18 would give block 21 of 21.
    return tuple((j, -(-(j + 1) * teacher_blocks // student_blocks) - 1) for j in range(student_blocks))


def reverse(student_blocks: int, teacher_blocks: int) -> Pairs:
    """The targets of `forward` in the opposite order: the last student block learns from the shallowest of them."""
    return tuple(enumerate(reversed(_targets(student_blocks, teacher_blocks))))


def all_to_one(student_blocks: int, teacher_blocks: int, target_block: int | None = None) -> Pairs:
    """Every student block learns from one teacher block, by default the middle one.

    The middle is block `L_t//2 - 1` (block 0 if there is but one): the paper's code reads `hidden_states[L_t//2]`,
    which is that block's output. Raises InputError on bad depths or a target out of range.
    """
    _check_depths(student_blocks, teacher_blocks)
    target = max(teacher_blocks // 2 - 1, 0) if target_block is None else target_block
    if not _is_block(target, teacher_blocks):
        raise InputError(
            f"target_block {target!r} is not a block of the teacher, which has {teacher_blocks}: "
            f"write a whole number from 0 to {teacher_blocks - 1}"
        )
    return tuple((j, target) for j in range(student_blocks))


def random(student_blocks: int, teacher_blocks: int, seed: int) -> Pairs:
    """The targets of `forward` in one random order, drawn once from the seed.

    Every order is equally likely, that of `forward` or `reverse` too: with 3 student blocks, 1 seed in 6 each.
    Raises InputError on bad depths or a negative seed.
    """
    return tuple(enumerate(_draw(_targets(student_blocks, teacher_blocks), student_blocks, seed)))


def in_order_random(student_blocks: int, teacher_blocks: int, seed: int, draw: int = 0) -> Pairs:
    """`student_blocks` teacher blocks drawn without replacement and sorted (the usual reading of RAIL-KD).

    `draw` counts the redraws of one run, each a function of (seed, draw) alone. Raises InputError on bad depths or a
    negative seed.
    """
    _check_depths(student_blocks, teacher_blocks)
    _check_seed(seed)
    # Beyond 64 bits, so that no seed that a recipe may name meets another seed's redraw.
    return tuple(enumerate(sorted(_draw(range(teacher_blocks), student_blocks, seed + (draw << 64)))))


def pkd_skip(student_blocks: int, teacher_blocks: int) -> Pairs:
    """Every k-th teacher block, k = L_t // L_s: student block j learns from block `(j+1) * k - 1`, the last student block from none.

    Patient KD, Sun et al., arXiv 1908.09355: its student's last block is left out, for the logits already teach that state, and
    a BERT of 6 blocks learns from the teacher's {2, 4, 6, 8, 10} of 12 (`--fc_layer_idx 1,3,5,7,9` in its public code, 0-based).
    So it is `forward` without its last pair where L_s divides L_t; elsewhere the paper says nothing. The paper compares the first
    token's state alone, by `normalized_mse`; here every position of the recipe is compared, by its distance. Raises InputError
    on bad depths or a student of one block.
    """
    _check_patient("pkd_skip", student_blocks, teacher_blocks)
    every = teacher_blocks // student_blocks
    return tuple((j, (j + 1) * every - 1) for j in range(student_blocks - 1))


def pkd_last(student_blocks: int, teacher_blocks: int) -> Pairs:
    """The teacher's last blocks but the very last, in order: student block j learns from block `L_t - L_s + j`, the last from none.

    Patient KD, as in `pkd_skip`: a BERT of 6 blocks learns from the teacher's {7, 8, 9, 10, 11} of 12, counted from 1. Raises
    InputError on bad depths or a student of one block.
    """
    _check_patient("pkd_last", student_blocks, teacher_blocks)
    return tuple((j, teacher_blocks - student_blocks + j) for j in range(student_blocks - 1))


def learned(student_blocks: int, teacher_blocks: int, candidates: int | None = None) -> Pairs:
    """Each student block with every teacher block, or with `candidates` of them, which are the targets of `forward` for so many blocks.

    It learns from a mixture of these, whose weights are trained with the student (llmkd.student.mixtures). Raises InputError on bad
    depths or a number of candidates that is not from 2 to the teacher's depth.
    """
    _check_depths(student_blocks, teacher_blocks)
    if candidates is not None and not 2 <= candidates <= teacher_blocks:
        raise InputError(
            f"candidates {candidates} can't be mixed: write a whole number from 2 to {teacher_blocks}, the teacher's depth, or leave it out"
        )
    blocks = _targets(candidates or teacher_blocks, teacher_blocks)
    return tuple((j, i) for j in range(student_blocks) for i in blocks)


def nearest(similarities: Sequence[Sequence[float]]) -> Pairs:
    """Each student block learns from the teacher block that it is most like; of equals, from the shallower one.

    `similarities[j][i]`: of student block j and teacher block i, for instance their linear CKA before training. Raises InputError
    where one is not a number.
    """
    for j, row in enumerate(similarities):
        for i, value in enumerate(row):
            if value != value:
                raise InputError(
                    f"the similarity of student block {j} and teacher block {i} is not a number: look for NaN in the two models' "
                    "weights, or choose another strategy"
                )
    return tuple((j, max(range(len(row)), key=lambda i: row[i])) for j, row in enumerate(similarities))


def none(student_blocks: int, teacher_blocks: int) -> Pairs:
    """No pair: the student learns from labels and logits alone, so it may be of any depth."""
    _check_counts(student_blocks, teacher_blocks)
    return ()


def explicit(student_blocks: int, teacher_blocks: int, pairs: Sequence[Sequence[int]] | None = None) -> Pairs:
    """The user's own pairs, checked and kept in the order given.

    A student block may learn from several teacher blocks and the other way round; the student may be the deeper one.
    Raises InputError on an empty list, a pair that is not two block numbers in range, or the same pair twice.
    """
    _check_counts(student_blocks, teacher_blocks)
    if not pairs:
        raise InputError(
            "strategy 'explicit' has no pairs: write some as [student block, teacher block], or use strategy 'none'"
        )
    checked: list[tuple[int, int]] = []
    for number, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InputError(f"pairs[{number}] is {pair!r}: write two block numbers, [student block, teacher block]")
        for side, block, blocks in (("student", pair[0], student_blocks), ("teacher", pair[1], teacher_blocks)):
            if not _is_block(block, blocks):
                raise InputError(
                    f"pairs[{number}] is {list(pair)}: {block!r} is not a block of the {side}, which has {blocks}: "
                    f"write a whole number from 0 to {blocks - 1}"
                )
        if (pair[0], pair[1]) in checked:
            raise InputError(
                f"pairs[{number}] is {list(pair)}, already given as pairs[{checked.index((pair[0], pair[1]))}]: "
                "take one of the two out (a pair counts once)"
            )
        checked.append((pair[0], pair[1]))
    return tuple(checked)


@dataclass(frozen=True)
class Strategy:
    """A rule that gives pairs, and what is special about it."""

    rule: Callable[..., Pairs]
    """(student_blocks, teacher_blocks) and, by name, those of `seed`, `draw` and its options that it takes -> pairs."""
    options: tuple[str, ...] = ()
    """The keys of a recipe's `matching` section that this strategy alone reads."""
    is_measured: bool = False
    """The rule takes, in place of depths, the similarity of every student block's states with every teacher block's."""
    is_written: bool = False
    """The user writes the pairs."""
    is_mixed: bool = False
    """A student block is compared once, with a mixture of the teacher blocks that it is paired with."""
    least_student_blocks: int = 1

    @property
    def arguments(self) -> frozenset[str]:
        """What the rule takes by name."""
        return frozenset(inspect.signature(self.rule).parameters) - {"student_blocks", "teacher_blocks"}


STRATEGIES: dict[str, Strategy] = {
    "forward": Strategy(forward),
    "reverse": Strategy(reverse),
    "all_to_one": Strategy(all_to_one, options=("target_block",)),
    "random": Strategy(random),
    "in_order_random": Strategy(in_order_random, options=("redraw_every",)),
    "pkd_skip": Strategy(pkd_skip, least_student_blocks=2),
    "pkd_last": Strategy(pkd_last, least_student_blocks=2),
    "none": Strategy(none),
    "learned": Strategy(
        learned, options=("candidates", "start", "temperature", "entropy", "learning_rate"), is_mixed=True
    ),
    "nearest": Strategy(nearest, is_measured=True),
    "explicit": Strategy(explicit, options=("pairs",), is_written=True),
}
RULES = tuple(name for name, s in STRATEGIES.items() if not (s.is_measured or s.is_written or s.is_mixed))
"""The strategies whose map follows from depths alone."""
OPTIONS = {option: name for name, strategy in STRATEGIES.items() for option in strategy.options}
"""The strategy that reads each option."""


def layer_map(
    strategy: str, student_blocks: int, teacher_blocks: int, *, seed: int = 0, draw: int = 0, **options: object
) -> Pairs:
    """The pairs of a strategy by its name; `seed` and `draw` are for the strategies that draw. An option of None counts as absent.

    Raises InputError on an unknown or measured strategy, on bad depths, seed or option, and on an option that the strategy does not read.
    """
    _check_name(strategy)
    if STRATEGIES[strategy].is_measured:
        raise InputError(f"strategy {needs_states(strategy)}")
    check_options(strategy, [name for name, value in options.items() if value is not None])
    values = {"seed": seed, "draw": draw, **options}
    arguments = STRATEGIES[strategy].arguments
    return STRATEGIES[strategy].rule(
        student_blocks, teacher_blocks, **{name: value for name, value in values.items() if name in arguments}
    )


def compared(strategy: str, pairs: Pairs) -> Pairs:
    """What is compared under a strategy with these pairs: they, or of a mixed map one of each student block, with MIXED."""
    if not STRATEGIES[strategy].is_mixed:
        return pairs
    return tuple(dict.fromkeys((student, MIXED if teacher >= 0 else teacher) for student, teacher in pairs))


def _check_name(strategy: str) -> None:
    if strategy not in STRATEGIES:
        near = difflib.get_close_matches(str(strategy), STRATEGIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"strategy {strategy!r} is not known: {hint}choose from {', '.join(STRATEGIES)}")


def needs_states(strategy: str) -> str:
    """Why depths alone do not give a measured strategy's map, and which command shows it."""
    return f"{strategy} needs the models' states: `llmkd train --strategy {strategy}` measures and prints the map"


def is_trained(strategy: str) -> str:
    """What a mixed map is, in a sentence."""
    return (
        f"{strategy}: each student block learns from a mixture of all teacher blocks (or matching.candidates of them), whose weights are "
        f"trained with the student: `llmkd train --strategy {strategy}` logs them"
    )


def check_options(strategy: str, given: Iterable[str]) -> None:
    """Raise InputError for an option that the strategy does not read."""
    for option in given:
        if option not in STRATEGIES[strategy].options:
            raise InputError(
                f"{option}: strategy {strategy!r} does not read this option; leave it out, or use strategy {OPTIONS[option]!r}"
            )


def check_read(strategies: Sequence[str], given: Iterable[str]) -> None:
    """Raise InputError on an unknown strategy, and on an option that none of these strategies reads."""
    for strategy in strategies:
        _check_name(strategy)
    for option in given:
        if OPTIONS[option] not in strategies:
            check_options(strategies[0], [option])


def _targets(student_blocks: int, teacher_blocks: int) -> list[int]:
    return [teacher for _, teacher in forward(student_blocks, teacher_blocks)]


def _draw(blocks: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` of the blocks in random order, without replacement: the first steps of a Fisher-Yates shuffle.

    Written out because Python keeps only the sequence of `Random.random()` the same across versions, not that of
    `sample` or `shuffle`, and a map must come back the same when a run is resumed elsewhere. Python seeds with |seed|,
    so a negative seed is refused.
    """
    _check_seed(seed)
    remaining = list(blocks)
    generator = python_random.Random(seed)  # its own: the global generator is left alone
    for here in range(count):
        there = here + int(generator.random() * (len(remaining) - here))
        remaining[here], remaining[there] = remaining[there], remaining[here]
    return remaining[:count]


def _check_seed(seed: int) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed {seed!r} can't draw a map: write a whole number from 0 up")


def _is_block(block: object, blocks: int) -> bool:
    return isinstance(block, int) and not isinstance(block, bool) and 0 <= block < blocks


def _check_counts(student_blocks: int, teacher_blocks: int) -> None:
    for side, blocks in (("student", student_blocks), ("teacher", teacher_blocks)):
        if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
            raise InputError(f"{side} blocks: {blocks!r} is not a depth; write a whole number from 1 up")


def _check_depths(student_blocks: int, teacher_blocks: int) -> None:
    _check_counts(student_blocks, teacher_blocks)
    if student_blocks > teacher_blocks:
        # Most often the two numbers were swapped, so this is refused even where a rule could be stretched to it.
        raise InputError(
            f"the student has {student_blocks} blocks and the teacher {teacher_blocks}: give the student at most {teacher_blocks}, or "
            "write the pairs yourself with strategy 'explicit', or match none with strategy 'none'"
        )


def _check_patient(strategy: str, student_blocks: int, teacher_blocks: int) -> None:
    _check_depths(student_blocks, teacher_blocks)
    if student_blocks == 1:
        raise InputError(
            f"strategy {strategy!r} leaves out the student's last block, and the student has no other: "
            "give it 2 blocks or more, or use strategy 'forward' or 'none'"
        )
