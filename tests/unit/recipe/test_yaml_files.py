"""What a recipe's YAML may hold, what its scalars mean, and what is refused before it can do harm."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from llmkd.errors import InputError
from llmkd.recipe.yaml_files import MOST_BYTES, RecipeDumper, parse_yaml, read_text

SCALARS = [
    ("1:30", "1:30"),
    ("yes", "yes"),
    ("off", "off"),
    ("2026-11-26", "2026-11-26"),
    ("1_000", "1_000"),
    ("1e-4", 1e-4),
    ("1.5E+3", 1500.0),
    ("-.5", -0.5),
    ("5.", 5.0),
    (".inf", math.inf),
    ("-.Inf", -math.inf),
    ("0x1F", 31),
    ("0o17", 15),
    ("017", 17),
    ("+12", 12),
    ("TRUE", True),
    ("~", None),
    ("", None),
    ("'12'", "12"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}", "f")["key"]
    assert read == value and type(read) is type(value)


BILLION = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = [
    (BILLION, "line 1 .more than 20000 values once its aliases are written out"),
    ("a: &a [*a]", "more than 32 levels"),
    ("a: &a {b: *a}", "more than 32 levels"),
    ("[" * 100_000, "more than 32 levels"),
    ("a:\n  - 0x" + "f" * 100_000, "line 2 .a whole number of more than 63 bits"),
    ("a: " + "9" * 100_000, "a whole number of more than 63 bits"),
    ("a: -9223372036854775808", "a whole number of more than 63 bits"),
    ("!!binary aGk=: 1", "a value of the type 'binary', which no key takes"),
    ("a: !!timestamp 2026-11-26", "a value of the type 'timestamp'"),
    ("a: !!python/object/apply:os.getcwd []", "a value of the type 'os.getcwd'"),
    ("? [a]\n: 1", "a key must be one word"),
    ("a: 1\na: 2", "line 2 .key 'a' is written twice"),
    ("a: [1", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED, ids=[text[:20] for text, _ in REFUSED])
def test_what_no_recipe_holds_is_refused_at_once(text: str, sentence: str) -> None:
    before = time.process_time()
    with pytest.raises(InputError, match=f"^f: .*{sentence}.*; fix it$"):
        parse_yaml(text, "f")
    assert time.process_time() - before < 5  # not the years that a billion values take


@given(
    st.recursive(
        st.none() | st.booleans() | st.text() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False),
        lambda part: st.lists(part, max_size=3),
    )
)
@example("\x85")
@example("a\u2028b")
def test_what_is_written_is_read_back(value: object) -> None:
    text = yaml.dump({"key": value}, Dumper=RecipeDumper, sort_keys=False, width=120)  # as `dump_recipe` does
    read = parse_yaml(text, "f")["key"]
    assert read == value and repr(read) == repr(value)


def test_a_file_that_is_no_recipe_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("a" * (MOST_BYTES + 1))
    for file in (tmp_path / "long.yaml", Path("/dev/zero")):
        with pytest.raises(InputError, match=f"{file}: more than 1048576 bytes; give a recipe"):
            read_text(file)
    with pytest.raises(InputError, match="can't be read as text"):
        read_text(tmp_path)
