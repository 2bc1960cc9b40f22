"""Texts in Markdown: whatever they hold, a viewer shows them as they are."""

from __future__ import annotations

from html import unescape

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llmkd.text import bullets, escaped, fenced

PIECES = [
    *(
        "<script>",
        "</details>",
        "<!--",
        "&lt;",
        "&#60;",
        "`",
        "```",
        "*",
        "__",
        "_",
        "~~",
        "[a](b)",
        "![x](http://y)",
        "<http://z>",
    ),
    *(
        "#",
        "# ",
        "- ",
        "+ ",
        "> ",
        "1. ",
        "12) ",
        "---",
        "===",
        "| ",
        "\\",
        "\\<",
        "\n",
        "\n\n",
        "a_b",
        "word",
        "2",
        "<",
        " < ",
        "&",
        ":",
        "!",
        ".",
    ),
]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join).filter(str.strip)
viewer = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown(markdown: str, before: str, after: str) -> str:
    """What stands between two pieces of HTML in what a viewer makes of Markdown."""
    html = viewer.render(markdown).strip()
    assert html.startswith(before) and html.endswith(after), html
    return html[len(before) : -len(after)]


@given(text=texts)
@example("<script>alert(1)</script>")
@example("1. one")
@example("a #")
@example("## a")
def test_a_text_is_shown_as_it_is(text: str) -> None:
    line = " ".join(text.split())
    for markdown, before, after in (
        (bullets([text]), "<ul>\n<li>", "</li>\n</ul>"),
        (f"# Study {escaped(text)}", "<h1>Study ", "</h1>"),
        (escaped(text), "<p>", "</p>"),
    ):
        html = shown(markdown, before, after)
        assert "<" not in html and unescape(html) == line


@given(text=texts)
def test_a_block_of_code_can_not_be_left(text: str) -> None:
    html = shown(fenced(text, "yaml"), '<pre><code class="language-yaml">', "\n</code></pre>")
    assert "<" not in html and unescape(html) == text.rstrip()
