"""A run's rows as tokens: made once, for every rank, student and run that has the same rows, tokenizer and lengths."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from llmkd import hub
from llmkd.data import arrays, formats, order, other_families, packing, records, slices, token_files, turns
from llmkd.data import rows as text_rows
from llmkd.data import tokens as text_tokens
from llmkd.data.batches import Batch, Family, TokenRow, collate_sequences
from llmkd.data.other_families import collate_for, encoder_for
from llmkd.data.packing import packed_rows
from llmkd.data.rows import HASHES, first_streamed_rows, keep_hashes, source_contents, streamed_rows
from llmkd.data.streams import Place, Share, Stream
from llmkd.data.token_files import Columns, Encode, TokenFiles
from llmkd.data.tokenized import PackedSource, PackedTokens, Tokens
from llmkd.distributed.ranks import World, on_each_node, on_main
from llmkd.errors import InputError
from llmkd.files import digest, sources
from llmkd.models.vocabularies import TOKEN_COLUMNS, check_ids, check_rows
from llmkd.processes import Stopping
from llmkd.provenance import versions
from llmkd.recipe.data import Data, Rows
from llmkd.recipe.inputs import fingerprint
from llmkd.recipe.recipe import Recipe
from llmkd.training.jobs import Job, read_rows

log = logging.getLogger("llmkd")


class StoppedTokenizing(Exception):
    """A signal asked the run to stop before its rows were tokenized; the shards that are done are kept."""


def tokens_of(world: World, job: Job, tokenizer: Any, stopping: Stopping | None = None) -> Tokens:
    """The job's rows as tokens (all ranks take part). One rank of each node makes what is missing; all read the same files.

    Raises StoppedTokenizing where `stopping` is asked to before all are there, and InputError where a row can't be tokenized, where one
    holds a token that only one of the student and its teacher has, and where two nodes made different tokens.
    """

    def asked() -> bool:
        return stopping is not None and stopping.asked

    def make() -> tuple[list[str], list[str], str | None] | None:
        files: list[TokenFiles] = []
        for part in job.data.parts:
            made = _made(job, part, tokenizer, asked)
            if made is None or asked():  # all may have been made by then
                return None
            files.append(made)
        if job.further_tokens:
            for part, of_part in zip(job.data.parts, files, strict=True):
                check_rows(of_part.rows(), job.further_tokens, f"data.source ({part.source})")
        return [str(of_part.folder) for of_part in files], [of_part.digest for of_part in files], hub.last_problem()

    results, own = on_each_node(world, make)
    nodes = [result for result in results if result is not None]
    if own is None or len(nodes) < len(results):
        raise StoppedTokenizing
    _check_same([digests for _, digests, _ in nodes])
    places, _, problem = own
    hub.believe(problem)
    files = [token_files.recorded(Path(folder)) for folder in places]
    assert all(files), "they were recorded just now"
    whole = [of_part for of_part in files if of_part is not None]
    rows, lengths = [of_part.rows() for of_part in whole], [of_part.lengths() for of_part in whole]
    tokens = together(job.data, rows, lengths)
    folders = tuple(of_part.folder for of_part in whole)
    return replace(tokens, folders=folders, digests=tuple(of_part.digest for of_part in whole))


def _check_same(digests: list[list[str]]) -> None:
    """Raise InputError where nodes that share no folder made different tokens."""
    for node, own in enumerate(digests):
        if own != digests[0]:
            raise InputError(
                f"data.source: node {node} made other tokens of it than node 0 ({', '.join(own)}, not {', '.join(digests[0])}); give all "
                "nodes the same files, tokenizer and package versions, or put data.tokens into a folder that they share"
            )


def _made(job: Job, part: Rows, tokenizer: Any, asked: Callable[[], bool]) -> TokenFiles | None:
    """The tokens of one source (one rank of a node); None where it was asked to stop before they were there."""
    folder = job.recipe.tokens_folder(job.data)
    identity = _identity(job.data, folder, job.family, part, tokenizer)
    cut = {"max_length": job.data.max_length, "too_long": job.data.too_long}

    def source() -> Any:
        rows = read_rows(part)
        return rows, encoder_for(job.family, rows.column_names, tokenizer, row_format=part.row_format, **cut)

    made = token_files.made(folder / fingerprint(identity), source, identity=identity, asked=asked, **cut)
    keep_hashes(part.source, part.split, folder / HASHES)
    return made


def found(recipe: Recipe, data: Data, family: Family, tokenizer: Any) -> list[TokenFiles | None]:
    """The tokens of each source of these rows, None where they are not there yet. Nothing is written, and no hash compared."""
    folder = recipe.tokens_folder(data)
    identities = [_identity(data, folder, family, part, tokenizer) for part in data.parts]
    return [token_files.recorded(folder / fingerprint(identity)) for identity in identities]


def _identity(data: Data, folder: Path, family: Family, part: Rows, tokenizer: Any) -> dict[str, Any]:
    """All that decides the tokens of a source, as JSON."""
    keys = set(Rows.model_fields)
    contents = source_contents(part.source, part.split, folder / HASHES)
    if contents is not None:
        keys -= {"source", "split"}  # the same files elsewhere are the same rows
    elif part.source != "records":
        contents = read_rows(part)._fingerprint  # datasets' own hash of the hub's revision and what was done with it
    return {
        "rows": {**part.model_dump(mode="json", include=keys), "contents": contents},
        "code": digest(sources(formats, other_families, records, slices, text_rows, text_tokens, token_files, turns)),
        "versions": versions("datasets", "tokenizers", "transformers"),
        "tokenizer": tokenizer_hash(tokenizer),
        "family": [family.kind, *family.labels, family.start],
        "max_length": data.max_length,
        "too_long": data.too_long,
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what a tokenizer makes of texts and chats."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # set by each call
    else:
        rules = sorted(tokenizer.get_vocab().items())
    behaviour = tokenizer("a", add_special_tokens=True)["input_ids"]
    parts = [type(tokenizer).__name__, rules, tokenizer.chat_template, tokenizer.special_tokens_map, behaviour]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def together(data: Data, rows: Sequence[Dataset], lengths: Sequence[np.ndarray]) -> Tokens:
    """The sources' tokens as one. `rows`, `lengths`: each source's tokenized rows and their lengths."""
    totals = [len(of_part) for of_part in rows]
    weights = order.weighed([weight or total for weight, total in zip(data.weights, totals, strict=True)])
    firsts = np.cumsum([0, *totals]).tolist()
    return Tokens(
        concatenate_datasets(list(rows)),
        tuple(lengths),
        tuple(order.Source(*one, weight=weight) for *one, weight in zip(firsts, totals, weights, strict=False)),
    )


def drawn(
    world: World, job: Job, tokens: Tokens, pad_id: int
) -> tuple[Tokens | PackedTokens, Callable[[np.ndarray], Batch]]:
    """(what batches are drawn from, what makes a micro-batch of its numbers) (all ranks take part)."""
    if job.data.batching == "packed":
        sequences = packed(world, job, tokens)
        return sequences, functools.partial(sequences.batch, pad_id=pad_id)
    return tokens, functools.partial(tokens.batch, collate=collate_for(job.family), pad_id=pad_id)


def packed(world: World, job: Job, tokens: Tokens) -> PackedTokens:
    """The tokens in sequences of `data.max_length` (all ranks take part; one of each node packs where it has not been done)."""
    width, seed = job.data.max_length, tokens.held_out_seed
    code = digest(sources(order, packing))[:8]

    def pack() -> list[PackedSource]:
        return [
            PackedSource(
                *arrays.saved(
                    folder,
                    f"sequences-{number}-{source.held_out}-{seed}-{code}",
                    functools.partial(packed_rows, lengths, number, source, seed, width),
                    count=2,
                )
            )
            for number, (folder, source, lengths) in enumerate(
                zip(tokens.folders, tokens.sources, tokens.lengths, strict=True)
            )
        ]

    on_each_node(world, lambda: len(pack()))
    attention = job.recipe.teacher.attention, job.recipe.student.attention
    weights = tuple(source.weight for source in tokens.sources) if any(job.data.weights) else None
    result = PackedTokens(tokens, tuple(pack()), width, weights, flat="flash_attention_2" in attention)
    if world.is_main:  # all lengths are read
        shape = f"{result.count} sequences of {width} tokens, {result.full:.1%} full"
        log.info("%s: %d rows are packed into %s", job.title, tokens.count, shape)
    return result


FIRST_ROWS = 100
"""Of a stream, what is looked at before training."""


def first_rows(part: Rows, count: int = FIRST_ROWS) -> Dataset:
    """The first rows of a source that is streamed, as text."""
    return first_streamed_rows(part.source, name=part.name, split=part.split, columns=part.columns, count=count)


def no_tokens() -> Tokens:
    """The tokens on disk of a run whose rows are streamed."""
    return Tokens(Dataset.from_dict({}), (), ())


def stream(
    world: World, job: Job, tokenizer: Any, pad_id: int, accumulation: int, saved: tuple[int, dict[str, Any]] | None
) -> Stream:
    """This rank's stream of the job's rows (all ranks take part); `saved`: the steps done, and a place in the stream, of a resumed run.

    Raises InputError where its first rows can't be trained on.
    """
    data = job.data
    cut = {"max_length": data.max_length, "too_long": data.too_long}
    packed = data.batching == "packed"

    def encoder(columns: Sequence[str], row_format: formats.RowFormat) -> Encode:
        encode = encoder_for(job.family, columns, tokenizer, row_format=row_format, **cut)
        return functools.partial(_shared_tokens, encode, job.further_tokens, data.source)

    def look() -> str:
        first = first_rows(data)
        encoder(first.column_names, data.row_format)(first[:], list(range(len(first))))
        among = formats.GUESSED if job.family.kind == "decoder" else other_families.FORMATS[job.family.kind][1:]
        return formats.format_of(first.column_names, data.format, among)

    # decided once: a later row may have columns that fit another format too
    row_format = replace(data.row_format, format=on_main(world, look))
    attention = job.recipe.teacher.attention, job.recipe.student.attention
    width = data.max_length * (job.train.micro_batch_size if "flash_attention_2" in attention else 1)
    collate = collate_for(job.family)

    def make(units: list[list[TokenRow]]) -> Batch:
        numbers = [row["row"] for unit in units for row in unit]
        if not packed:
            return collate([row for [row] in units], pad_id=pad_id, packed=False, numbers=numbers)
        together = [sum(units, [])] if width > data.max_length else units
        return collate_sequences(together, width=width, pad_id=pad_id, numbers=numbers)

    share = Share(
        rank=world.rank,
        world_size=world.size,
        accumulation=accumulation,
        micro_batch_size=job.train.micro_batch_size,
        seed=job.seed,
        shuffle_rows=data.shuffle_rows,
        packed=packed,
        **cut,
    )
    source = streamed_rows(data.source, name=data.name, split=data.split, columns=data.columns)
    place = None if saved is None else (saved[0], Place.of(saved[1]))
    encode = functools.partial(encoder, row_format=row_format)
    return Stream(source, encode, make, share, names=data.columns, saved=place)


def _shared_tokens(
    encode: Encode, further: Mapping[int, str], source: str, columns: Columns, numbers: list[int]
) -> Columns:
    """What `encode` makes of some rows. Raises InputError for a token that only one of the student and its teacher has."""
    encoded = encode(columns, numbers)
    for name in (name for name in TOKEN_COLUMNS if further and name in encoded):
        for number, ids in zip(numbers, encoded[name], strict=True):
            check_ids(ids, further, f"row {number} of data.source ({source})")
    return encoded
