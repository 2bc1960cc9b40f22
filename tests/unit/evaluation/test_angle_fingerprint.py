"""When a student's angles are measured again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llmkd.evaluation.angles.measure import _made_of
from llmkd.evaluation.angles.students import TrainedStudent
from llmkd.recipe.recipe import load_recipe


def test_of_a_mixture_the_source_that_is_read_decides(tiny: Path, tmp_path: Path) -> None:
    """How its rows are read is written at the source; another source of the mixture changes nothing."""
    shutil.copytree(tiny / "teacher", tmp_path / "model")
    rows, other = str(tiny / "rows.jsonl"), str(tmp_path / "other.jsonl")
    recipe = load_recipe(tiny / "recipe.yaml")

    def made_of(read: dict[str, Any], unread: dict[str, Any]) -> list[str]:
        sources = [{"source": rows, **read}, {"source": other, **unread}]
        changes = {"data.source": "records", "data.sources": sources, "evaluation.generation": {"source": rows}}
        student = TrainedStudent("one", "student", "forward", 0, tmp_path, recipe.changed(changes), ((0, 1),))
        return _made_of(student, "generation")

    plain = made_of({}, {})
    assert made_of({}, {"format": "text"}) == made_of({"weight": 3}, {"weight": 1}) == plain
    assert made_of({"columns": {"question": "prompt"}}, {}) != plain
    assert made_of({"template_options": {"enable_thinking": False}}, {}) != plain
