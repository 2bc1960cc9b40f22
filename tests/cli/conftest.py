"""What the command tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd.errors import InputError
from llmkd.evaluation import angles
from llmkd.inference import child


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The child's work in this process; the orders that it was given."""
    orders: list[Any] = []

    def run(module: str, order: Any, talk: Path, label: str, variables: Any = None) -> int:
        order = json.loads(json.dumps(order))
        orders.append(order)
        said: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(child, "listen", lambda: (order, said.append))
            code = angles.main()
        if said[-1].startswith(child.REFUSAL):
            raise InputError(said[-1].removeprefix(child.REFUSAL))
        return code

    monkeypatch.setattr(child, "run", run)
    return orders
