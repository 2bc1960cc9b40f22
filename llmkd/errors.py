"""The one error a user is meant to read."""


class InputError(ValueError):
    """A user's mistake, said in one sentence: what is wrong, where, and what to write instead. Commands exit with 2 on it."""
