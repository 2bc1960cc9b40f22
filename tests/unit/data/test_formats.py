"""Rows as people's files hold them: columns by other names, options of the chat template."""

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
from llmkd.data.formats import OWN_ARGUMENTS, renamed
from llmkd.data.other_families import check_format
from llmkd.data.rows import load_rows
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
