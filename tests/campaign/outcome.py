"""What a trial came to."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """The end of one trial."""

    ending: str
    """By what name it is counted where nothing is wrong: bit-equal, refused, ..."""
    did: str
    """What was done, in words."""
    faults: list[str] = field(default_factory=list)
    """What is wrong; empty where all is right."""
    strikes: int = 0
    """How many signals met a process."""
