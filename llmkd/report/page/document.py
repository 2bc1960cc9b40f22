"""The page that people look at: one HTML file that needs nothing else, from the results and the generated texts.

Every string of a study is escaped; the page's one script is named by its hash, so no other can run, and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypedDict

from markupsafe import Markup

from llmkd.evaluation.results import Scores
from llmkd.report import numbers, rollouts
from llmkd.report.files import GeneratedItem
from llmkd.report.page import html
from llmkd.report.page.angles import angle_section
from llmkd.report.page.cost import cost_section
from llmkd.report.page.rollouts import rollout_section
from llmkd.report.page.scores import comparison_section, interval_section, map_section, score_section
from llmkd.report.page.training import training_section
from llmkd.report.page.validation import validation_part
from llmkd.report.results import Results
from llmkd.report.tables import plain

BUDGET = 1_000_000  # bytes of the page that generated texts may take
LONGEST_TEXT = 4_000  # characters of one prompt, reference or output

Text = tuple[str, int | None, list[float | None]]
"""A text, whether it is right (1 or 0, None where nothing shows it), and its scores in the order of `Packed.scores`."""

PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="llmkd">
<title>{name} – a distillation study</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<p class="kicker">A study of layer matching in distillation</p>
<h1>{name}</h1>
{opening}
</header>
<nav aria-label="Contents"><ol>{links}</ol></nav>
<main id="main">
{body}
</main>
<footer><p>Made by llmkd from the files of the study. This page is whole: it needs no network.</p></footer>
<script>{script}</script>
</body>
</html>
""")


def whole_page(results: Results, generations: Sequence[GeneratedItem], recipe: str) -> str:
    """The whole page as one string; the same arguments give the same bytes."""
    sections: dict[str, tuple[str, Sequence[html.Content]]] = {
        "scores": ("Scores", score_section(results)),
        "comparisons": ("Comparisons", comparison_section(results)),
        "maps": ("Layer maps", map_section(results)),
        "angles": ("Angles between teacher blocks", angle_section(results.angles)),
        "intervals": ("Scores with their intervals", interval_section(results)),
        "training": ("Training", [*training_section(results), *validation_part(results)]),
        "teachers-texts": (
            rollouts.BEFORE,
            [html.paragraph(rollouts.of_teacher(results))] if results.teachers_texts else [],
        ),
        "rollouts": (rollouts.HEADING, rollout_section(results)),
        "cost": ("Cost", cost_section(results.runs)),
        "generations": ("Generated texts", _generation_section(results, generations)),
        "run": ("What was run", _run_section(results, recipe)),
    }
    sections = {name: (heading, parts) for name, (heading, parts) in sections.items() if parts}
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    links = [html.tag("li", html.tag("a", heading, href=f"#{name}")) for name, (heading, _) in sections.items()]
    page = PAGE.format(
        policy=Markup(policy),
        name=results.name,
        style=_asset("page.css"),
        opening=_opening(results),
        links=html.join(links),
        body=html.join((html.section(name, heading, parts) for name, (heading, parts) in sections.items()), "\n"),
        script=script,
    )
    return str(page)  # a plain string: written to a file, it is no longer a part of a page


@cache
def _asset(name: str) -> Markup:
    """A file of our own beside this one."""
    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _opening(results: Results) -> Markup:
    """The answer, what limits it, and the study in a line of facts."""
    scored = f"{results.scored} of {results.models}"
    parts = [html.tag("p", results.conclusion, class_="answer")]
    if results.scored < results.models:
        sentence = f" {scored} models have scores; what is missing is named below."
        parts.append(html.tag("p", html.tag("strong", "Partial."), sentence, class_="partial"))
    if results.notes:
        notes = [html.tag("li", note) for note in results.notes]
        parts.append(html.tag("ul", *notes, class_="notes", aria_label="Notes"))
    labels = {metric.name: metric.label for metric in results.metrics}
    margins = [f"{numbers.margin(margin)} {labels.get(name, name)}" for name, margin in results.margins.items()]
    facts = [
        ("Models scored", scored),
        ("Seeds", _seeds(results)),
        ("Compared with", results.reference),
        ("Margin", ", ".join(margins) or "none stated"),
    ]
    return html.join([*parts, html.definitions(facts, "facts")], "\n")


def _seeds(results: Results) -> str:
    return ", ".join(map(str, results.seeds)) or "none"


# --- Texts, and what was run


def _generation_section(results: Results, generations: Sequence[GeneratedItem]) -> list[html.Content]:
    if not generations:
        return [html.missing("No model has generated a text yet.")]
    texts = packed(generations, {run.name: run.strategy for run in results.runs})
    shown, note = len(texts["items"]), ""
    if shown < len(generations):
        note = f"The first {shown} of {len(generations)} items are on this page; all are in the study's folder generations/."
    words = (
        "Each prompt with its reference and what the models wrote; models with the same text share a line. Words that are not "
        "in the nearest reference are underlined, words of it that are missing are struck through."
    )
    without = html.missing("It takes the script of this page to show the texts; they lie in generations/ too.")
    parts = [html.paragraph(words), html.paragraph(note, "small"), html.tag("div", without, id="texts")]
    return [*parts, html.data_script("texts-data", texts)]


def _run_section(results: Results, recipe: str) -> list[html.Content]:
    facts: list[tuple[str, html.Content]] = [
        ("Commit", html.tag("code", results.commit) if results.commit else "not known"),
        ("Seeds", _seeds(results)),
        ("Hardware", plain(results.hardware) or "not known"),
        ("Versions", plain(results.versions) or "not known"),
    ]
    parts: list[html.Content] = [html.definitions(facts, "ran")]
    if results.backends:
        head = ("step", "backend", "models")
        parts.append(html.table("What ran the models when they were evaluated", head, _backend_rows(results.backends)))
    else:
        parts.append(html.missing("No evaluation has run yet."))
    if recipe:
        summary = html.join(["The recipe, ", html.tag("code", "recipe.yaml")])
        parts.append(html.details(summary, html.tag("pre", html.tag("code", recipe))))
    else:
        parts.append(html.missing("The study's recipe.yaml is not at hand."))
    return parts


def _backend_rows(backends: Mapping[str, Mapping[str, Sequence[str]]]) -> list[tuple[str, str, str]]:
    """Step, backend and models; the models are named where a step had several backends."""
    return [
        (step, backend, f"{len(models)} models" if len(used) == 1 else ", ".join(models))
        for step, used in backends.items()
        for backend, models in used.items()
    ]


# --- Generated texts: each once per item, with who wrote it


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
