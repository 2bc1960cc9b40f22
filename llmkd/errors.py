"""The one error a user is meant to read, and what to quote of another's."""


class InputError(ValueError):
    """A user's mistake, said in one sentence: what is wrong, where, and what to write instead. Commands exit with 2 on it."""


def first_line(error: BaseException) -> str:
    """An error's first line, without its full stop, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
