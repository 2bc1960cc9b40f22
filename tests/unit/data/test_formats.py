"""Rows as people's files hold them: alpaca and sharegpt, columns by other names, options of the chat template."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmkd.data.batches import Family
from llmkd.data.formats import OWN_ARGUMENTS, turns_of
from llmkd.data.other_families import check_format
from llmkd.data.rows import load_rows, renamed
from llmkd.data.tokens import tokenize
from llmkd.errors import InputError
from llmkd.evaluation.held_out import encoded, read_prompts
from llmkd.recipe.data import Data
from tests.unit.data.test_data import CHATML, make_tokenizer, texts

USER, ANSWER = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}
MOOD = CHATML.replace("Be kind.", "Be ' + (mood | default('kind')) + '.")
"""A template with an option."""


def write(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(file)


def tokens_of(data: Data, tokenizer: Any) -> Any:
    rows = load_rows(data.source, name=None, split="train", rows=data.rows, columns=data.columns)
    return tokenize(rows, tokenizer, row_format=data.row_format, max_length=400, too_long="drop")


# --- data.columns


def test_renamed_columns_are_read_in_training_and_generation(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"question": "one?", "answer": "two", "prompt_id": 3})
    data = Data(source=source, rows=1, columns={"question": "prompt", "answer": "completion"})
    assert texts(tokens_of(data, make_tokenizer())[0], make_tokenizer()) == ("one?two<eos>", "two<eos>")
    assert read_prompts(data)[0].text == "one?" and read_prompts(data)[0].references == ["two"]


def test_renamed_columns_of_a_csv_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a,class\n007,2024-01-01,3\n")
    columns = {"q": "prompt", "a": "completion", "class": "label"}
    rows = load_rows(str(tmp_path / "a.csv"), name=None, split="train", rows=None, columns=columns)
    assert rows[0] == {"prompt": "007", "completion": "2024-01-01", "label": 3}


def test_two_columns_may_change_places() -> None:
    rows = renamed(
        Dataset.from_list([{"prompt": "a", "completion": "b"}]), {"prompt": "completion", "completion": "prompt"}
    )
    assert rows[0] == {"prompt": "b", "completion": "a"}


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"quest": "prompt"},
            "data.columns: the data has no column 'quest', it has question, answer, text; write one of these",
        ),
        (
            {"answer": "text"},
            "data.columns: answer is to be text, and the data has a column text too; take one of them out of",
        ),
    ],
)
def test_columns_that_cannot_be_renamed(columns: dict[str, str], sentence: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b", "text": "c"})
    with pytest.raises(InputError, match=sentence):
        load_rows(source, name=None, split="train", rows=None, columns=columns)
    with pytest.raises(InputError, match="no column 'question', it has prompt, completion"):
        load_rows("records", name=None, split="train", rows=1, columns={"question": "prompt"})


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"columns": {"question": "promt"}}, "columns: no format has a column 'promt'; did you mean prompt"),
        (
            {"columns": {"prompt": "question"}},
            "columns: .*'question'; the data's own name comes first, {question: prompt}",
        ),
        ({"columns": {"a": "prompt", "b": "prompt"}}, "columns: two columns become 'prompt'"),
        ({"template_options": {"tokenize": True}}, "template_options: 'tokenize' is set by llmkd itself"),
    ],
)
def test_names_that_a_recipe_cannot_have(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Data(**keys)


def test_how_rows_are_read_is_json() -> None:
    data = Data(columns={"a": "prompt"}, template_options={"enable_thinking": False, "documents": [{"title": "t"}]})
    assert json.loads(json.dumps(asdict(data.row_format))) == data.model_dump(
        include={"format", "columns", "template_options"}
    )


# --- data.template_options


def test_options_reach_the_template_in_training_and_generation(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=MOOD)
    data = Data(
        source=write(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}), rows=1, template_options={"mood": "calm"}
    )
    row = tokens_of(data, tokenizer)[0]
    assert texts(row, tokenizer) == (
        "<|im_start|>system\nBe calm.<|im_end|>\n<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n",
        "two<|im_end|>",
    )
    ((_, asked),) = encoded(read_prompts(data), tokenizer)
    assert asked == row["input_ids"][: row["trained"].index(True)]


def test_options_that_no_template_reads_are_refused(tmp_path: Path) -> None:
    data = Data(source=write(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}), rows=1, template_options={"mod": 1})
    tokenizer = make_tokenizer(template=MOOD)
    for run in (lambda: tokens_of(data, tokenizer), lambda: encoded(read_prompts(data), tokenizer)):
        with pytest.raises(
            InputError, match="data.template_options: the tokenizer's chat template does not read 'mod'; "
        ):
            run()
    with pytest.raises(
        InputError, match="data.template_options: the tokenizer has no chat template that would read them"
    ):
        tokens_of(data, make_tokenizer())
    with pytest.raises(InputError, match="data.template_options: an encoder reads no chats"):
        check_format(Family("encoder", labels=("a", "b")), data.row_format)


def test_no_option_can_be_an_argument_of_the_tokenizers_own() -> None:
    """Else `tokenize: true` in a recipe would change what `apply_chat_template` gives; documents alone are the template's."""
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert set(OWN_ARGUMENTS) >= {*own} - {"self", "kwargs", "documents"}


# --- alpaca


ALPACA = {"instruction": "one?", "input": "six seven", "output": "two"}


def test_alpaca_is_a_chat_where_there_is_a_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=CHATML)
    source = write(tmp_path / "a.jsonl", ALPACA, {**ALPACA, "input": ""}, {"instruction": "one?", "output": "two"})
    data = Data(source=source, rows=3)
    rows, prompts = tokens_of(data, tokenizer), read_prompts(data)
    for row, prompt, asked in zip(rows, prompts, ("one?\n\nsix seven", "one?", "one?"), strict=True):
        chat = [{"role": "user", "content": asked}, ANSWER]
        assert texts(row, tokenizer) == (tokenizer.apply_chat_template(chat, tokenize=False), "two<|im_end|>")
        ((_, ids),) = encoded([prompt], tokenizer)
        assert ids == row["input_ids"][: row["trained"].index(True)] and prompt.references == ["two"]


def test_alpaca_is_prompt_and_completion_where_there_is_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    data = Data(source=write(tmp_path / "a.jsonl", ALPACA, {**ALPACA, "input": None}), rows=2, format="alpaca")
    rows, prompts = tokens_of(data, tokenizer), read_prompts(data)
    for row, prompt, asked in zip(rows, prompts, ("one?\n\nsix seven\n\n", "one?\n\n"), strict=True):
        assert texts(row, tokenizer) == (f"{asked}two<eos>", "two<eos>")
        assert encoded([prompt], tokenizer) == [(asked, row["input_ids"][: row["trained"].index(True)])]


# --- sharegpt


SHAREGPT = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]


@pytest.mark.parametrize(
    ("conversations", "system"),
    [
        ([{"from": "system", "value": "Be brief."}, *SHAREGPT], None),
        (SHAREGPT, "Be brief."),
        ([{"role": "system", "content": "Be brief."}, USER, ANSWER], ""),
    ],
)
def test_sharegpt_is_the_same_chat_as_messages(conversations: list[Any], system: str | None, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=CHATML)
    chat = [{"role": "system", "content": "Be brief."}, USER, ANSWER]
    more = [{"from": "human", "value": "one?"}] if "from" in conversations[-1] else [USER]
    sharegpt = {"conversations": [*conversations, *more, conversations[-1]], "system": system}
    ours = Data(source=write(tmp_path / "a.jsonl", sharegpt), rows=1)
    theirs = Data(source=write(tmp_path / "b.jsonl", {"messages": [*chat, USER, ANSWER]}), rows=1)
    assert tokens_of(ours, tokenizer)[:] == tokens_of(theirs, tokenizer)[:]
    assert read_prompts(ours) == read_prompts(theirs)


def test_calls_in_sharegpt_are_those_of_messages() -> None:
    call = {"name": "weather", "arguments": {"town": "t"}}
    row = {"conversations": [
        SHAREGPT[0], {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "sunny"}, SHAREGPT[1],
    ]}  # fmt: skip
    assert turns_of(row, "sharegpt")[1] == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "sunny"},
        ANSWER,
    ]


# --- What can't be told


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 0: 'narrator' in from is none of human, user, gpt, .*; write"),
        ({"conversations": [SHAREGPT[0], {"from": "gpt", "value": 3}]}, "turn 1: its value is int; make it text"),
        ({"conversations": [SHAREGPT[0], USER]}, "turn 1: None in from is none of human"),
        ({"conversations": "one?"}, "conversations must be a list of turns; write .*from"),
        ({"conversations": [SHAREGPT[0]]}, "the conversation has no turn of the role assistant"),
        ({"conversations": [{"from": "function_call", "value": "weather()"}]}, "turn 0: a function_call is JSON, this is not .*; write"),
        ({"conversations": [{"from": "system", "value": "a"}, *SHAREGPT], "system": "b"}, "there is a column system and a first"),
        ({"messages": SHAREGPT}, "messages holds turns of from and value, as sharegpt does; write data.columns: .messages: conversations"),
        ({**ALPACA, "output": 3}, "output must be text, it is int; make it text"),
        ({**ALPACA, "input": ["a"]}, "input must be text, it is list; make it text"),
        ({"prompt": "a", "completion": [ANSWER]}, "completion is a list of turns and prompt is none; write both as texts, or both as"),
        ({"prompt": [USER], "completion": "a"}, "prompt is a list of turns and completion is none; write both as texts, or both as"),
        ({"prompt": "a", "completion": None}, "completion must be text, it is NoneType; make it text"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_told_are_named(row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    data = Data(source=write(tmp_path / "a.jsonl", row), rows=1)
    with pytest.raises(InputError, match=f"data row 0: {sentence}"):
        tokens_of(data, make_tokenizer(template=CHATML))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [{**ALPACA, "text": "a"}],
            "data.format: the columns instruction, input, output, text fit alpaca and text alike; write which",
        ),
        (
            [{"messages": [USER, ANSWER]}, {"prompt": "a", "completion": "b"}],
            "fit prompt_completion and messages alike; .* a file each",
        ),
        (
            [{"question": "a", "answer": "b"}],
            r"are none of prompt \+ completion .*data.columns which is which, e.g. .question: prompt",
        ),
        (
            [{"prompt": "a"}],
            r"columns prompt are none of .* for prompts alone, .* \(section rollouts\), write format: prompts",
        ),
    ],
)
def test_columns_that_fit_several_formats_or_none(rows: list[dict[str, Any]], sentence: str, tmp_path: Path) -> None:
    data = Data(source=write(tmp_path / "a.jsonl", *rows), rows=2)
    with pytest.raises(InputError, match=sentence):
        tokens_of(data, make_tokenizer(template=CHATML))


def test_texts_and_chats_may_stand_in_one_file(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=CHATML)
    kinds = [{"prompt": "one?", "completion": "two"}, {"prompt": [USER], "completion": [ANSWER]}]
    rows = tokens_of(Data(source=write(tmp_path / "a.jsonl", kinds[1], kinds[0], kinds[1])), tokenizer)
    alone = [tokens_of(Data(source=write(tmp_path / "b.jsonl", kind)), tokenizer)[0]["input_ids"] for kind in kinds]
    assert rows["input_ids"] == [alone[1], alone[0], alone[1]]
