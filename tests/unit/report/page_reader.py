"""Reads a page back, to compare what it says with what it was made from."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser
from urllib.parse import unquote

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The page's elements: `tags` are (name, attributes), `text[i]` is all text inside the i-th."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[int] = []
        self.feed(str(source))  # a Markup would escape the text that is read from it
        self.close()
        assert not self._open, [self.tags[i] for i in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.text.append("")
        if tag not in VOID:
            self._open.append(len(self.tags) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.tags[self._open[-1]][0] == tag, (tag, self.tags[self._open[-1]])
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.text[i] += data

    def all(self, tag: str, kind: str | None = None) -> list[tuple[dict[str, str], str]]:
        """Attributes and text of every such element, in order; `kind` is one of its classes."""
        return [
            (attributes, text)
            for (name, attributes), text in zip(self.tags, self.text, strict=True)
            if name == tag and (kind is None or kind in attributes.get("class", "").split())
        ]

    def csv(self, name: str) -> list[list[str]]:
        """The rows of a CSV link, its header first."""
        (link,) = [a["href"] for a, _ in self.all("a", "csv") if a["download"] == f"{name}.csv"]
        kind, _, data = link.partition(",")
        assert kind == "data:text/csv;charset=utf-8"
        return list(csv.reader(io.StringIO(unquote(data))))
