"""The head's losses by the Triton kernel against the head's own operations, in fp32 and in float64. On a GPU: tests/gpu/test_head.py.

Triton's interpreter runs all cases in one process of its own (tests/triton_interpreter.py).
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkd.losses.chunked_head import head_losses
from llmkd.losses.divergences import DIVERGENCES, Divergence, with_parameters
from llmkd.losses.head_inputs import TeacherHead, Terms, TopK
from llmkd.losses.head_kernels import takes_in
from tests.triton_interpreter import Found, in_child_with_triton, in_interpreter

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="there is a Triton for Linux on x86_64 alone"
)
V, H, N, CHUNK = 300, 8, 7, 4
KERNELS: dict[str, Divergence] = {name: d for name, d in DIVERGENCES.items() if takes_in("triton", d)} | {
    "a sum": with_parameters({"forward_kl": 0.3, "jsd": 0.4, "skew_kl": 0.3}, {"skew": 0.2}),
    "a sum with top_k": with_parameters({"top_k": 0.6, "tvd": 0.4, "reverse_kl": 0.2}, {"top_k": 5}),
    "jsd at an end": with_parameters("jsd", {"beta": 1.0}),
}
BLOCKED = slice(100, 140)


def case(
    divergence: str = "forward_kl",
    *,
    temperature: float = 1.0,
    columns: int = V,
    vocabulary: int = V,
    dtype: torch.dtype = torch.float32,
    stored: int = 0,
    blocked: tuple[str, ...] = (),
    **changes: Any,
) -> dict[str, Any]:
    """Arguments of `head_losses`. stored: the teacher is a top k of so many; blocked: on whose side some columns are at -inf."""
    torch.manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    biases = {side: torch.zeros(size, dtype=dtype) for side, size in (("ours", vocabulary), ("theirs", columns))}
    for side in blocked:
        biases[side][BLOCKED] = -torch.inf
    teacher: TeacherHead | TopK = TeacherHead(some(N, H), some(columns, H), biases["theirs"])
    if stored:
        log_p = (teacher.states.double() @ teacher.weight.double().T).log_softmax(-1)
        likeliest = log_p.topk(stored)
        teacher = TopK(likeliest.indices.int(), likeliest.values.float(), columns)
    return {
        "states": some(N, H).requires_grad_(),
        "weight": some(vocabulary, H).requires_grad_(),
        "bias": biases["ours"].requires_grad_(),
        "teacher": teacher,
        "targets": torch.randint(0, BLOCKED.start, (N,)).masked_fill(torch.arange(N) % 4 == 3, -100),
        "compared": torch.arange(N) % 3
        != 2,  # position 5 without both, 2 without the divergence, 3 without cross-entropy
        "terms": Terms(0.3, 0.7, KERNELS[divergence], temperature),
        "chunk": CHUNK,
    } | changes


def itself(divergence: str) -> dict[str, Any]:
    """A student that is its teacher, with the divergence alone."""
    made = case(divergence)
    teacher = TeacherHead(made["states"].detach(), made["weight"].detach(), None)
    return made | {"teacher": teacher, "terms": replace(made["terms"], ce_scale=0.0)}


CASES: dict[tuple[str, str], dict[str, Any]] = {
    (divergence, name): case(divergence, **settings)
    for divergence in KERNELS
    for name, settings in {
        "as it is": {},
        "warm, narrower teacher": {"temperature": 2.0, "columns": V - 60},
        "wider teacher": {"columns": V + 9, "chunk": N},
        "-inf on both sides": {"blocked": ("ours", "theirs"), "temperature": 0.8},
        "-inf at the student": {"blocked": ("ours",)},
        "-inf at the teacher": {"blocked": ("theirs",)},
    }.items()
} | {
    ("stored", "as it is"): case(stored=5),
    ("stored", "warm, fewer columns"): case(stored=5, temperature=2.0, columns=V - 60),
    ("stored", "-inf at the student"): case(stored=5, blocked=("ours",)),
    ("stored", "all columns"): case(stored=V, temperature=2.0),
    ("none", "cross-entropy alone"): case(teacher=None),
    ("forward_kl", "bfloat16"): case(dtype=torch.bfloat16),
    ("jsd", "bfloat16"): case("jsd", dtype=torch.bfloat16, temperature=2.0),
    ("a sum with top_k", "bfloat16"): case("a sum with top_k", dtype=torch.bfloat16),
    ("stored", "bfloat16"): case(stored=5, dtype=torch.bfloat16),
}
FINITE = {key: made for key, made in CASES.items() if key[1] not in ("-inf at the student", "-inf at the teacher")}
ITSELF = {divergence: itself(divergence) for divergence in KERNELS}
WIDTHS = {columns: case(columns=columns, vocabulary=columns, dtype=torch.bfloat16) for columns in (1024, 2048)}


@pytest.fixture(scope="module")
def found() -> dict[Any, Found]:
    """By case."""
    cases = {**CASES, **ITSELF, **WIDTHS}
    return dict(zip(cases, in_interpreter(list(cases.values())), strict=True))


def plain(made: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """What the head's own operations find, in another dtype if one is given."""
    dtype = dtype or made["states"].dtype

    def cast(value: Any) -> Any:
        if isinstance(value, TeacherHead):
            bias = None if value.bias is None else value.bias.to(dtype)
            return TeacherHead(value.states.to(dtype), value.weight.to(dtype), bias)
        is_input = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().to(dtype).requires_grad_() if is_input else value

    made = {key: cast(value) for key, value in made.items()}
    outputs = head_losses(**made)
    return [
        *(value.detach() for value in outputs),
        *torch.autograd.grad(outputs[0], [made["states"], made["weight"], made["bias"]]),
    ]


def error(ours: Tensor, theirs: Tensor) -> float:
    """Of the norm."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("key", FINITE, ids=": ".join)
def test_the_kernel_gives_what_the_operations_give(found: dict[Any, Found], key: Any) -> None:
    made, ours = FINITE[key], found[key].outputs
    tolerance = 8e-3 if made["states"].dtype == torch.bfloat16 else 5e-6  # the interpreter cuts bfloat16 off
    for references in (plain(made), plain(made, torch.float64)) if tolerance < 1e-3 else (plain(made),):
        for value, reference in zip(ours, references, strict=True):
            assert error(value, reference) <= tolerance


@pytest.mark.parametrize("key", [key for key in CASES if key not in FINITE], ids=": ".join)
def test_tokens_that_one_side_shuts_out(found: dict[Any, Found], key: Any) -> None:
    """The sums are infinite where the operations' are; where the gradient stays finite it is theirs."""
    (loss, ce, kl, *gradients), references = found[key].outputs, plain(CASES[key])
    for value, reference in zip((loss, ce, kl), references, strict=False):
        assert value == reference if reference.isinf() else error(value, reference) < 5e-6
    for value, reference in zip(gradients, references[3:], strict=True):
        if reference.isfinite().all() and reference.norm() < 1e6:
            assert error(value, reference) <= 5e-6


def test_what_is_infinite_is_covered() -> None:
    kinds = {key[0] for key, made in CASES.items() if key not in FINITE and plain(made)[2].isinf()}
    assert {"forward_kl", "reverse_kl", "stored", "top_k", "jsd at an end"} <= kinds


@pytest.mark.parametrize("divergence", ITSELF)
def test_a_student_that_is_its_teacher(found: dict[Any, Found], divergence: str) -> None:
    loss, _, kl, *gradients = found[divergence].outputs
    assert loss == kl == 0 and all(not gradient.any() for gradient in gradients)


def test_one_launch_for_each_chunk(found: dict[Any, Found]) -> None:
    assert {key: found[key].launches for key in CASES} == {key: -(-N // made["chunk"]) for key, made in CASES.items()}


def test_the_bytes_of_a_token(found: dict[Any, Found]) -> None:
    """Forward KL in bfloat16: both models' logits are read twice, and the gradient is written, whatever the width; at most 2 MB."""
    narrow, wide = (found[columns].bytes / N for columns in WIDTHS)
    a_column = (wide - narrow) / 1024
    assert a_column == 2 * (2 + 2) + 2
    assert narrow + a_column * (151_936 - 1024) < 2e6


def test_the_compiler_takes_what_the_interpreter_takes(tmp_path: Path) -> None:
    """For an H100: each pass reads each model's logits 16 bytes at a time, twice of a block, and all stays in registers."""
    said = in_child_with_triton([sys.executable, "-m", "tests.triton_compiled"], TRITON_CACHE_DIR=str(tmp_path))
    versions = json.loads(said)
    assert {name: version["wide"] for name, version in versions.items()} == {
        "forward_kl": 2 * 4,
        "jsd, warm": 2 * 6,
        "tvd and top_k": 2 * 6,
        "stored": 2 * 2,
    }
    assert all(version["other"] <= 8 and version["spilt"] <= 16 for version in versions.values())
