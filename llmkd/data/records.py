"""The built-in task: records of places to stay, described in one or two sentences.

    name Heron Mill | kind inn | setting lake | price low | food Thai | rating 4 | dogs yes | near Selby =>
    Heron Mill is a cheap inn by the lake. It serves Thai food, has four stars, welcomes dogs and is near Selby.

Every example is a function of (split, seed, index) alone, so a loader may start anywhere and two ranks never need to
talk. A record belongs to the split that a hash of its `COMBINATION` names, whatever the seed: a combination seen in
training is never tested.
"""

import hashlib
import re
from itertools import product
from random import Random
from typing import Any

from llmkd.errors import InputError

Record = dict[str, str]
Example = dict[str, Any]
Phrasing = tuple[int, int]  # (opening, wording)

SPLITS = ("train", "validation", "test")
HELD_OUT = {"validation": 12, "test": 12}  # percent of all combinations; the rest trains
COMBINATION = ("kind", "setting", "food")
CHANCE = 0.75  # of each slot but name and kind to be in a record

FIRST_WORDS = """
    Amber Birch Cedar Copper Coral Crane Ember Falcon Fern Flint Frost Hazel Heron Indigo Ivory Jade
    Juniper Larch Linden Maple Marble Otter Pearl Raven Ruby Sable Silver Swan Thistle Topaz Velvet Willow
""".split()
PLACE_WORDS = """
    Arch Barn Bridge Brook Court Croft Dale Dock Fold Forge Gate Glen Grange Grove Hall Haven
    Hollow Keep Lantern Manor Mill Nest Orchard Point Quay Ridge Spire Terrace Tower Vale Wharf Yard
""".split()
TOWNS = "Ashford Bexley Corby Dunmore Elton Fenwick Harlow Kelso Ludlow Marlow Oakham Selby".split()
STARS = {"1": "one star", "2": "two stars", "3": "three stars", "4": "four stars", "5": "five stars"}

# Slot -> value -> the words that realise it, one per wording. `name` is an open slot: it is copied.
CLOSED_SLOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "kind": {kind: (kind,) * 3 for kind in ("cabin", "farm", "hostel", "hotel", "inn", "lodge", "villa")},
    "setting": {
        "coast": ("on the coast",) * 3,
        "hills": ("in the hills",) * 3,
        "lake": ("by the lake",) * 3,
        "old town": ("in the old town",) * 3,
        "river": ("by the river",) * 3,
        "square": ("on the square",) * 3,
        "valley": ("in the valley",) * 3,
        "woods": ("in the woods",) * 3,
    },
    "price": {
        "low": ("cheap", "low-cost", "cheap"),
        "fair": ("mid-priced", "fairly priced", "mid-priced"),
        "high": ("expensive", "costly", "expensive"),
    },
    "food": {
        food: (f"serves {food} food", f"offers {food} dishes", f"cooks {food} meals")
        for food in ("Cuban", "French", "Greek", "Indian", "Korean", "Mexican", "Polish", "Thai", "Turkish")
    },
    "rating": {digit: (f"has {stars}", f"holds {stars}", f"is rated {stars}") for digit, stars in STARS.items()},
    "dogs": {
        "yes": ("welcomes dogs", "takes dogs", "lets dogs in"),
        "no": ("bans dogs", "takes no dogs", "keeps dogs out"),
    },
    "near": {town: (f"is near {town}", f"lies close to {town}", f"stands beside {town}") for town in TOWNS},
}
SLOTS = ("name", "kind", "setting", "price", "food", "rating", "dogs", "near")
ORDERS = (("food", "rating", "dogs", "near"), ("near", "food", "dogs", "rating"), ("rating", "near", "food", "dogs"))
PHRASINGS: tuple[Phrasing, ...] = tuple(product(range(4), range(len(ORDERS))))

# What `slots_right` looks for: the value's own word where every wording has it, else the whole wording.
SIGNS: dict[str, dict[str, tuple[str, ...]]] = {
    **{slot: {value: tuple(set(words)) for value, words in CLOSED_SLOTS[slot].items()} for slot in CLOSED_SLOTS},
    "food": {food: (food,) for food in CLOSED_SLOTS["food"]},
    "rating": {digit: (stars,) for digit, stars in STARS.items()},
    "near": {town: (town,) for town in TOWNS},
}
NAME_PATTERN = re.compile(rf"\b(?:{'|'.join(FIRST_WORDS)}) (?:{'|'.join(PLACE_WORDS)})\b")


def examples(split: str, seed: int, start: int, count: int) -> list[Example]:
    """Examples `start` to `start + count - 1` of a split: prompt, completion (begins with a space), record, references.

    `references` are all phrasings of the record, the completion among them, without the space. Raises InputError for a
    split that is not in `SPLITS`.
    """
    return [{**row, "references": references(row["record"])} for row in rows(split, seed, start, count)]


def rows(split: str, seed: int, start: int, count: int) -> list[Example]:
    """The same without references, which take most of the time and which training has no use for."""
    if split not in SPLITS:
        raise InputError(f"records: no split {split!r}; choose from {', '.join(SPLITS)}")
    return [_row(split, seed, index) for index in range(start, start + count)]


def _row(split: str, seed: int, index: int) -> Example:
    random = Random(stable_hash(f"{split} {seed} {index}"))
    record = draw_record(random)
    while home(record) != split:
        record = draw_record(random)
    opening, wording = PHRASINGS[draw(random, len(PHRASINGS))]
    return {
        "prompt": linearised(record),
        "completion": " " + sentences(record, (opening, wording)),
        "record": record,
    }


def linearised(record: Record) -> str:
    """The prompt of a record: `slot value | slot value =>`."""
    return " | ".join(f"{slot} {record[slot]}" for slot in SLOTS if slot in record) + " =>"


def references(record: Record) -> list[str]:
    """All phrasings of a record, none twice."""
    return list(dict.fromkeys(sentences(record, phrasing) for phrasing in PHRASINGS))


def sentences(record: Record, phrasing: Phrasing) -> str:
    """The record in words, with one of four openings and one of three wordings."""
    opening, wording = phrasing
    words = {slot: CLOSED_SLOTS[slot][value][wording] for slot, value in record.items() if slot in CLOSED_SLOTS}
    name, kind = record["name"], " ".join(words[slot] for slot in ("price", "kind") if slot in words)
    kind = ("an " if kind[0] in "aeiou" else "a ") + kind
    where = f" {words['setting']}" if "setting" in words else ""
    rest = listed([words[slot] for slot in ORDERS[wording] if slot in words])
    if opening == 1 and rest:
        return f"{name}, {kind}{where}, {rest}."
    first = f"{name} is {kind}{where}."
    if opening == 2:
        first = f"There is {kind} called {name}{where}."
    if opening == 3 and where:
        first = f"{where[1].upper()}{where[2:]} is {name}, {kind}."
    return f"{first} It {rest}." if rest else first


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}" if parts else ""


def slots_right(record: Record, text: str) -> float:
    """The share of slots that a text has right; 1.0 only if it has every slot of the record and nothing contradicts it.

    Counted over the record's slots and those that the text adds: a slot is right if its own value is in the text and no
    other value of that slot is.
    """
    values = _values_in(text)
    slots = [slot for slot in SLOTS if slot in record or values[slot]]
    return sum(values[slot] == {record.get(slot)} for slot in slots) / len(slots)


def _values_in(text: str) -> dict[str, set[str]]:
    """The values of each slot that a text names."""
    values = {"name": set(NAME_PATTERN.findall(text))}
    without_name = NAME_PATTERN.sub(" ", text).lower()
    for slot, signs_of in SIGNS.items():
        values[slot] = {
            value
            for value, signs in signs_of.items()
            if any(re.search(rf"\b{re.escape(sign.lower())}\b", without_name) for sign in signs)
        }
    return values


def choices(example: Example, count: int = 4) -> tuple[list[str], int]:
    """(the completion among `count - 1` others, each with another slot wrong in the same wording; its place among them)."""
    record, text = example["record"], example["completion"].strip()
    phrasing = next(phrasing for phrasing in PHRASINGS if sentences(record, phrasing) == text)
    random = Random(stable_hash(example["prompt"] + text))
    slots = [slot for slot in SLOTS if slot in record]
    wrong: list[str] = []
    while len(wrong) < count - 1:
        slot = slots.pop(draw(random, len(slots)))
        wrong.append(" " + sentences({**record, slot: another_value(random, slot, record[slot])}, phrasing))
    gold = draw(random, count)
    return [*wrong[:gold], example["completion"], *wrong[gold:]], gold


def another_value(random: Random, slot: str, value: str) -> str:
    other = value
    while other == value:
        other = draw_value(random, slot)
    return other


def draw_record(random: Random) -> Record:
    """At least three slots, so that `choices` always finds three to swap."""
    record: Record = {}
    while len(record) < 3:
        kept = [slot for slot in SLOTS if slot in ("name", "kind") or random.random() < CHANCE]
        record = {slot: draw_value(random, slot) for slot in kept}
    return record


def draw_value(random: Random, slot: str) -> str:
    if slot in CLOSED_SLOTS:
        values = list(CLOSED_SLOTS[slot])
        return values[draw(random, len(values))]
    return f"{FIRST_WORDS[draw(random, len(FIRST_WORDS))]} {PLACE_WORDS[draw(random, len(PLACE_WORDS))]}"


def draw(random: Random, below: int) -> int:
    """An integer in [0, below). Of `random`, only `.random()` promises the same numbers in every Python version."""
    return int(random.random() * below)


def home(record: Record) -> str:
    """The split that a record belongs to, by its combination of kind, setting and food."""
    place = stable_hash("/".join(record.get(slot, "") for slot in COMBINATION)) % 100
    for split, share in HELD_OUT.items():
        if place < share:
            return split
        place -= share
    return "train"


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
