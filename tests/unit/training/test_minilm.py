"""A real BERT-like encoder on real rows: fine-tuned by its recipe, a student copied and trained, both scored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from llmkd.evaluation import classification
from llmkd.evaluation.held_out import classification_data
from llmkd.evaluation.results import ClassificationResult
from llmkd.files import ROOT
from llmkd.recipe.recipe import load_recipe
from llmkd.train import student_folder, train
from llmkd.training import jobs

FILES = Path(os.environ.get("LLMKD_MINILM", ROOT / "runs" / "minilm"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FILES / "train.jsonl").is_file(), reason=f"no {FILES}: python scripts/fetch_minilm.py, or set LLMKD_MINILM"
    ),
]


def test_minilm_is_fine_tuned_and_distilled(world: Any, tmp_path: Path) -> None:
    recipe = load_recipe("minilm_sst2").changed(
        {
            "output": str(tmp_path),
            "finetune.path": str(FILES / "model"),
            "finetune.train.epochs": 2,
            "data.source": str(FILES / "train.jsonl"),
            "evaluation.classification.source": str(FILES / "test.jsonl"),
            "train.epochs": 2,
        }
    )
    assert train(world, jobs.finetune_job(world, recipe, recipe.folder / "teacher"))
    assert train(world, jobs.distil_job(world, recipe, student_folder(recipe)))
    data = classification_data(recipe)
    rows, task = jobs.read_rows(data), classification.Task(recipe.evaluation, data)
    accuracy = {}
    for name, folder in (("teacher", Path(recipe.teacher_path)), ("student", student_folder(recipe) / "model")):
        scored, lines = classification.score(ClassificationResult(name=name, model=str(folder)), rows, task)
        assert len(lines) == 200 and scored.classes == ["negative", "positive"]
        accuracy[name] = scored.metrics["accuracy"]
        print(name, json.dumps(scored.metrics))
    assert accuracy["teacher"] > 0.7 and accuracy["student"] > 0.6  # each class has half of the rows
    student = AutoModelForSequenceClassification.from_pretrained(student_folder(recipe) / "model")
    assert student.config.num_hidden_layers == 3 and student.config.id2label == {0: "negative", 1: "positive"}
