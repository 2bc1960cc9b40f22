"""Creating model folders: students of copied blocks or new weights, new models, and their tokenizers."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from llmkd.data.batches import Kind
from llmkd.errors import InputError
from llmkd.files import write_folder
from llmkd.layer_map import forward
from llmkd.models.families import AUTO_CLASSES, by_stack, depths, kind, model_type
from llmkd.models.folders import copy_tokenizer, tensor_files
from llmkd.models.load import load_config, load_model, quiet_about_unused, student_config
from llmkd.models.parts import blocks
from llmkd.models.width import Kept, narrowed

SHARD_BYTES = 4 * 2**30


def block_choice(rule: str | Sequence[int], student_blocks: int, teacher_blocks: int) -> tuple[int, ...]:
    """Which teacher blocks are copied into a student.

    `spread`: first to last evenly, min(floor(j * L_t / (L_s - 1)), L_t - 1); it reproduces the layer-selection paper's lists
    [0, 4, 9, 13, 18, 22, 27, 31, 35] for 36 -> 9, [0, 6, 11] for 12 -> 3 and [0, 2, 4, 7, 9, 11] for 12 -> 6 (not those for 28 and 40).
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


def copied_student(
    teacher: Path,
    chosen: Sequence[int],
    folder: Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    kept: Kept | None = None,
) -> None:
    """Write an HF folder of the teacher's embeddings, final norm, head and the chosen blocks, renumbered; `kept`: their parts that stay,
    default all.

    Tensors go from file to file, one output shard (4 GiB) in memory at a time; the teacher is never built.
    """
    config = load_config(teacher, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{teacher}: its weights are quantized, so blocks can't be copied from it; give the model unquantized"
        )
    renamed = _renamed(teacher, chosen, depths(config))
    small = student_config(config, chosen, {} if kept is None else kept.sizes)
    small.dtype = dtype
    head_dim: Any = getattr(config, "head_dim", None)
    cut = _whole if kept is None else functools.partial(narrowed, kept=kept, head_dim=head_dim)
    write_folder(
        folder,
        lambda tmp: (
            _copy_tensors(teacher, tmp, renamed, dtype, cut),
            small.save_pretrained(tmp),
            copy_tokenizer(teacher, tmp),
        ),
    )


def _renamed(folder: Path, chosen: Sequence[int], blocks: Sequence[int]) -> Callable[[str], list[str]]:
    """A tensor's name in the teacher's files -> its names in the student's, one for each copy of its block."""
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
    write_folder(folder, lambda tmp: (model.save_pretrained(tmp), tokenizer(tmp)))


def new_tokenizer(texts: Iterable[str], vocab_size: int, of: Kind = "decoder") -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts, with `<eos>` and a `<pad>` of its own (a pad that is the eos is never trained).

    `of` an encoder, it writes `<cls>` a `<sep>`, or `<cls>` a `<sep>` b `<sep>`; of an encoder-decoder, an `<eos>` after each text.
    """
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    names = {"cls_token": "<cls>", "sep_token": "<sep>"} if of == "encoder" else {"eos_token": "<eos>"}
    special = ["<pad>", *names.values()]
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
    # transformers leaves token_type_ids out by default
    inputs = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} if of == "encoder" else {}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", padding_side=side, **names, **inputs)


def _block_prefixes(folder: Path, blocks: Sequence[int]) -> list[str]:
    """What precedes the block number in the tensor names of each stack, e.g. `model.layers.`."""
    numbered: dict[str, set[int]] = {}
    for name in tensor_files(folder):
        for match in re.finditer(r"\.(\d+)\.", name):
            numbered.setdefault(name[: match.start() + 1], set()).add(int(match[1]))
    sides = [r"(^|\.)encoder\.", r"(^|\.)decoder\."] if len(blocks) == 2 else [""]
    prefixes = []
    for side, depth in zip(sides, blocks, strict=True):
        full = [p for p, numbers in numbered.items() if numbers == set(range(depth)) and re.search(side, p)]
        full = [p for p in full if p.count(".") == min(p.count(".") for p in full)]  # not a block's experts
        if len(full) != 1:
            raise InputError(
                f"{folder}: can't tell which tensors are the {depth} blocks (candidates: {', '.join(full) or 'none'}); write "
                "student.init: random, or give another teacher"
            )
        prefixes += full
    return prefixes


def _whole(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _copy_tensors(
    source: Path,
    folder: Path,
    names: Callable[[str], list[str]],
    dtype: torch.dtype,
    cut: Callable[[str, Tensor], Tensor],
) -> None:
    """`names`: a tensor's in `source` -> its names in `folder`; `cut`: such a name and the tensor -> the part of it that is written."""
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
                tensor = cut(new, tensors.get_tensor(name))
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


def copied_encoder(
    teacher: Path, chosen: Sequence[int], folder: Path, *, seed: int, dtype: torch.dtype, classifier: bool
) -> None:
    """As `copied_student`, for an encoder with classes: embeddings, the chosen blocks and the pooler are copied, with `classifier` the map
    to the classes too; new weights are drawn from the seed."""
    config = load_config(teacher)
    source = load_model(teacher, dtype=dtype, ds_config=None, attention="eager")
    small = student_config(config, chosen, {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = AUTO_CLASSES["encoder"].from_config(small, dtype=dtype)
    left_out = (blocks_name(source),) if classifier else (blocks_name(source), f"{_classifier(config)}.")
    copied = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith(left_out)}
    missing = student.load_state_dict(copied, strict=False).missing_keys
    assert all(name.startswith(left_out) for name in missing), missing
    old_blocks = blocks(source)
    for new, old in zip(blocks(student), chosen, strict=True):
        new.load_state_dict(old_blocks[old].state_dict())
    write_folder(folder, lambda tmp: (student.save_pretrained(tmp), copy_tokenizer(teacher, tmp)))


def new_classifier(start: Path, labels: Sequence[str], folder: Path, *, seed: int, dtype: torch.dtype) -> None:
    """Write an HF folder of an encoder checkpoint with a new map to these classes (and a pooler where it has none) from the seed."""
    config = load_config(start)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    with torch.random.fork_rng(devices=[]), quiet_about_unused(True):
        torch.manual_seed(seed)
        fresh = AUTO_CLASSES["encoder"].from_config(config, dtype=dtype)
        model, info = AUTO_CLASSES["encoder"].from_pretrained(
            start,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    lacking = [name for name in info["missing_keys"] if blocks_name(model) in name or "embeddings" in name]
    if lacking:
        raise InputError(
            f"{start}: its weights lack {len(lacking)} tensors of the model, first {min(lacking)!r}; give the whole weights"
        )
    drawn = dict(fresh.named_parameters())
    renewed = {name for name in drawn if name.startswith(f"{_classifier(config)}.")} | set(info["missing_keys"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in renewed:
                parameter.copy_(drawn[name])
    write_folder(folder, lambda tmp: (model.save_pretrained(tmp), copy_tokenizer(start, tmp)))


def _classifier(config: PreTrainedConfig) -> str:
    place = model_type(config).classifier
    assert place is not None, config.model_type
    return place


def blocks_name(model: PreTrainedModel) -> str:
    """What precedes the block number in a model's parameter names, e.g. `model.layers.`."""
    stack = blocks(model)
    return next(name for name, module in model.named_modules() if module is stack) + "."
