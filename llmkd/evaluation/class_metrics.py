"""Scores of predicted classes: pure functions of counts that add up over items, fit for a bootstrap.

rows = np.stack([class_statistics(label, predicted, classes) for label, predicted in items])   # [items, 3 * classes]
macro_f1(rows[drawn].sum(0))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmkd.evaluation.text_metrics import Metric

Score = Callable[[np.ndarray], Any]
"""Sums over items -> a score of them all."""

METRICS = {
    "accuracy": Metric("accuracy", True, False),
    "f1": Metric("F1, mean over classes", True, False),
    "f1_second": Metric("F1 of the second class", True, False),
    "cross_entropy": Metric("cross-entropy", False, False),
}
"""Every metric of a classification, in the order of a table."""


def class_metrics(
    labels: Sequence[int], predicted: Sequence[int], nats: Sequence[float], classes: int
) -> dict[str, float]:
    """All metrics of a set of items; `nats` are the negative log-probabilities of their labels."""
    rows = np.stack([class_statistics(y, p, classes) for y, p in zip(labels, predicted, strict=True)])
    found = {
        "accuracy": float(np.mean([y == p for y, p in zip(labels, predicted, strict=True)])),
        "cross_entropy": float(np.mean(nats)),
        **{name: float(score(rows.sum(0))) for name, score in f1_scores(classes).items()},
    }
    return {name: found[name] for name in METRICS if name in found}


def class_statistics(label: int, predicted: int, classes: int) -> np.ndarray:
    """What one item adds to the counts `[3 * classes]`: of each class how often it was right, predicted, and there."""
    counts = np.zeros((3, classes))
    counts[0, label] = label == predicted
    counts[1, predicted] = counts[2, label] = 1
    return counts.ravel()


def f1_scores(classes: int) -> dict[str, Score]:
    """The scores of sums of `class_statistics`; F1 of the second class, which GLUE reports for MRPC and QQP, where there are two."""
    return {"f1": macro_f1, "f1_second": second_f1} if classes == 2 else {"f1": macro_f1}


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """The mean of 2 * right / (predicted + there) over the classes that are there or were predicted, `[..., 3 * classes]` -> `[...]`.

    So scikit-learn's `f1_score(average="macro")` counts them too.
    """
    found = _f1(sums)
    return found.sum(-1) / np.maximum((_named(sums) > 0).sum(-1), 1)


def second_f1(sums: np.ndarray) -> np.ndarray:
    """F1 of the second class, `[..., 3 * classes]` -> `[...]`."""
    return _f1(sums)[..., 1]


def _f1(sums: np.ndarray) -> np.ndarray:
    right, named = _counts(sums)[0], _named(sums)
    return np.divide(2 * right, named, out=np.zeros_like(right), where=named > 0)


def _named(sums: np.ndarray) -> np.ndarray:
    """How often each class was there or predicted, [..., classes]."""
    return _counts(sums)[1:].sum(0)


def _counts(sums: np.ndarray) -> np.ndarray:
    """[..., 3 * classes] -> [3, ..., classes]."""
    return np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
