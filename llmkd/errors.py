"""The error that is written for the user, and how other errors are quoted in it."""

import errno
import os
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
NO_GPU_MEMORY = ("out of memory", "cublas_status_alloc_failed")
NO_HOST_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
"""How it is reported, in lower case where the words differ by that alone."""
ANOTHER_FOLDER = "choose another folder (`output` or `name` in the recipe, or --output of llmkd train)"
"""A cure for a folder that a run or a study can't use."""


class InputError(ValueError):
    """A user's mistake in one sentence: what is wrong, where, and what to write instead. Commands exit with 2 on it."""


class FoundByAll(InputError):
    """A mistake that all ranks have found together, each of them at the same place: they can go on with something else."""


def first_line(error: BaseException) -> str:
    """An error's first line, without its full stop, or its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def storage_problem(error: BaseException) -> str | None:
    """What the file system refused, in one sentence with the cure; None for any other error."""
    # without a file's name it may be about anything, a process or a socket
    if isinstance(error, OSError) and (error.errno in NO_ROOM or (error.errno in STORAGE and error.filename)):
        return f"{error.filename or 'a file'}: {STORAGE[error.errno]}"
    return f"a file: {FULL}" if any(words in str(error) for words in FULL_IN_OTHER_WORDS) else None


def memory_problem(error: BaseException) -> str | None:
    """That this rank's memory does not suffice, in one sentence with the cure; None for any other error.

    torch, CUDA's own calls, NCCL and cuBLAS each have words of their own for it.
    """
    rank = os.environ.get("RANK", "0")
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_HOST_MEMORY):
        return f"rank {rank} gets no more memory from this machine ({first_line(error)}): {NO_MEMORY}"
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_GPU_MEMORY):
        said = ". ".join(
            first_line(error).split(". ")[:3]
        )  # what was asked for and what the GPU has; then come hints for programmers
        return (
            f"rank {rank} gets no more memory from its GPU ({said}): write a smaller train.micro_batch_size (train.batch_size stays), a "
            "smaller study.together where students take turns, or use more ranks; `llmkd plan` says what a rank needs"
        )
    return None


def problem(error: BaseException) -> str | None:
    """What the file system or the memory lacks, in one sentence with the cure; None for any other error."""
    return storage_problem(error) or memory_problem(error)


def reason(error: BaseException) -> str:
    """As `first_line`; of an error in which transformers wraps another, that one's text, which names the cause."""
    lines = str(error).strip().splitlines()
    wrapped = lines[1:] and lines[0].endswith(":")
    return re.sub(r"^\s*\w*Error: ", "", lines[1]).strip().rstrip(".")[:300] if wrapped else first_line(error)
