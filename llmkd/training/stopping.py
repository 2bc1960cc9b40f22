"""SIGTERM and SIGINT: a run stops after the step under way."""

from __future__ import annotations

import logging
import signal

log = logging.getLogger("llmkd")


class Stopping:
    """Remembers SIGTERM and SIGINT until the step is over; the loop asks every rank, so one rank's signal stops all."""

    def __init__(self) -> None:
        self.asked = False
        self.name = "another rank's signal"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if not self.asked:
            self.asked, self.name = True, signal.Signals(number).name
            log.info("%s: stopping after this step", self.name)
