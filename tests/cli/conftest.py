"""What the command tests share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.in_process import in_process


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The child's work in this process; the orders that it was given."""
    return in_process(monkeypatch)
