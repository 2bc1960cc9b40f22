"""Prompts of held-out rows: they begin as training begins such a row, and rows that hold none or are trained on are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd.data import records, tokens
from llmkd.data import rows as row_files
from llmkd.data.formats import RowFormat
from llmkd.errors import InputError
from llmkd.evaluation.held_out import Prompt, encoded, held_out_prompts, read_prompts
from llmkd.models import make
from llmkd.recipe.evaluation import Generation
from llmkd.recipe.recipe import Data

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    rows = records.rows("train", 0, 0, 200)
    made = make.new_tokenizer([row["prompt"] + row["completion"] for row in rows], 400)
    made.chat_template = TEMPLATE
    return made


def test_the_built_in_task_brings_its_records_and_all_their_phrasings() -> None:
    items = held_out_prompts(Generation(items=3), Data(rows=10, records_seed=5))
    made = records.examples("test", 5, 0, 3)
    assert items == [Prompt(text=e["prompt"], references=e["references"], record=e["record"]) for e in made]


CHAT = [
    {"role": "user", "content": "a cheap inn"},
    {"role": "assistant", "content": "There is one."},
    {"role": "user", "content": "by the lake"},
    {"role": "assistant", "content": " Heron Mill is by the lake. "},
]


def write(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_chat_is_asked_up_to_where_training_begins_the_last_answer(tokenizer: Any, tmp_path: Path) -> None:
    source = write(
        tmp_path / "chats.jsonl", {"messages": CHAT}, {"messages": [*CHAT, {"role": "user", "content": "thanks"}]}
    )
    items = held_out_prompts(Generation(source=source, items=5), Data(rows=10))
    ids, is_trained = tokens.conversation(CHAT, tokenizer)
    begins = max(place for place in range(1, len(ids)) if is_trained[place] and not is_trained[place - 1])
    for item, (text, asked) in zip(items, encoded(items, tokenizer), strict=True):
        assert asked == ids[:begins] and text.endswith(f"by the lake{tokenizer.eos_token}\n<assistant> ")
        assert item.references == ["Heron Mill is by the lake."]


def test_a_prompt_is_asked_as_training_begins_its_row(tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": "kind inn =>", "completion": " It is an inn."}
    source = write(tmp_path / "rows.jsonl", row, {**row, "prompt": "kind farm =>"})
    items = held_out_prompts(Generation(source=source, items=1), Data(rows=10))
    assert items == [Prompt(text="kind inn =>", references=["It is an inn."])]
    rows = row_files.load_rows(source, name=None, split="train", rows=1)
    ids = tokens.tokenize(rows, tokenizer, row_format=RowFormat(), max_length=99, too_long="drop")[0]
    [(text, asked)] = encoded(items, tokenizer)
    assert text == row["prompt"] and asked == ids["input_ids"][: ids["trained"].index(True)]


def test_references_of_their_own_take_the_completions_place(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": " c", "references": ["one", "two "][: n + 1]} for n in range(2)]
    items = read_prompts(Data(source=write(tmp_path / "rows.jsonl", *rows), split="test", rows=9))
    assert [item.references for item in items] == [["one"], ["one", "two"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "plain"}], "hold text, which is no prompt to continue"),
        ([{"prompt": "p"}], "hold prompt, which is no prompt to continue"),
        ([{"messages": CHAT[:1]}], "row 0 .* no turn of the assistant follows another"),
        ([{"messages": CHAT[1:2]}], "row 0 .* no turn of the assistant follows another"),
        ([{"prompt": "p", "completion": 3}], "row 0 .* completion must be text, it is int"),
    ],
)
def test_rows_without_prompts_are_refused(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(Data(source=write(tmp_path / "rows.jsonl", *rows), split="test", rows=9))


def test_rows_that_the_students_are_trained_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="evaluation.generation.split: the students are trained on the split 'test'"):
        held_out_prompts(Generation(), Data(rows=10, split="test"))
    one = write(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c"})
    for source in (one, str(tmp_path)):
        with pytest.raises(InputError, match="evaluation.generation.source: the students are trained on all of"):
            held_out_prompts(Generation(), Data(source=source))
    write(tmp_path / "train.jsonl", {"prompt": "of train", "completion": "c"})
    write(tmp_path / "test.jsonl", {"prompt": "held out", "completion": "c"})
    assert [item.text for item in held_out_prompts(Generation(), Data(source=str(tmp_path)))] == ["held out"]
    assert held_out_prompts(Generation(source=one), Data(source=one))  # said by name: meant so


def test_held_out_rows_are_read_as_the_students_own_unless_they_say_otherwise(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"question": "p", "answer": "c", "text": "t"})
    other = write(tmp_path / "other.jsonl", {"instruction": "i", "output": "o", "messages": CHAT, "text": "t"})
    data = Data(source=source, format="prompt_completion", columns={"question": "prompt", "answer": "completion"})
    assert held_out_prompts(Generation(source=source), data) == [Prompt(text="p", references=["c"])]
    chats = held_out_prompts(Generation(source=other, format="messages", columns={}), data)
    assert chats[0].references == ["Heron Mill is by the lake."]
    plain = Data(source=source, format="text")
    assert held_out_prompts(Generation(source=source, columns=data.columns), plain)[0].text == "p"
    with pytest.raises(InputError, match="evaluation.generation: .*data.columns: the data has no column 'question'"):
        held_out_prompts(Generation(source=other), data)
    with pytest.raises(InputError, match="evaluation.generation: .*data.format: .* fit messages and alpaca alike"):
        held_out_prompts(Generation(source=other, format="auto", columns={}), data)


@pytest.mark.parametrize("keys", [{"format": "alpaca"}, {"columns": {"a": "prompt"}}])
def test_how_the_students_own_rows_are_read_is_said_once(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(keys))}: it belongs to a source of its own; give source too"):
        Generation(**keys)
    with pytest.raises(ValueError, match="columns: no format has a column 'promt'; did you mean prompt"):
        Generation(source="a.jsonl", columns={"a": "promt"})
