"""Which kernel takes in which losses."""

from __future__ import annotations

import pytest
import torch

from llmkd.losses.divergences import DIVERGENCES, with_parameters
from llmkd.losses.head_kernels import Part, takes_in, triton_parts


def test_what_each_kernel_takes_in() -> None:
    taken = {
        kernel: {n for n, d in DIVERGENCES.items() if takes_in(kernel, d)} for kernel in ("compiled", "triton", "none")
    }
    assert taken["triton"] == set(DIVERGENCES) - {"akl"}
    assert taken["compiled"] == taken["triton"] - {"top_k"}
    assert taken["none"] == set()
    assert takes_in("compiled", None) and takes_in("triton", None) and not takes_in("none", None)


def test_a_stored_top_k_is_for_triton_whatever_the_divergence_is_called() -> None:
    assert takes_in("triton", DIVERGENCES["akl"], stored_top_k=True)
    assert not takes_in("compiled", DIVERGENCES["forward_kl"], stored_top_k=True)


def test_float64_stays_float64() -> None:
    assert not takes_in("triton", None, dtype=torch.float64)
    assert takes_in("triton", None, dtype=torch.bfloat16) and takes_in("compiled", None, dtype=torch.float64)


def test_a_sum_is_all_its_parts() -> None:
    two = with_parameters({"skew_kl": 0.25, "tvd": 0.5, "jsd": 0.0}, {"skew": 0.3})
    assert triton_parts(two) == (Part("skew_kl", 0.25, 0.3), Part("tvd", 0.5, 0.0))
    assert triton_parts(with_parameters({"tvd": 0.5, "akl": 0.5}, {})) is None
    assert triton_parts(lambda student, teacher, temperature: student.sum(-1)) is None


@pytest.mark.parametrize(
    ("name", "key", "value", "same"),
    [
        ("jsd", "beta", 0.0, "forward_kl"),
        ("jsd", "beta", 1.0, "reverse_kl"),
        ("skew_kl", "skew", 0.0, "forward_kl"),
        ("skew_reverse_kl", "skew", 0.0, "reverse_kl"),
    ],
)
def test_the_ends_of_a_parameter(name: str, key: str, value: float, same: str) -> None:
    assert triton_parts(with_parameters(name, {key: value})) == (Part(same, 1.0, value),)
