"""A made-up study's folder, written piece by piece, for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkd.report.gather import gather
from llmkd.report.results import Comparison, Results, Row

VERSIONS = {"llmkd": "0.1.0", "lm_eval": "0.4.13"}
TWO_STEPS = ("evaluation", "generation")


class Folder:
    """A study's folder; `score` writes a model's results, by default lm-eval's alone."""

    def __init__(self, folder: Path, name: str = "made-up", **study: Any) -> None:
        self.folder = folder
        self.study = {
            "name": name,
            "entries": [],
            "reference": "forward",
            "margins": {},
            "margins_history": [],
            **study,
        }
        self.write("study.json", self.study)

    def entry(
        self,
        kind: str,
        strategy: str | None,
        seed: int | None,
        name: str | None = None,
        steps: Sequence[str] = ("evaluation",),
    ) -> str:
        """Plan a model, and give its name."""
        name = name or f"{strategy}-s{seed}"
        train = {"teacher": "teacher"}.get(name, f"students/{name}" if seed is not None else None)
        places = {"evaluation": "evaluations", "generation": "generations", "agreement": "agreement"}
        files = {step: f"{place}/{name}.json" if step in steps else None for step, place in places.items()}
        about = {"name": name, "kind": kind, "strategy": strategy, "seed": seed}
        self.study["entries"].append({**about, "model": f"{train or name}/model", **files, "train": train})
        self.write("study.json", self.study)
        return name

    def write(self, path: str, value: Any) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value if isinstance(value, str) else json.dumps(value))

    def lines(self, path: str, values: Sequence[dict[str, Any]]) -> None:
        self.write(path, "".join(json.dumps(value) + "\n" for value in values))

    def score(
        self, name: str, bleu: float | None, acc: float | None = 0.5, error: str | None = None, **more: Any
    ) -> None:
        """lm-eval's results of two tasks, or its failure."""
        tasks = {} if error else {"say": {"bleu": bleu}, "choose": {"acc": acc}}
        found = {"name": name, "tasks": tasks, "stderr": {}, "error": error, "versions": VERSIONS, "backend": "hf"}
        self.write(f"evaluations/{name}.json", {**found, "items": {"say": 200, "choose": 200}, **more})

    def generated(self, name: str, metrics: dict[str, float] | None, error: str | None = None, **more: Any) -> None:
        """The generation step's results, or its failure."""
        found = {"name": name, "error": error, "backend": "hf", "versions": VERSIONS, "dtype": "float32", "items": 3}
        self.write(f"generations/{name}.json", {**found, "metrics": metrics or {}, **more})

    def students(self, scores: Mapping[str, Sequence[float | None]]) -> None:
        """Plan and score strategies, a BLEU per seed; None is planned and has not had its turn."""
        for strategy, values in scores.items():
            kind = "baseline" if strategy in ("ce_only", "undistilled") else "student"
            for seed, bleu in enumerate(values):
                name = self.entry(kind, strategy, seed)
                if bleu is not None:
                    self.score(name, bleu)

    def results(self) -> Results:
        return gather(self.folder)

    def row(self, name: str) -> Row:
        return next(row for row in self.results().rows if row.name == name)

    def comparison(self, metric: str, strategy: str, reference: str) -> Comparison:
        wanted = (metric, strategy, reference)
        return next(c for c in self.results().comparisons if (c.metric, c.strategy, c.reference) == wanted)


def small_study(folder: Path) -> Folder:
    """Teacher, undistilled and two strategies over two seeds, all scored: forward 70 and 72, none 40 and 41."""
    made = Folder(folder)
    made.score(made.entry("teacher", None, None, "teacher"), 90.0, 0.99)
    made.score(made.entry("baseline", "undistilled", None, "undistilled"), 3.0, 0.25)
    made.students({"none": (40.0, 41.0), "forward": (70.0, 72.0)})
    return made
