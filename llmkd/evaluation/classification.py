"""Encoders put held-out rows into classes, and are scored: accuracy, F1 and cross-entropy.

`classify([("forward-s0", folder)], settings, data, out)` writes `out/forward-s0.json` and, with a line per row, `out/forward-s0.jsonl`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset

from llmkd.data.batches import Family
from llmkd.data.other_families import collate_classified, tokenize_for
from llmkd.errors import InputError
from llmkd.evaluation import class_metrics
from llmkd.evaluation.held_out import load_to_run, local_hashes, read_rows
from llmkd.evaluation.results import ClassificationResult, ClassifiedRow
from llmkd.evaluation.step import Jobs, Score, Step, before_scoring, run, serve
from llmkd.files import digest, sources
from llmkd.inference.child import Say, quietly, say_share
from llmkd.models.families import family
from llmkd.models.load import load_tokenizer
from llmkd.models.parts import final_state, head
from llmkd.provenance import versions
from llmkd.recipe.recipe import Data, Evaluation
from llmkd.recipe.scoring_steps import CLASSIFICATION

PACKAGES = ("transformers", "torch", "datasets")
ROWS = 32  # at once, where the recipe's evaluation.batch_size is auto


@dataclass(frozen=True)
class Task:
    """What all models of a call share."""

    settings: Evaluation
    data: Data


def classify(jobs: Jobs, settings: Evaluation, data: Data, out: Path) -> dict[str, Path]:
    """Have models classify the rows of `data`, as `step.run` says; the result files by name.

    Raises InputError where the rows can't be read.
    """
    packages = versions(*PACKAGES)
    rows = [data.model_dump_json(), settings.dtype, json.dumps(packages, sort_keys=True)]
    decides = [digest([*rows, *local_hashes(data.source), *sources(class_metrics)])]
    about = {"dtype": settings.dtype, "versions": packages, "rows": 0, "metrics": dict.fromkeys(class_metrics.METRICS)}
    unscored = [before_scoring(ClassificationResult, name, folder, decides, **about) for name, folder in jobs]
    return run(STEP, unscored, Task(settings, data), out)


# --- The child process


def prepare(task: Task, say: Say = quietly) -> Score[ClassificationResult]:
    """Read the rows. Raises InputError where they can't be read."""
    rows = read_rows(task.data)
    say(f"{len(rows)} rows")
    return partial(score, rows=rows, task=task, say=say)


@torch.no_grad()
def score(
    model: ClassificationResult, rows: Dataset, task: Task, say: Say = quietly
) -> tuple[ClassificationResult, list[ClassifiedRow]]:
    """One encoder's scores, and a line per row. Raises whatever loading or running it raises."""
    folder, data = Path(model.model), task.data
    encoder = load_to_run(folder, task.settings.dtype)
    labels, tokenizer = family(encoder.config).labels, load_tokenizer(folder)
    how = {"row_format": data.row_format, "max_length": data.max_length, "too_long": data.too_long}
    tokens = tokenize_for(Family("encoder", labels=tuple(labels)), rows, tokenizer, **how)
    size = task.settings.batch_size if isinstance(task.settings.batch_size, int) else ROWS
    order = sorted(range(len(tokens)), key=lambda number: tokens[number]["length"])
    layer = head(encoder)
    items = []
    for start in range(0, len(order), size):
        part = [tokens[number] for number in order[start : start + size]]
        batch = collate_classified(part, pad_id=tokenizer.pad_token_id).to(encoder.device)
        logits = F.linear(final_state(encoder, batch)[:, 0], layer.weight, layer.bias).float()
        if not logits.isfinite().all():
            raise InputError("its logits are not numbers: its training has diverged; lower its learning rate")
        nats = F.cross_entropy(logits, batch.targets[:, 0], reduction="none").tolist()
        for row, predicted, loss in zip(part, logits.argmax(-1).tolist(), nats, strict=True):
            scores = {"accuracy": float(predicted == row["class"]), "cross_entropy": loss}
            about = {"label": row["class"], "predicted": predicted, "classes": len(labels)}
            items.append(ClassifiedRow(item=row["row"], **about, scores=scores))
        say_share(say, len(items), len(order))
    items.sort(key=lambda item: item.item)
    metrics = class_metrics.class_metrics(
        [item.label for item in items],
        [item.predicted for item in items],
        [item.scores["cross_entropy"] for item in items],
        len(labels),
    )
    return replace(model, rows=len(items), classes=list(labels), metrics={**metrics}), items


STEP = Step(CLASSIFICATION, Task, ClassificationResult, prepare)


def main() -> int:
    """The process that scores models."""
    return serve(STEP)


if __name__ == "__main__":
    sys.exit(main())
