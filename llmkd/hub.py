"""The Hugging Face hub, and what is done where it can't be reached.

Its clients try again for minutes. So one request asks first whether the hub answers at all; where it does not, they are given what their
caches hold and nothing else. How long a download takes is not limited.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, Queue
from typing import Any, TypeVar

from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError

from llmkd.errors import InputError, first_line

Fetched = TypeVar("Fetched")

ANSWER_SECONDS = 5
"""How long the hub may take to answer; HF_HUB_ETAG_TIMEOUT, where it is set, says so instead."""
ASKED_AGAIN_SECONDS = 60
"""How long an answer, or that there was none, holds."""


class OutOfReach(InputError):
    """The hub can't be reached, and its client's cache does not hold what was asked for."""


class _Last:
    """The last answer: why the hub could not be reached, None where it could; and when it was asked."""

    problem: str | None = None
    time: float = -float("inf")


def fetch(work: Callable[[], Fetched]) -> Fetched:
    """The result of `work`, which calls the hub's clients.

    Raises OutOfReach, with the cure, where the hub does not answer and the caches lack it; else whatever `work` raises.
    """
    if constants.HF_HUB_OFFLINE or (problem := _problem()) is None:
        return work()
    with _from_caches_alone():
        try:
            return work()
        except Exception as error:  # each client has its own errors, and those that it wraps
            of_the_client = isinstance(error, LocalEntryNotFoundError | ConnectionError)  # says to go online
            why = "" if of_the_client else f" ({first_line(error)})"
            raise OutOfReach(
                f"{constants.ENDPOINT} can't be reached ({problem}), nor is it in the cache{why}; give a local path, fill the cache "
                "where there is a network and set HF_HUB_OFFLINE=1, write a mirror's address into HF_ENDPOINT, or more seconds than "
                f"{_seconds()} into HF_HUB_ETAG_TIMEOUT"
            ) from error


def last_problem() -> str | None:
    """Why the hub could not be reached when it was last asked; None where it could, or nobody has asked."""
    return _Last.problem


def believe(problem: str | None) -> None:
    """Take what another rank found, so that this one does not wait for the hub too."""
    _Last.problem, _Last.time = problem, time.monotonic()


def stay_offline_if_out_of_reach() -> None:
    """Where the hub was not reached, keep its clients to their caches for the rest of this process: other people's code may call them."""
    if _Last.problem is not None:
        contextlib.ExitStack().enter_context(_from_caches_alone())


def _problem() -> str | None:
    """Why the hub can't be reached; None where it answers."""
    if time.monotonic() - _Last.time > ASKED_AGAIN_SECONDS:
        believe(_ask())
    return _Last.problem


def _ask() -> str | None:
    """Ask the hub for anything. In a thread that ends with the process: looking a name up has no time limit of its own."""
    seconds = _seconds()
    answers: Queue[str | None] = Queue()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)  # whatever the status, something answers
            answers.put(None)
        except Exception as error:  # the client's library has a score of network errors
            answers.put(first_line(error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except Empty:
        return f"no answer in {seconds} s"


def _seconds() -> int:
    return constants.HF_HUB_ETAG_TIMEOUT if os.environ.get("HF_HUB_ETAG_TIMEOUT") else ANSWER_SECONDS


@contextlib.contextmanager
def _from_caches_alone() -> Iterator[None]:
    """Inside, the hub's clients are offline, as HF_HUB_OFFLINE=1 makes them at their import."""
    switches = [(constants, "HF_HUB_OFFLINE")]
    for library, name in (("datasets", "HF_HUB_OFFLINE"), ("evaluate", "HF_EVALUATE_OFFLINE")):
        config: Any = sys.modules.get(f"{library}.config")  # not imported: it has nothing to fetch
        switches += [(config, name)] if config is not None else []
    before = [getattr(module, name) for module, name in switches]
    for module, name in switches:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
