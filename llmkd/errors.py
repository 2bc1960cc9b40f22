"""The error that is written for the user, and how other errors are quoted in it."""

import errno
import re

FULL = "the disk is full; free some space and give the same command again, which goes on from the last checkpoint"
STORAGE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL.replace("the disk is full", "your share of the disk is used up"),
    errno.EFBIG: "the file system or a limit (ulimit -f) does not allow a file of that size; raise it, or give another folder",
    errno.EROFS: "it can only be read; give another folder",
    errno.EACCES: "this user may not use it; change its permissions, or give another folder",
    errno.EPERM: "this user may not use it; change its permissions, or give another folder",
    errno.ENOTDIR: "a file lies where a folder must be; move it away, or give another folder",
    errno.EEXIST: "a file lies where a folder must be; move it away, or give another folder",
    errno.EISDIR: "a folder lies where a file must be; move it away, or give another folder",
    errno.ENAMETOOLONG: "the name is too long for the file system; give a shorter one",
}
"""What the file system refuses, and what to do about it."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing, which carry no name."""
FULL_IN_OTHER_WORDS = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos")
"""How torch, safetensors and Arrow report a full disk, which raise no OSError."""
NO_MEMORY = (
    "its memory, or the job's share of it, is used up; write less in train.micro_batch_size, or start fewer ranks there"
)
"""Why the kernel kills a process, and the cure."""
ANOTHER_FOLDER = "choose another folder (`output` or `name` in the recipe, or --output of llmkd train)"
"""A cure for a folder that a run or a study can't use."""


class InputError(ValueError):
    """A user's mistake in one sentence: what is wrong, where, and what to write instead. Commands exit with 2 on it."""


class Diverged(InputError):
    """A training that can't go on because its numbers are not finite; all its ranks find so together."""


def first_line(error: BaseException) -> str:
    """An error's first line, without its full stop, or its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def storage_problem(error: BaseException) -> str | None:
    """What the file system refused, in one sentence with the cure; None for any other error."""
    # without a file's name it may be about anything, a process or a socket
    if isinstance(error, OSError) and (error.errno in NO_ROOM or (error.errno in STORAGE and error.filename)):
        return f"{error.filename or 'a file'}: {STORAGE[error.errno]}"
    return f"a file: {FULL}" if any(words in str(error) for words in FULL_IN_OTHER_WORDS) else None


def reason(error: BaseException) -> str:
    """As `first_line`; of an error in which transformers wraps another, that one's text, which names the cause."""
    lines = str(error).strip().splitlines()
    wrapped = lines[1:] and lines[0].endswith(":")
    return re.sub(r"^\s*\w*Error: ", "", lines[1]).strip().rstrip(".")[:300] if wrapped else first_line(error)
