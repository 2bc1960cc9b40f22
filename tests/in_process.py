"""The work of a scoring step's child, done in this process: quicker, and within reach of monkeypatches."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmkd.errors import InputError
from llmkd.evaluation import places, step
from llmkd.inference import child


@contextlib.contextmanager
def one_after_another() -> Iterator[None]:
    """Inside, models are scored by one process, also where the cores would carry more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "BESIDE", 1)
        yield


def in_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Do all orders in this process from now on; the orders, each with what all of its call share."""
    orders: list[dict[str, Any]] = []

    class InProcess:
        """In the place of `child.Child`; each order begins anew."""

        def __init__(self, module: str, shared: Any, log_file: Path, variables: object = None) -> None:
            self._step, self._shared = importlib.import_module(module).STEP, json.loads(json.dumps(shared))

        def do(self, order: Any, say: child.Say, moved: object) -> int | None:
            order = json.loads(json.dumps(order))
            orders.append({**order, "shared": self._shared["shared"]})
            lines: list[str] = []
            with monkeypatch.context() as patch:
                patch.setattr(child, "listen", lambda: (self._shared, iter([order]), lines.append))
                code = step.serve(self._step)
            if lines[-1].startswith(child.REFUSAL):
                raise InputError(lines[-1].removeprefix(child.REFUSAL))
            return code or None

        def close(self) -> None: ...

        def kill(self) -> None: ...

    monkeypatch.setattr(child, "Child", InProcess)
    monkeypatch.setattr(places, "BESIDE", 1)  # one after another, as this process can
    return orders


def stopped_at_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every child is interrupted at its first order from now on, with nothing done; the names in those orders."""
    asked: list[str] = []

    class Stopped:
        def __init__(self, *_: object) -> None: ...

        def do(self, order: Any, say: child.Say, moved: object) -> int | None:
            asked.append(order["model"]["name"])
            raise KeyboardInterrupt

        def kill(self) -> None: ...

    monkeypatch.setattr(child, "Child", Stopped)
    monkeypatch.setattr(places, "BESIDE", 1)
    return asked
