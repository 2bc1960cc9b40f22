"""From rows to batches: which tokens are trained, that packed documents are apart, and that the order is what it says."""

from __future__ import annotations

import functools
import gzip
import json
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from llmkd.data.batches import IGNORE, Batch, batches, collate, micro_batch_rows, steps_per_epoch
from llmkd.data.formats import RowFormat
from llmkd.data.order import Source, rows_of_window, window_steps
from llmkd.data.packing import packed_rows
from llmkd.data.rows import load_rows, source_contents, streamed_rows
from llmkd.data.tokenized import PackedSource, PackedTokens, Tokens
from llmkd.data.tokens import conversation, tokenize
from llmkd.errors import InputError
from llmkd.evaluation.held_out import Prompt, encoded
from llmkd.models import make as making
from llmkd.models import parts

CORPUS = ["user assistant system think one two three, yes no? Fine. What is it", "name red blue green"]
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]

# What Qwen3's template does: an empty thought before what is said after the last question, none before what was said earlier.
QWEN3_LIKE = """
{%- set ns = namespace(last = -1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in message.content else '' %}
    {%- set thought = message.reasoning_content or thought %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
"""What Qwen3's template does with thoughts: written in the last answer alone, empty ones too; off, the prompt has the empty ones."""
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2_LIKE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
PHI3_LIKE = (  # ends a whole chat with a token of its own
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets keeps of a test's files is gone after the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_tokenizer(*, adds: str = "", pad_is_eos: bool = False, template: str | None = None, trim: bool = False) -> Any:
    """A byte-level tokenizer. `adds`: what it puts around a text by itself, e.g. "<bos> $A <eos>"."""
    tokenizer = making.new_tokenizer(CORPUS, 300)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": CHAT_TOKENS})
    if adds:
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=special)
    if trim:  # as GPT-2's and RoBERTa's: a token's place leaves out its spaces
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = template
    return tokenizer


def tokenized(rows: list[dict[str, Any]], tokenizer: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {"row_format": RowFormat(), "max_length": 100, "too_long": "drop", **changes}
    return tokenize(Dataset.from_list(rows), tokenizer, **settings)


def texts(row: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    """(all of a row, what of it is trained), as text."""
    trained = [i for i, t in zip(row["input_ids"], row["trained"], strict=True) if t]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(trained)


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens are trained


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize(
    ("adds", "opening"), [("", ""), ("<bos> $A", "<bos>"), ("$A <eos>", ""), ("<bos> $A <eos>", "<bos>")]
)
def test_prompt_is_not_trained_and_one_eos_is(adds: str, opening: str, pad_is_eos: bool) -> None:
    tokenizer = make_tokenizer(adds=adds, pad_is_eos=pad_is_eos)
    (row,) = tokenized([{"prompt": "one two", "completion": " three"}], tokenizer)
    assert texts(row, tokenizer) == (f"{opening}one two three<eos>", " three<eos>")
    batch = collate([row, row], pad_id=tokenizer.pad_token_id, packed=False)
    assert (batch.targets == tokenizer.eos_token_id).sum() == 2  # eos is a target even where it is the pad too
    assert batch.counts == (2 * sum(row["trained"]), 2 * len(row["input_ids"]), 0)


@pytest.mark.parametrize("adds", ["", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_text_is_trained_whole(adds: str) -> None:
    tokenizer = make_tokenizer(adds=adds)
    (row,) = tokenized([{"text": "one two"}], tokenizer)
    assert texts(row, tokenizer)[0] == ("<bos>" if "bos" in adds else "") + "one two<eos>"
    assert all(row["trained"])


@pytest.mark.parametrize("adds", ["", "<bos> $A <eos>"])
def test_special_tokens_that_the_text_brings_are_not_doubled(adds: str) -> None:
    tokenizer = make_tokenizer(adds=adds)
    rows = [{"prompt": "<bos>one", "completion": " two<eos>"}, {"prompt": "<bos>one", "completion": " two"}]
    for row in tokenized(rows, tokenizer):
        assert texts(row, tokenizer)[0] == "<bos>one two<eos>"
    (row,) = tokenized([{"text": "<bos>one two<eos>"}], tokenizer)
    assert texts(row, tokenizer)[0] == "<bos>one two<eos>"


def test_prompt_and_completion_are_tokenized_apart() -> None:
    """A token over the border would not be there when the model continues the prompt."""
    tokenizer = make_tokenizer()
    whole = tokenizer("name")["input_ids"]
    assert len(whole) < len(tokenizer("na")["input_ids"]) + len(tokenizer("me")["input_ids"])  # else this shows nothing
    (row,) = tokenized([{"prompt": "na", "completion": "me"}], tokenizer)
    assert row["input_ids"] == [*tokenizer("na")["input_ids"], *tokenizer("me")["input_ids"], tokenizer.eos_token_id]


def test_empty_lines_teach_nothing() -> None:
    data = tokenized([{"text": ""}, {"text": "one two"}, {"text": " \n"}], make_tokenizer(adds="<bos> $A"))
    assert len(data) == 1


USER, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Fine."}
THOUGHT = {"role": "assistant", "content": "<think>\none two\n</think>\n\nYes."}
SYSTEM, TOOL = {"role": "system", "content": "three"}, {"role": "tool", "content": "two"}
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (QWEN3_LIKE, [USER, ANSWER], [f"{NO_THOUGHT}Fine.<|im_end|>"]),
        (QWEN3_LIKE, [SYSTEM, USER, ANSWER, USER, ANSWER], ["Fine.<|im_end|>", f"{NO_THOUGHT}Fine.<|im_end|>"]),
        (
            QWEN3_LIKE,
            [USER, THOUGHT, USER, THOUGHT],
            ["Yes.<|im_end|>", "<think>\none two\n</think>\n\nYes.<|im_end|>"],
        ),
        (QWEN3_LIKE, [USER, ANSWER, USER], ["Fine.<|im_end|>"]),
        (QWEN3_LIKE, [USER, ANSWER, TOOL, ANSWER], ["Fine.<|im_end|>", f"{NO_THOUGHT}Fine.<|im_end|>"]),
        (CHATML, [USER, ANSWER], ["Fine.<|im_end|>"]),
        (CHATML, [SYSTEM, USER, ANSWER, USER, ANSWER], ["Fine.<|im_end|>"] * 2),
        (CHATML, [USER, {"role": "assistant", "content": "  Fine.\n"}], ["Fine.<|im_end|>"]),  # the template trims
        (CHATML, [USER, {"role": "assistant", "content": ""}, USER, ANSWER], ["Fine.<|im_end|>"]),  # nothing is written
        (LLAMA2_LIKE, [USER, ANSWER, USER, ANSWER], [" Fine.<eos>"] * 2),
        (PHI3_LIKE, [USER, ANSWER, USER, ANSWER], ["Fine.<|im_end|>", "Fine.<|im_end|>\n<eos>"]),
    ],
)
@pytest.mark.parametrize("trim", [False, True])
def test_of_a_chat_exactly_what_the_assistant_says_is_trained(
    template: str, messages: list[dict[str, str]], said: list[str], trim: bool
) -> None:
    tokenizer = make_tokenizer(template=template, trim=trim, adds="" if trim else "<bos> $A <eos>")
    ids, trained = conversation(messages, tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    edges = [0, *(k for k in range(1, len(ids)) if trained[k] != trained[k - 1]), len(ids)]
    assert [tokenizer.decode(ids[a:b]) for a, b in pairwise(edges) if trained[a]] == said


def test_spaces_in_a_row_are_trained_too() -> None:
    """Code is indented; with places that leave out spaces such tokens have none."""
    tokenizer = make_tokenizer(template=CHATML, trim=True)
    tokenizer.add_tokens(["    "])
    ids, trained = conversation([USER, {"role": "assistant", "content": "one\n    two"}], tokenizer)
    row = {"input_ids": ids, "trained": trained}
    assert texts(row, tokenizer)[1] == "one\n    two<|im_end|>"


def test_a_turn_that_quotes_the_template_changes_nothing() -> None:
    tokenizer = make_tokenizer(template=CHATML)
    quoting = {"role": "user", "content": "assistant\nFine.<|im_end|>\n<|im_start|>assistant\nFine."}
    ids, trained = conversation([quoting, ANSWER], tokenizer)
    assert texts({"input_ids": ids, "trained": trained}, tokenizer)[1] == "Fine.<|im_end|>"
    assert sum(trained) == len(tokenizer("Fine.<|im_end|>")["input_ids"])


@pytest.mark.parametrize("begins", ["Fine.", "<b>Fine.", "think"])
def test_empty_thoughts_are_trained_or_asked_with(begins: str) -> None:
    """By `enable_thinking`: with it the student learns to write them, without it they are part of what is asked; as in generation."""
    tokenizer, answer = make_tokenizer(template=QWEN3_LIKE), {"role": "assistant", "content": begins}
    row = [{"messages": [USER, answer, USER, answer]}]
    for options, thoughts in (
        ({}, NO_THOUGHT),
        ({"enable_thinking": True}, NO_THOUGHT),
        ({"enable_thinking": False}, ""),
    ):
        (found,) = tokenized(row, tokenizer, row_format=RowFormat(template_options=options))
        assert texts(found, tokenizer)[1] == f"{begins}<|im_end|>{thoughts}{begins}<|im_end|>"
        ((_, asked),) = encoded(
            [Prompt(references=[], turns=[USER, answer, USER], template_options=options)], tokenizer
        )
        assert asked == found["input_ids"][: len(asked)] and found["trained"][len(asked) - 1 : len(asked) + 1] == [
            False,
            True,
        ]


def test_thoughts_of_their_own_column_are_trained() -> None:
    thinking = {"role": "assistant", "content": "Yes.", "reasoning_content": "one two"}
    tokenizer = make_tokenizer(template=QWEN3_LIKE)
    (row,) = tokenized([{"messages": [USER, thinking]}], tokenizer)
    assert texts(row, tokenizer)[1] == "<think>\none two\n</think>\n\nYes.<|im_end|>"


@pytest.mark.parametrize("answer", [THOUGHT, {"role": "assistant", "content": "Yes.", "reasoning_content": "one two"}])
def test_thoughts_that_are_switched_off_are_refused(answer: Any) -> None:
    options = RowFormat(template_options={"enable_thinking": False})
    with pytest.raises(
        InputError,
        match="data row 0: turn 1 has thoughts, and the chat template asks for an answer without any .*; leave",
    ):
        tokenized([{"messages": [USER, answer]}], make_tokenizer(template=QWEN3_LIKE), row_format=options)
    tokenized([{"messages": [USER, answer, USER, ANSWER]}], make_tokenizer(template=QWEN3_LIKE), row_format=options)


@pytest.mark.parametrize(
    ("messages", "template", "expected"),
    [
        ([USER], CHATML, "no turn of the role assistant; add one"),
        ([], CHATML, "no turn of the role assistant; add one"),
        ("hello", CHATML, 'messages must be a list of turns; write [{"role": "user"'),
        (None, CHATML, "messages must be a list of turns"),
        ([{"from": "human", "value": "hi"}], CHATML, "messages holds turns of from and value, as sharegpt does"),
        (
            [USER, ANSWER],
            None,
            "the tokenizer has no chat template; give prompt and completion, or give the tokenizer one",
        ),
        (
            [{**USER, "role": "human"}, ANSWER],
            QWEN3_LIKE.replace(
                "{%- for message in messages %}\n    {",
                "{%- for message in messages if message.role in ('user', 'assistant') %}\n    {",
            ),
            "does not write turn 0, of the role 'human'; write a role that it knows",
        ),
        ([SYSTEM, USER, ANSWER], LLAMA2_LIKE, "template refuses the messages (only user and assistant); fix"),
        ([USER, ANSWER, ANSWER], QWEN3_LIKE, "changes the text before turn 2 once that turn is there, so"),
        ([USER, ANSWER], "{{ messages | length }}", "does not write turn 0, of the role 'user'"),
        ([USER, ANSWER], "{{ messages[0].content }}", "can't be located; give prompt and completion"),
    ],
)
def test_chat_that_cannot_be_read_is_refused_by_its_row(messages: Any, template: str | None, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        tokenized([{"messages": messages}], make_tokenizer(template=template))
    assert "data row 0: " in str(caught.value) and expected in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# What is left out, and what is refused


def test_too_long_rows_are_dropped_or_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    rows = [{"prompt": "one", "completion": " two" * n} for n in (1, 2, 30, 40)]
    rows.append({"prompt": "one " * 40, "completion": " two"})  # cut, nothing of it is trained
    with caplog.at_level(logging.INFO, "llmkd"):
        dropped = tokenized(rows, tokenizer, max_length=20)
        assert "2 of 5 rows are used; 3 longer than 20 tokens (dropped), 0 with nothing to train" in caplog.text
        caplog.clear()
        cut = tokenized(rows, tokenizer, max_length=20, too_long="truncate")
        assert "4 of 5 rows are used; 3 longer than 20 tokens (truncated), 1 with nothing to train" in caplog.text
        caplog.clear()
        assert len(tokenized(rows, tokenizer, max_length=400)) == 5 and not caplog.text
    assert len(dropped) == 2 and dropped["length"] == cut["length"][:2] and cut["length"][2:] == [20, 20]
    assert all(len(row["input_ids"]) == len(row["trained"]) == row["length"] for row in cut)
    assert not any(tokenizer.eos_token_id in row["input_ids"] for row in list(cut)[2:])  # cut text has not ended
    assert set(dropped.column_names) == {"input_ids", "trained", "length", "row"}


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_only_overlong_rows_are_an_error(too_long: str) -> None:
    with pytest.raises(
        InputError, match=r"data\.max_length: no row has a token to train within 5 tokens; the rows have 2\d to"
    ):
        tokenized(
            [{"prompt": "one " * 20, "completion": " two"}] * 3, make_tokenizer(), max_length=5, too_long=too_long
        )


@pytest.mark.parametrize(
    ("rows", "format", "expected"),
    [
        ([{"question": "a", "answer": "b"}], "auto", "columns question, answer are none of prompt + completion"),
        (
            [{"prompt": "a", "answer": "b"}],
            "prompt_completion",
            "needs the column 'completion', the data has prompt, answer",
        ),
        ([{"prompt": "a"}], "text", "needs the column 'text', the data has prompt; rename"),
        ([{"text": "a"}, {"text": None}], "auto", "data row 1: text must be text, it is NoneType; make it text"),
        ([{"prompt": "a", "completion": 3}], "auto", "data row 0: completion must be text, it is int; make it text"),
        (
            [{"prompt": [USER], "completion": "Fine."}],
            "auto",
            "data row 0: prompt is a list of turns and completion is none",
        ),
    ],
)
def test_rows_that_are_not_what_they_should_be(rows: list[dict[str, Any]], format: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        tokenized(rows, make_tokenizer(), row_format=RowFormat(format))
    assert expected in str(caught.value)


def test_tokenizer_without_end_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(
        InputError, match="no end-of-sequence token, from which a student learns to stop; set its eos_token"
    ):
        tokenized([{"text": "one"}], tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Files


ROWS = [{"prompt": "one", "completion": " two"}, {"prompt": "nächste", "completion": " N/A"}]


def _write(file: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.name.endswith(".jsonl"):
        file.write_text(lines, encoding="utf-8")
    elif file.name.endswith(".jsonl.gz"):
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.name.endswith(".json"):
        file.write_text(json.dumps(rows))
    elif file.name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(file)
    else:
        Dataset.from_list(rows).to_csv(file, index=False)
    return file


def loaded(source: Path | str, split: str = "train", rows: int | None = None) -> list[dict[str, Any]]:
    found: Any = load_rows(str(source), name=None, split=split, rows=rows)
    return list(found)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.json", "r.parquet", "r.csv"])
def test_local_files_of_every_kind(tmp_path: Path, name: str) -> None:
    file = _write(tmp_path / name, ROWS)
    assert loaded(file) == ROWS
    assert loaded(file, rows=1) == ROWS[:1] and loaded(file, rows=99) == ROWS
    assert loaded(file, split="validation") == ROWS  # one file is what was meant, whatever its name


def test_csv_words_for_nothing_are_words(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("prompt,completion\none,None\nNA,\n")
    assert loaded(tmp_path / "r.csv") == [{"prompt": "one", "completion": "None"}, {"prompt": "NA", "completion": ""}]


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for number, name in enumerate(("b.jsonl", "a.jsonl.gz")):
        _write(tmp_path / "rows" / name, [ROWS[number]])
    (tmp_path / "rows" / "README.md").write_text("not data")
    assert loaded(tmp_path / "rows") == [ROWS[1], ROWS[0]]


def test_folder_with_splits_keeps_the_test_rows_out_of_training(tmp_path: Path) -> None:
    _write(tmp_path / "rows" / "csqa_train.jsonl", ROWS[:1])
    _write(tmp_path / "rows" / "csqa_test-00000.jsonl", ROWS[1:])
    assert loaded(tmp_path / "rows") == ROWS[:1]
    assert loaded(tmp_path / "rows", split="test") == ROWS[1:]
    with pytest.raises(
        InputError, match=r"data\.split: no file of .* is named after 'dev' \(csqa_test-00000.jsonl, csqa_tr"
    ):
        loaded(tmp_path / "rows", split="dev")


def _bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    _write(folder / "mixed" / "a.jsonl", ROWS)
    _write(folder / "mixed" / "b.csv", ROWS)
    (folder / "none").mkdir()
    contents = {
        "empty.jsonl": (b"", "has no rows"),
        "blank.jsonl": (b"\n\n", "has no rows"),
        "list.json": (b"[]", "has no rows"),
        "header.csv": (b"prompt,completion\n", "has no rows"),
        "empty.jsonl.gz": (gzip.compress(b""), "has no rows"),
        "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-20], "can't be read as json"),
        "broken.jsonl": (b'{"text": "a"}\n{oops\n', ", line 2: not valid JSON (Expecting property name"),
        "fake.parquet": (b"PAR0", "can't be read as parquet"),
        "text.txt": (b"hello", "must be (or hold) files of one kind"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    found = {name: (folder / name, expected) for name, (_, expected) in contents.items()}
    found["mixed"] = (folder / "mixed", "must be (or hold) files of one kind: .jsonl, .json, .parquet, .csv")
    found["none"] = (folder / "none", "must be (or hold) files of one kind")
    found["missing"] = (folder / "missing.jsonl", "no file or folder")
    return found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, (file, expected) in _bad_files(tmp_path / "bad").items():
        with pytest.raises(InputError) as caught:
            loaded(file)
        sentence = str(caught.value)
        assert sentence.startswith("data.source: ") and str(file) in sentence and expected in sentence, (name, sentence)
        assert "\n" not in sentence, name


def test_names_that_no_hub_gives() -> None:
    with pytest.raises(
        InputError, match="'no-one/nothing' is not a file here and could not be loaded from the hub .*local file"
    ):
        loaded("no-one/nothing")
    for path in ("./rows", "~/rows", "/nowhere/rows.jsonl", "rows.jsonl", "rows.jsonl.gz", "my/data/rows"):
        with pytest.raises(InputError, match=r"data\.source: no file or folder .*; give a \.jsonl"):
            loaded(path)


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.parquet", "r.csv"])
def test_a_slice_of_local_files_is_the_one_that_datasets_takes(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(25)]
    file = _write(tmp_path / name, rows)
    places = {"[:10%]": rows[:2], "[10%:]": rows[2:], "[48%:-8%]": rows[12:23], "[3:7]": rows[3:7]}
    for part, expected in (places | {"[-4:]": rows[-4:], "[20:99]": rows[20:], "[:]": rows}).items():
        assert loaded(file, split="train" + part) == expected, part
    assert loaded(file, split="train[3:7]", rows=2) == rows[3:5]
    assert source_contents(str(file), "train[:10%]") != source_contents(
        str(file), "train[10%:]"
    )  # each has its own tokens
    with pytest.raises(InputError, match=r"data\.split: 'train\[30:\]' takes none of 25 rows"):
        loaded(file, split="train[30:]")
    with pytest.raises(InputError, match=r"data\.split: 'train\[:200%\]' of 25 rows can't be taken \(Percent slice"):
        loaded(file, split="train[:200%]")


def test_a_slice_of_a_folder_counts_the_rows_of_its_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(20)]
    for name, part in (("train-0", rows[:8]), ("train-1", rows[8:]), ("test", ROWS)):
        _write(tmp_path / "rows" / f"{name}.jsonl", part)
    assert loaded(tmp_path / "rows", split="train[:50%]") == rows[:10]
    assert loaded(tmp_path / "rows", split="test[1:]") == ROWS[1:]


@pytest.mark.parametrize("split", ["train[:1]+train[3:]", "train[4]", "train[::2]", "train[:1", "train[]"])
def test_what_is_no_slice_of_local_files_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(InputError, match=r"data\.split: .* is not one slice of rows or percent.*as data\.sources"):
        loaded(_write(tmp_path / "r.jsonl", ROWS), split=split)


def test_files_that_are_streamed_have_no_slices(tmp_path: Path) -> None:
    file = _write(tmp_path / "r.jsonl", ROWS)
    with pytest.raises(InputError, match=r"data\.split: 'train\[:1\]' is a slice, .*write streaming: false, or train"):
        streamed_rows(str(file), name=None, split="train[:1]", columns={})


def test_built_in_rows_differ_by_split_and_need_a_number() -> None:
    train, validation = (loaded("records", split, rows=20) for split in ("train", "validation"))
    assert len(train) == len(validation) == 20 and set(train[0]) == {"prompt", "completion"}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}
    with pytest.raises(InputError, match=r"data\.rows: the built-in task is endless"):
        loaded("records")
    with pytest.raises(InputError, match="no split 'dev'"):
        loaded("records", "dev", rows=2)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


LENGTHS = (5, 1, 9, 2, 16)
SHAPE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=1,
)


def documents() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    made = [torch.randint(3, 64, (n,), generator=draw).tolist() for n in LENGTHS]
    return [{"input_ids": ids, "trained": [k >= len(ids) // 3 for k in range(len(ids))]} for ids in made]


@pytest.fixture(scope="module")
def tiny_model() -> Iterator[Callable[[str, str], Any]]:
    def make(kind: str, attention: str) -> Any:
        config = Qwen3Config(**SHAPE, head_dim=8) if kind == "qwen3" else LlamaConfig(**SHAPE)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()

    yield make


def logits(model: Any, batch: Batch) -> torch.Tensor:
    """As the student runs it."""
    final = parts.backbone(model)(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    return parts.head(model)(final)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@torch.no_grad()
def test_packed_and_padded_documents_are_as_alone(tiny_model: Any, kind: str, attention: str) -> None:
    model = tiny_model(kind, attention)
    rows = documents()
    alone = [model(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    packed = logits(model, collate(rows, pad_id=0, packed=True))[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
    padded = logits(model, collate(rows, pad_id=0, packed=False))
    for theirs, ours in zip(alone, padded, strict=True):
        torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=1e-5)
    # The same rows with positions counted through, as if they were one document: this must be seen.
    crossing = collate(rows, pad_id=0, packed=True)
    crossing.position_ids.copy_(torch.arange(crossing.position_ids.numel()))
    assert (logits(model, crossing)[0] - torch.cat(alone)).abs().max() > 0.1


@pytest.mark.parametrize("packed", [False, True])
def test_targets_are_the_next_tokens_of_the_same_document(packed: bool) -> None:
    rows = documents()
    batch = collate(rows, pad_id=0, packed=packed)
    at = 0
    for number, row in enumerate(rows):
        ids, trained, length = row["input_ids"], row["trained"], len(row["input_ids"])
        expected = [i if t else IGNORE for i, t in zip(ids[1:], trained[1:], strict=True)] + [IGNORE]
        targets = batch.targets[0, at : at + length] if packed else batch.targets[number, :length]
        positions = batch.position_ids[0, at : at + length] if packed else batch.position_ids[number, :length]
        assert targets.tolist() == expected and positions.tolist() == list(range(length))
        at += length
    flat = batch.targets.flatten()
    assert batch.trained_at.tolist() == [k for k, t in enumerate(flat.tolist()) if t != IGNORE]
    assert batch.attended_at.tolist() == [k for k, a in enumerate(batch.attended.flatten().tolist()) if a]
    assert batch.counts == (sum(sum(row["trained"][1:]) for row in rows), sum(LENGTHS), 0)
    assert batch.input_ids.shape == ((1, sum(LENGTHS)) if packed else (len(rows), 16))


def test_padding_is_a_multiple_and_never_a_target() -> None:
    batch = collate(documents()[:3], pad_id=7, packed=False)
    assert batch.input_ids.shape == (3, 16)
    assert batch.attention_mask is not None and batch.attention_mask.sum(1).tolist() == [5, 1, 9]
    assert (batch.input_ids[~batch.attended] == 7).all() and (batch.targets[~batch.attended] == IGNORE).all()
    moved = batch.to(torch.device("cpu"))
    assert all(torch.equal(getattr(moved, key), getattr(batch, key)) for key in ("input_ids", "targets", "attended_at"))


# ---------------------------------------------------------------------------------------------------------------------
# Order


ROW_LENGTHS = np.random.default_rng(0).integers(2, 200, size=1003)


def order(seed: int = 0, grouped: bool = True, lengths: np.ndarray = ROW_LENGTHS, size: int = 8) -> np.ndarray:
    """[steps, size] the rows of a pass's whole windows."""
    of, sources = lengths.__getitem__ if grouped else None, [Source(0, len(lengths))]
    windows = max(1, len(lengths) // size // window_steps(sources, size))
    return np.concatenate([rows_of_window(w, sources, lengths=of, batch_size=size, seed=seed) for w in range(windows)])


@pytest.mark.parametrize("grouped", [True, False])
def test_order_is_a_pure_function_of_the_seed(grouped: bool) -> None:
    first = order(3, grouped)
    np.random.seed(1)
    torch.manual_seed(1)
    assert np.array_equal(order(3, grouped), first)
    assert first.shape == (96, 8)
    assert len(set(first.flatten())) == 768 <= len(ROW_LENGTHS)  # each row at most once
    assert not np.array_equal(np.sort(order(4, grouped)[0]), np.sort(first[0]))


def test_order_is_the_same_on_every_machine() -> None:
    """Written down once: a resumed run must find its rows after numpy has been upgraded too."""
    lengths = np.array([5, 3, 9, 4, 8, 2, 7, 6, 1, 10, 11])
    assert order(1, True, lengths, 4).tolist() == [[7, 0, 3, 1], [10, 2, 4, 6]]
    assert order(1, False, lengths, 4).tolist() == [[4, 2, 7, 10], [1, 6, 0, 3]]


def _padded_share(rows: np.ndarray) -> float:
    lengths = ROW_LENGTHS[rows]
    return 1 - lengths.sum() / (lengths.max(axis=1, keepdims=True) * rows.shape[1]).sum()


def test_grouped_rows_need_far_less_padding_and_come_in_no_order_of_length() -> None:
    grouped, mixed = order(grouped=True), order(grouped=False)
    assert _padded_share(grouped) < 0.1 < 0.4 < _padded_share(mixed)
    longest = ROW_LENGTHS[grouped].max(axis=1)
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


def test_ranks_and_accumulation_share_the_rows_of_a_step() -> None:
    for rows in order():
        for world_size, accumulation in ((1, 1), (1, 4), (2, 2), (4, 1), (8, 1), (2, 1)):
            shares = [
                micro_batch_rows(rows, rank=rank, world_size=world_size, accumulation=accumulation)
                for rank in range(world_size)
            ]
            assert all(len(share) == accumulation for share in shares)
            together = np.concatenate([np.concatenate(share) for share in shares])
            assert sorted(together) == sorted(rows)


def test_too_few_rows_for_a_step() -> None:
    assert steps_per_epoch(8, 8) == 1 and steps_per_epoch(15, 8) == 1
    with pytest.raises(
        InputError,
        match=r"train\.batch_size: 8 rows per step, but the data has only 7 \(packed: sequences of rows\); write a smaller",
    ):
        steps_per_epoch(7, 8)


def _tokens(data: Dataset, start: int, packed: bool, **changes: Any) -> list[list[list[int]]]:
    """The token ids of each micro-batch of each step from `start` to 7 (a pass over the rows is of 3 steps and a half)."""
    settings: dict[str, Any] = {"accumulation": 1, "rank": 0, "world_size": 1, "seed": 5, **changes}
    tokens = Tokens(data, (np.array(data["length"]),), (Source(0, len(data)),))
    drawn: Any = tokens
    make = functools.partial(tokens.batch, collate=collate, pad_id=0)
    if packed:
        drawn = PackedTokens(tokens, (PackedSource(*packed_rows(tokens.lengths[0], 0, tokens.sources[0], 0, 8)),), 8)
        make = functools.partial(drawn.batch, pad_id=0)
    steps = batches(drawn, start_step=start, steps=7, batch_size=4, make=make, **settings)
    return [[batch.input_ids[batch.attended].tolist() for batch in micro] for micro in steps]


@pytest.mark.parametrize("packed", [False, True])
def test_resumed_batches_are_the_tail_of_the_uninterrupted(packed: bool) -> None:
    rows = [{"input_ids": [100 * k + j for j in range(2 + k % 5)], "trained": [True] * (2 + k % 5)} for k in range(14)]
    data = Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows])
    whole = _tokens(data, 0, packed=packed)
    assert len(whole) == 7 and len({str(step) for step in whole}) == 7
    for start in (1, 3, 4, 6, 7):
        assert _tokens(data, start, packed=packed) == whole[start:]
    shared = [_tokens(data, 0, packed=packed, world_size=2, rank=rank, accumulation=2) for rank in (0, 1)]
    for step, ours in enumerate(zip(*shared, strict=True)):
        assert sorted(i for micro in ours for batch in micro for i in batch) == sorted(whole[step][0])
    assert [len(micro) for micro in shared[0]] == [2] * 7
    if not packed:  # in a pass no row comes twice
        seen = [i for step in whole[:3] for batch in step for i in batch]
        assert len(seen) == len(set(seen))
    assert whole[:3] != whole[3:6]
    assert _tokens(data, 0, packed=packed, seed=6) != whole


def test_pre_tokenizer_of_the_fixture_is_byte_level() -> None:
    assert isinstance(make_tokenizer().backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
