"""The page that people look at: one HTML file that needs nothing else, from `results.json` and the generated texts.

Every string of a study is escaped; the page's one script is named by its hash, so no other can run, and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from llmkd.report.page.angles import angle_section
from llmkd.report.page.html import data_script, details, missing, pairs, paragraph, section, table
from llmkd.report.page.scores import comparison_section, interval_section, map_section, score_section
from llmkd.report.page.texts import packed
from llmkd.report.page.training import cost_section, training_section

Results = dict[str, Any]


def html(results: Results, generations: Sequence[Mapping[str, Any]], recipe: str) -> str:
    """The whole page as one string; the same arguments give the same bytes."""
    parts = {
        "scores": ("Scores", score_section(results)),
        "comparisons": ("Comparisons", comparison_section(results)),
        "maps": ("Layer maps", map_section(results)),
        **({"angles": ("Angles between teacher blocks", angle_section(results))} if results.get("angles") else {}),
        "intervals": ("Scores with their intervals", interval_section(results)),
        "training": ("Training", training_section(results)),
        "cost": ("Cost", cost_section(results)),
        "generations": ("Generated texts", _generation_section(results, generations)),
        "run": ("What was run", _run_section(results, recipe)),
    }
    links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, (heading, _) in parts.items())
    body = "\n".join(section(name, heading, *inner) for name, (heading, inner) in parts.items())
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="llmkd">
<title>{escape(results["name"])} – a distillation study</title>
<style>{_asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<p class="kicker">A study of layer matching in distillation</p>
<h1>{escape(results["name"])}</h1>
{_opening(results)}
</header>
<nav aria-label="Contents"><ol>{links}</ol></nav>
<main id="main">
{body}
</main>
<footer><p>Made by llmkd from the files of the study. This page is whole: it needs no network.</p></footer>
<script>{script}</script>
</body>
</html>
"""


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _opening(results: Results) -> str:
    """The answer, what limits it, and the study in a line of facts."""
    scored, models = results["scored"], results["models"]
    half = ""
    if scored < models:
        said = f"{scored} of {models} models have scores; what is missing is named below."
        half = f'<p class="partial"><strong>Partial.</strong> {said}</p>'
    notes = "".join(f"<li>{escape(note)}</li>" for note in results["notes"])
    labels = {metric["name"]: metric["label"] for metric in results["metrics"]}
    margins = [f"{margin:g} {labels.get(name, name)}" for name, margin in results["margins"].items()]
    facts = [
        ("Models scored", f"{scored} of {models}"),
        ("Seeds", escape(", ".join(str(seed) for seed in results["seeds"]) or "none")),
        ("Compared with", escape(results["reference"])),
        ("Margin", escape(", ".join(margins) or "none stated")),
    ]
    return "\n".join(
        part
        for part in (
            f'<p class="answer">{escape(results["conclusion"])}</p>',
            half,
            f'<ul class="notes" aria-label="Notes">{notes}</ul>' if notes else "",
            pairs(facts, "facts"),
        )
        if part
    )


# ---------------------------------------------------------------------------------------------------------------------
# Texts, and what was run


def _generation_section(results: Results, generations: Sequence[Mapping[str, Any]]) -> list[str]:
    if not generations:
        return [missing("No model has generated a text yet.")]
    value = packed(generations, {run["name"]: run["strategy"] for run in results["runs"]})
    said = (
        "Each prompt with its reference and what the models wrote; models with the same text share a line. Words that are not in the "
        "nearest reference are underlined, words of it that are missing are struck through."
    )
    shown = len(value["items"])
    cut = ""
    if shown < len(generations):
        cut = f"The first {shown} of {len(generations)} items are on this page; all are in the study's folder generations/."
    return [
        paragraph(said),
        paragraph(cut, "small") if cut else "",
        '<div id="texts">'
        + missing("It takes the script of this page to show the texts; they lie in generations/ too.")
        + "</div>",
        data_script("texts-data", value),
    ]


def _run_section(results: Results, recipe: str) -> list[str]:
    seeds = ", ".join(str(seed) for seed in results["seeds"]) or "none"
    facts = [
        ("Commit", f"<code>{escape(results['commit'])}</code>" if results["commit"] else "not known"),
        ("Seeds", escape(seeds)),
        ("Hardware", escape(_plain(results["hardware"])) or "not known"),
        ("Versions", escape(_plain(results["versions"])) or "not known"),
    ]
    backends = [
        (step, backend, f"{len(entries)} models" if len(used) == 1 else ", ".join(entries))
        for step, used in results["backends"].items()
        for backend, entries in used.items()
    ]
    return [
        pairs(facts, "ran"),
        table("What ran the models when they were evaluated", ("step", "backend", "models"), backends)
        if backends
        else missing("No evaluation has run yet."),
        details("The recipe, <code>recipe.yaml</code>", f"<pre><code>{escape(recipe)}</code></pre>")
        if recipe
        else missing("The study's recipe.yaml is not at hand."),
    ]


def _plain(value: Any) -> str:
    """A JSON value in words: `cpu AMD EPYC, cores 2`."""
    if isinstance(value, Mapping):
        kept = {name.replace("_gib", " in GiB"): inner for name, inner in value.items() if inner not in (None, [], {})}
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in kept.items())
    if isinstance(value, (list, tuple)):
        return " / ".join(_plain(inner) for inner in value)
    return "" if value is None else str(value)
