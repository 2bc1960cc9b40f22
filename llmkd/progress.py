"""How far a long piece of work is: a bar in a terminal, a line now and then in a file.

with progress("tokenizing", total=1_000_000, unit="rows") as advance:
    advance(10_000)
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger("llmkd")
SECONDS = 30.0
"""Between two lines in a file."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Advance(Protocol):
    """Called with how much more has been done, and with a note that a bar ends with."""

    def __call__(self, count: float, note: str = "") -> None: ...


def progress(
    work: str, *, total: float, unit: str, done: float = 0, seconds: float = SECONDS, shown: bool = True
) -> AbstractContextManager[Advance]:
    """Inside, the function that says how far the work is.

    `done`: before it begins. `seconds`: between two lines in a file, infinite for work with lines of its own. `shown`: False where
    another process shows it.
    """
    if not shown:
        return contextlib.nullcontext(_unseen)
    return _bar(work, total, unit, done) if sys.stderr.isatty() else _lines(work, total, unit, done, seconds)


def _unseen(count: float, note: str = "") -> None:
    pass


@contextlib.contextmanager
def _bar(work: str, total: float, unit: str, done: float) -> Iterator[Advance]:
    # Not disabled: our processes run with TQDM_DISABLE, which silences libraries' bars.
    options: Any = {"initial": done, "desc": work, "unit": unit, "bar_format": BAR}
    with logging_redirect_tqdm(), tqdm(total=total, **options, leave=False, disable=False, miniters=0) as bar:

        def advance(count: float, note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(count)

        yield advance


@contextlib.contextmanager
def _lines(work: str, total: float, unit: str, done: float, seconds: float) -> Iterator[Advance]:
    began = said = time.monotonic()
    before = done

    def advance(count: float, note: str = "") -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said < seconds or not before < done < total:
            return
        said, rate = now, (done - before) / (now - began)
        left = (total - done) / rate
        speed = f"{_short(rate)} {unit}/s" if rate >= 1 else f"{_short(1 / rate)} s each"
        log.info("%s: %s of %s %s, %s, %.0f s left", work, _short(done), _short(total), unit, speed, left)

    yield advance


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
