"""The losses of a chunk as one compiled function, against the head's own operations. On a GPU: tests/gpu/test_head.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor

from llmkd.losses import compiled_rows, divergences
from llmkd.losses.chunked_head import head_losses
from llmkd.losses.divergences import DIVERGENCES, Divergence, with_parameters
from llmkd.losses.head_inputs import TeacherHead, Terms
from llmkd.losses.head_kernels import HeadKernel

V, H = 37, 8


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """torch.compile up to the graph, which then runs as it is: no C compiler, and every graph is in this list."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(compiled_rows, "_COMPILED", {})
    dynamo.reset()
    yield graphs
    dynamo.reset()


def _losses(
    rows: int,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    kl: float = 0.7,
    kernel: HeadKernel,
    columns: int = V,
) -> tuple[Tensor, ...]:
    """The loss, its two sums and both gradients of so many rows."""
    torch.manual_seed(rows)
    states, weight = torch.randn(rows, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    teacher = TeacherHead(torch.randn(rows, H), torch.randn(columns, H), None)
    targets = torch.randint(0, V, (rows,)).masked_fill(torch.arange(rows) % 4 == 3, -100)
    terms = Terms(0.3, kl, divergence, temperature)
    found = head_losses(
        states, weight, None, teacher, targets, torch.arange(rows) % 3 != 2, terms, chunk=5, kernel=kernel
    )
    return *found, *torch.autograd.grad(found[0], [states, weight])


@pytest.mark.parametrize("name", sorted(n for n, d in DIVERGENCES.items() if compiled_rows.reads_row_by_row(d)))
def test_one_graph_serves_every_number_of_rows_and_every_scale(traced: list[Any], name: str) -> None:
    for rows, kl in ((5, 0.7), (13, 0.01), (28, 0.2)):  # chunks of 5, 5, and 5; of 4 or 5 rows
        found = _losses(rows, DIVERGENCES[name], kl=kl, kernel="compiled")
        torch.testing.assert_close(found, _losses(rows, DIVERGENCES[name], kl=kl, kernel="none"), rtol=1e-5, atol=1e-6)
    assert len(traced) == 1


def test_a_temperature_and_an_equal_divergence_compile_once(traced: list[Any]) -> None:
    for rows, temperature in ((5, 2.0), (9, 3.0), (7, 1.5)):
        jsd = partial(divergences.jsd, beta=0.3)  # a new one each time, as a report of gradient norms makes it
        found = _losses(rows, jsd, temperature=temperature, kernel="compiled", columns=V - 6)
        expected = _losses(rows, jsd, temperature=temperature, kernel="none", columns=V - 6)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(traced) == 1


def test_what_no_kernel_takes_in_is_run_an_operation_at_a_time(traced: list[Any]) -> None:
    mixed = with_parameters({"forward_kl": 0.5, "akl": 0.5}, {})
    for divergence in (DIVERGENCES["akl"], DIVERGENCES["top_k"], mixed, lambda s, t, by: DIVERGENCES["tvd"](s, t, by)):
        assert torch.equal(_losses(5, divergence, kernel="compiled")[0], _losses(5, divergence, kernel="none")[0])
    assert not traced
    assert compiled_rows.reads_row_by_row(with_parameters({"forward_kl": 0.5, "jsd": 0.5}, {"beta": 0.1}))


def test_tokens_that_one_side_shuts_out(traced: list[Any]) -> None:
    """-inf on both sides adds nothing; on the student's alone, forward KL is infinite; nothing is ever NaN."""
    ours, theirs = torch.randn(3, V), torch.randn(3, V)
    ours[:2, 5], theirs[0, 5] = -torch.inf, -torch.inf
    rows = compiled_rows.compiled_rows(DIVERGENCES["forward_kl"])
    one, nothing = torch.ones(()), torch.full((3,), -100)
    for row, finite in ((0, True), (1, False), (2, True)):
        logits = ours.clone()
        _, value = rows(logits, theirs, nothing, torch.arange(3) == row, one, one, None)
        assert not logits.isnan().any() and not value.isnan()
        assert value.isfinite() == finite
    logits = ours[:1].clone()
    rows(logits, theirs[:1], nothing[:1], torch.ones(1, dtype=torch.bool), one, one, None)
    keep = torch.arange(V) != 5
    expected = (ours[:1, keep].softmax(-1) - theirs[:1, keep].softmax(-1)).squeeze()
    torch.testing.assert_close(logits[0, keep], expected)
    assert logits[0, 5] == 0
