"""lm-eval with few tasks of its own. To read its thousands takes half a minute: one slow test of test_lm_eval.py does."""

from __future__ import annotations

from pathlib import Path

import pytest


def few_tasks(patch: pytest.MonkeyPatch) -> None:
    """From now on lm-eval's own tasks are those of one of its folders."""
    from lm_eval.tasks import manager  # heavy

    assert manager.__file__ is not None
    folder = Path(manager.__file__).parent / "arc"
    assert folder.is_dir()
    patch.setattr(manager, "__file__", str(folder / "manager.py"))
