"""Sequence-level distillation (Kim & Rush, 1606.07947): before training the teacher writes the completions of the data's rows, once.

What it wrote lies on disk as tokens do (`llmkd.data.token_files`), a shard of some hundred rows at a time: every student of a study, a
cache and packing read it like any rows. A killed writing goes on at the first shard that is not whole.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from llmkd.data.batches import TokenRow
from llmkd.data.order import Source, weighed
from llmkd.data.token_files import TokenFiles, Written, opened, record, record_shard, recorded, recorded_shard
from llmkd.data.tokenized import Tokens
from llmkd.distributed.ranks import World, on_each_node, on_every_rank, on_main, sum_counts
from llmkd.errors import InputError
from llmkd.files import read_checked, sync, write_checked
from llmkd.inference.sampling import Ids
from llmkd.processes import StoppedWaiting, only_one_in
from llmkd.progress import progress
from llmkd.recipe.inputs import fingerprint
from llmkd.rollouts.prompts import prompt_of
from llmkd.rollouts.texts import KnownTokens, Wrote, answered
from llmkd.rollouts.wanted import Schedule
from llmkd.rollouts.writer import Writer, Writing, written_together

log = logging.getLogger("llmkd")

SHARD_ROWS = 256
"""What a killed writing loses at most."""
WROTE = ".texts.json"
"""Ends the name of the file beside a shard that says what was written for it, in numbers."""
SEED = 0
"""Of the texts and of which rows have them: not the run's, so that all students of a study read the same."""


def teachers_texts(folders: Sequence[Path]) -> dict[str, float]:
    """What a teacher wrote of the tokens in these folders, whichever run had it written; empty where it wrote nothing.

    A damaged file is named and left out: it decides nothing.
    """
    files = [file for folder in folders for file in sorted(folder.glob(f"*{WROTE}"))]
    parts = []
    for file in files:
        if (part := read_checked(file)) is None:
            log.warning("%s is not what was written; the numbers of the teacher's texts lack those of its rows", file)
        else:
            parts.append(part)
    return {name: sum(part[name] for part in parts) for name in Wrote.__dataclass_fields__} if files else {}


def wrote_into(folder: Path) -> bool:
    """Whether a teacher wrote some of the tokens in this folder."""
    return any(folder.glob(f"*{WROTE}"))


@dataclass(frozen=True)
class ByTeacher:
    """How a teacher writes."""

    teacher: Path
    """Its folder."""
    contents: str
    """A hash of its weights."""
    writing: Writing
    share: float
    """Of the rows that are trained on."""
    drops_truncated: bool
    known: KnownTokens
    """A text is cut before a token that student or teacher lacks."""
    place: Path
    """Where the tokens of written rows lie."""
    by_rows: bool
    """Whether the sources of a mixture weigh as many as they have rows."""

    def identity(self, tokens: str, held_out: Sequence[int]) -> dict[str, Any]:
        """All that decides the texts of a source, as JSON. `tokens`: a hash of its rows; `held_out`: what says which are not rewritten."""
        return {
            "teacher": self.contents,
            "writing": self.writing.decides(),
            "share": self.share,
            "drops_truncated": self.drops_truncated,
            "known": [self.known.count, *sorted(self.known.foreign)],
            "tokens": tokens,
            "held_out": [*held_out],
            "shard_rows": SHARD_ROWS,
            "format": 1,  # of what is made of a prompt and its text
        }


def rewritten(
    world: World, tokens: Tokens, how: ByTeacher, new_writer: Callable[[], Writer], asked: Callable[[], bool]
) -> Tokens | None:
    """The rows that are trained on, with what the teacher writes as completions (all ranks take part); the others are left out.

    None where a rank was `asked` to stop before all texts were there. Raises InputError where the texts can't be written, or none is left.
    """
    held_out = tokens.held_out
    found: list[TokenFiles] = []
    # one thread for all: a process that it starts ends with it
    with ThreadPoolExecutor(1) as thread, contextlib.closing(_Lazily(new_writer)) as writer:
        for number, (source, digest) in enumerate(zip(tokens.sources, tokens.digests, strict=True)):
            rows = np.setdiff1d(np.arange(source.first, source.first + source.rows), held_out)
            seed = [source.held_out, tokens.held_out_seed, number] if source.held_out else []
            part = _Source(world, tokens, rows, how, how.identity(digest, seed))
            files = part.written(thread, writer, asked)
            if files is None:
                return None
            found.append(files)
    rows, lengths = [files.rows() for files in found], [files.lengths() for files in found]
    firsts = np.cumsum([0, *map(len, rows)]).tolist()
    weights = weighed([*map(len, rows)]) if how.by_rows else [source.weight for source in tokens.sources]
    return Tokens(
        concatenate_datasets(rows),
        tuple(lengths),
        tuple(
            Source(first, len(part), weight=weight) for first, part, weight in zip(firsts, rows, weights, strict=False)
        ),
        folders=tuple(files.folder for files in found),
        digests=tuple(files.digest for files in found),
    )


class _Lazily:
    """A writer that is there from the first text on: where all texts are on disk the teacher is not loaded."""

    def __init__(self, new: Callable[[], Writer]) -> None:
        self._new, self._writer = new, None

    def write(self, asked: Any) -> Any:
        self._writer = self._writer or self._new()
        return self._writer.write(asked)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@dataclass(frozen=True)
class _Source:
    """The rows of one source that are trained on, and their texts."""

    world: World
    tokens: Tokens
    rows: np.ndarray
    """Their numbers."""
    how: ByTeacher
    identity: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.how.place / fingerprint(self.identity)

    def written(self, thread: Executor, writer: Writer, asked: Callable[[], bool]) -> TokenFiles | None:
        """The tokens, read or written; None where a rank was asked to stop."""
        if not self._is_there():
            with contextlib.ExitStack() as held:

                def enter() -> bool:
                    try:
                        held.enter_context(only_one_in(self.folder, float("inf"), asked))
                    except StoppedWaiting:
                        return False
                    return True

                alone = on_every_rank(self.world, thread, lambda: not self.world.is_main or enter())
                if not all(alone) or not (self._is_there() or self._write(thread, writer, asked)):
                    return None
        files = recorded(self.folder)
        assert files is not None, "it was recorded just now"
        return files

    def _is_there(self) -> bool:
        """Whether each node has all texts."""
        nodes, _ = on_each_node(self.world, lambda: opened(self.folder) is not None)
        return all(nodes)

    def _write(self, thread: Executor, writer: Writer, asked: Callable[[], bool]) -> bool:
        """Write the shards that a node lacks; False where a rank was asked to stop."""
        count = -(-len(self.rows) // SHARD_ROWS)
        schedule = Schedule(1, self.how.share, 1, SEED, count)
        lacking, _ = on_each_node(self.world, lambda: self._lacking(count))
        missing = sorted(set[int]().union(*lacking))
        log.info(
            "rollouts: %s writes %.0f%% of %d rows by %s, before training",
            self.how.teacher, 100 * self.how.share, len(self.rows), self.how.writing.backend,
        )  # fmt: skip
        texts = round(self.how.share * min(len(missing) * SHARD_ROWS, len(self.rows)))
        with progress("the teacher's texts", total=texts, unit="texts", shown=self.world.is_main) as advance:
            for number in missing:
                if sum_counts(self.world, [int(asked())]) != [0]:
                    return False
                rows = self.rows[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
                wanted = schedule.wanted(number, rows)
                prompts = [prompt_of(self.tokens.row(row)) for row in wanted.rows]
                seeds = wanted.seeds.tolist()
                began = time.perf_counter()
                ids = written_together(self.world, thread, writer, self.how.writing, self.how.teacher, prompts, seeds)
                written = dict(zip(wanted.places.tolist(), zip(prompts, ids, strict=True), strict=True))
                seconds = time.perf_counter() - began
                self._on_nodes(functools.partial(self._publish, number, rows, written, seconds))
                advance(len(ids))
        digests = self._on_nodes(functools.partial(self._finish, count))
        if len(set(digests)) > 1:
            raise InputError(
                f"{self.folder}: the nodes hold other texts ({', '.join(digests)}); remove it on all of them, or put data.tokens into a "
                "folder that they share"
            )
        return True

    def _lacking(self, count: int) -> list[int]:
        """The shards that this node lacks (one of its ranks); what a killed writing left of one is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("tmp-*"):
            leftover.unlink()
        return [number for number in range(count) if recorded_shard(self.folder, number) is None]

    def _on_nodes(self, write: Callable[[str | None], str]) -> list[str]:
        """Write the same on every node, one hash each (all ranks take part).

        Rank 0 is first, so that nodes that share its folder find there what they would write: `write` gets the hash of what it has
        written.
        """
        first = on_main(self.world, lambda: write(None))
        nodes, _ = on_each_node(self.world, lambda: write(first))
        return nodes

    def _publish(
        self,
        number: int,
        rows: np.ndarray,
        written: Mapping[int, tuple[np.ndarray, Ids]],
        seconds: float,
        first: str | None,
    ) -> str:
        """Put a shard in place, completely or not at all; its hash. Nothing is done where the one there has the hash `first`.

        `written`: by place in `rows`, (prompt, text). `seconds`: what they took.
        """
        if first is not None and (there := recorded_shard(self.folder, number)) is not None and there.sha256 == first:
            return first
        kept: list[TokenRow] = []
        unended = empty = left_out = of_texts = 0
        for place, row in enumerate(map(self.tokens.row, rows)):
            if place not in written:
                kept.append(row)
                continue
            prompt, ids = written[place]
            text, ended = self.how.known.cut(ids, self.how.writing.stops)
            unended += not ended
            is_empty = len(text) <= int(ended)
            empty, of_texts = empty + is_empty, of_texts + len(text)
            if is_empty or (self.how.drops_truncated and not ended):
                left_out += 1
            else:
                kept.append({**row, **answered(prompt, text)})
        tokens = sum(row["length"] for row in kept)
        file = self.folder / f"{number:05d}.arrow"
        tmp = self.folder / f"tmp-{number}.arrow"
        with ArrowWriter(path=str(tmp), features=self.tokens.rows.features) as shard:
            for row in kept:
                shard.write({**row})
            shard.finalize()
        sync(tmp)
        os.replace(tmp, file)
        # before the shard counts as written: where the one is, the other is too
        wrote = Wrote(len(written), of_texts, unended, empty, left_out, seconds)
        write_checked(file.with_suffix(WROTE), asdict(wrote))
        return record_shard(file, Written(len(rows), len(kept), tokens, long=unended, useless=left_out)).sha256

    def _finish(self, count: int, first: str | None) -> str:
        """Record that all shards are there (one rank of a node); a hash of the content. Nothing is done where it is `first`."""
        if first is not None and (there := recorded(self.folder)) is not None and there.digest == first:
            return first
        shards = [shard for number in range(count) if (shard := recorded_shard(self.folder, number)) is not None]
        assert len(shards) == count, "a shard is missing"
        files = TokenFiles(self.folder, tuple(shards))
        total, most, wrote = files.total, self.how.writing.max_new_tokens, teachers_texts([self.folder])
        if total.rows == 0:
            raise InputError(
                f"rollouts: nothing is left of what the teacher wrote: {total.long} of its texts did not end within {most} tokens, and the "
                "others are empty; write a larger max_new_tokens, or truncated: train"
            )
        record(files, self.identity)
        log.info(
            "rollouts: %d rows of %d tokens with the teacher's texts, %d not ended within %d tokens, %d empty, %d left out, "
            "written in %.0f s; %s",
            total.rows, total.tokens, total.long, most, wrote["empty"], total.useless, wrote["seconds"], self.folder,
        )  # fmt: skip
        return files.digest
