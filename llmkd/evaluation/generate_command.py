"""The models that `llmkd generate` is asked to run, and what it shows of their texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmkd.errors import InputError
from llmkd.evaluation.results import GeneratedText, GenerationResult, read_items
from llmkd.evaluation.text_metrics import METRICS
from llmkd.models.folders import resolve
from llmkd.recipe.study_entries import read_study

log = logging.getLogger("llmkd")


def models_of(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, folder) of models given as folders or hub names, and of all models of studies. Raises InputError for neither.

    What a study has not trained yet is left out, and logged.
    """
    models: list[tuple[str, Path]] = []
    for path in paths:
        if (path / "study.json").is_file():
            models += _models_of_study(path)
            continue
        folder, place = resolve(str(path), "MODEL_OR_STUDY"), path.resolve()
        models.append((place.parent.name if place.name == "model" else place.name, folder))
    if not models:
        raise InputError(f"MODEL_OR_STUDY: {paths[0]} has no model yet; run the study first")
    names = [name for name, _ in models]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"MODEL_OR_STUDY: two models are called {name!r}; give each a call of its own, with another --output"
            )
    return models


def _models_of_study(study: Path) -> Iterator[tuple[str, Path]]:
    for entry in read_study(study).entries:
        inside = study / entry.model
        if inside.is_dir():
            yield entry.name, inside
        elif entry.train is None and entry.strategy != "undistilled":  # the study reads it from elsewhere
            yield entry.name, resolve(entry.model, entry.name)
        else:
            log.info("generation: %s has no model yet and is left out", entry.name)


def summary(files: dict[str, Path], samples: int = 3) -> str:
    """A table of the models' scores, the texts of the first items side by side, and where it all is."""
    results = {name: GenerationResult.read(file) for name, file in files.items()}
    metrics = [metric for metric in METRICS if any(metric in result.metrics for result in results.values())]
    width = max(len(name) for name in [*results, "model"])
    lines = [f"{'model':{width}}  backend  " + "  ".join(METRICS[metric].label for metric in metrics)]
    for name, result in results.items():
        cells = [f"{result.metrics[m]:>{len(METRICS[m].label)}.4g}" for m in metrics if m in result.metrics]
        lines.append(f"{name:{width}}  {result.backend:7}  " + (result.error or "  ".join(cells)))
    texts = {name: read_items(file.with_suffix(".jsonl"), GeneratedText) for name, file in files.items()}
    for prompt in next((some[:samples] for some in texts.values() if some), []):
        lines += ["", f"prompt {prompt.item}: {prompt.prompt}", f"  {'reference':{width}}  {prompt.references[0]}"]
        lines += [f"  {name:{width}}  {some[prompt.item].text}" for name, some in texts.items() if some]
    return "\n".join([*lines, "", *(f"{file} and {file.stem}.jsonl" for file in files.values())])
