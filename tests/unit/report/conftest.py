"""What the tests of the page share."""

from __future__ import annotations

import pytest
from markupsafe import Markup

from llmkd.report.page import svg


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty picture stands for each: for tests of what is said and tabulated, in half the time."""
    empty = Markup('<svg class="picture" role="img" aria-label="{}"><desc id="{}-words">{}</desc></svg>')
    monkeypatch.setattr(svg, "inline", lambda figure, name, title, words: empty.format(title, name, words))
