"""A whole small study of an encoder and of encoder-decoders from nothing: teacher made, student distilled, scored, reported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkd.recipe.recipe import load_recipe
from llmkd.recipe.study_entries import read_study
from llmkd.report.write import report
from llmkd.study import study
from tests.family_models import write_rows
from tests.tiny import recipe_values

SHAPE = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_attention_heads=4, max_position_embeddings=64)
STEPS = {"bert": {"classification": {}}, "t5": {"generation": {}}, "bart": {"generation": {}}}
HELD_OUT = {
    "bert": {"source": "rows.jsonl"},
    "t5": {"items": 8, "max_new_tokens": 8},
    "bart": {"items": 8, "max_new_tokens": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", STEPS)
def test_study_of_another_family(tmp_path: Path, model_type: str) -> None:
    (step,) = STEPS[model_type]
    write_rows(tmp_path, "encoder" if model_type == "bert" else "encoder_decoder")
    (tmp_path / "rows.jsonl").rename(tmp_path / "train.jsonl")
    (tmp_path / "held_out.jsonl").write_text("".join((tmp_path / "train.jsonl").read_text().splitlines(True)[:8]))
    values: dict[str, Any] = recipe_values(tmp_path)
    values["data"] = {"source": str(tmp_path / "train.jsonl"), "max_length": 48}
    values["teacher"] = {"dtype": "float32"}
    values["matching"] = {"embedding": True}
    architecture = {"model_type": model_type, "num_hidden_layers": 4, **SHAPE}
    values["finetune"] = {"architecture": architecture, "train": values["train"]}
    section = {**HELD_OUT[model_type], "source": str(tmp_path / "held_out.jsonl")}
    values["evaluation"] = {step: section, "angles_rows": 5, **({} if model_type == "bert" else {"agreement_rows": 6})}
    values["student"] = {"blocks": 2, **({} if model_type == "bert" else {"decoder_blocks": 1})}
    values["study"] = {"strategies": ["forward"], "seeds": [0], "baselines": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    written = study(recipe)
    assert written is not None
    page = written.page
    folder = recipe.folder
    for entry in read_study(folder).entries:
        found = json.loads((folder / entry.results[step]).read_text())
        assert found["error"] is None and found["metrics"], (entry.name, found)
    if model_type != "bert":
        found = json.loads((folder / "agreement" / "forward-s0.json").read_text())
        assert found["error"] is None and found["metrics"]["kl"] > 0
    results = json.loads((folder / "results.json").read_text())
    assert results["scored"] == 2 and results["problems"] == {}
    (drawn,) = results["maps"]
    two = [[0, 1], [1, 3]]
    assert drawn["pairs"] == (two if model_type == "bert" else [*two, [2, 7]])
    assert (drawn["student_blocks"], drawn["teacher_blocks"]) == ((2, 4) if model_type == "bert" else (3, 8))
    assert "Layer map of forward" in page.read_text() and report(folder).page == page
    angles = json.loads((folder / "angles" / "forward-s0.json").read_text())
    assert angles["error"] is None and angles["rows"] == 5
    stacks = [(stack["stack"], stack["student_blocks"], stack["teacher_blocks"]) for stack in angles["stacks"]]
    assert stacks == ([("", 2, 4)] if model_type == "bert" else [("encoder", 2, 4), ("decoder", 1, 4)])
    markdown = (folder / "report.md").read_text().split("## Angles between teacher blocks")[1]
    pictures = re.findall("Mean cosine between teacher blocks, forward(, [a-z]+)?", page.read_text())
    if model_type == "bert":
        assert "| forward | teacher | 1 | before |" in markdown and set(pictures) == {""}
    else:
        assert all(f"| forward | {stack} | teacher | 1 | after |" in markdown for stack, _, _ in stacks)
        assert set(pictures) == {", encoder", ", decoder"}
