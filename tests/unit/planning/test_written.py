"""What is said of texts that are written is what a run does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkd.planning import written
from llmkd.planning.doctor import examine
from llmkd.planning.written import writing_text
from llmkd.recipe.recipe import Recipe, load_recipe


def told(recipe: Recipe, teacher: Path | None = None) -> str:
    text = writing_text(recipe, teacher, 40)
    assert text is not None
    return text


@pytest.fixture
def recipe(tiny: Path) -> Recipe:
    return load_recipe(tiny / "recipe.yaml").changed(
        {"loss.ce": 0.0, "rollouts": {"max_new_tokens": 8, "backend": "hf"}}
    )


def test_one_finding_tells_who_writes_what(recipe: Recipe) -> None:
    (said,) = [f.what for f in examine(recipe)[0] if f.what.startswith("rollouts: ")]
    assert said == (
        "rollouts: before each step the student writes 100% of each step's 8 rows, 1 text of a prompt, by Hugging Face (as the recipe "
        "says); a text has at most 8 new tokens, and one that has not ended by then is trained on; what is said and shown of trained "
        "tokens is the data's own"
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"every": 4, "share": 0.5, "samples": 2},
            ["every 4 steps the student writes 50% of", "2 texts of each prompt"],
        ),
        ({"truncated": "drop"}, ["one that has not ended by then is left out"]),
        ({"by": "mixed", "alpha": 0.3}, ["the teacher (30% of each token's", "(each token is drawn from two models)"]),
        (
            {"by": "teacher", "share": 0.25},
            ["rollouts: before training the teacher continues the prompts of 25% of the 40"],
        ),
        (
            {"by": "both", "share": 0.5},
            ["the teacher continues the prompts of 100% of the 40", "writes 50% of each step's"],
        ),
    ],
)
def test_what_a_recipe_changes_is_told(recipe: Recipe, changes: dict[str, Any], parts: list[str]) -> None:
    said = told(recipe.changed({f"rollouts.{key}": value for key, value in changes.items()}))
    assert all(part in said for part in parts), said


def test_the_backend_is_chosen_as_a_run_does(recipe: Recipe, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size of a model that is there, and by how large one would have to be that is not."""
    by_teacher = recipe.changed({"rollouts": {"max_new_tokens": 8, "by": "teacher"}})
    monkeypatch.setattr(written, "vllm_version", lambda: "0.1")
    monkeypatch.setattr("llmkd.inference.choose.vllm_version", lambda: "0.1")
    monkeypatch.setattr("llmkd.inference.choose.on_cpu", lambda: False)
    assert "by Hugging Face (0." in (said := told(by_teacher, tiny / "teacher")) and "too little to repay" in said
    auto = recipe.changed({"rollouts.backend": "auto", "rollouts.every": 1000})
    assert "by vLLM if it has 4.7 M parameters or more" in told(auto)  # 3e11 / (8 rows x 1000 steps x 8 tokens)
    monkeypatch.setattr(written, "vllm_version", lambda: None)
    monkeypatch.setattr("llmkd.inference.choose.vllm_version", lambda: None)
    assert "by Hugging Face (vLLM is not installed)" in told(auto)


def test_nothing_is_said_where_nothing_is_written(recipe: Recipe) -> None:
    assert writing_text(recipe.changed({"rollouts": None}), None, 40) is None
    assert writing_text(recipe.changed({"rollouts.share": 0.0}), None, 40) is None
