"""What a recipe's rows are once they are tokens: how many, what is trained, how they mix and fill batches, where they lie on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from llmkd.data.batches import MULTIPLE, Family
from llmkd.data.formats import FORMATS, FURTHER, format_of, is_chat
from llmkd.data.order import counts
from llmkd.data.packing import packed_rows
from llmkd.data.token_files import opened
from llmkd.data.tokenized import PackedSource, PackedTokens, Tokens
from llmkd.data.tokens import tokenize
from llmkd.data.turns import THOUGHTS, THOUGHTS_END
from llmkd.models.vocabularies import ROWS_AT_ONCE, check_rows
from llmkd.planning.run_checks import check_length, check_prompted
from llmkd.recipe.data import Data, Rows
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.run import Train
from llmkd.text import figures
from llmkd.training.build import total_steps
from llmkd.training.jobs import read_rows
from llmkd.training.tokens import first_rows, found, together
from llmkd.training.validation_rows import check_apart, divided, held_out_count, named_validation

EMPTY = f"{THOUGHTS}{THOUGHTS_END}"
LOOKED_AT = 100
"""How many rows of a source are searched for empty thoughts."""
MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """A result of one check: `warning` for what will probably spoil a run, `note` for what is good to know."""

    grade: Literal["ok", "note", "warning"]
    what: str


@dataclass(frozen=True)
class SourceTokens:
    """A source's rows, as text and as tokens."""

    name: str
    """What findings begin with: `data`, or of several sources `data (NAME)`."""
    part: Rows
    rows: Dataset
    tokens: Dataset
    """input_ids, trained, length, row."""


def tokenized(recipe: Recipe, data: Data, tokenizer: Any, further: Mapping[int, str]) -> list[SourceTokens]:
    """Each source's rows; a run's tokens of them where they are there. `further`: the tokens that only one of student and teacher has.

    `data`: the recipe's, or its rows of validation. Raises InputError as a run would: for rows that can't be read or tokenized, and for one
    that holds such a token.
    """
    sources = []
    files = [] if data.streaming else found(recipe, data, Family("decoder"), tokenizer)
    whole = [None if of_part is None else opened(of_part.folder) for of_part in files]
    made = [of_part.rows() for of_part in whole if of_part is not None]
    for number, (name, part) in enumerate(zip(data.names, data.parts, strict=True)):
        rows = first_rows(part) if data.streaming else read_rows(part)
        cut = {"max_length": data.max_length, "too_long": data.too_long}
        there = len(made) == len(data.parts)
        tokens = made[number] if there else tokenize(rows, tokenizer, row_format=part.row_format, **cut)
        check_rows(tokens, further, f"data.source ({part.source})")
        sources.append(SourceTokens(f"data ({name})" if data.sources else "data", part, rows, tokens))
    return sources


def validated(recipe: Recipe, tokenizer: Any, further: Mapping[int, str]) -> list[SourceTokens]:
    """As `tokenized`, the rows of validation that have a source or split of their own; none of a share."""
    check_apart(recipe.data)
    with named_validation():
        return [] if recipe.data.held_out is None else tokenized(recipe, recipe.data.held_out, tokenizer, further)


def data_findings(
    recipe: Recipe, sources: Sequence[SourceTokens], apart: Sequence[SourceTokens], tokenizer: Any
) -> list[Finding]:
    """What there is to say about the rows of a decoder's recipe, source after source, then about all of them.

    `apart`: the rows of validation of their own. Raises InputError where a run could not draw its batches from the rows.
    """
    findings = []
    if recipe.data.streaming:
        text = f"data: a stream; what is said of its rows is said of the first {len(sources[0].rows)}"
        findings.append(Finding("note", text))
    for source in sources:
        findings += [*_unread(source), *_template(source, tokenizer), *_counts(source, tokenizer)]
    lengths = [lengths_of(source.tokens) for source in sources]
    tokens = divided(recipe.data, together(recipe.data, [source.tokens for source in sources], lengths))
    drawn = (
        tokens
        if recipe.data.batching == "grouped"
        else packed(tokens, recipe.data.max_length, any(recipe.data.weights))
    )
    check_prompted(recipe, tokens)
    check_length(recipe, drawn)
    if recipe.data.streaming:  # nothing is counted before training, or kept
        return [*findings, _filled(recipe, drawn), *_validation(recipe, sources, apart)]
    findings += [*_mixture(recipe, drawn), _filled(recipe, drawn), *_validation(recipe, sources, apart)]
    return [*findings, _on_disk(recipe, tokenizer)]


def _unread(source: SourceTokens) -> list[Finding]:
    """The columns that training does not look at: a file may hold in one of them what its user counts on."""
    format = format_of(source.rows.column_names, source.part.format)
    read = {*FORMATS[format], *FURTHER[format]}
    unread = [column for column in source.rows.column_names if column not in read]
    return [Finding("note", f"{source.name}: the columns {', '.join(unread)} are not read")] if unread else []


def _template(source: SourceTokens, tokenizer: Any) -> list[Finding]:
    """What the chat template does that a user may not expect: empty thoughts that are trained, options that no row needs."""
    findings = []
    format = format_of(source.rows.column_names, source.part.format)
    if source.part.template_options and (
        format == "text" or not is_chat(source.rows[0], format, bool(tokenizer.chat_template))
    ):
        text = f"{source.name}: data.template_options are for chats, and the rows are texts, which no template writes"
        findings.append(Finding("warning", text))
    first = source.tokens.select(range(min(LOOKED_AT, len(source.tokens))))
    empty = sum(map(partial(_has_empty_thoughts, tokenizer), first["input_ids"], first["trained"]))
    if empty:
        text = f"{empty} of the first {len(first)} rows have no thoughts, and the chat template writes {EMPTY}, which is trained"
        if "enable_thinking" in str(tokenizer.chat_template):
            text += "; with data.template_options: {enable_thinking: false} it is a part of the prompt, here and when a model answers"
        findings.append(Finding("note", f"{source.name}: {text}"))
    return findings


def _has_empty_thoughts(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> bool:
    """Whether a row's trained tokens hold them."""
    text = tokenizer.decode([token for token, is_trained in zip(ids, trained, strict=True) if is_trained])
    return EMPTY in "".join(text.split())


def _counts(source: SourceTokens, tokenizer: Any) -> list[Finding]:
    """The rows, their tokens, and those of them that are trained."""
    data, name = source.tokens, source.name
    format = format_of(source.rows.column_names, source.part.format)
    lengths = lengths_of(data)
    quarter, half, most = (int(q) for q in np.quantile(lengths, (0.25, 0.5, 1.0), method="nearest"))
    tokens = int(lengths.sum())
    spread = f"lengths {quarter} (quarter), {half} (half), {most} (longest)"
    rows = Finding("ok", f"{name}: {len(data):,} rows of the format {format}, {tokens:,} tokens; {spread}")
    if format == "prompts":
        return [rows, Finding("ok", f"{name}: what is trained is written (section rollouts)")]
    trained, lasts = trained_of(data)
    findings = [
        rows,
        Finding(
            "ok" if trained else "warning", f"{name}: {trained:,} tokens are trained, {trained / tokens:.1%} of all"
        ),
    ]
    unended = int((lasts != tokenizer.eos_token_id).sum())
    if unended:
        text = f"{name}: of {unended:,} rows the last trained token is not the end token (cut short, or a template's own end)"
        findings.append(Finding("note", text))
    if len(source.rows) > len(data):
        text = f"{name}: {len(source.rows) - len(data):,} of {len(source.rows):,} rows are left out, too long or with nothing to train"
        findings.append(Finding("note", text))
    return findings


def lengths_of(tokens: Dataset) -> np.ndarray:
    """[rows] tokens of each row."""
    whole: Any = tokens.select_columns("length").with_format("arrow")[:]
    return whole["length"].to_numpy()


def trained_of(tokens: Dataset) -> tuple[int, np.ndarray]:
    """(how many tokens are trained, by row the last trained one) of rows that all have one; a row's first token is read, not trained."""
    count, lasts = 0, [np.empty(0, dtype=np.int32)]
    tables: Any = tokens.select_columns(["input_ids", "trained", "length"]).with_format("arrow").iter(ROWS_AT_ONCE)
    for part in tables:
        ids, marks = (
            part[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in ("input_ids", "trained")
        )
        lengths = part["length"].to_numpy()
        ends = lengths.cumsum()
        trained = np.flatnonzero(marks)
        lasts.append(ids[trained[np.searchsorted(trained, ends) - 1]])
        count += len(trained) - int(marks[ends - lengths].sum())
    return count, np.concatenate(lasts)


def packed(tokens: Tokens, width: int, weighed: bool) -> PackedTokens:
    """The rows in sequences of `width` tokens, as a run packs them; `weighed`: whether the recipe weighs its sources."""
    lengths, seed = tokens.lengths, tokens.held_out_seed
    sources = [
        PackedSource(*packed_rows(lengths[number], number, source, seed, width))
        for number, source in enumerate(tokens.sources)
    ]
    weights = tuple(source.weight for source in tokens.sources) if weighed else None
    return PackedTokens(tokens, tuple(sources), width, weights)


def _mixture(recipe: Recipe, drawn: Tokens | PackedTokens) -> list[Finding]:
    """What each of several sources gives to a step, and how often its rows are seen."""
    if len(drawn.sources) == 1:
        return []
    steps = total_steps(recipe.train, drawn.count)
    taken = counts(steps * recipe.train.batch_size, drawn.sources)
    weights = sum(source.weight for source in drawn.sources)
    unit = "sequences" if isinstance(drawn, PackedTokens) else "rows"
    parts = [
        f"{name} {source.weight / weights:.1%} ({count:,} {unit}, {figures(count / source.trained, 3)} passes)"
        for name, source, count in zip(recipe.data.names, drawn.sources, taken, strict=True)
    ]
    return [Finding("ok", f"data: in {steps:,} steps of {recipe.train.batch_size} {unit}: {', '.join(parts)}")]


def _filled(recipe: Recipe, drawn: Tokens | PackedTokens) -> Finding:
    """How much of the batches is tokens, and of packed ones how many a step has."""
    if isinstance(drawn, PackedTokens):
        shape = f"{drawn.count:,} sequences of {drawn.width:,} tokens"
        filled = f"{drawn.tokens.count:,} rows are packed into {shape}, {drawn.full:.1%} full"
        sequences = recipe.train.batch_size
        step = f"a step takes {sequences:,} of them, {sequences * drawn.width:,} tokens at most"
        return Finding("ok", f"data: {filled}; {step}")
    return Finding("ok", f"data: {_padding(recipe, drawn):.1%} of the places of a batch are padding (never counted)")


def _padding(recipe: Recipe, tokens: Tokens) -> float:
    """The share of padding in the first pass's micro-batches, on one rank."""
    size = recipe.train.batch_size
    windows = range(max(1, tokens.count // (tokens.window_steps(size) * size)))
    order = np.concatenate([tokens.window(window, batch_size=size, seed=recipe.seed).ravel() for window in windows])
    micro = tokens.lengths_of(order).reshape(-1, recipe.train.micro_batch_size)
    width = -(-micro.max(axis=1) // MULTIPLE) * MULTIPLE
    return float(1 - micro.sum() / (width.sum() * recipe.train.micro_batch_size))


def _validation(recipe: Recipe, sources: Sequence[SourceTokens], apart: Sequence[SourceTokens]) -> list[Finding]:
    """The rows that are validated, where the recipe names some, and those that a share takes from training."""
    given = recipe.data.validation
    if given is None:
        return []
    if given.share is not None:
        rows = [len(source.tokens) for source in sources]
        count = sum(held_out_count(of_source, given.share) for of_source in rows)
        text = f"validation: {count:,} of the {sum(rows):,} rows are held out and never trained on"
    else:
        count = sum(len(source.tokens) for source in apart)
        unused = sum(len(source.rows) for source in apart) - count
        left_out = f" ({unused:,} more are left out, too long or with nothing to train)" if unused else ""
        text = f"validation: {count:,} rows of their own{left_out}"
    text += f", {min(count, given.rows):,} of them are validated"
    if recipe.train.validate_every:
        return [Finding("ok", f"{text} every {recipe.train.validate_every} steps"), *_chosen(recipe.train)]
    return [Finding("note", f"{text} when train.validate_every is set, which it is not")]


def _chosen(train: Train) -> list[Finding]:
    """Which validation decides what is exported, and when a run stops."""
    best = f"{'highest' if train.keep_by == 'validation/agreement' else 'lowest'} {train.keep_by}"
    texts = [f"the student of the step with the {best} is exported"] * (train.keep == "best")
    if train.patience is not None:
        texts.append(f"a run stops after {train.patience} validations in a row without a new {best}")
    return [Finding("ok", f"validation: {'; '.join(texts)}")] if texts else []


def _on_disk(recipe: Recipe, tokenizer: Any) -> Finding:
    """Where a run keeps the tokens, and whether they are there already."""
    files = found(recipe, recipe.data, Family("decoder"), tokenizer)
    there = [of_source for of_source in files if of_source is not None]
    mib = sum(shard.bytes for of_source in there for shard in of_source.shards) / MIB
    where = f"tokens: kept in {recipe.tokens_folder(recipe.data)}, for all runs that have the same"
    if not there:
        return Finding("ok", f"{where}; not made yet")
    which = (
        "there already" if len(there) == len(files) else f"those of {len(there)} of the {len(files)} sources are there"
    )
    return Finding("ok", f"{where}; {which}, {mib:,.1f} MiB")
