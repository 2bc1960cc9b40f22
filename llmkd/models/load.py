"""Loading Hugging Face models: `load_model` reads a plain folder, under ZeRO-3 straight into shards.

Every student starts as such a folder (llmkd.models.make). llmkd.models.parts finds its blocks and its head.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from llmkd.distributed.ds_configs import DsConfig
from llmkd.distributed.engines import sharded_construction
from llmkd.errors import InputError, first_line, reason
from llmkd.models import four_bit, varlen
from llmkd.models.families import (
    AUTO_CLASSES,
    by_stack,
    check_blocks,
    check_logits,
    depths,
    kind,
    model_type,
    set_depths,
)
from llmkd.models.folders import has_own_head, tensor_files
from llmkd.models.model_types import types_with
from llmkd.models.parts import blocks as blocks_of
from llmkd.models.parts import head
from llmkd.models.per_block import check_copies, check_lists, fields_of

log = logging.getLogger("llmkd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def without_weights(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of that shape on the meta device, to inspect and count."""
    with torch.device("meta"), no_init_weights():  # to draw numbers that are not there takes half of the time
        model = AUTO_CLASSES[kind(config)].from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()  # which would have come after it
    return model


def check_usable(config: PreTrainedConfig, *, section: str, attention: str, packed: bool) -> None:
    """Raise InputError for a model that can't be used with a recipe section's settings; only its configuration is needed.

    Packed rows are for the model types that a test has shown to keep documents apart.
    """
    check_logits(config)
    check_blocks(config)
    if attention == "flash_attention_2" and not _flash_attention():
        raise InputError(f"{section}.attention: flash_attention_2 needs a GPU and the package flash-attn; write auto")
    if packed and not model_type(config).packs:
        raise InputError(
            f"data.batching: packed rows of a {config.model_type!r} model might see each other; write grouped "
            f"(packed is for {', '.join(types_with(lambda row: row.packs))})"
        )


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model folder."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration's own checks raise errors of any kind
        raise InputError(
            f"{folder}: transformers can't read this model ({reason(error)}); give another, or fix its config.json"
        ) from error
    if not hasattr(config, "num_hidden_layers"):
        raise InputError(
            f"{folder}: a model of type {config.model_type!r} is more than a causal language model; give one of text alone"
        )
    kind(config)
    check_lists(config, folder)
    if getattr(config, "tie_word_embeddings", False) and has_own_head(folder, model_class(config)):
        config.tie_word_embeddings = False
    return config


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(
            f"{folder}: holds no tokenizer that transformers can read ({first_line(error)}); copy the model's tokenizer into it"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without its files
        raise InputError(f"{folder}: its tokenizer has no vocabulary; copy the model's tokenizer files into the folder")
    return tokenizer


def student_config(teacher: PreTrainedConfig, blocks: Sequence[int], width: dict[str, int]) -> PreTrainedConfig:
    """The teacher's configuration at the student's depth (and width, where given); per-block settings follow their blocks."""
    config = copy.deepcopy(teacher)
    set_depths(config, [len(chosen) for chosen in by_stack(blocks, depths(teacher))])
    if len(depths(teacher)) == 1:
        for key, value in fields_of(teacher, blocks).items():
            setattr(config, key, value)
    if width.get("num_experts") == 0:
        config = _without_experts(config)
    for key, value in width.items():
        for name in () if key == "num_experts" else model_type(teacher).widths.get(key, (key,)):
            if not hasattr(config, name):
                raise InputError(
                    f"student.{key}: the teacher's model type {teacher.model_type!r} has no such setting; leave it out"
                )
            setattr(config, name, value)
    if getattr(teacher, "word_embed_proj_dim", None) == teacher.hidden_size:  # OPT: as wide as the rest
        config.word_embed_proj_dim = config.hidden_size
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if shared and heads % shared:
        raise InputError(
            f"student.num_key_value_heads: {heads} attention heads can't share {shared} key-value heads; write a divisor of {heads}"
        )
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise InputError(
            f"student.num_attention_heads: {heads} heads can't share a width of {config.hidden_size}; write a divisor of it"
        )
    return config


def _without_experts(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the same model with all of its blocks dense."""
    dense = model_type(config).dense
    if dense is None:
        known = ", ".join(types_with(lambda row: row.dense is not None))
        raise InputError(
            f"student.num_experts: blocks without experts are known of {known}, and the teacher is a {config.model_type!r} model; leave it "
            "out"
        )
    own = AutoConfig.for_model(dense).to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    return AutoConfig.for_model(dense, **{key: value for key, value in config.to_dict().items() if key in own})


def check_copied_config(
    teacher: PreTrainedConfig, student: PreTrainedConfig, chosen: Sequence[int], *, trust_remote_code: bool = False
) -> None:
    """Raise InputError unless a decoder of the student's configuration has, at each place, the block that is copied there.

    Both are built on the meta device, the student's from its configuration as it will be read from its file.
    """
    stacks = []
    for config in (teacher, type(student).from_dict(student.to_dict())):
        try:
            stacks.append(blocks_of(without_weights(config, trust_remote_code=trust_remote_code)))
        except InputError:
            raise
        except Exception as error:  # a model's own checks raise errors of any kind
            whose = (
                "student.copy_blocks: a student of these blocks"
                if stacks
                else "teacher.path: a model of its config.json"
            )
            raise InputError(
                f"{whose} can't be built ({reason(error)}); write other blocks, or give another teacher"
            ) from error
    check_copies(stacks[0], stacks[1], chosen)


def attention_implementation(setting: str, dtype: torch.dtype, config: PreTrainedConfig) -> tuple[str, str]:
    """(name for transformers, why): under `auto` varlen (llmkd.models.varlen) where the model can have it; else flash_attention_2 where it
    is installed, there is a GPU and the model is in half precision; else sdpa, or eager for a model that lacks it (GPT-OSS)."""
    if setting != "auto":
        return setting, "as the recipe says"
    of = model_class(config)
    lacking = "the model's code is its folder's own" if of is None else varlen.lacking(config, dtype)
    if lacking is None:
        return varlen.NAME, "packed rows need no mask"
    row = model_type(config)
    apart = (
        row.varlen or not row.packs
    )  # else flash-attn would let the documents of a batch of packed rows see each other
    if _flash_attention() and dtype != torch.float32 and getattr(of, "_supports_flash_attn", True) and apart:
        return "flash_attention_2", "flash-attn is installed and there is a GPU"
    if not getattr(of, "_supports_sdpa", True):
        return "eager", f"transformers has no sdpa for a {config.model_type!r} model"
    return "sdpa", f"no varlen: {lacking}"


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that transformers makes a model of; None where it is the folder's own code."""
    classes: Any = AUTO_CLASSES[kind(config)]._model_mapping
    return classes[type(config)] if type(config) in classes else None


def _flash_attention() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def load_causal_lm(folder: Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """As `load_model`, where only a decoder will do. Raises InputError for another family."""
    shape = kind(load_config(folder, trust_remote_code=trust_remote_code))
    if shape != "decoder":
        raise InputError(
            f"{folder}: an {shape.replace('_', '-')} where a causal language model is needed; give a decoder"
        )
    return load_model(folder, trust_remote_code=trust_remote_code, **options)


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    ds_config: DsConfig | None,
    attention: str,
    trust_remote_code: bool = False,
    first_blocks: int | None = None,
    quantize: four_bit.Quantize = "none",
) -> PreTrainedModel:
    """Load a model of any family from safetensors; straight into shards if `ds_config` asks for ZeRO-3.

    `first_blocks`: build and load no more than so many of a decoder's blocks. `quantize`: how the weights of the blocks' linear maps are
    kept, of a model that is not in shards; those in 4 bits are on this process's GPU at once, where it has one. Raises InputError when the
    folder's weights do not fill the model (transformers itself would only warn and make them up).
    """
    shape = load_config(folder, trust_remote_code=trust_remote_code)
    name, why = attention_implementation(attention, dtype, shape)
    if attention == "auto":
        log.info("%s: attention %s (%s)", folder, name, why)
    part = shape if first_blocks is None else student_config(shape, range(first_blocks), {})
    try:
        with sharded_construction(ds_config), quiet_about_unused(first_blocks is not None):
            loaded: Any = AUTO_CLASSES[kind(shape)].from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=name,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                config=part,
            )
    except (ImportError, OSError, ValueError) as error:
        raise InputError(
            f"{folder}: can't be loaded with attention {name!r} ({first_line(error)}); choose another model, or another attention"
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):  # out of memory, and the like
            raise
        raise InputError(
            f"{folder}: its weights have other shapes than its config.json says; give the weights with their own config.json"
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"{folder}: its weights lack {len(missing)} tensors of the model, first {missing[0]!r}; give the whole weights"
        )
    _restore_float32_buffers(model)
    if quantize != "none":
        four_bit.quantize(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.config.use_cache = False
    return model


def load_head(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> tuple[Tensor, Tensor | None]:
    """The head's weight [V, H] and bias [V] or None, alone: nothing else of the folder's weights is read.

    Where the stored names differ from those in memory, which transformers translates, a model of one block is loaded for its head.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model: Any = without_weights(config, trust_remote_code=trust_remote_code)
    module = head(model)
    modules = {id(m): name for name, m in model.named_modules()}
    names = [modules[id(module)]]
    if config.tie_word_embeddings:  # a tied head is stored once, as the embedding
        names.append(modules[id(model.get_input_embeddings())])
    files = tensor_files(folder)
    stored = next((name for name in names if f"{name}.weight" in files), None)
    if stored is None:
        options: dict[str, Any] = dict(
            ds_config=None, attention="eager", trust_remote_code=trust_remote_code, first_blocks=1
        )
        small = head(load_causal_lm(folder, dtype=dtype, **options))
        return small.weight.detach(), None if small.bias is None else small.bias.detach()

    def tensor(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as tensors:
            return tensors.get_tensor(name).to(dtype, copy=True)

    return tensor(f"{stored}.weight"), None if module.bias is None else tensor(f"{names[0]}.bias")


@contextlib.contextmanager
def quiet_about_unused(quiet: bool) -> Iterator[None]:
    """Where only a part of a model is loaded, keep transformers from listing the unused tensors."""
    before = transformers.utils.logging.get_verbosity()
    if quiet:
        transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model below its head, as a model of its own; the head's weights are released."""
    base: Any = model.base_model
    return base


def _restore_float32_buffers(model: PreTrainedModel) -> None:
    """Give rotary frequencies back their float32 values.

    DeepSpeed's zero.Init creates every floating tensor in the engine's dtype, so that a bf16 model would compute positions from
    frequencies of 8 bits: wrong by several positions at a few thousand tokens, and not what the exported model does.
    """
    for module in model.modules():
        rounded = [
            n
            for n in module._non_persistent_buffers_set
            if n.endswith("inv_freq") and (b := module._buffers[n]) is not None and b.dtype == torch.bfloat16
        ]
        if not rounded:
            continue
        fresh = type(module)(module.config)  # type: ignore[call-arg,arg-type]
        for name in rounded:
            module._buffers[name] = fresh._buffers[name].to(module._buffers[name].device)  # type: ignore[union-attr]
