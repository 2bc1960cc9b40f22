"""Whether a folder's weights are those of its config.json, by their headers alone: a wrong field is named before a model is made of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig

from llmkd.errors import InputError, reason
from llmkd.models.families import kind, model_type
from llmkd.models.folders import resolve, tensor_files
from llmkd.models.load import load_config, without_weights
from llmkd.models.parts import blocks

Shape = tuple[int, ...]


def read_config(
    path: str, what: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> tuple[Path, PreTrainedConfig]:
    """(folder, configuration) of a model, a folder or a hub name; `what`: the recipe's key, for the sentence.

    Raises InputError where the model is not whole or its configuration is not that of its weights.
    """
    folder = resolve(path, what, revision)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    check_stored(folder, config, trust_remote_code=trust_remote_code)
    return folder, config


def check_stored(folder: Path, config: PreTrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Raise InputError where the stored tensors have other shapes than config.json's fields give them, or are of fewer blocks.

    Tensors are compared that have the same name in the files and in memory; quantized weights are not compared, nor an encoder's map to
    its classes, which may be replaced.
    """
    try:
        model = without_weights(config, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # a model's own checks raise errors of any kind
        raise InputError(
            f"{folder}: transformers can't make a model of its config.json ({reason(error)}); give the config.json of these weights"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        return
    _check_depth(folder, model, config)
    classifier = (model_type(config).classifier or "").partition(".")[0] if kind(config) == "encoder" else None
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if classifier is None or not name.startswith(f"{classifier}.")
    }
    inputs: Any = model.get_input_embeddings()
    embedding = next((name for name, tensor in model.named_parameters() if tensor is inputs.weight), "")
    wrong = {name: shape for name, shape in _shapes(folder) if expected.get(name, shape) != shape}
    for name in [embedding, *sorted(wrong)]:  # the embeddings name the field best
        if name in wrong:
            raise InputError(
                f"{folder}: config.json does not fit its weights: {name} is stored as {_text(wrong[name])}, and "
                f"{_fields(config, wrong[name], expected[name])} {_text(expected[name])}; give the config.json of these weights"
            )


def _check_depth(folder: Path, model: Any, config: PreTrainedConfig) -> None:
    if kind(config) != "decoder":
        return
    stack = blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in tensor_files(folder) if name.startswith(prefix)}
    stored = {int(number) for number in numbers if number.isdecimal()}
    if stored and max(stored) + 1 < len(stack):
        raise InputError(
            f"{folder}: config.json does not fit its weights: num_hidden_layers is {len(stack)}, and weights of {max(stored) + 1} blocks "
            "are stored; give the config.json of these weights"
        )


def _shapes(folder: Path) -> Iterator[tuple[str, Shape]]:
    """Every stored tensor's name and shape."""
    names: dict[Path, list[str]] = defaultdict(list)
    for name, file in tensor_files(folder).items():
        names[file].append(name)
    for file, members in names.items():
        with safe_open(file, framework="pt") as tensors:
            for name in members:
                yield name, tuple(tensors.get_slice(name).get_shape())


def _fields(config: PreTrainedConfig, stored: Shape, expected: Shape) -> str:
    """The fields that hold the size that differs, with it: `hidden_size 96 makes it`."""
    sizes = [size for size, other in zip(expected, stored, strict=False) if size != other]
    values = {key: value for key, value in config.to_dict().items() if value in sizes and type(value) is int}
    likely = {key: value for key, value in values.items() if key.endswith(("_size", "_dim", "n_embd", "n_inner"))}
    listed = [f"{key} {value}" for key, value in (likely or values).items()]
    return f"{' or '.join(listed)} makes it" if listed else "config.json makes it"


def _text(shape: Shape) -> str:
    return " x ".join(map(str, shape))
