"""docs/recipes.md is what the sections' docstrings make it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from llmkd.recipe import reference
from llmkd.recipe.section import Section

PAGE = Path(__file__).parents[3] / "docs" / "recipes.md"


def test_the_page_is_what_the_generator_gives() -> None:
    assert PAGE.read_text() == reference.reference(), "run: python -m llmkd.recipe.reference > docs/recipes.md"


def test_types_defaults_bounds_and_marks_are_shown() -> None:
    lines = PAGE.read_text().splitlines()
    assert "| `clip` | number (≥ 0) | `1.0` | Largest gradient norm; 0 does not clip. |" in lines
    assert any(line.startswith("| `log_every` † | whole number (> 0) | `10` | ") for line in lines)
    assert any(line.startswith("| `learning_rate` | number (> 0) | **required** | ") for line in lines)
    assert any(line.startswith("| `betas` | [number, number] | `[0.9, 0.999]` | ") for line in lines)
    assert (
        "Where: `loss.schedules.ce`, `loss.schedules.kl`, `loss.schedules.hidden`, `loss.schedules.stones`, "
        in PAGE.read_text()
    )


def test_every_link_leads_to_a_section() -> None:
    page = PAGE.read_text()
    anchors = {
        line.removeprefix("## ").lower().replace(" ", "-") for line in page.splitlines() if line.startswith("## ")
    }
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links and links <= anchors


def test_a_key_without_a_meaning_is_an_error() -> None:
    class Unexplained(Section):
        """A section."""

        key: int = Field(default=1, ge=0)

    with pytest.raises(ValueError, match="Unexplained.key: no text below the field"):
        reference._section_text(Unexplained, [])
