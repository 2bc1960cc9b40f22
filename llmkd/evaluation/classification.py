"""Encoders put held-out rows into classes, and are scored: accuracy, F1 and cross-entropy.

`classify([("forward-s0", folder)], settings, data, out)` writes `out/forward-s0.json` and, with a line per row, `out/forward-s0.jsonl`;
what is there and made of the same model, rows and versions is not done again. The work is done in a process of its own, this file:
`python -m llmkd.evaluation.classification` reads its order from stdin as JSON, and leaves the libraries' talk in `out/classification.log`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from llmkd.data.other_families import collate_classified, tokenize_classified
from llmkd.data.rows import load_rows
from llmkd.errors import InputError
from llmkd.evaluation import class_metrics
from llmkd.evaluation.step import model_contents, one_sentence, up_to_date, written
from llmkd.files import contents, digest, publish_json, publish_lines, sources
from llmkd.inference import child
from llmkd.models.families import family
from llmkd.models.load import DTYPES, load_config, load_model, load_tokenizer
from llmkd.models.parts import final_state, head
from llmkd.provenance import versions
from llmkd.recipe.recipe import Data, Evaluation

log = logging.getLogger("llmkd")

PACKAGES = ("transformers", "torch", "datasets")
ROWS = 32  # at once, where the recipe's evaluation.batch_size is auto

Line = dict[str, Any]


def classify(jobs: Sequence[tuple[str, Path]], settings: Evaluation, data: Data, out: Path) -> dict[str, Path]:
    """Have every (name, model folder) that has no up-to-date result in `out` classify the rows of `data`; the result files by name.

    A model that can't be run gets a file with `error` set, and is tried again at the next call. Raises InputError where the rows can't
    be read.
    """
    shared = _rows_fingerprint(settings, data)
    files = {name: out / f"{name}.json" for name, _ in jobs}
    orders = [
        {"name": name, "model": str(model), "fingerprint": digest([shared, *model_contents(model)])}
        for name, model in jobs
    ]
    todo = [order for order in orders if not up_to_date(files[order["name"]], order["fingerprint"])]
    log.info("classification: %d of %d models are up to date", len(orders) - len(todo), len(orders))
    out.mkdir(parents=True, exist_ok=True)
    (out / "classification.log").unlink(missing_ok=True)
    sections = {"settings": settings.model_dump(mode="json"), "data": data.model_dump(mode="json")}
    while todo:
        order = {"jobs": todo, "out": str(out.resolve()), **sections}
        code = child.run("llmkd.evaluation.classification", order, out / "classification.log", "classification")
        todo = [order for order in todo if not written(files[order["name"]], order["fingerprint"])]
        if todo:  # the process fell over one model: note it, and go on with the others
            error = f"the process that classifies ended with code {code}; see {out / 'classification.log'}"
            _publish(out, _result(todo.pop(0), settings, error=error), [])
    return files


def _rows_fingerprint(settings: Evaluation, data: Data) -> str:
    """A hash of what all models share: the rows and how they become tokens, precision and versions."""
    local = Path(data.source).expanduser()
    files = sorted(file for file in (local.rglob("*") if local.is_dir() else [local]) if file.is_file())
    parts = [data.model_dump_json(), settings.dtype, json.dumps(versions(*PACKAGES), sort_keys=True)]
    return digest([*parts, *contents(local, files), *sources(class_metrics)])


# --- The child process


def main() -> int:
    """Run the models of the order on stdin one after another; 2 if the rows can't be read."""
    order, say = child.listen()
    settings = Evaluation.model_validate_json(json.dumps(order["settings"]))
    data = Data.model_validate_json(json.dumps(order["data"]))
    jobs, out = order["jobs"], Path(order["out"])
    try:
        rows = load_rows(data.source, name=data.name, split=data.split, rows=data.rows)
    except InputError as error:
        say(f"{child.REFUSAL}{error}")
        return 2
    for number, job in enumerate(jobs, start=1):
        say(f"{number}/{len(jobs)} {job['name']}: started on {len(rows)} rows")
        started, lines = time.perf_counter(), []
        try:
            found, lines = classified(Path(job["model"]), rows, settings, data)
        except Exception as error:  # whatever is wrong with one model must not cost the others their scores
            log.exception("%s", job["name"])
            found = {"error": str(error) if isinstance(error, InputError) else one_sentence(error)}
        result = _result(job, settings, seconds=time.perf_counter() - started, **found)
        _publish(out, result, lines)
        told = result["error"] or " ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
        say(f"{number}/{len(jobs)} {job['name']}: {told} ({result['seconds']:.1f} s)")
    return 0


@torch.no_grad()
def classified(folder: Path, rows: Any, settings: Evaluation, data: Data) -> tuple[dict[str, Any], list[Line]]:
    """One encoder's scores, and a line per row. Raises whatever loading or running it raises."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (no config.json)")
    labels = family(load_config(folder)).labels
    tokenizer = load_tokenizer(folder)
    tokens = tokenize_classified(rows, tokenizer, labels, max_length=data.max_length, too_long=data.too_long)
    model: Any = load_model(folder, dtype=DTYPES[settings.dtype], ds_config=None, attention="auto")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    size = settings.batch_size if isinstance(settings.batch_size, int) else ROWS
    order = sorted(range(len(tokens)), key=lambda number: tokens[number]["length"])
    layer = head(model)
    lines: dict[int, Line] = {}
    for start in range(0, len(order), size):
        part = [tokens[number] for number in order[start : start + size]]
        batch = collate_classified(part, pad_id=tokenizer.pad_token_id).to(model.device)
        logits = F.linear(final_state(model, batch)[:, 0], layer.weight, layer.bias).float()
        if not logits.isfinite().all():
            raise InputError("its logits are not numbers: its training has diverged; lower its learning rate")
        nats = F.cross_entropy(logits, batch.targets[:, 0], reduction="none").tolist()
        for row, predicted, loss in zip(part, logits.argmax(-1).tolist(), nats, strict=True):
            right = float(predicted == row["class"])
            about = {"item": row["row"], "label": row["class"], "predicted": predicted, "classes": len(labels)}
            lines[row["row"]] = {**about, "scores": {"accuracy": right, "cross_entropy": loss}}
    found = [lines[number] for number in sorted(lines)]
    metrics = class_metrics.class_metrics(
        [line["label"] for line in found],
        [line["predicted"] for line in found],
        [line["scores"]["cross_entropy"] for line in found],
        len(labels),
    )
    return {"rows": len(found), "classes": list(labels), "metrics": metrics}, found


# --- Files


def _result(job: dict[str, Any], settings: Evaluation, **found: Any) -> dict[str, Any]:
    empty = {"error": None, "seconds": 0.0, "rows": 0, "classes": [], "metrics": dict.fromkeys(class_metrics.METRICS)}
    return {**job, **empty, "dtype": settings.dtype, "versions": versions(*PACKAGES), **found}


def _publish(out: Path, result: dict[str, Any], lines: Sequence[Line]) -> None:
    """The lines first: where a result is, its lines are."""
    publish_lines(out / f"{result['name']}.jsonl", lines)
    publish_json(out / f"{result['name']}.json", result)


if __name__ == "__main__":
    sys.exit(main())
