"""The page that people look at: one HTML file that needs nothing else, from the results and the generated texts.

Every string of a study is escaped; the page's one script is named by its hash, so no other can run, and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from markupsafe import Markup

from llmkd.report import numbers
from llmkd.report.files import GeneratedItem
from llmkd.report.page import html
from llmkd.report.page.angles import angle_section
from llmkd.report.page.scores import comparison_section, interval_section, map_section, score_section
from llmkd.report.page.texts import packed
from llmkd.report.page.training import cost_section, training_section
from llmkd.report.results import Results
from llmkd.report.tables import plain

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
        "training": ("Training", training_section(results)),
        "cost": ("Cost", cost_section(results.runs)),
        "generations": ("Generated texts", _generation_section(results, generations)),
        "run": ("What was run", _run_section(results, recipe)),
    }
    sections = {name: (heading, parts) for name, (heading, parts) in sections.items() if parts}
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    page = PAGE.format(
        policy=Markup(policy),
        name=results.name,
        style=_asset("page.css"),
        opening=_opening(results),
        links=html.join(
            html.tag("li", html.tag("a", heading, href=f"#{name}")) for name, (heading, _) in sections.items()
        ),
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
        parts.append(
            html.tag("ul", *(html.tag("li", note) for note in results.notes), class_="notes", aria_label="Notes")
        )
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


# ---------------------------------------------------------------------------------------------------------------------
# Texts, and what was run


def _generation_section(results: Results, generations: Sequence[GeneratedItem]) -> list[html.Content]:
    if not generations:
        return [html.missing("No model has generated a text yet.")]
    texts = packed(generations, {run.name: run.strategy for run in results.runs})
    shown, note = len(texts["items"]), ""
    if shown < len(generations):
        note = f"The first {shown} of {len(generations)} items are on this page; all are in the study's folder generations/."
    return [
        html.paragraph(
            "Each prompt with its reference and what the models wrote; models with the same text share a line. Words that are not "
            "in the nearest reference are underlined, words of it that are missing are struck through."
        ),
        html.paragraph(note, "small"),
        html.tag(
            "div",
            html.missing("It takes the script of this page to show the texts; they lie in generations/ too."),
            id="texts",
        ),
        html.data_script("texts-data", texts),
    ]


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
        parts.append(
            html.details(
                html.join(["The recipe, ", html.tag("code", "recipe.yaml")]), html.tag("pre", html.tag("code", recipe))
            )
        )
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
