"""The recipe that lies in a folder of results: someone else's, perhaps, so it may not let that folder's Python run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmkd.errors import InputError
from llmkd.recipe.recipe import Recipe, load_recipe

TRUST = ("teacher.trust_remote_code", "student.trust_remote_code", "evaluation.trust_include")
"""Keys that let a folder's Python run."""


def recipe_for(folder: Path | None, given: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that was given, or else the folder's own; without either the quickstart's."""
    if given is not None or folder is None:
        return load_recipe(given or "quickstart", overrides)
    return load_recipe_found(folder / "recipe.yaml", overrides)


def load_recipe_found(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe` of a recipe that nobody named on the command line. Raises InputError where the file trusts what `--set` does not."""
    recipe = load_recipe(file, overrides)
    own = {override.partition("=")[0].strip() for override in overrides}
    variants = [recipe.study.changes(name) for name in recipe.study.variants]
    for key in TRUST:
        section, _, name = key.partition(".")
        trusts = getattr(getattr(recipe, section), name) or any(changes.get(key) for changes in variants)
        if trusts and key not in own:
            raise InputError(
                f"{file}: {key} is true in this folder's own recipe, and would run Python that came with it; if you trust "
                f"its authors, add --set {key}=true, else --set {key}=false"
            )
    return recipe
