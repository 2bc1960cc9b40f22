"""How far a long piece of work is: a bar in a terminal, a line now and then in a file.

with progress("tokenizing", total=1_000_000, unit="rows") as advance:
    advance(10_000)
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger("llmkd")
SECONDS = 30
"""Between two lines in a file."""


@contextlib.contextmanager
def progress(work: str, *, total: int, unit: str, seconds: float = SECONDS) -> Iterator[Callable[[int], None]]:
    """Inside, the function that is called with how much more has been done; it shows the rate and the time left."""
    if sys.stderr.isatty():
        with logging_redirect_tqdm(), tqdm(total=total, desc=work, unit=f" {unit}", leave=False) as bar:

            def move(count: int) -> None:
                bar.update(count)

            yield move
        return
    began = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said >= seconds and done < total:
            said, rate = now, done / (now - began)
            log.info(
                "%s: %d of %d %s, %.0f %s/s, %.0f s left", work, done, total, unit, rate, unit, (total - done) / rate
            )

    yield advance
