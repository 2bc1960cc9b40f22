"""Chats as people's files hold them: contents in parts, tools and their calls, prompts of turns, columns that look like dates."""

from __future__ import annotations

import json
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from datasets import Dataset

from llmkd.data import turns as reading
from llmkd.data.formats import RowFormat
from llmkd.data.rows import load_rows
from llmkd.data.tokens import conversation, tokenize
from llmkd.data.turns import read_tools, read_turns
from llmkd.errors import InputError
from llmkd.evaluation.held_out import encoded, read_prompts
from llmkd.recipe.recipe import Data
from tests.unit.data.test_data import CHATML, make_tokenizer, texts

TOOLS_TEMPLATE = """
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
        {{- '<call>' + call.function.name + ' ' + call.function.arguments + '</call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
USER, ANSWER = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}
CALL = {"id": "c0", "type": "function", "function": {"name": "weather", "arguments": '{"town": "t"}'}}
CALLS: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c0", "content": "sunny"}
IMAGE = {"type": "image_url", "image_url": "x"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _loaded(file: Path, rows: list[dict[str, Any]]) -> Dataset:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return load_rows(str(file), name=None, split="train", rows=None)


def _tokens(rows: Dataset, tokenizer: Any) -> Any:
    return tokenize(rows, tokenizer, row_format=RowFormat(), max_length=400, too_long="drop")


def _trained(row: Any, tokenizer: Any) -> list[str]:
    """The stretches of a row that are trained."""
    ids, trained = row["input_ids"], row["trained"]
    edges = [0, *(k for k in range(1, len(ids)) if trained[k] != trained[k - 1]), len(ids)]
    return [tokenizer.decode(ids[a:b]) for a, b in pairwise(edges) if trained[a]]


def test_a_content_in_parts_is_their_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=CHATML)
    parts = [{"type": "text", "text": "t"}, "w", {"type": "output_text", "text": "o"}]
    row = _tokens(_loaded(tmp_path / "a.jsonl", [{"messages": [USER, {**ANSWER, "content": parts}]}]), tokenizer)[0]
    assert _trained(row, tokenizer) == ["two<|im_end|>"]
    assert texts(row, tokenizer)[0] == tokenizer.apply_chat_template([USER, ANSWER], tokenize=False)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("words", [None, "", "I look."])
def test_tools_reach_the_template_and_calls_are_trained(tmp_path: Path, as_text: bool, words: str | None) -> None:
    tokenizer = make_tokenizer(template=TOOLS_TEMPLATE)
    chat = [USER, {**CALLS, "content": words}, RESULT, ANSWER]
    rows = _loaded(
        tmp_path / "a.jsonl",
        [{"tools": json.dumps(TOOLS) if as_text else TOOLS, "messages": chat}, {"messages": [USER, ANSWER]}],
    )
    first, second = _tokens(rows, tokenizer)
    call = '<call>weather {"town": "t"}</call><|im_end|>'
    assert _trained(first, tokenizer) == [f"{words}\n{call}" if words else call, "two<|im_end|>"]
    assert json.dumps(TOOLS[0]) in texts(first, tokenizer)[0]
    assert texts(second, tokenizer)[0].startswith("<|im_start|>user")  # a row without tools has none of another's


def test_what_arrow_fills_in_does_not_reach_the_template() -> None:
    """Parquet gives every turn the keys of all turns; a template that asks whether `tool_calls` is there must not find None."""
    template = "{% for m in messages %}{{ m.role }}{% if 'tool_calls' in m %}!{% endif %}:{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = make_tokenizer(template=template + "{% if add_generation_prompt %}assistant:{% endif %}")
    rows = Dataset.from_list([{"messages": [USER, {**CALLS, "content": "x"}, RESULT, ANSWER]}])
    assert rows[0]["messages"][0]["tool_calls"] is None
    assert (
        texts(_tokens(rows, tokenizer)[0], tokenizer)[0]
        == "user:one?<|im_end|>assistant!:x<|im_end|>tool:sunny<|im_end|>assistant:two<|im_end|>"
    )


def test_prompt_and_completion_may_be_turns(tmp_path: Path) -> None:
    """TRL's form: of the completion alone the assistant's turns are trained."""
    tokenizer = make_tokenizer(template=CHATML)
    rows = _loaded(
        tmp_path / "a.jsonl", [{"prompt": [USER, {**ANSWER, "content": "three"}, USER], "completion": [ANSWER]}]
    )
    row = _tokens(rows, tokenizer)[0]
    assert _trained(row, tokenizer) == ["two<|im_end|>"] and "three" in texts(row, tokenizer)[0]
    (prompt,) = read_prompts(Data(source=str(tmp_path / "a.jsonl"), rows=1))
    assert prompt.references == ["two"] and prompt.turns is not None and len(prompt.turns) == 3


def test_an_empty_completion_is_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = _loaded(tmp_path / "a.jsonl", [{"prompt": "a", "completion": c} for c in ("b", "", " \n", "c")])
    with caplog.at_level("INFO"):
        data = _tokens(rows, make_tokenizer())
    assert (
        data["row"] == [0, 3]
        and "2 of 4 rows are used; 0 longer than 400 tokens (dropped), 2 with nothing to train" in caplog.text
    )


def test_texts_stay_what_the_file_says(tmp_path: Path) -> None:
    completions = [
        "2024-01-01",
        "2024-01-01T00:00:00Z",
        "007",
        "1e5",
        "true",
        "null",
        "line\u2028one\u2029two\x85three\x0bfour",
    ]
    rows = _loaded(tmp_path / "a.jsonl", [{"prompt": "a", "completion": text} for text in completions])
    assert rows["completion"] == completions
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a", "completion": text} for text in completions]))
    assert load_rows(str(tmp_path / "a.json"), name=None, split="train", rows=None)["completion"] == completions
    (tmp_path / "a.csv").write_text(
        "prompt,completion,label\n" + "".join(f"1,{text},{n}\n" for n, text in enumerate(completions[:6]))
    )
    table = load_rows(str(tmp_path / "a.csv"), name=None, split="train", rows=None)
    assert table["completion"] == completions[:6] and table["prompt"] == ["1"] * 6 and table["label"] == list(range(6))


def test_a_file_that_is_not_utf_8_or_no_rows_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "a"}\n{"prompt": "Café"}\n'.encode("latin-1"))
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n\n["prompt"]\n')
    for name, sentence in (
        ("a", "line 2: not UTF-8 text .the byte 0xe9.; save"),
        ("b", "line 3: a row is an object, this is list"),
    ):
        with pytest.raises(InputError, match=f"{name}.jsonl', {sentence}"):
            load_rows(str(tmp_path / f"{name}.jsonl"), name=None, split="train", rows=None)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"messages": [USER, {**ANSWER, "content": [IMAGE]}]},
            "data row 0: turn 1: its content has a part of the type 'image_url'",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "data row 0: turn 1 has no content"),
        ({"messages": [USER, {**ANSWER, "content": 3}]}, "data row 0: turn 1: its content is int; make it text"),
        ({"messages": [USER, ANSWER], "tools": "[oops"}, "data row 0: tools are a text that is no JSON"),
        ({"messages": [USER, ANSWER], "tools": {"name": "x"}}, "data row 0: tools must be a list"),
        ({"prompt": "a", "completion": [ANSWER]}, "data row 0: completion is a list of turns and prompt is none"),
    ],
)
def test_what_no_template_reads_is_refused_by_its_row(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    rows = _loaded(tmp_path / "a.jsonl", [row])
    with pytest.raises(InputError, match=sentence):
        _tokens(rows, make_tokenizer(template=TOOLS_TEMPLATE))


def test_a_prompt_that_ends_in_a_call_cannot_be_compared(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    _loaded(file, [{"tools": TOOLS, "messages": [USER, CALLS]}])
    with pytest.raises(
        InputError, match="row 0 of .*: the assistant's last turn calls a tool, so there is no text to compare with"
    ):
        read_prompts(Data(source=str(file), rows=1))
    _loaded(file, [{"tools": TOOLS, "messages": [USER, CALLS, RESULT, ANSWER]}])
    prompts = read_prompts(Data(source=str(file), rows=1))
    tokenizer = make_tokenizer(template=TOOLS_TEMPLATE)
    ((text, ids),) = encoded(prompts, tokenizer)
    whole, trained = conversation(read_turns([USER, CALLS, RESULT, ANSWER]), tokenizer, read_tools(TOOLS))
    assert (
        ids == whole[: len(ids)]
        and len(ids) == max(k for k, t in enumerate(trained) if not t and trained[k + 1 : k + 2] == [True]) + 1
    )
    assert json.dumps(TOOLS[0]) in text


def test_a_template_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "TEMPLATE_SECONDS", 0.3)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="chat template does not end within 0.3 s"):
        conversation(read_turns([USER, ANSWER]), make_tokenizer(template=endless))
    results: list[Any] = []  # elsewhere than in the main thread there is no limit, and no error for want of one
    thread = threading.Thread(
        target=lambda: results.append(conversation([USER, ANSWER], make_tokenizer(template=CHATML)))
    )
    thread.start()
    thread.join()
    assert len(results) == 1
