"""The projectors that a student's angles are seen through are those of its training, as drawn from the seed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llmkd.evaluation.angles.students import drawn_projectors
from llmkd.recipe.recipe import load_recipe
from llmkd.student.distiller import make_projectors


def test_a_pair_without_projector_sees_nothing_and_the_others_are_as_drawn(tiny: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml", ["matching.distance=[cka, mse, gram, mse]"])
    student: Any = SimpleNamespace(recipe=recipe, pairs=((-1, -1), (0, 1), (1, 3), (2, 5)))
    found = drawn_projectors(student, (24, 32), torch.device("cpu"))
    made = make_projectors(4, 24, 32, bias=False, seed=recipe.seed, without=(0, 2))
    assert made is not None and list(found) == [0, 2]
    for block, number in ((0, 1), (2, 3)):
        assert torch.equal(found[block].weight, made[number].weight)  # type: ignore[arg-type]
