"""A recipe that lies in someone's folder of results may not let that folder's Python run."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from llmkd.cli import cli
from llmkd.errors import InputError
from llmkd.recipe.found import TRUST, load_recipe_found
from llmkd.recipe.recipe import dump_recipe, load_recipe


@pytest.mark.parametrize("key", TRUST)
def test_only_the_command_line_trusts(tiny: Path, tmp_path: Path, key: str) -> None:
    recipe = load_recipe(tiny / "recipe.yaml", [f"{key}=true"])
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    with pytest.raises(
        InputError, match=rf"{file}: {key} is true in this folder's own recipe.*add --set {key}=true, else"
    ):
        load_recipe_found(file)
    for value in (True, False):
        section, _, name = key.partition(".")
        found = load_recipe_found(file, [f"{key}={str(value).lower()}"])
        assert getattr(getattr(found, section), name) is value


def test_a_variant_can_not_trust_either(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    variants = "study.variants={sly: {student.trust_remote_code: true}}"
    file.write_text(dump_recipe(load_recipe(tiny / "recipe.yaml", [variants])))
    with pytest.raises(InputError, match=r"student\.trust_remote_code is true"):
        load_recipe_found(file)


@pytest.mark.parametrize("command", ["generate", "angles"])
def test_a_command_over_a_foreign_study_runs_none_of_its_python(tiny: Path, tmp_path: Path, command: str) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    recipe = load_recipe(tiny / "recipe.yaml", ["teacher.trust_remote_code=true"])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "study.json").write_text('{"entries": [], "recipe": "x"}')
    result = CliRunner().invoke(cli, [command, str(folder)], standalone_mode=False)
    assert isinstance(result.exception, InputError)
