"""Linear maps whose weights are kept in 4 bits (QLoRA's NF4, arXiv 2305.14314), by `bitsandbytes`, and computed with as plain ones.

Of a weight, each run of `RUN` numbers is kept as the nearest of 16 levels times the run's largest magnitude; these magnitudes are kept in
8 bits, in runs of `MAGNITUDES` (the paper's double quantization). A map's product is that of its plain weight, made for that moment.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmkd.errors import InputError
from llmkd.models.parts import blocks

Quantize = Literal["none", "nf4"]
RUN, MAGNITUDES = 64, 256


class FourBit(nn.Linear):
    """A frozen linear map; `weight` is the plain one that it computes with, made anew whenever it is asked for.

    What is kept is no parameter and in no state dict, so that a checkpoint, an optimizer and a sum over ranks have nothing of it.
    """

    def __init__(self, plain: nn.Linear, device: torch.device) -> None:
        """`plain` is left as it is; its weight is quantized on `device` and stays there."""
        nn.Module.__init__(self)  # no weight is drawn
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_parameter("bias", plain.bias)
        weight = plain.weight.detach().to(device)
        packed, self._state = _library().quantize_4bit(
            weight, blocksize=RUN, compress_statistics=True, quant_type="nf4"
        )
        self.register_buffer("_packed", packed, persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[outputs, inputs], in the dtype that it was quantized from."""
        return _library().dequantize_4bit(self._packed, self._state)

    def forward(self, input: Tensor) -> Tensor:
        """The product with the plain weight, in the input's dtype; it is not kept for the backward pass."""
        return _Product.apply(input, self)  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourBit:
        """As of any module, which may be moved; a change of dtype changes nothing that is kept in 4 bits."""
        super()._apply(fn, recurse)
        self._state.to(self._packed.device)
        return self


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: FourBit) -> Tensor:
        ctx.layer, dtype, bias = layer, states.dtype, layer.bias
        return F.linear(states, layer.weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def quantize(model: PreTrainedModel, device: torch.device) -> None:
    """Keep the weights of the linear maps of a model's blocks in 4 bits on `device`, in place, one map after another.

    Raises InputError for a weight that holds a NaN or an infinity, which 4 bits would hide.
    """
    for name, plain in quantizable(model).items():
        if not plain.weight.isfinite().all():
            raise InputError(f"{name}: its weight holds a NaN or an infinity; give a whole model")
        model.set_submodule(name, FourBit(plain, device))


def quantizable(model: PreTrainedModel, key: str = "quantize") -> Mapping[str, nn.Linear]:
    """The linear maps of a model's blocks, by name. `key`: the recipe's.

    Raises InputError where a block has another matrix (as experts, or GPT-2's maps), which would stay as it is.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, nn.Linear] = {}
    for block in blocks(model):
        for module in block.modules():
            name = names[id(module)]
            if type(module) is nn.Linear:
                found[name] = module
                continue
            for part, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    raise InputError(
                        f"{key}: {name}.{part} of a {model.config.model_type!r} model is no plain linear map's weight, and only these are "
                        "kept in 4 bits; write none"
                    )
    return found


def four_bit(model: nn.Module) -> dict[str, FourBit]:
    """The maps that are kept in 4 bits, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FourBit)}


def kept_bytes(numbers: int) -> int:
    """What so many weights take in 4 bits: half a byte each, one for each run, and a float32 for each run of these."""
    runs = -(-numbers // RUN)
    return -(-numbers // 2) + runs + 4 * -(-runs // MAGNITUDES)


def check_installed(key: str) -> None:
    """Raise InputError where the package that this takes is missing. `key`: the recipe's."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"{key}: nf4 takes the package bitsandbytes, which is not installed here; run pip install 'llmkd[bnb]', or write none"
        )


def _library() -> Any:
    import bitsandbytes.functional as functions  # pyright: ignore[reportMissingImports]  (heavy, and not always there)

    return functions
