"""What all models wrote for the same items, packed for the page: each text once per item, with who wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TypedDict

from llmkd.evaluation.results import Scores
from llmkd.report.files import GeneratedItem

BUDGET = 1_000_000  # bytes of the page that generated texts may take
LONGEST_TEXT = 4_000  # characters of one prompt, reference or output

Text = tuple[str, int | None, list[float | None]]
"""A text, whether it is right (1 or 0, None where nothing shows it), and its scores in the order of `Packed.scores`."""


class PackedItem(TypedDict):
    """An item for page.js: number, prompt, references, texts, and per model the place of its text, or -1."""

    n: int
    p: str
    r: list[str]
    t: list[Text]
    m: list[int]


class Packed(TypedDict):
    """All items for page.js; `groups` is a strategy or baseline per model, `scores` are names."""

    total: int
    models: list[str]
    groups: list[str]
    scores: list[str]
    items: list[PackedItem]


def packed(generations: Sequence[GeneratedItem], strategies: Mapping[str, str | None]) -> Packed:
    """The first items that fit into `BUDGET`; `strategies` is model -> strategy, where known."""
    models = list(dict.fromkeys(model for item in generations for model in item.outputs))
    names = list(dict.fromkeys(name for item in generations for scores in item.scores.values() for name in scores))
    items: list[PackedItem] = []
    used = 0
    for item in generations:
        smaller = _item(item, models, names)
        used += len(json.dumps(smaller, ensure_ascii=False, separators=(",", ":")).encode())
        if used > BUDGET:
            break
        items.append(smaller)
    groups = [strategies.get(model) or re.sub(r"-s\d+$", "", model) for model in models]
    return Packed(total=len(generations), models=models, groups=groups, scores=names, items=items)


def _item(item: GeneratedItem, models: Sequence[str], names: Sequence[str]) -> PackedItem:
    places: dict[str, int] = {}
    texts: list[Text] = []
    of_models = []
    for model in models:
        if model not in item.outputs:
            of_models.append(-1)
            continue
        text, scores = item.outputs[model], item.scores.get(model, {})
        values = [None if (score := scores.get(name)) is None else round(float(score), 4) for name in names]
        key = json.dumps([text, values])
        if key not in places:
            places[key] = len(texts)
            texts.append((_shortened(text), _is_right(text, scores, item.references), values))
        of_models.append(places[key])
    references = [_shortened(reference) for reference in item.references]
    return PackedItem(n=item.item, p=_shortened(item.prompt), r=references, t=texts, m=of_models)


def _is_right(text: str, scores: Scores, references: Sequence[str]) -> int | None:
    """1 where every slot is right, or where there are no slots the text is one of the references; None without either."""
    if scores.get("slots_exact") is not None:
        return int(scores["slots_exact"] == 1)
    if not references:
        return None
    return int(text.strip() in {reference.strip() for reference in references})


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … [cut here; {len(text):,} characters in all]"
