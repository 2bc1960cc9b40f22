"""Rows of encoders and encoder-decoders: what the tokenizer writes around a text, classes, cuts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from llmkd.data.batches import IGNORE, Family
from llmkd.data.formats import RowFormat
from llmkd.data.other_families import (
    check_format,
    collate_classified,
    collate_sources,
    label_names,
    label_number,
    tokenize_for,
)
from llmkd.data.rows import load_rows
from llmkd.errors import InputError
from llmkd.models import make

TEXTS = ["one two three four five", "six seven"]
ENCODER = Family("encoder", labels=("no", "yes"))


@pytest.fixture(scope="module")
def encoder_tokenizer() -> Any:
    return make.new_tokenizer(TEXTS, 300, "encoder")


@pytest.fixture(scope="module")
def seq2seq_tokenizer() -> Any:
    return make.new_tokenizer(TEXTS, 300, "encoder_decoder")


def rows(*values: dict[str, Any]) -> Dataset:
    return Dataset.from_list(list(values))


def classified(data: Dataset, tokenizer: Any, max_length: int = 32, too_long: str = "drop") -> Any:
    return tokenize_for(ENCODER, data, tokenizer, row_format=RowFormat(), max_length=max_length, too_long=too_long)


def classified_as(data: Dataset, tokenizer: Any, labels: Any, **lengths: Any) -> Any:
    return tokenize_for(Family("encoder", labels=labels), data, tokenizer, row_format=RowFormat(), **lengths)


def sources(data: Dataset, tokenizer: Any, start: int, **lengths: Any) -> Any:
    family = Family("encoder_decoder", start=start)
    return tokenize_for(family, data, tokenizer, row_format=RowFormat(), **lengths)


def test_renamed_columns_of_other_families(encoder_tokenizer: Any, seq2seq_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sentence,class,q,a\none two,yes,one,two\none two,no,1,2024-01-01\n")
    columns = {"sentence": "text", "class": "label", "q": "prompt", "a": "completion"}
    rows = load_rows(str(tmp_path / "a.csv"), name=None, split="train", rows=None, columns=columns)
    lengths: Any = {"row_format": RowFormat(columns=columns), "max_length": 32, "too_long": "drop"}
    assert tokenize_for(Family("encoder", labels=("no", "yes")), rows, encoder_tokenizer, **lengths)["class"] == [1, 0]
    assert len(tokenize_for(Family("encoder_decoder"), rows, seq2seq_tokenizer, **lengths)) == 2


def test_one_text_and_two_texts_are_written_by_the_tokenizers_template(encoder_tokenizer: Any) -> None:
    cls, sep = encoder_tokenizer.cls_token_id, encoder_tokenizer.sep_token_id
    a, b = (encoder_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one two", "six"))
    (single,) = classified(rows({"text": "one two", "label": "yes"}), encoder_tokenizer)
    assert single["input_ids"] == [cls, *a, sep] and single["class"] == 1 and single["length"] == len(a) + 2
    (pair,) = classified(rows({"text_a": "one two", "text_b": "six", "label": 0}), encoder_tokenizer)
    assert pair["input_ids"] == [cls, *a, sep, *b, sep] and pair["class"] == 0
    assert pair["segments"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    batch = collate_classified([single, pair], pad_id=0, numbers=[4, 7])
    assert batch.targets.tolist() == [[1], [0]] and batch.trained_at.tolist() == [0, 1] and batch.rows == (4, 7)
    assert batch.segments is not None and batch.segments[0].sum() == 0
    assert batch.segments[1, : len(pair["segments"])].tolist() == pair["segments"]
    assert batch.attended.sum(1).tolist() == [single["length"], pair["length"]]
    assert batch.counts == (2, single["length"] + pair["length"], 0)
    assert collate_classified([single], pad_id=0).segments is None  # a model without two kinds of text is told of none


def test_a_cut_text_keeps_its_closing_token(encoder_tokenizer: Any) -> None:
    data = rows({"text": "one two three four five", "label": "yes"}, {"text": "six", "label": "no"})
    kept = classified(data, encoder_tokenizer, 5)
    assert [row["row"] for row in kept] == [1]
    cut = classified(data, encoder_tokenizer, 5, "truncate")
    assert [row["row"] for row in cut] == [0, 1] and len(cut[0]["input_ids"]) == 5
    assert cut[0]["input_ids"][-1] == encoder_tokenizer.sep_token_id
    with pytest.raises(InputError, match=r"data\.max_length: no row has a token to train within 2 tokens"):
        classified(data, encoder_tokenizer, 2)


def test_classes_are_in_one_order() -> None:
    assert label_names(rows({"label": "yes"}, {"label": "no"}, {"label": "yes"})) == ("no", "yes")
    assert label_names(rows({"label": 2}, {"label": 0})) == ("0", "1", "2")
    for data, sentence in (
        (rows({"label": 1.5}, {"label": 0.0}), r"the label .* is not a class; write texts, or whole numbers from 0 up"),
        (rows({"label": -1}, {"label": 0}), r"the label -1 is not a class"),
        (rows({"label": "yes"}), r"all rows have the label 'yes'; give rows of two classes"),
        (rows({"class": 1}), r"data\.format: classification needs the column 'label', the data has class"),
    ):
        with pytest.raises(InputError, match=sentence):
            label_names(data)


@pytest.mark.parametrize("label", ["maybe", 2, -1])
def test_label_that_is_no_class(encoder_tokenizer: Any, label: Any) -> None:
    with pytest.raises(InputError, match=r"data row 0: the label .* is none of the model's classes \(no, yes\)"):
        classified_as(
            rows({"text": "one", "label": label}), encoder_tokenizer, ("no", "yes"), max_length=9, too_long="drop"
        )


def test_source_and_target(seq2seq_tokenizer: Any) -> None:
    eos, start = seq2seq_tokenizer.eos_token_id, 0
    one, six = (seq2seq_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one two", "six"))
    data = rows(
        {"prompt": "one two", "completion": "six"},
        {"prompt": "six", "completion": "one"},
        {"prompt": "six", "completion": " "},
    )
    found = sources(data, seq2seq_tokenizer, start, max_length=32, too_long="drop")
    assert found[0]["source_ids"] == [*one, eos] and found[0]["target_ids"] == [start, *six, eos]
    assert found["row"] == [0, 1]  # an empty answer would teach to stop at once
    assert found[0]["length"] == len(one) + len(six) + 2
    batch = collate_sources([found[0], {**found[1], "target_ids": [start, eos]}], pad_id=0)
    assert batch.input_ids[0, : len(six) + 1].tolist() == [start, *six]
    assert batch.targets[0, : len(six) + 1].tolist() == [*six, eos]
    assert batch.targets[1, 0] == eos and (batch.targets[1, 1:] == IGNORE).all()
    assert batch.source_ids is not None and batch.source_ids[0, : len(one) + 1].tolist() == [*one, eos]
    assert batch.counts == (len(six) + 2, len(six) + 2, len(one) + len(six) + 2)


def test_each_side_has_a_length_of_its_own(seq2seq_tokenizer: Any) -> None:
    long, short = "one two three four five", "six"
    data = rows({"prompt": long, "completion": short}, {"prompt": short, "completion": long})
    whole = len(seq2seq_tokenizer(long)["input_ids"])
    assert len(sources(data, seq2seq_tokenizer, 0, max_length=whole, too_long="drop")) == 2
    cut = sources(data, seq2seq_tokenizer, 0, max_length=whole - 1, too_long="truncate")
    assert len(cut[0]["source_ids"]) == whole - 1 and len(cut[1]["target_ids"]) == whole
    assert cut[0]["source_ids"][-1] == seq2seq_tokenizer(long)["input_ids"][-1]  # the token that closes it stays
    with pytest.raises(InputError, match="no row has a token to train within"):
        sources(data, seq2seq_tokenizer, 0, max_length=whole - 1, too_long="drop")


@pytest.mark.parametrize(
    ("family", "format", "sentence"),
    [
        (ENCODER, "text", r"data\.format: an encoder is not trained on text; write auto or classification"),
        (
            Family("encoder_decoder"),
            "messages",
            r"an encoder-decoder is not trained on messages; write auto or prompt_c",
        ),
        (
            Family("decoder"),
            "classification",
            r"a decoder is not trained on classification; write auto",
        ),
    ],
)
def test_formats_of_other_families_are_refused(family: Family, format: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_format(family, RowFormat(format))


def test_texts_that_are_none(encoder_tokenizer: Any, seq2seq_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="data row 0: a text is int; make it a text"):
        classified(rows({"text": 3, "label": "yes"}), encoder_tokenizer)
    with pytest.raises(InputError, match="data row 0: completion must be text, it is NoneType; make it text"):
        data = rows({"prompt": "one", "completion": None})
        sources(data, seq2seq_tokenizer, 0, max_length=9, too_long="drop")


def test_a_class_is_found_by_its_name_before_its_number() -> None:
    assert [label_number(label, ("1", "2", "3"), 0) for label in (1, "2", 3)] == [0, 1, 2]
    assert [label_number(label, ("no", "yes"), 0) for label in (1, "no")] == [1, 0]
    with pytest.raises(InputError, match="the label 2 is none of the model's classes"):
        label_number(2, ("no", "yes"), 0)
