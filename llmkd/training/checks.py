"""Which settings each family of models supports; checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig

from llmkd.data.batches import Family
from llmkd.data.other_families import check_format
from llmkd.distributed.compiled import lacking_to_compile
from llmkd.distributed.ds_configs import load_ds_config, zero_stage
from llmkd.errors import InputError
from llmkd.files import ROOT
from llmkd.layer_map import Pairs
from llmkd.losses.set_distances import WIDTH_FREE
from llmkd.models.adapter_folders import check_adapter
from llmkd.models.architectures import new_config
from llmkd.models.families import KIND_NAMES, check_logits, model_type
from llmkd.models.four_bit import check_installed, quantizable
from llmkd.models.liger import check_liger
from llmkd.models.load import without_weights
from llmkd.models.lora import targeted
from llmkd.models.model_types import types_with
from llmkd.models.parts import blocks, routers
from llmkd.models.per_block import are_alike
from llmkd.models.stored import read_config
from llmkd.models.width import check_narrowed
from llmkd.recipe.models import Lora
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.run import Train
from llmkd.recipe.study_entries import shared_pass
from llmkd.teachers.upper_blocks import check_upper


def teacher_shape(recipe: Recipe) -> PreTrainedConfig:
    """The configuration of the recipe's teacher, or of what it is fine-tuned from."""
    if recipe.teacher_start is None:
        assert recipe.finetune is not None and recipe.finetune.architecture is not None
        return new_config(recipe.finetune.architecture.model_dump())
    trust = recipe.teacher.trust_remote_code
    return read_config(*recipe.teacher_start, recipe.teacher.revision, trust_remote_code=trust)[1]


def check_kernels(recipe: Recipe, *, gpu: bool) -> None:
    """Raise InputError where this machine can't compile what the recipe asks for, or lacks a package; `gpu`: whether ranks run on GPUs."""
    if gpu and recipe.head_kernel != "none" and (lacking := lacking_to_compile()):
        raise InputError(
            f"train.head_kernel: a kernel of the head's losses takes {lacking}, which is missing here; install it, or write none"
        )
    trainings = [recipe.train, *([] if recipe.finetune is None else [recipe.finetune.train])]
    for train in trainings:
        if train.compile == "blocks":
            _check_compiled_blocks(recipe, train, gpu=gpu)
        if train.kernels == "liger":
            check_liger([], gpu=gpu)


def _check_compiled_blocks(recipe: Recipe, train: Train, *, gpu: bool) -> None:
    if lacking := lacking_to_compile(gpu=gpu):
        raise InputError(
            f"train.compile: compiled blocks take {lacking}, which is missing here; install it, or write none"
        )
    if recipe.data.batching == "packed":
        raise InputError(
            "train.compile: attention within packed documents has not been compiled; write none, or data.batching: grouped"
        )
    if "nvme" in (recipe.teacher.offload, _weights_rest(train)):
        raise InputError(
            "train.compile: from NVMe a block's weights are gathered map by map, and each map would end a graph; write none, or offload "
            "to the cpu"
        )


def _weights_rest(train: Train) -> str | None:
    """Where the shards of the trained model are kept between uses; None where it has none, or they stay on the device."""
    config = load_ds_config(train.deepspeed, ROOT / "ds_configs")
    rests = (config.get("zero_optimization", {}).get("offload_param") or {}).get("device")
    return rests if zero_stage(config) == 3 else None


def check_training(recipe: Recipe, family: Family) -> None:
    """Raise InputError for settings of a student's training that this family of models does not support."""
    for part in recipe.data.parts:
        check_format(family, part.row_format)
    student, kind = recipe.student, KIND_NAMES[family.kind]
    if student.decoder_blocks is not None and family.kind != "encoder_decoder":
        raise InputError(f"student.decoder_blocks: {kind} has one stack of blocks; leave it out")
    if student.classifier is not None and family.kind != "encoder":
        raise InputError(f"student.classifier: {kind} has no classes; leave it out")
    if family.kind == "decoder":
        return
    if recipe.rollouts is not None:
        raise InputError(f"rollouts: only a decoder continues prompts, and this is {kind}; leave the section out")
    if recipe.teacher.serving.takes_decoders_only:
        key = "share_cache" if recipe.teacher.share_cache else "placement"
        cure = "false" if recipe.teacher.share_cache else "replicated or zero3"
        raise InputError(
            f"teacher.{key}: only a decoder can be cut into stages or cached, and this is {kind}; write {cure}"
        )
    if recipe.teacher.offload_states:
        raise InputError(f"teacher.offload_states: not supported for {kind} yet; write false")
    if recipe.stones is not None and family.kind == "encoder_decoder":
        raise InputError(
            f"stones: a stone continues with the upper blocks of one stack, and this is {kind}; leave the section out, or give a decoder "
            "or an encoder"
        )
    if family.kind == "encoder":
        _check_encoder(recipe)


def _check_encoder(recipe: Recipe) -> None:
    if recipe.loss.kl_positions != "trained":
        raise InputError(
            "loss.kl_positions: an encoder has one distribution per row, that of its classes; write trained"
        )
    if recipe.matching.positions != "attended":
        raise InputError("matching.positions: no token of an encoder's text is trained, its class is; write attended")


def check_measured(recipe: Recipe, teacher: PreTrainedConfig) -> None:
    """Raise InputError for a teacher on which the blocks, or the width, of the recipe's student can't be measured."""
    if recipe.student.narrows:
        check_narrowed(teacher, recipe.student.width)
    rule, row = recipe.student.copy_blocks, model_type(teacher)
    if not recipe.student.measures_blocks:
        return
    if row.kind != "decoder":
        raise InputError(
            f"student.copy_blocks: {rule} is measured of decoders, and the teacher is {KIND_NAMES[row.kind]}; write spread, matched or a "
            "list"
        )
    if rule == "influence" and (row.ends is None or row.starts):  # what a teacher gives as the embeddings' state
        raise InputError(
            f"student.copy_blocks: influence needs a first block that reads the words' embeddings as they are, which the first of a "
            f"{teacher.model_type!r} model has not been shown to; write perplexity, or a list"
        )
    if rule == "perplexity" and not are_alike(
        blocks(without_weights(teacher, trust_remote_code=recipe.teacher.trust_remote_code))
    ):
        raise InputError(
            "student.copy_blocks: perplexity runs the teacher without some blocks, and this one has blocks of several kinds; write "
            "influence, or a list"
        )


def check_adapted(recipe: Recipe, family: Family, student: PreTrainedConfig, *, pairs: Pairs) -> None:
    """Raise InputError for a student with adapters that this family of models, this map or these shards are not ready for.

    `student`: the configuration of its checkpoint, else of its teacher.
    """
    lora = recipe.student.lora
    if lora is None:
        return
    trust = (recipe.student if recipe.student.init == "checkpoint" else recipe.teacher).trust_remote_code
    _check_place_of("student.lora", lora, "train", recipe.train, family, student, trust_remote_code=trust)
    if any(block < 0 for block, _ in pairs):
        raise InputError(
            "matching.embedding: under student.lora the student's embeddings are frozen, so that their pair teaches nothing; write false"
        )


def check_quantized(recipe: Recipe, family: Family, teacher: PreTrainedConfig) -> None:
    """Raise InputError for a teacher, of this configuration, that has not been shown to run with weights in 4 bits."""
    if recipe.teacher.quantize == "none":
        return
    if family.kind != "decoder":
        raise InputError(
            f"teacher.quantize: only decoders have been shown to run with weights in 4 bits, and this is {KIND_NAMES[family.kind]}; write "
            "none"
        )
    for key, is_set, problem, cure in (
        ("stones", recipe.stones is not None, "stones have not been shown to learn from", "leave the section out"),
        ("train.compile", recipe.train.compile == "blocks", "torch has not been shown to compile", "write none"),
    ):
        if is_set:
            raise InputError(
                f"{key}: {problem} a teacher's blocks with weights in 4 bits; {cure}, or teacher.quantize: none"
            )
    quantizable(without_weights(teacher, trust_remote_code=recipe.teacher.trust_remote_code), "teacher.quantize")
    check_installed("teacher.quantize")


def check_unsharded(key: str, lora: Lora, section: str, train: Train) -> None:
    """Raise InputError where adapters' training would share out weights that are kept in 4 bits. `key`, `section`: the recipe's."""
    if lora.quantize != "none" and zero_stage(load_ds_config(train.deepspeed, ROOT / "ds_configs")) == 3:
        raise InputError(
            f"{key}.quantize: ZeRO-3 shares out weights, and those in 4 bits are whole on every rank; write {section}.deepspeed: zero2, or "
            "quantize: none"
        )


def check_adapter_folders(recipe: Recipe, teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raise InputError for adapters that can't be added to the model at their path. `teacher`, `student`: its configurations."""
    for key, section, base in (("teacher", recipe.teacher, teacher), ("student", recipe.student, student)):
        if section.adapter is not None:
            check_adapter(section.adapter, f"{key}.adapter", base, trust_remote_code=section.trust_remote_code)


def check_tuned(recipe: Recipe, family: Family, start: PreTrainedConfig) -> None:
    """As `check_adapted`, of a teacher that the recipe fine-tunes by adapters; `start`: the configuration of what it starts from."""
    tuned = recipe.finetune
    if tuned is None or tuned.lora is None:
        return
    trust = recipe.teacher.trust_remote_code
    _check_place_of("finetune.lora", tuned.lora, "finetune.train", tuned.train, family, start, trust_remote_code=trust)


def _check_place_of(
    key: str,
    lora: Lora,
    section: str,
    train: Train,
    family: Family,
    config: PreTrainedConfig,
    *,
    trust_remote_code: bool,
) -> None:
    """Raise InputError where the model, or its training's shards, have no place for these adapters. `key`, `section`: the recipe's."""
    if family.kind != "decoder":
        raise InputError(
            f"{key}: only decoders' adapters have been shown to learn, and this is {KIND_NAMES[family.kind]}; leave it out"
        )
    if lora.dora and _weights_rest(train) == "nvme":
        raise InputError(
            f"{key}.dora: it reads a map's weight beside the map, and from NVMe ZeRO-3 gathers weights map by map; write false, or "
            f"a {section}.deepspeed that offloads to the cpu"
        )
    if lora.dora and trust_remote_code:
        raise InputError(
            f"{key}.dora: it reads a map's weight beside the map, which ZeRO-3 gathers for transformers' own blocks alone, and "
            "trust_remote_code runs a folder's; write false"
        )
    check_unsharded(key, lora, section, train)
    model = without_weights(config, trust_remote_code=trust_remote_code)
    targeted(model, lora.targets, key)
    if lora.quantize != "none":
        quantizable(model, f"{key}.quantize")
        check_installed(f"{key}.quantize")


def check_routed(recipe: Recipe, student: PreTrainedConfig) -> None:
    """Raise InputError for a load balance of a student, of this configuration, that has no router."""
    if not recipe.loss.router:
        return
    trust = (recipe.student if recipe.student.init == "checkpoint" else recipe.teacher).trust_remote_code
    if not routers(without_weights(student, trust_remote_code=trust)):
        known = ", ".join(types_with(lambda row: row.router is not None))
        raise InputError(
            f"loss.router: no block of the student, a {student.model_type!r} model, has a router that is known (those of {known} are); "
            "write 0, or copy blocks with experts"
        )


def check_projected(recipe: Recipe, teacher: PreTrainedConfig, student: PreTrainedConfig, *, pairs: Pairs) -> None:
    """Raise InputError where pairs have projectors that their map, or checkpointing, can't do with; `teacher`, `student`: their shapes."""
    width: int = recipe.student.hidden_size or student.hidden_size
    matching = recipe.matching
    if not matching.projects(width, teacher.hidden_size):
        return
    if pairs and matching.compare == "differences" and recipe.train.activation_checkpointing:
        raise InputError(  # checkpointing would run a projector again on the state, without that of the pair before
            "train.activation_checkpointing: not with matching.compare: differences where states pass projectors; write false, or compare: "
            "states"
        )
    if matching.redraw_every:
        why = f"the student's states have {width} numbers and the teacher's {teacher.hidden_size}, and a projector is"
        raise InputError(
            f"matching.redraw_every: {'projectors are' if width == teacher.hidden_size else why} learned for one teacher block; write "
            f"redraw_every: 0, or a distance that needs none ({', '.join(WIDTH_FREE)})"
        )


def check_upper_blocks(
    recipe: Recipe, teacher: PreTrainedConfig, student: PreTrainedConfig, *, pairs: Pairs, stones: Pairs
) -> None:
    """Raise InputError for models that stones, or a distance that reads states, have not been shown to work with."""
    if stones:
        check_upper(teacher)
    for config in (teacher, student) if pairs and recipe.matching.reads_logits else ():
        check_logits(config)
        row = model_type(config)
        if row.kind != "decoder" or row.ends is None:
            raise InputError(
                f"matching.distance: logit_lens has not been shown to read a {config.model_type!r} model's states; write another distance"
            )


def check_same_classes(teacher: Family, student: Family) -> None:
    """Raise InputError where a student's checkpoint is of another kind than its teacher, or has other classes."""
    if teacher.kind != student.kind:
        raise InputError(
            f"student.path: the teacher is {KIND_NAMES[teacher.kind]}, the student {KIND_NAMES[student.kind]}; give two of one kind"
        )
    if teacher.labels != student.labels:
        raise InputError(
            f"student.path: the teacher's classes are {', '.join(teacher.labels)}, the student's {', '.join(student.labels)}; give a "
            "student of the same classes in the same order"
        )


def check_in_turn(recipes: Mapping[str, Recipe]) -> None:
    """Raise InputError where students, by their names, can't be trained in turn off one teacher."""
    if len(recipes) < 2:
        return
    cure = "write study.together: 1, or train it without the others"
    first, *_ = recipes
    for name, recipe in recipes.items():
        if recipe.rollouts is not None and recipe.rollouts.during_training:
            raise InputError(
                f"{name}: rollouts: the student writes texts of its own, so that no other learns from its rows; {cure}"
            )
        if recipe.teacher.offload_states:
            raise InputError(
                f"teacher.offload_states: states that several students take in turn are kept where they are; write false, or {cure}"
            )
        if recipe.train.profile_steps:
            raise InputError(f"{name}: train.profile_steps: one training in a process is profiled; write 0, or {cure}")
        ours, theirs = shared_pass(recipes[first]), shared_pass(recipe)
        for key in ours.keys() | theirs.keys():
            if ours.get(key) != theirs.get(key):
                raise InputError(
                    f"{name}: {key} is {theirs.get(key)!r} and that of {first} is {ours.get(key)!r}: they can't learn from one pass of "
                    "the teacher; make them alike, or train them apart"
                )
