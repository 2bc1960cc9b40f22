"""Rows of text to micro-batches: which tokens are trained, in which order, padded or packed.

The order is a pure function of (seed, step), so a run resumes at the exact row by knowing its step, and the rows of a
step do not depend on the number of ranks or on accumulation.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from torch import Tensor

from llmkd import records
from llmkd.errors import InputError

log = logging.getLogger("llmkd")

IGNORE = -100
MULTIPLE = 8
"""To which the rows of a batch are padded."""
FORMATS = {"prompt_completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
SAID = "llmkd0said0here"
"""Stands for what an assistant says while a chat template is asked what it writes around it."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Positions are those of states: `targets[b, t]` is the token that position t must predict."""

    input_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, T], counted from 0 in each row (packed: in each document)
    attention_mask: Tensor | None  # [B, T]; None when packed, where position_ids keep documents apart
    targets: Tensor  # [B, T], IGNORE where the next token is not trained
    attended: Tensor  # [B, T] bool, False at padding
    trained_at: Tensor  # [N] flat positions with a target
    attended_at: Tensor  # [M] flat positions that are not padding
    rows: tuple[int, ...] = ()  # the rows' numbers in the tokenized data, in the order in which they stand here
    segments: Tensor | None = None  # [B, T] to which of two texts a token belongs, where an encoder is told
    source_ids: Tensor | None = None  # [B, S] what an encoder-decoder's encoder reads; all else is then its decoder's
    source_attended: Tensor | None = None  # [B, S] bool, False at padding
    source_at: Tensor | None = None  # [K] flat positions of the source that are not padding

    def to(self, device: torch.device) -> Batch:
        """The same batch on the device."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {k: v for k, v in parts.items() if isinstance(v, Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})

    @property
    def counts(self) -> tuple[int, int]:
        """(trained positions, attended positions); shapes only, nothing is read from the device."""
        return self.trained_at.numel(), self.attended_at.numel()

    @property
    def source_count(self) -> int:
        """How many positions of the source are not padding; 0 where there is none."""
        return 0 if self.source_at is None else self.source_at.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def load_rows(source: str, *, name: str | None, split: str, rows: int | None, records_seed: int = 0) -> Dataset:
    """The rows of the built-in task, of local files or of a hub data set. Raises InputError when there are none."""
    if source == "records":
        if rows is None:
            raise InputError("data.rows: the built-in task is endless; say how many rows to use, e.g. rows: 20000")
        made = records.rows(split, records_seed, 0, rows)
        return Dataset.from_list([{"prompt": e["prompt"], "completion": e["completion"]} for e in made])
    path = Path(source).expanduser()
    if path.exists():
        data = _local_rows(path, split)
    elif source.endswith((*LOADERS, ".gz")) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(
            f"data.source: no file or folder {source!r}; give a .jsonl, .parquet or .csv, a folder of them, a hub "
            "name, or records"
        )
    else:
        data = _hub_rows(source, name, split)
    if rows is not None:
        data = data.select(range(min(rows, len(data))))
    if len(data) == 0:
        raise InputError(f"data.source: {source!r} (split {split!r}) holds no rows; give data with some")
    return data


def source_contents(source: str, split: str) -> str | None:
    """A hash of the local files that a source's rows come from; None for the built-in task and the hub."""
    path = Path(source).expanduser()
    if source == "records" or not path.exists():
        return None
    digest = hashlib.sha256()
    for file in _files(path, split):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()} ".encode())
    return digest.hexdigest()[:16]


def _files(path: Path, split: str) -> list[Path]:
    return _of_split(sorted(f for f in path.iterdir() if _kind(f)), path, split) if path.is_dir() else [path]


def _local_rows(path: Path, split: str) -> Dataset:
    if not split.replace("_", "").isalnum():
        raise InputError(
            f"data.split: {split!r} is more than a name, which only the hub reads; use data.rows to take fewer"
        )
    files = _files(path, split)
    kinds = {_kind(f) for f in files}
    if len(kinds) != 1 or None in kinds:
        raise InputError(
            f"data.source: {str(path)!r} must be (or hold) files of one kind: {', '.join(LOADERS)}, each may end in .gz"
        )
    kind = str(kinds.pop())
    # In a CSV an empty cell is an empty text, and the word None or NA is that word.
    options: dict[str, Any] = {"keep_default_na": False} if kind == "csv" else {}
    try:
        return load_dataset(kind, data_files={"rows": [str(f) for f in files]}, split="rows", **options)
    except Exception as error:  # datasets wraps every parser's own error
        if not any(f.stat().st_size for f in files) or "corresponds to no data" in str(error):
            raise InputError(f"data.source: {str(path)!r} holds no rows; give data with some") from error
        reason = _first_line(error.__cause__ or error)
        raise InputError(f"data.source: {str(path)!r} can't be read as {kind} ({reason}); mend the file") from error


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """The files of a folder; where one is named after a split (train.jsonl, test-0001.parquet), this split's alone."""

    def named(file: Path, word: str) -> bool:
        return re.search(rf"(^|[^a-z]){word}([^a-z]|$)", file.name.lower()) is not None

    if not any(named(file, word) for file in files for word in SPLITS):
        return files
    chosen = [file for file in files if named(file, split)]
    if not chosen:
        raise InputError(
            f"data.split: no file of {str(folder)!r} is named after {split!r} ({', '.join(f.name for f in files)}); "
            "write the split that you mean, or give one file as data.source"
        )
    return chosen


def _kind(file: Path) -> str | None:
    suffixes = [s for s in file.suffixes if s != ".gz"]
    return LOADERS.get(suffixes[-1]) if suffixes else None


def _hub_rows(source: str, name: str | None, split: str) -> Dataset:
    try:
        return load_dataset(source, name, split=split)
    except Exception as error:  # the hub client has a score of network errors; all mean the same to the user
        raise InputError(
            f"data.source: {source!r} is no file here and the hub did not give it ({_first_line(error)}); check the "
            "name, data.name and data.split, or give a local file"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def tokenize(rows: Dataset, tokenizer: Any, *, format: str, max_length: int, too_long: str) -> Dataset:
    """Rows -> {input_ids, trained (per token), length, row}. Prompts are not trained; of a chat, what the assistant says is.

    `row` is the row's number. Prompt and completion are tokenized apart, as they are when the model later continues the
    prompt. Raises InputError for a row that lacks its columns, or when no row is left.
    """
    format = _format_of(rows.column_names) if format == "auto" else format
    check_columns(rows, FORMATS[format], format)
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token, by which a student learns to stop; set its eos_token"
        )
    encode = {"prompt_completion": _prompt_completion, "messages": _messages, "text": _text}[format]

    def encoded(columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
        _check_text(columns, format, numbers)
        ids, trained = encode(columns, tokenizer, numbers)
        whole = [len(i) for i in ids]
        if too_long == "truncate":
            ids, trained = [i[:max_length] for i in ids], [t[:max_length] for t in trained]
        useful = [any(t[1:]) for t in trained]
        length = [len(i) for i in ids]
        return {
            "input_ids": ids,
            "trained": trained,
            "length": length,
            "whole": whole,
            "useful": useful,
            "row": numbers,
        }

    found = rows.map(
        encoded, batched=True, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
    )
    return kept_rows(found, max_length=max_length, too_long=too_long)


def check_columns(rows: Dataset, needed: Sequence[str], format: str) -> None:
    """Raise InputError where a format's column is not there."""
    missing = [column for column in needed if column not in rows.column_names]
    if missing:
        raise InputError(
            f"data.format: {format} needs the column {missing[0]!r}, the data has {', '.join(rows.column_names)}; "
            "rename the column, or choose another format"
        )


def kept_rows(found: Dataset, *, max_length: int, too_long: str) -> Dataset:
    """The tokenized rows that are trained on, by their columns `whole` (tokens before any cut) and `useful`, which go.

    Raises InputError when no row is left.
    """
    long, useful = np.array(found["whole"]) > max_length, np.array(found["useful"])
    kept = np.flatnonzero(useful & (~long | (too_long == "truncate")))
    if long.any() or not useful.all():
        fate = "truncated" if too_long == "truncate" else "dropped"
        log.info(
            "data: %d of %d rows are used; %d longer than %d tokens (%s), %d with nothing to train (dropped)",
            len(kept), len(useful), long.sum(), max_length, fate, (~useful).sum(),
        )  # fmt: skip
    if len(kept) == 0:
        raise InputError(
            f"data.max_length: no row has a token to train within {max_length} tokens; write a larger max_length, or "
            "look at the data"
        )
    return found.select(kept).remove_columns(["whole", "useful"])


def _format_of(columns: Sequence[str]) -> str:
    for format, needed in FORMATS.items():
        if all(column in columns for column in needed):
            return format
    raise InputError(
        f"data.format: columns {', '.join(columns)} are none of prompt + completion, messages, text; rename them, or "
        "choose a format"
    )


Encoded = tuple[list[list[int]], list[list[bool]]]


def _check_text(columns: dict[str, list[Any]], format: str, numbers: list[int]) -> None:
    for column in FORMATS[format]:
        for number, value in zip(numbers, columns[column], strict=True):
            if column != "messages" and not isinstance(value, str):
                cure = "for chats name the column messages" if isinstance(value, list) else "make it a text"
                raise InputError(f"data row {number}: {column} must be text, it is {type(value).__name__}; {cure}")


def _prompt_completion(columns: dict[str, list[Any]], tokenizer: Any, numbers: list[int]) -> Encoded:
    prompts = leading(tokenizer, columns["prompt"])
    completions = _closed(tokenizer(columns["completion"], add_special_tokens=False)["input_ids"], tokenizer)
    both = list(zip(prompts, completions, strict=True))
    return [p + c for p, c in both], [[False] * len(p) + [True] * len(c) for p, c in both]


def leading(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts that open a sequence: with the tokenizer's leading tokens, without a closing one it may add."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = tokenizer("a", add_special_tokens=True)["input_ids"]
    opens, closes = bos is not None and added[:1] == [bos], added[-1:] == [eos]
    encoded = [ids[:-1] if closes else ids for ids in tokenizer(texts, add_special_tokens=True)["input_ids"]]
    return [ids[1:] if opens and ids[:2] == [bos, bos] else ids for ids in encoded]  # the text brought its own


def _closed(encoded: list[list[int]], tokenizer: Any) -> list[list[int]]:
    """The ids with an end-of-sequence token, one even where the text brought its own."""
    eos = tokenizer.eos_token_id
    return [ids if ids[-1:] == [eos] else [*ids, eos] for ids in encoded]


def _text(columns: dict[str, list[Any]], tokenizer: Any, numbers: list[int]) -> Encoded:
    texts = _closed(leading(tokenizer, columns["text"]), tokenizer)
    # An empty line is no document; trained on, it would teach to stop at once.
    return texts, [[bool(text.strip())] * len(ids) for text, ids in zip(columns["text"], texts, strict=True)]


def _messages(columns: dict[str, list[Any]], tokenizer: Any, numbers: list[int]) -> Encoded:
    encoded = []
    for number, messages in zip(numbers, columns["messages"], strict=True):
        try:
            encoded.append(conversation(messages, tokenizer))
        except InputError as error:
            raise InputError(f"data row {number}: {error}") from error
    return [ids for ids, _ in encoded], [trained for _, trained in encoded]


def conversation(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A chat through the tokenizer's template: (ids, trained). What the assistant says is trained, its end of turn too.

    Raises InputError where that can't be told.
    """
    if not (
        isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    ):
        raise InputError('messages must be a list of turns; write [{"role": "user", "content": "..."}, ...]')
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; give prompt and completion, or give the tokenizer one")
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InputError("the conversation has no turn of the role assistant; add one, there is nothing to train on")
    whole = rendered(messages, tokenizer)
    spans = [_said(messages, turn, whole, tokenizer) for turn in turns]
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    # Some tokenizers leave white space out of a token's place, so that (a, b) may be (b, b).
    trained = [any(start <= a and start < b <= end for start, end in spans) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], trained


def _said(messages: list[dict[str, str]], turn: int, whole: str, tokenizer: Any) -> tuple[int, int]:
    """Where an assistant's turn stands in the rendered chat: from the end of the generation prompt to its end of turn.

    A template may write a turn otherwise once others follow (Qwen3 leaves out what was thought), so the place is found
    from what stands around a stand-in for the words, in the whole chat and where the chat ends with this turn.
    """
    upto = [*messages[:turn], {**messages[turn], "content": SAID}]
    opening, _, closing = rendered(upto, tokenizer).partition(SAID)
    after = rendered([*upto, *messages[turn + 1 :]], tokenizer).partition(SAID)[2] if messages[turn + 1 :] else closing
    if not after.startswith(closing):  # Phi-3 ends a whole chat with a further token
        closing = re.sub(r"\s\S*$", "", os.path.commonprefix([closing, after]))
    end = len(whole) - len(after) + len(closing.rstrip() or closing)
    before = rendered(messages[:turn], tokenizer, add_generation_prompt=True) if turn else opening
    start = len(os.path.commonprefix([whole, before]))
    told = len(os.path.commonprefix([before, rendered(messages[:turn], tokenizer)])) if turn else 0
    if SAID in whole or not whole.endswith(after) or not told <= start <= end:
        raise InputError(
            f"the chat template writes what precedes turn {turn} otherwise once that turn is there, so the assistant's "
            "tokens can't be told apart; give prompt and completion instead"
        )
    return start, end


def rendered(messages: list[dict[str, str]], tokenizer: Any, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program of its own, and may raise anything
        reason = _first_line(error)
        raise InputError(f"the tokenizer's chat template refuses the messages ({reason}); mend one of them") from error


# ---------------------------------------------------------------------------------------------------------------------
# Order


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Whole batches in one pass; the rest of the rows sits out, others each time."""
    if rows < batch_size:
        raise InputError(
            f"train.batch_size: {batch_size} rows per step, but the data has only {rows}; write a smaller batch, or "
            "give more rows"
        )
    return rows // batch_size


def epoch_batches(lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int, grouped: bool) -> np.ndarray:
    """[steps, batch_size] row numbers of one pass, longest first in each step. A pure function of its arguments.

    Grouped: within windows of about 32 batches rows are sorted by length before they are cut into batches, and the
    batches shuffled.
    """
    steps = steps_per_epoch(len(lengths), batch_size)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))[: steps * batch_size]
    if grouped:
        windows = np.array_split(order, math.ceil(steps / 32))
        order = np.concatenate([w[np.argsort(-lengths[w], kind="stable")] for w in windows])
    cut = order.reshape(steps, batch_size)
    if grouped:
        cut = cut[random.permutation(steps)]
    return np.stack([b[np.argsort(-lengths[b], kind="stable")] for b in cut])


def micro_batch_rows(rows: np.ndarray, *, rank: int, world_size: int, accumulation: int) -> list[np.ndarray]:
    """This rank's micro-batches of a step; neighbours in length go to different ranks, so that none waits long."""
    return list(rows.reshape(accumulation, world_size, -1)[:, rank])


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def collate(
    rows: Sequence[dict[str, Any]], *, pad_id: int, packed: bool, multiple: int = MULTIPLE, numbers: Sequence[int] = ()
) -> Batch:
    """Tokenized rows -> one Batch: padded on the right to a multiple of 8, or packed end to end in one row.

    `numbers`: which rows of the data these are, where somebody asks (a cached teacher does).
    """
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    targets = [_targets(i, torch.as_tensor(row["trained"])) for i, row in zip(ids, rows, strict=True)]
    if packed:
        input_ids, target = torch.cat(ids)[None], torch.cat(targets)[None]
        position_ids = torch.cat([torch.arange(len(i)) for i in ids])[None]
        attended = torch.ones_like(input_ids, dtype=torch.bool)
        mask = None
    else:
        width = -(-max(len(i) for i in ids) // multiple) * multiple
        input_ids = torch.stack([_padded(i, width, pad_id) for i in ids])
        target = torch.stack([_padded(t, width, IGNORE) for t in targets])
        attended = torch.stack([_padded(torch.ones_like(i), width, 0) for i in ids]).bool()
        position_ids = torch.arange(width).expand(len(ids), width).contiguous()
        mask = attended.long()
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        targets=target,
        attended=attended,
        trained_at=(target.flatten() != IGNORE).nonzero().flatten(),
        attended_at=attended.flatten().nonzero().flatten(),
        rows=tuple(int(number) for number in numbers),
    )


def _targets(ids: Tensor, trained: Tensor) -> Tensor:
    """[T]: the next token where it is trained, else IGNORE. The last one predicts none: nothing crosses documents."""
    following = torch.where(trained.bool(), ids, IGNORE)[1:]
    return torch.cat([following, torch.tensor([IGNORE])])


def _padded(values: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - len(values)), value=fill)


def announced(steps: Iterator[list[Batch]], tell: Callable[[list[Batch]], None]) -> Iterator[list[Batch]]:
    """The same steps; `tell` hears of each when the step before it is about to be trained."""
    waiting: list[list[Batch]] = []
    for batches_of_step in steps:
        tell(batches_of_step)
        waiting.append(batches_of_step)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def batches(
    data: Dataset,
    *,
    seed: int,
    start_step: int,
    steps: int,
    batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    pad_id: int,
    packed: bool,
    make: Callable[..., Batch] = collate,
) -> Iterator[list[Batch]]:
    """For each step from `start_step` on, this rank's micro-batches, made ready one step ahead; `make` makes one of its rows."""
    lengths = np.array(data["length"])
    per_epoch = steps_per_epoch(len(lengths), batch_size)

    @functools.lru_cache(maxsize=1)
    def of_epoch(epoch: int) -> np.ndarray:
        return epoch_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch, grouped=not packed)

    def of_step(step: int) -> list[Batch]:
        epoch, place = divmod(step, per_epoch)
        mine = micro_batch_rows(of_epoch(epoch)[place], rank=rank, world_size=world_size, accumulation=accumulation)
        return [
            make([data[int(r)] for r in micro], pad_id=pad_id, packed=packed, numbers=micro.tolist()) for micro in mine
        ]

    # A thread, not a worker process: a process would be ended by the signal that asks this one to save and stop.
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(of_step, start_step) if start_step < steps else None
        for step in range(start_step, steps):
            assert following is not None
            ready = following.result()
            following = ahead.submit(of_step, step + 1) if step + 1 < steps else None
            yield ready
