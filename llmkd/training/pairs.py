"""A recipe's layer map at given depths, and how its pairs are written."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from llmkd.errors import InputError
from llmkd.layer_map import DECODER_EMBEDDING, EMBEDDING, MIXED, STRATEGIES, Pairs, compared, forward, layer_map
from llmkd.models import families
from llmkd.recipe.recipe import Recipe

DECODER_SEED = 2**16
"""Added to a recipe's seed where an encoder-decoder's decoder draws its map."""
STACKS = ("encoder", "decoder")
"""Of encoder-decoders, in the order in which their blocks are counted."""


def depths_of(recipe: Recipe, shape: Any) -> tuple[int, ...]:
    """How many blocks each stack of the student has; `shape` is the configuration of its teacher, or of its own checkpoint."""
    settings = recipe.student
    if settings.blocks is None:
        return families.depths(shape)
    return (settings.blocks, settings.decoder_blocks or settings.blocks)[: len(families.depths(shape))]


def maps_of(recipe: Recipe, student: Sequence[int], teacher: Sequence[int], draw: int = 0) -> Pairs:
    """The recipe's pairs of models whose stacks have these depths, each stack's by itself, the encoder's first.

    Random maps of encoder and decoder are drawn independently. `draw` counts the redraws of a map that is drawn again. Of `nearest`,
    which is not known before it is measured (llmkd.training.nearest), the pairs of `forward`: as many, and no block of the teacher lies
    deeper, so that what is planned by them is enough. None where `loss.hidden` is 0.
    """
    stacks = STACKS if len(teacher) == 2 else ("",)
    maps = [
        _stack_map(recipe, *depths, stack=stack, draw=draw)
        for stack, *depths in zip(stacks, student, teacher, strict=True)
    ]
    pairs = through_stacks(recipe, maps, encoders_of(student, teacher))
    return _checked_lists(recipe, pairs, encoders_of(student, teacher))


def _stack_map(recipe: Recipe, student: int, teacher: int, *, stack: str = "", draw: int = 0) -> Pairs:
    """The recipe's own pairs of one stack, counted in it; of a measured strategy, those of `forward`.

    `stack`: one of STACKS, of models of two.
    """
    matching = recipe.matching
    matching.check_options([matching.strategy])  # a study's recipe may give options of its other strategies
    by_stack = {key: value for key, value in matching.options.items() if isinstance(value, Mapping)}
    for key in by_stack if not stack else ():
        example = "[[0, 1], [1, 3]]" if key == "pairs" else "2"
        raise InputError(
            f"matching.{key}: it is given for encoder and decoder apart, and these models have one stack of blocks; write it plainly, "
            f"e.g. {example}"
        )
    options = {**matching.options, **{key: value.get(stack) for key, value in by_stack.items()}}
    strategy = STRATEGIES[matching.strategy]
    if strategy.is_written and by_stack and not options["pairs"] and any(by_stack["pairs"].values()):
        return ()  # all pairs are the other stack's
    name = "forward" if strategy.is_measured else matching.strategy
    seed = recipe.seed + DECODER_SEED * (stack == "decoder")
    try:
        return layer_map(name, student, teacher, seed=seed, draw=draw, **options)
    except InputError as error:
        if not stack:
            raise
        apart = [key for key in options if key not in by_stack and key in strategy.arguments]
        cure = f", or give each stack its own: matching.{apart[0]}: {{encoder: .., decoder: ..}}" if apart else ""
        raise InputError(f"the {stack}s: {error}{cure}") from error


def pairs_of(recipe: Recipe, student_depth: int, teacher_depth: int) -> Pairs:
    """`maps_of` for models of one stack."""
    return maps_of(recipe, (student_depth,), (teacher_depth,))


def encoders_of(student: Sequence[int], teacher: Sequence[int]) -> tuple[int, int] | None:
    """How many blocks the encoders of two encoder-decoders of these depths have; None for models of one stack."""
    return (student[0], teacher[0]) if len(teacher) == 2 else None


def through_stacks(recipe: Recipe, maps: Sequence[Pairs], encoders: tuple[int, int] | None) -> Pairs:
    """Each stack's own map, the encoder's first -> pairs counted through all stacks, each stack's after its embeddings' where the recipe
    matches them too."""
    counted: list[tuple[int, int]] = []
    for pairs, (student, teacher), embedding in zip(
        maps, ((0, 0), encoders or (0, 0)), (EMBEDDING, DECODER_EMBEDDING), strict=False
    ):
        if recipe.matching.embedding and pairs:
            counted.append((embedding, embedding))
        counted += [(s + student, t + teacher) for s, t in pairs]
        if recipe.matching.compare == "differences":
            _check_differences(pairs)
    return tuple(counted)


def _check_differences(pairs: Pairs) -> None:
    """Raise InputError where blocks of a stack that are matched one after another have nothing between them."""
    for before, pair in itertools.pairwise(pairs):
        names = " and ".join(f"{student}<{teacher}" for student, teacher in (before, pair))
        if before[0] >= pair[0]:
            raise InputError(
                f"matching.compare: differences lie between one student block and the next that is matched, and the pairs {names} do not "
                "go upwards; write each student block once, in order, or compare: states"
            )
        if before[1] == pair[1]:
            raise InputError(
                f"matching.compare: from pair to pair of {names} the teacher's state stays the same; write states, or another strategy"
            )


def _checked_lists(recipe: Recipe, pairs: Pairs, encoders: tuple[int, int] | None = None) -> Pairs:
    """The pairs, after a check that lists of weights and distances are as long; none where `loss.hidden` is 0."""
    matching, each = recipe.matching, compared(recipe.matching.strategy, pairs)
    listed = {"pair_weights": ("weights", matching.pair_weights), "distance": ("distances", matching.distance)}
    for key, (what, values) in listed.items():
        if isinstance(values, tuple) and each and len(values) != len(each):
            names = pair_names(each, encoders=encoders)
            raise InputError(
                f"matching.{key}: {len(values)} {what} for the {len(each)} pairs {', '.join(names)}; "
                "write one for each, in this order"
            )
    return () if recipe.loss.hidden == 0 else pairs


def preferred_of(recipe: Recipe, student: Sequence[int], teacher: Sequence[int]) -> Pairs | None:
    """The pairs whose teacher blocks weigh most when a learned map's training begins, through all stacks; None where none does."""
    if recipe.matching.start == "uniform":
        return None
    maps = [forward(*depths) for depths in zip(student, teacher, strict=True)]
    return through_stacks(recipe, maps, encoders_of(student, teacher))


def stones_of(recipe: Recipe, student_depth: int, teacher_depth: int) -> Pairs:
    """The recipe's stepping stones at these depths, by student block; none where it has no `stones` section.

    From the map of `nearest`, which is not known before it is measured, those of `forward`, as many; what is nearest may lie anywhere, and
    a plan counts by the first block (llmkd.planning.stepping_stones).
    """
    settings = recipe.stones
    if settings is None:
        return ()
    if settings.pairs == "from_map":
        pairs = _stack_map(recipe, student_depth, teacher_depth)
        if not pairs:
            raise InputError(
                f"stones.pairs: the layer map of strategy {recipe.matching.strategy!r} has no pairs; write them, e.g. [[0, 3]], or another "
                "matching.strategy"
            )
    else:
        pairs = settings.pairs
    for side, blocks, depth in (
        ("student", [s for s, _ in pairs], student_depth),
        ("teacher", [t for _, t in pairs], teacher_depth),
    ):
        for block in blocks:
            if not 0 <= block < depth:
                raise InputError(f"stones.pairs: {block} is not a block of the {side} (0 to {depth - 1})")
    return tuple(sorted(pairs))


def pair_names(
    pairs: Sequence[tuple[int, int]], encoders: tuple[int, int] | None = None, *, redraws: bool = False
) -> list[str]:
    """How pairs are written in logs: `student<teacher`, `e` for the embeddings, `*` for a teacher block that is drawn again and again;
    `mix` for a mixture of them; of encoder-decoders `enc 0<3` and `dec 1<7`."""

    first_student, first_teacher = encoders or (0, 0)

    def stack(student: int) -> str:
        return "" if encoders is None else "enc " if EMBEDDING <= student < first_student else "dec "

    def name(block: int, encoder: int) -> str:
        return "mix" if block == MIXED else "e" if block < 0 else str(block - encoder if block >= encoder else block)

    def drawn(block: int) -> str:
        return "*" if redraws and block >= 0 else name(block, first_teacher)

    return [f"{stack(s)}{name(s, first_student)}<{drawn(t)}" for s, t in pairs]


def named_weights(
    weights: Mapping[int, Mapping[int, float]], encoders: tuple[int, int] | None = None
) -> dict[str, dict[str, float]]:
    """Student block -> teacher block -> weight, by the names that each has within its stack: `{"0": {"2": 0.9, ..}}`, `{"enc 0": ..}`."""
    named: dict[str, dict[str, float]] = {}
    for student, of_blocks in weights.items():
        names = [name.split("<") for name in pair_names([(student, teacher) for teacher in of_blocks], encoders)]
        named[names[0][0]] = {teacher: weight for (_, teacher), weight in zip(names, of_blocks.values(), strict=True)}
    return named
