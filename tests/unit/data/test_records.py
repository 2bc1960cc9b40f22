"""The built-in task: a function of its arguments alone, splits that never meet, and a checker that can't be fooled."""

import os
import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkd.data import records
from llmkd.errors import InputError
from llmkd.files import ROOT

KNOWN_PROMPT = (
    "name Jade Ridge | kind inn | setting old town | price fair | food Korean | rating 3 | dogs no | near Kelso =>"
)
KNOWN_COMPLETION = (
    " In the old town is Jade Ridge, a mid-priced inn."
    " It is rated three stars, stands beside Kelso, cooks Korean meals and keeps dogs out."
)
RECORD = {"name": "Heron Mill", "kind": "inn", "setting": "lake", "price": "low", "dogs": "no", "near": "Selby"}


def test_a_known_example_does_not_change() -> None:
    """Written down once: a change of the generator, of Python or of its `random` shows here."""
    example = records.examples("train", 0, 7, 1)[0]
    assert example["prompt"] == KNOWN_PROMPT
    assert example["completion"] == KNOWN_COMPLETION


def test_another_process_with_another_hash_seed_makes_the_same_examples() -> None:
    code = "from llmkd.data import records; print(records.examples('test', 3, 5, 4))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(records.examples("test", 3, 5, 4))


@given(st.sampled_from(records.SPLITS), st.integers(0, 50), st.integers(0, 10_000), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_any_range_can_be_read_alone(split: str, seed: int, start: int, count: int) -> None:
    alone = [records.examples(split, seed, start + i, 1)[0] for i in range(count)]
    assert records.examples(split, seed, start, count) == alone


def test_seeds_and_splits_give_different_examples() -> None:
    drawn = {(s, seed): str(records.examples(s, seed, 0, 5)) for s, seed in product(records.SPLITS, (0, 1))}
    assert len(set(drawn.values())) == len(drawn)


def test_a_record_of_one_split_never_occurs_in_another() -> None:
    """Thousands of each, of several seeds: no combination, hence no record, is shared."""
    seen = {}
    for split in records.SPLITS:
        made = [example for seed in range(3) for example in records.examples(split, seed, 0, 1500)]
        seen[split] = {tuple(e["record"].get(slot) for slot in records.COMBINATION) for e in made}
    assert all(len(combinations) > 30 for combinations in seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@given(st.integers(0, 2**40))
@settings(deadline=None)
def test_a_record_has_one_home(seed: int) -> None:
    record = records.draw_record(records.Random(seed))
    assert records.home(record) in records.SPLITS
    assert records.home(record) == records.home({**record, "name": "Amber Arch"})


def test_every_value_and_phrasing_occurs_in_training() -> None:
    """Held-out combinations are made of values that were all seen."""
    made = records.examples("train", 0, 0, 3000)
    for slot, values in records.CLOSED_SLOTS.items():
        assert {e["record"].get(slot) for e in made} >= set(values)
    names = [e["record"]["name"].split() for e in made]
    assert {first for first, _ in names} == set(records.FIRST_WORDS)
    assert {second for _, second in names} == set(records.PLACE_WORDS)


def test_prompt_completion_and_references_belong_together() -> None:
    for example in records.examples("validation", 1, 0, 300):
        assert example["completion"].startswith(" ") and not example["prompt"].endswith(" ")
        assert example["completion"][1:] in example["references"]
        assert len(set(example["references"])) == len(example["references"])
        assert example["prompt"] == records.linearised(example["record"])


def test_every_phrasing_of_every_record_is_told_rightly() -> None:
    for example in records.examples("train", 2, 0, 500):
        assert [records.slots_right(example["record"], text) for text in example["references"]] == [1.0] * len(
            example["references"]
        )


@pytest.mark.parametrize("slot", list(records.SLOTS))
def test_a_swapped_slot_is_one_slot_wrong(slot: str) -> None:
    """Whatever slot is swapped, and in any phrasing, the checker sees it, and it alone."""
    random = records.Random(1)
    for example in records.examples("test", 0, 0, 200):
        record = example["record"]
        if slot not in record:
            continue
        swapped = {**record, slot: records.another_value(random, slot, record[slot])}
        for phrasing in records.PHRASINGS:
            share = records.slots_right(record, records.sentences(swapped, phrasing))
            assert share == pytest.approx(1 - 1 / len(record))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Heron Mill is a cheap inn by the lake. It bans dogs and is near Selby.", 1.0),
        ("By the lake is Heron Mill, a low-cost inn. It keeps dogs out and lies close to Selby.", 1.0),
        ("Heron Mill is a cheap inn by the lake. It bans dogs.", 5 / 6),  # near is missing
        ("Heron Mill is a cheap inn by the lake. It bans dogs, takes dogs and is near Selby.", 5 / 6),  # both said
        ("Heron Mill is a cheap inn by the lake. It bans dogs, has two stars and is near Selby.", 6 / 7),  # one added
        ("Heron Vale is a cheap inn by the lake. It bans dogs and is near Selby.", 5 / 6),
        ("Amber Heron Mill Yard Heron Vale is a cheap inn by the lake. It bans dogs and is near Selby.", 5 / 6),
        ("Heron is a cheap inn by the lake. It bans dogs and is near Selby.", 5 / 6),
        ("Heron Mill is a cheap inner inn by the lake. It bans dogs and is near Selbyville.", 5 / 6),
        ("", 0.0),
        ("=> | | \u00e9\u00e9", 0.0),
    ],
)
def test_slots_right(text: str, share: float) -> None:
    assert records.slots_right(RECORD, text) == pytest.approx(share)


def test_no_word_serves_two_slots() -> None:
    """Else one slot's value could pass for another's, or a name for either."""
    signs = [sign for values in records.SIGNS.values() for words in values.values() for sign in words]
    assert len(set(signs)) == len(signs)
    plain = {word.lower() for sign in signs for word in sign.split()}
    assert not plain & {word.lower() for word in records.FIRST_WORDS + records.PLACE_WORDS}
    assert not set(records.FIRST_WORDS) & set(records.PLACE_WORDS)


def test_choices_hold_the_completion_once_and_wrong_ones_of_different_slots() -> None:
    golds = []
    for example in records.examples("test", 0, 0, 300):
        completions, gold = records.choices(example)
        golds.append(gold)
        shares = [records.slots_right(example["record"], completion) for completion in completions]
        assert len(set(completions)) == 4
        assert completions[gold] == example["completion"] and shares[gold] == 1.0
        wrong = [share for place, share in enumerate(shares) if place != gold]
        assert wrong == pytest.approx([1 - 1 / len(example["record"])] * 3)
        assert records.choices(example) == (completions, gold)
    assert all(golds.count(place) > 40 for place in range(4))  # the place gives nothing away


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="'dev'; choose from train, validation, test"):
        records.examples("dev", 0, 0, 1)
