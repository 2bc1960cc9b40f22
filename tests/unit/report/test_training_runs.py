"""Training runs as the report reads them: depths of models, blocks of logged pairs, layer maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd.layer_map import DECODER_EMBEDDING, EMBEDDING
from llmkd.models import families, load
from llmkd.recipe.recipe import load_recipe
from llmkd.recipe.study_entries import StudyEntry
from llmkd.report.files import Summary, curve, depth, layer_maps
from llmkd.report.page import training
from llmkd.report.runs import LogLine
from llmkd.training import pairs as recipe_map
from tests.family_models import DECODERS, ENCODER_DECODERS, ENCODERS


@pytest.mark.parametrize("strategy", ["forward", "pkd_skip", "pkd_last", "explicit"])
def test_distances_of_two_stacks_are_counted_like_the_maps(tiny: Path, strategy: str) -> None:
    """Whichever blocks are paired, and so wherever the encoder's last block is left out: all have their own distance."""
    pairs = {"matching.pairs": {"encoder": [[0, 1]], "decoder": [[1, 2], [2, 7]]}} if strategy == "explicit" else {}
    recipe = load_recipe(tiny / "recipe.yaml").changed(
        {"matching.embedding": True, "matching.strategy": strategy, **pairs}
    )
    mapped = recipe_map.maps_of(recipe, (3, 3), (4, 12))
    names = recipe_map.pair_names(mapped, (3, 4))
    line = LogLine(1, {}, {name: float(number) for number, name in enumerate(names)})
    logged = curve([line], Summary([list(pair) for pair in mapped], done=True))
    assert training.by_block(logged, line) == {s: float(n) for n, (s, _) in enumerate(mapped)}


@pytest.mark.parametrize(
    ("kind", "config", "blocks"),
    [
        ("t5", lambda: ENCODER_DECODERS["t5"](2, 3), 5),
        ("bart", lambda: ENCODER_DECODERS["bart"](2, 3), 5),
        ("bert", lambda: ENCODERS["bert"](2), 2),
        ("distilbert", lambda: ENCODERS["distilbert"](2), 2),
        ("opt", lambda: DECODERS["opt"](2), 2),
    ],
)
def test_report_knows_the_depth_of_every_family(tmp_path: Path, kind: str, config: Any, blocks: int) -> None:
    config().save_pretrained(tmp_path)
    assert depth(tmp_path) == blocks == sum(families.depths(load.load_config(tmp_path)))


def test_report_draws_no_embeddings(tmp_path: Path) -> None:
    """Their pair has no place in a map of blocks."""
    about: dict[str, Any] = {"kind": "student", "strategy": "forward", "seed": 0, "model": "model", "train": "."}
    entry = StudyEntry(name="forward-s0", **about)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    summary = Summary([[EMBEDDING, EMBEDDING], [0, 1], [1, 3], [DECODER_EMBEDDING, DECODER_EMBEDDING]])
    (found,) = layer_maps(tmp_path, [entry], {"forward-s0": summary})
    assert found.pairs == [[0, 1], [1, 3]] and found.student_blocks == 2
