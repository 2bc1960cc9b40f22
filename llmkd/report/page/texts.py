"""What all models wrote for the same items, packed for the page: each text once per item, with who wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

BUDGET = 1_000_000  # bytes of the page that generated texts may take
LONGEST_TEXT = 4_000  # characters of one prompt, reference or output


def packed(generations: Sequence[Mapping[str, Any]], strategies: Mapping[str, str | None]) -> dict[str, Any]:
    """The first items that fit into `BUDGET`, for page.js:

    {"total", "models", "groups": a strategy or baseline per model, "scores": names,
     "items": [{"n": item, "p": prompt, "r": references, "t": [[text, right, scores], ...], "m": per model its text's place or -1}]}

    `strategies` is entry -> strategy, where known. `right` is 1 or 0, or null where nothing says so.
    """
    models = list(dict.fromkeys(entry for item in generations for entry in item["outputs"]))
    names = list(dict.fromkeys(name for item in generations for given in _scores(item).values() for name in given))
    found = {
        "total": len(generations),
        "models": models,
        "groups": [strategies.get(entry) or re.sub(r"-s\d+$", "", entry) for entry in models],
        "scores": names,
        "items": [],
    }
    used = 0
    for item in generations:
        one = _item(item, models, names)
        used += len(json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode())
        if used > BUDGET:
            break
        found["items"].append(one)
    return found


def _item(item: Mapping[str, Any], models: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    places: dict[str, int] = {}
    texts: list[list[Any]] = []
    written = []
    for entry in models:
        if entry not in item["outputs"]:
            written.append(-1)
            continue
        text, given = item["outputs"][entry], _scores(item).get(entry, {})
        values = [None if given.get(name) is None else round(float(given[name]), 4) for name in names]
        one = [_cut(text), _right(text, given, item["references"]), values]
        key = json.dumps([text, values])
        if key not in places:
            places[key] = len(texts)
            texts.append(one)
        written.append(places[key])
    references = [_cut(reference) for reference in item["references"]]
    return {"n": item["item"], "p": _cut(item["prompt"]), "r": references, "t": texts, "m": written}


def _right(text: str, scores: Mapping[str, Any], references: Sequence[str]) -> int | None:
    """1 where every slot is right, or where there are no slots the text is one of the references; None without either."""
    if scores.get("slots_exact") is not None:
        return int(scores["slots_exact"] == 1)
    if not references:
        return None
    return int(text.strip() in {reference.strip() for reference in references})


def _scores(item: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return item.get("scores") or {}


def _cut(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … [cut here; {len(text):,} characters in all]"
