"""States as they are stored: as they are, rounded to bfloat16, or in one byte per number with one scale per token.

`stored(states, "fp8")` takes `[N, H]` of any float dtype and gives (values `[N, H]`, scales `[N]` or None); `restored` is its inverse
but for the rounding. A scale puts a token's largest number at the format's largest, so no token can spoil another's digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"fp8": 448.0, "int8": 127.0}
"""The largest number of the formats that need a scale."""


def stored(states: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """(values [N, H], scales [N]) of states [N, H]; a format wide enough needs no scale.

    fp8 (e4m3) keeps 4 significant bits of every number down to 2^-15 of the token's largest; int8 keeps steps of 1/127 of the
    largest, so that one very large number, as residual streams have, takes the digits of the token's others.
    """
    if dtype not in LARGEST:
        return states.to(STORED[dtype]), None
    wide = states.float()
    scales = wide.abs().amax(-1) / LARGEST[dtype]
    scales = torch.where(scales == 0, 1.0, scales)  # a token of zeros
    values = wide / scales[:, None]
    if dtype == "int8":
        values = values.round()
    # The division may round up past the largest, and fp8 has no infinity to go to but NaN.
    return values.clamp(-LARGEST[dtype], LARGEST[dtype]).to(STORED[dtype]), scales


def restored(values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The states [N, H] in this dtype."""
    return values.to(dtype) if scales is None else (values.float() * scales[:, None]).to(dtype)
