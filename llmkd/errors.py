"""The error that is written for the user, and how other errors are quoted in it."""


class InputError(ValueError):
    """A user's mistake in one sentence: what is wrong, where, and what to write instead. Commands exit with 2 on it."""


def first_line(error: BaseException) -> str:
    """An error's first line, without its full stop, or its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
