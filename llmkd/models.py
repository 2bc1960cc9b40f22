"""Hugging Face models in folders: how a student is cut from a teacher, how one is loaded in shards.

Every student starts as a plain HF folder, whatever it is made from. Loading is then one path, `load_model`, straight into shards under
ZeRO-3. Where a model has its blocks and its head is said by llmkd.families.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from llmkd.distributed import sharded_construction
from llmkd.errors import InputError
from llmkd.families import (
    AUTO_CLASSES,
    Kind,
    by_stack,
    check_blocks,
    depths,
    kind,
    set_depths,
    width_settings,
)
from llmkd.families import backbone as backbone
from llmkd.families import blocks as blocks
from llmkd.families import check_logits as check_logits
from llmkd.families import head as head
from llmkd.layer_map import forward

log = logging.getLogger("llmkd")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 4 * 2**30
PACKABLE = (
    "gemma",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
)
"""Model types that keep packed documents apart by their position ids; each is tested. OPT, Bloom, Falcon and Mamba do not."""


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def without_weights(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of that shape to count and look at; it holds no weight."""
    with torch.device("meta"):
        return AUTO_CLASSES[kind(config)].from_config(config, trust_remote_code=trust_remote_code)


def check_usable(config: PreTrainedConfig, *, section: str, attention: str, packed: bool) -> None:
    """Raise InputError for a model that can't be used as a recipe's section asks; its weights need not be there.

    Packed rows are for the model types that a test has shown to keep documents apart.
    """
    check_logits(config)
    check_blocks(config)
    if attention == "flash_attention_2" and not _flash_attention():
        raise InputError(f"{section}.attention: flash_attention_2 needs a GPU and the package flash-attn; write auto")
    if packed and config.model_type not in PACKABLE:
        raise InputError(
            f"data.batching: packed rows of a {config.model_type!r} model might see each other; write grouped "
            f"(packed is for {', '.join(PACKABLE)})"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Folders and the hub


def resolve(path: str, what: str, revision: str | None = None) -> Path:
    """The local folder of a model: a folder as it is, a hub name by download of its safetensors, tokenizer and configuration.

    Raises InputError when it is neither, when the hub can't be reached, or when it holds no safetensors.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
            raise InputError(f"{what}: no folder {path!r}; give an HF model folder or a hub name such as Qwen/Qwen3-8B")
        folder = _download(path, what, revision)
    if not (folder / "config.json").is_file():
        raise InputError(f"{what}: {path!r} holds no config.json; give a folder written by save_pretrained")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{what}: {path!r} holds no .safetensors file; convert it (pickled weights are never loaded)")
    _check_whole(folder, what)
    return folder


def folder_contents(folder: Path, *, weights_alone: bool = False) -> str:
    """A hash by which a changed model folder is noticed: of each file its name, its size, and what `_sample` reads of it.

    All of a large model's bytes would take minutes. `weights_alone`: of the weights and config.json, not of the tokenizer.
    """
    digest = hashlib.sha256()
    files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".txt", ".model")]
    if weights_alone:
        files = [f for f in files if f.suffix == ".safetensors" or f.name == "config.json"]
    for file in sorted(files):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        for part in _sample(file):
            digest.update(part)
    return digest.hexdigest()[:16]


def _sample(file: Path) -> Iterator[bytes]:
    """All of a file up to 2 MiB; of a larger safetensors file its header and the first 64 KiB of every tensor, of another its two ends.

    Not seen is a change of other bytes alone: some rows edited within a tensor, say. Training changes them all.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= 2 * 2**20:
            yield stream.read()
        elif file.suffix != ".safetensors":
            yield stream.read(2**20)
            stream.seek(-(2**20), os.SEEK_END)
            yield stream.read()
        else:  # eight bytes say how long the header is, which has every tensor's place behind it
            start = 8 + int.from_bytes(stream.read(8), "little")
            if start > size:
                raise InputError(f"{file} is not whole; download or copy the model again")
            header = stream.read(start - 8)
            yield header
            places = [value["data_offsets"] for name, value in json.loads(header).items() if name != "__metadata__"]
            for first, last in sorted(places):
                stream.seek(start + first)
                yield stream.read(min(last - first, 2**16))


def _check_whole(folder: Path, what: str) -> None:
    """Raise InputError if a file of weights is missing or cut short, or is a git-lfs pointer; only headers are read."""
    file = index = folder / "model.safetensors.index.json"
    try:
        files = set(tensor_files(folder).values()) if index.is_file() else folder.glob("*.safetensors")
        for file in sorted(files):
            with safe_open(file, framework="pt"):
                pass
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"{what}: {file} is not whole ({_first_line(error)}); download or copy the model again"
        ) from error


def _download(name: str, what: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client has a score of network errors; all mean the same to the user
        raise InputError(
            f"{what}: no folder {name!r} here, and the hub did not give it ({_first_line(error)}); give the path of a "
            "local HF folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model folder."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(
            f"{folder}: transformers can't read this model ({_first_line(error)}); give another, or mend its config.json"
        ) from error
    if not hasattr(config, "num_hidden_layers"):
        raise InputError(
            f"{folder}: a model of type {config.model_type!r} is more than a causal language model; give one of text alone"
        )
    kind(config)
    return config


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(
            f"{folder}: holds no tokenizer that transformers can read ({_first_line(error)}); copy the model's tokenizer into it"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without its files
        raise InputError(f"{folder}: its tokenizer has no vocabulary; copy the model's tokenizer files into the folder")
    return tokenizer


def check_same_tokens(teacher: Any, student: Any) -> None:
    """Raise InputError unless both tokenizers give every token the same id; the first that differs is named."""
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    if ours == theirs:
        return
    different = [(i, t) for t, i in [*ours.items(), *theirs.items()] if ours.get(t) != theirs.get(t)]
    token_id, token = min(different)
    raise InputError(
        f"teacher and student tokenizers differ, first at token {token!r} (id {token_id}): teacher id {ours.get(token)}, student id "
        f"{theirs.get(token)}; their logits can't be compared, use a student with the teacher's tokenizer"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Making a student


def block_choice(rule: str | Sequence[int], student_blocks: int, teacher_blocks: int) -> tuple[int, ...]:
    """Which teacher blocks a student is made of.

    `spread`: first to last evenly, min(floor(j * L_t / (L_s - 1)), L_t - 1); it reproduces the layer-selection paper's lists
    [0, 4, 9, 13, 18, 22, 27, 31, 35] for 36 -> 9, [0, 6, 11] for 12 -> 3 and [0, 2, 4, 7, 9, 11] for 12 -> 6.
    `matched`: the forward map's own. Or their numbers.
    """
    if student_blocks > teacher_blocks:
        raise InputError(
            f"student.blocks: {student_blocks} blocks can't be copied from a teacher of {teacher_blocks}; write at most {teacher_blocks}"
        )
    if rule == "matched":
        return tuple(teacher for _, teacher in forward(student_blocks, teacher_blocks))
    if rule == "spread":
        if student_blocks == 1:
            return (0,)
        return tuple(min(j * teacher_blocks // (student_blocks - 1), teacher_blocks - 1) for j in range(student_blocks))
    chosen = tuple(int(block) for block in rule)
    for block in chosen:
        if not 0 <= block < teacher_blocks:
            raise InputError(f"student.copy_blocks: {block} is not a block of the teacher (0 to {teacher_blocks - 1})")
    return chosen


def stack_choices(rule: str | Sequence[int], student: Sequence[int], teacher: Sequence[int]) -> tuple[int, ...]:
    """`block_choice` for each stack by itself, counted through the teacher's stacks: depths of (36,), or of an encoder and a decoder."""
    chosen: list[int] = []
    for number, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        chosen += [sum(teacher[:number]) + block for block in block_choice(rule, ours, theirs)]
    return tuple(chosen)


def student_config(teacher: PreTrainedConfig, blocks: Sequence[int], width: dict[str, int]) -> PreTrainedConfig:
    """The teacher's configuration at the student's depth (and width, where given); per-block settings follow their blocks."""
    config = copy.deepcopy(teacher)
    set_depths(config, [len(chosen) for chosen in by_stack(blocks, depths(teacher))])
    for key, value in teacher.to_dict().items():  # layer_types, and SmolLM3's no_rope_layers
        if "layer" in key and isinstance(value, list | tuple) and len(value) == teacher.num_hidden_layers:
            setattr(config, key, [value[block] for block in blocks])
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, len(blocks))
    for key, value in width.items():
        for name in width_settings(teacher, key):
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


def copied_student(
    teacher: Path, chosen: Sequence[int], folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> None:
    """Write an HF folder of the teacher's embeddings, final norm, head and the chosen blocks, renumbered.

    Tensors go from file to file, one output shard (4 GiB) in memory at a time; the teacher is never built.
    """
    config = load_config(teacher, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{teacher}: its weights are quantized, so blocks can't be copied from it; give the model unquantized"
        )
    renamed = _renamed(teacher, chosen, depths(config))

    small = student_config(config, chosen, {})
    small.dtype = dtype
    publish_folder(
        folder,
        lambda tmp: (
            _copy_tensors(teacher, tmp, renamed, dtype),
            small.save_pretrained(tmp),
            copy_tokenizer(teacher, tmp),
        ),
    )


def _renamed(folder: Path, chosen: Sequence[int], blocks: Sequence[int]) -> Callable[[str], list[str]]:
    """A tensor's name in the teacher's files -> its names in the student's, one for each block made of it."""
    homes: list[tuple[re.Pattern[str], str, dict[int, list[int]]]] = []
    for prefix, part in zip(_block_prefixes(folder, blocks), by_stack(chosen, blocks), strict=True):
        new_of: dict[int, list[int]] = {}
        for new, old in enumerate(part):
            new_of.setdefault(old, []).append(new)
        homes.append((re.compile(rf"^{re.escape(prefix)}(\d+)\.(.*)$"), prefix, new_of))

    def names(name: str) -> list[str]:
        for where, prefix, new_of in homes:
            if match := where.match(name):
                # T5 keeps the positions of a whole stack in its first block.
                news = [0] if "relative_attention_bias" in name else new_of.get(int(match[1]), [])
                return [f"{prefix}{new}.{match[2]}" for new in news]
        return [name]

    return names


def random_student(
    teacher: Path,
    depth: int | Sequence[int],
    width: dict[str, int],
    folder: Path,
    *,
    seed: int,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> None:
    """Write an HF folder of a new model of the teacher's type, with weights drawn from the seed; `depth` of each stack."""
    config = load_config(teacher, trust_remote_code=trust_remote_code)
    wanted = [depth] if isinstance(depth, int) else depth
    small = student_config(config, stack_choices("spread", wanted, depths(config)), width)
    new_model(
        small,
        folder,
        seed=seed,
        dtype=dtype,
        tokenizer=lambda tmp: copy_tokenizer(teacher, tmp),
        trust_remote_code=trust_remote_code,
    )


def new_model(
    config: PreTrainedConfig,
    folder: Path,
    *,
    seed: int,
    dtype: torch.dtype,
    tokenizer: Callable[[Path], object],
    trust_remote_code: bool = False,
) -> None:
    """Write an HF folder of a model with weights drawn from the seed, whatever the state of torch's own generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AUTO_CLASSES[kind(config)].from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    publish_folder(folder, lambda tmp: (model.save_pretrained(tmp), tokenizer(tmp)))


def qwen3_config(shape: dict[str, Any], special: dict[str, Any]) -> Qwen3Config:
    """A Qwen3 configuration from the recipe's `architecture` and the tokenizer's special token ids."""
    return Qwen3Config(**shape, **special, use_cache=True)


def new_tokenizer(texts: Iterable[str], vocab_size: int, of: Kind = "decoder") -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts, with `<eos>` and a `<pad>` of its own (a pad that is the eos is never trained).

    `of` an encoder, it writes `<cls>` a `<sep>`, or `<cls>` a `<sep>` b `<sep>`; of an encoder-decoder, an `<eos>` after each text.
    """
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    names: dict[str, Any] = {"eos_token": "<eos>"}
    if of == "encoder":
        names = {"cls_token": "<cls>", "sep_token": "<sep>"}
    special = ["<pad>", *names.values()]
    if of == "encoder":  # which transformers leaves out unless told
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    if of == "encoder":
        pair = "<cls>:0 $A:0 <sep>:0 $B:1 <sep>:1"
        bpe.post_processor = TemplateProcessing(
            single="<cls> $A <sep>", pair=pair, special_tokens=[("<cls>", 1), ("<sep>", 2)]
        )
    elif of == "encoder_decoder":
        bpe.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    side = "left" if of == "decoder" else "right"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", padding_side=side, **names)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy everything of a model folder that is neither weights nor configuration: tokenizer, chat template, generation settings."""
    for file in source.iterdir():
        if (
            file.is_file()
            and file.suffix in (".json", ".txt", ".model", ".jinja", ".py")
            and file.name not in ("config.json", "llmkd.json", "adapter_config.json")
            and ".index." not in file.name
        ):
            shutil.copy2(file, folder / file.name)


def publish_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside, then put it in place by one rename."""
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    write(tmp)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(tmp, folder)


def _block_prefixes(folder: Path, blocks: Sequence[int]) -> list[str]:
    """What precedes the block number in the tensor names of each stack, e.g. `model.layers.`."""
    found: dict[str, set[int]] = {}
    for name in tensor_files(folder):
        for match in re.finditer(r"\.(\d+)\.", name):
            found.setdefault(name[: match.start() + 1], set()).add(int(match[1]))
    sides = [r"(^|\.)encoder\.", r"(^|\.)decoder\."] if len(blocks) == 2 else [""]
    prefixes = []
    for side, depth in zip(sides, blocks, strict=True):
        full = [p for p, numbers in found.items() if numbers == set(range(depth)) and re.search(side, p)]
        full = [p for p in full if p.count(".") == min(p.count(".") for p in full)]  # not a block's experts
        if len(full) != 1:
            raise InputError(
                f"{folder}: can't tell which tensors are the {depth} blocks (candidates: {', '.join(full) or 'none'}); write "
                "student.init: random, or give another teacher"
            )
        prefixes += full
    return prefixes


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    names: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.update(dict.fromkeys(tensors.keys(), file))
    return names


def _copy_tensors(source: Path, folder: Path, names: Callable[[str], list[str]], dtype: torch.dtype) -> None:
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    total = size = 0

    def flush() -> None:
        nonlocal shard, size
        if shard:
            save_file(shard, folder / f"model-{len(shards) + 1:05d}.safetensors", metadata={"format": "pt"})
            shards.append(list(shard))
            shard, size = {}, 0

    for name, file in sorted(tensor_files(source).items(), key=lambda item: (str(item[1]), item[0])):
        for new in names(name):
            with safe_open(file, framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
            shard[new] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            size += shard[new].nbytes
            total += shard[new].nbytes
            if size >= SHARD_BYTES:
                flush()
    flush()
    weight_map = {}
    for number, members in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        os.replace(folder / f"model-{number:05d}.safetensors", folder / final)
        weight_map.update(dict.fromkeys(members, final))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def attention_implementation(asked: str, dtype: torch.dtype) -> tuple[str, str]:
    """(name for transformers, why): flash_attention_2 when it is installed, there is a GPU and the model is in half precision."""
    if asked != "auto":
        return asked, "as the recipe says"
    if _flash_attention() and dtype == torch.float32:
        return "sdpa", "flash-attn does not compute in float32"
    if _flash_attention():
        return "flash_attention_2", "flash-attn is installed and there is a GPU"
    return "sdpa", "no GPU" if not torch.cuda.is_available() else "flash-attn is not installed"


def _flash_attention() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def load_causal_lm(folder: Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """As `load_model`, where only a decoder will do. Raises InputError for another family."""
    found = kind(load_config(folder, trust_remote_code=trust_remote_code))
    if found != "decoder":
        raise InputError(
            f"{folder}: an {found.replace('_', '-')} where a causal language model is needed; give a decoder"
        )
    return load_model(folder, trust_remote_code=trust_remote_code, **options)


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    ds_config: dict[str, Any] | None,
    attention: str,
    trust_remote_code: bool = False,
    first_blocks: int | None = None,
) -> PreTrainedModel:
    """Load a model of any family from safetensors; straight into shards if `ds_config` asks for ZeRO-3.

    `first_blocks`: build and load no more than so many of a decoder's blocks. Raises InputError when the folder's weights do not fill
    the model (transformers itself would only warn and make them up).
    """
    shape = load_config(folder, trust_remote_code=trust_remote_code)
    name, why = attention_implementation(attention, dtype)
    log.info("%s: attention %s (%s)", folder, name, why)
    part: dict[str, Any] = {}
    if first_blocks is not None:
        part["config"] = student_config(shape, range(first_blocks), {})
    try:
        with sharded_construction(ds_config), quiet_about_unused(part):
            loaded: Any = AUTO_CLASSES[kind(shape)].from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=name,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **part,
            )
    except (ImportError, OSError, ValueError) as error:
        raise InputError(
            f"{folder}: can't be loaded with attention {name!r} ({_first_line(error)}); choose another model, or another attention"
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
    model.config.use_cache = False
    return model


def load_head(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> tuple[Tensor, Tensor | None]:
    """The head's weight [V, H] and bias [V] or None, alone: nothing else of the folder's weights is read.

    Some model types are stored under other names than they have in memory, which transformers alone knows: these are read through a
    model of one block, which is let go.
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
        options: dict[str, Any] = dict(attention="eager", trust_remote_code=trust_remote_code, first_blocks=1)
        found = head(load_causal_lm(folder, dtype=dtype, ds_config=None, **options))
        return found.weight.detach(), None if found.bias is None else found.bias.detach()

    def tensor(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as tensors:
            return tensors.get_tensor(name).to(dtype, copy=True)

    return tensor(f"{stored}.weight"), None if module.bias is None else tensor(f"{names[0]}.bias")


@contextlib.contextmanager
def quiet_about_unused(part: dict[str, Any]) -> Iterator[None]:
    """Where a part of a model is loaded, keep transformers from listing the tensors that are left in the files."""
    before = transformers.utils.logging.get_verbosity()
    if part:
        transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model below its head, as a model of its own: what the head alone holds is let go with the whole."""
    base: Any = model.base_model
    return base


def _restore_float32_buffers(model: PreTrainedModel) -> None:
    """Give rotary frequencies back their float32 values.

    DeepSpeed's zero.Init makes every new floating tensor of its own dtype, so that a bf16 model computes its positions from
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
