"""What a recipe can't ask of another family than a decoder is one sentence with the cure; maps and names of two stacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from llmkd.data.batches import Family, Kind
from llmkd.errors import InputError
from llmkd.layer_map import DECODER_EMBEDDING, EMBEDDING, forward
from llmkd.models import families, make
from llmkd.models.architectures import new_config
from llmkd.models.compiled_blocks import compile_blocks
from llmkd.models.model_types import types_with
from llmkd.planning import doctor, memory
from llmkd.recipe.inputs import finetune_inputs, training_inputs
from llmkd.recipe.recipe import Recipe, dump_recipe, load_recipe
from llmkd.train import Stopping, train
from llmkd.training import checks, jobs, write_cache
from llmkd.training import pairs as recipe_map
from tests.family_models import DECODERS, ENCODER_DECODERS, ENCODERS, family_recipe, new

ENCODER = Family("encoder", labels=("no", "yes"))
ENCODER_DECODER = Family("encoder_decoder")


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        (
            ENCODER,
            {"teacher.placement": "pipeline"},
            r"teacher\.placement: only a decoder can be cut.*write replicated or z",
        ),
        (
            ENCODER_DECODER,
            {"teacher.placement": "cache"},
            r"teacher\.placement: .* an encoder-decoder; write replicated",
        ),
        (ENCODER_DECODER, {"teacher.share_cache": True}, r"teacher\.share_cache: only a decoder .*; write false"),
        (ENCODER_DECODER, {"teacher.offload_states": True}, r"teacher\.offload_states: .*; write false"),
        (ENCODER, {"loss.kl_positions": "attended"}, r"loss\.kl_positions: an encoder has one .*; write trained"),
        (ENCODER, {"matching.positions": "trained"}, r"matching\.positions: no token of .*; write attended"),
        (
            ENCODER_DECODER,
            {"stones": {"pairs": [[0, 1]]}},
            r"stones: .*, and this is an encoder-decoder; leave the section out",
        ),
        (ENCODER, {"student.decoder_blocks": 2}, r"student\.decoder_blocks: an encoder has one stack.*; leave it out"),
        (ENCODER, {"data.format": "text"}, r"data\.format: an encoder is not trained on text"),
        (ENCODER_DECODER, {"student.classifier": "new"}, r"student\.classifier: an encoder-decoder has no classes"),
        (Family("decoder"), {"student.classifier": "new"}, r"student\.classifier: a decoder has no classes; leave it"),
        (
            Family("decoder"),
            {"data.format": "classification"},
            r"data\.format: a decoder is not trained on classification",
        ),
        (
            Family("decoder"),
            {
                "data.source": "records",
                "data.sources": [{"source": "a.jsonl"}, {"source": "b.jsonl", "format": "classification"}],
            },
            r"data\.format: a decoder is not trained on classification",
        ),
    ],
)
def test_what_a_family_cannot_be_trained_with(tiny: Path, family: Family, changes: Any, sentence: str) -> None:
    recipe = load_recipe(tiny / "recipe.yaml")
    checks.check_training(recipe, family)
    with pytest.raises(InputError, match=sentence):
        checks.check_training(recipe.changed(changes), family)


def test_students_of_another_kind_or_other_classes_are_refused() -> None:
    checks.check_same_classes(ENCODER, ENCODER)
    with pytest.raises(InputError, match="the teacher is an encoder, the student an encoder-decoder; give two of one"):
        checks.check_same_classes(ENCODER, ENCODER_DECODER)
    with pytest.raises(InputError, match="classes are no, yes, the student's yes, no; give a student of the same"):
        checks.check_same_classes(ENCODER, Family("encoder", labels=("yes", "no")))


def test_models_that_have_not_been_tested_are_refused(tmp_path: Path) -> None:
    import transformers as hf

    with pytest.raises(
        InputError, match="an encoder-decoder of type 'mbart' is not supported; give one of type bart, mt5 or t5"
    ):
        families.kind(hf.MBartConfig())
    for other in (hf.ElectraConfig(), hf.DebertaV2Config(), hf.AlbertConfig(), hf.ModernBertConfig()):
        with pytest.raises(
            InputError,
            match=f"an encoder of type '{other.model_type}' is not supported; give one of type bert, camembert, distilb",
        ):
            families.kind(other)
    assert families.kind(hf.ElectraConfig(is_decoder=True)) == "decoder"
    shape = ENCODER_DECODERS["t5"](2, 2)
    shape.decoder_start_token_id = None
    with pytest.raises(InputError, match="write decoder_start_token_id into its config.json"):
        families.family(shape)


def folder_of(tmp_path: Path, config: Any, kind: str) -> Path:
    new(config, kind).save_pretrained(tmp_path / "model")
    make.new_tokenizer(["one"], 300).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_plan_and_doctor_are_for_decoders(tiny: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ENCODERS["bert"](2), "encoder")
    recipe = load_recipe(tiny / "recipe.yaml").changed({"teacher.path": str(folder)})
    with pytest.raises(InputError, match="llmkd plan counts a decoder's bytes, and the teacher is of type 'bert'"):
        memory.plan(recipe, 2)
    with pytest.raises(
        InputError, match="llmkd doctor looks at a decoder's rows, and this recipe's teacher is an encoder"
    ):
        doctor.examine(recipe)


def test_no_cache_of_another_family_is_written(tmp_path: Path, world: Any) -> None:
    recipe = family_recipe(tmp_path, "encoder", new(ENCODERS["bert"](4), "encoder"), **{"teacher.placement": "cache"})
    with pytest.raises(InputError, match="llmkd cache is for decoders, and this teacher is an encoder; train"):
        write_cache.cache(world, recipe, Stopping())
    assert not recipe.cache_folder.exists()


def test_a_stream_is_not_read_to_its_end(tiny: Path, tmp_path: Path, world: Any) -> None:
    streamed = load_recipe(tiny / "recipe.yaml").changed({"data.streaming": True, "output": str(tmp_path)})
    with pytest.raises(InputError, match="data.streaming: a cache holds what the teacher says of all rows"):
        write_cache.cache(world, streamed, Stopping())
    assert not streamed.cache_folder.exists()
    with pytest.raises(InputError, match="data.streaming: an encoder's classes are the labels of all rows"):
        jobs.labels_of(streamed.data)


def test_a_recipe_is_refused_before_anything_is_written(tiny: Path, tmp_path: Path, world: Any) -> None:
    narrow = folder_of(tmp_path, DECODERS["opt_narrow"](4), "decoder")
    base = load_recipe(tiny / "recipe.yaml").changed({"teacher.path": str(narrow), "student.blocks": 2})
    with pytest.raises(InputError, match=r"matching\.embedding: this 'opt' model's"):
        jobs.distil_job(world, base.changed({"matching.embedding": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_are_as_long_as_the_positions_that_padding_leaves() -> None:
    """64 positions; RoBERTa's begin at 1; T5 has none."""
    shapes = {**ENCODERS, "opt": DECODERS["opt"]}
    found = {name: families.positions(shape(2)) for name, shape in shapes.items()}
    robertas = dict.fromkeys(types_with(lambda row: row.positions_follow_padding), 56)
    assert found == {"bert": 64, **robertas, "distilbert": 64, "opt": 64}
    assert families.positions(ENCODER_DECODERS["bart"](2, 2)) == 64
    assert families.positions(ENCODER_DECODERS["t5"](2, 2)) is None


SIZES = "vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4"
TRAIN = "finetune.train={steps: 1, batch_size: 1, micro_batch_size: 1, learning_rate: 0.1}"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("model_type: bert, head_dim: 8", r"head_dim: a bert model has no such setting; leave it out"),
        (
            "model_type: t5, num_key_value_heads: 4",
            r"num_key_value_heads: a t5 model has no such setting; leave it out",
        ),
        ("head_dim: 8", r"num_key_value_heads: a qwen3 model needs it; add it"),
        ("model_type: bert, decoder_layers: 2", r"decoder_layers: a bert model has one stack of blocks; leave it out"),
    ],
)
def test_architectures_that_cannot_be(tiny: Path, more: str, sentence: str) -> None:
    shape = f"finetune.architecture={{{SIZES}, max_position_embeddings: 64, {more}}}"
    with pytest.raises(InputError, match=rf"finetune\.architecture\.{sentence}"):
        load_recipe(tiny / "recipe.yaml", ["teacher.path=null", TRAIN, shape])


@pytest.mark.parametrize("model_type", ["bert", "t5", "bart"])
def test_new_models_are_of_their_kind_and_size(tiny: Path, model_type: str) -> None:
    stacks = {} if model_type == "bert" else {"decoder_layers": 3}
    more = "".join(f", {key}: {value}" for key, value in {"model_type": model_type, **stacks}.items())
    shape = f"finetune.architecture={{{SIZES}, max_position_embeddings: 64{more}}}"
    recipe = load_recipe(tiny / "recipe.yaml", ["teacher.path=null", TRAIN, shape])
    assert recipe.finetune is not None and recipe.finetune.architecture is not None
    kind: Kind = "encoder" if model_type == "bert" else "encoder_decoder"
    tokenizer = make.new_tokenizer(["one two"], 300, kind)
    config = new_config(recipe.finetune.architecture.model_dump(), tokenizer, ("no", "yes"))
    assert families.kind(config) == kind and families.depths(config) == ((2,) if model_type == "bert" else (2, 3))
    made = families.family(config)
    assert made.labels == (("no", "yes") if model_type == "bert" else ())
    if model_type != "bert":
        assert made.start == {"t5": tokenizer.pad_token_id, "bart": tokenizer.eos_token_id}[model_type]
    assert config.hidden_size == 32 and config.pad_token_id == tokenizer.pad_token_id


def test_a_decoders_fingerprint_knows_nothing_of_other_families(tiny: Path) -> None:
    """What was trained before these keys were there is still of the same recipe."""
    base = load_recipe(tiny / "recipe.yaml")
    assert not {"student.decoder_blocks", "student.classifier"} & training_inputs(base).keys()
    assert training_inputs(base.changed({"student.classifier": "new"}))["student.classifier"] == "new"
    shape = f"finetune.architecture={{{SIZES}, max_position_embeddings: 64, head_dim: 8, num_key_value_heads: 2}}"
    made = finetune_inputs(load_recipe(tiny / "recipe.yaml", ["teacher.path=null", TRAIN, shape]))
    assert "finetune.architecture.head_dim" in made
    assert not {"finetune.architecture.model_type", "finetune.architecture.decoder_layers"} & made.keys()


# ---------------------------------------------------------------------------------------------------------------------
# Maps of two stacks


def two_stacks(tiny: Path, **changes: Any) -> Recipe:
    return load_recipe(tiny / "recipe.yaml").changed(changes)


def test_a_strategy_is_applied_to_each_stack(tiny: Path) -> None:
    pairs = recipe_map.maps_of(two_stacks(tiny, **{"matching.embedding": True}), (2, 3), (4, 12))
    first = ((EMBEDDING, EMBEDDING), *forward(2, 4))
    second = tuple((s + 2, t + 4) for s, t in forward(3, 12))
    assert pairs == (*first, (DECODER_EMBEDDING, DECODER_EMBEDDING), *second)
    assert recipe_map.pair_names(pairs, (2, 4)) == [
        "enc e<e", "enc 0<1", "enc 1<3", "dec e<e", "dec 0<3", "dec 1<7", "dec 2<11",
    ]  # fmt: skip
    assert recipe_map.pair_names(pairs, (2, 4), redraws=True)[:4] == ["enc e<e", "enc 0<*", "enc 1<*", "dec e<e"]
    assert recipe_map.maps_of(two_stacks(tiny), (3,), (12,)) == forward(3, 12)
    assert recipe_map.pair_names(((EMBEDDING, EMBEDDING), *forward(3, 12))) == ["e<e", "0<3", "1<7", "2<11"]
    assert recipe_map.maps_of(two_stacks(tiny, **{"matching.strategy": "none"}), (2, 3), (4, 12)) == ()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (
            {"matching.target_block": 3},
            "matching.target_block: strategy 'nearest' does not read this option; leave it out, or use strategy 'all_to_one'",
        ),
        (
            {"matching.redraw_every": 5},
            "matching.redraw_every: strategy 'nearest' does not read this option; leave it out, or use strategy 'in_order_random'",
        ),
        (
            {"matching.pairs": [[0, 1]]},
            "matching.pairs: strategy 'nearest' does not read this option; leave it out, or use strategy 'explicit'",
        ),
    ],
)
def test_what_the_recipes_own_strategy_does_not_read_is_named_by_it(tiny: Path, option: Any, sentence: str) -> None:
    """Though `nearest` is planned by the pairs of `forward`; and though a student of the recipe's study reads it."""
    assert recipe_map.pairs_of(two_stacks(tiny, **{"matching.strategy": "nearest"}), 3, 12) == forward(3, 12)
    with pytest.raises(InputError, match=sentence):
        two_stacks(tiny, **{"matching.strategy": "nearest"}, **option)
    studied = {"study.strategies": ["nearest", "all_to_one", "in_order_random", "explicit"]}
    recipe = two_stacks(tiny, **{"matching.strategy": "nearest"}, **option, **studied)
    with pytest.raises(InputError, match=sentence):
        recipe_map.pairs_of(recipe, 3, 12)


def explicit(tiny: Path, pairs: Any, **changes: Any) -> Recipe:
    return two_stacks(tiny, **{"matching.strategy": "explicit", "matching.pairs": pairs}, **changes)


def test_each_stack_has_pairs_of_its_own(tiny: Path) -> None:
    """4 + 3 blocks -> 2 + 1, counted through both stacks."""
    apart = explicit(tiny, {"encoder": [[0, 1], [1, 3]], "decoder": [[0, 2]]})
    assert recipe_map.maps_of(apart, (2, 1), (4, 3)) == ((0, 1), (1, 3), (2, 6))
    embedded = apart.changed({"matching.embedding": True})
    assert recipe_map.pair_names(recipe_map.maps_of(embedded, (2, 1), (4, 3)), (2, 4)) == [
        "enc e<e", "enc 0<1", "enc 1<3", "dec e<e", "dec 0<2",
    ]  # fmt: skip
    both = explicit(tiny, {"encoder": [[0, 1]], "decoder": [[0, 1]]})
    assert recipe_map.maps_of(both, (2, 1), (4, 3)) == recipe_map.maps_of(explicit(tiny, [[0, 1]]), (2, 1), (4, 3))
    one = explicit(tiny, {"encoder": [[1, 3]]}, **{"matching.embedding": True})
    assert recipe_map.maps_of(one, (2, 1), (4, 3)) == ((EMBEDDING, EMBEDDING), (1, 3))
    with pytest.raises(InputError, match="3 weights for the 2 pairs enc e<e, enc 1<3; write one for each"):
        recipe_map.maps_of(one.changed({"matching.pair_weights": [1.0, 2.0, 3.0]}), (2, 1), (4, 3))


def test_each_stack_has_a_target_block_of_its_own(tiny: Path) -> None:
    """A stack that is left out has the middle one."""
    found = {}
    for name, target in {"apart": {"encoder": 2, "decoder": 1}, "one": {"encoder": 3}, "same": 2, "none": None}.items():
        recipe = two_stacks(tiny, **{"matching.strategy": "all_to_one", "matching.target_block": target})
        found[name] = recipe_map.maps_of(recipe, (2, 1), (4, 3))
    assert found["apart"] == ((0, 2), (1, 2), (2, 5))
    assert found["one"] == ((0, 3), (1, 3), (2, 4))
    assert found["same"] == ((0, 2), (1, 2), (2, 6))
    assert found["none"] == ((0, 1), (1, 1), (2, 4))


@pytest.mark.parametrize(
    ("strategy", "key", "value", "sentence"),
    [
        (
            "explicit",
            "pairs",
            [[0, 1], [1, 2]],
            r"the decoders: pairs\[1\] is \[1, 2\]: 1 is not a block of the student, which has 1: .* matching.pairs: {encoder",
        ),
        (
            "explicit",
            "pairs",
            {"decoder": [[0, 3]]},
            "the decoders: .* 3 is not a block of the teacher, which has 3: write a whole",
        ),
        (
            "explicit",
            "pairs",
            {"encoder": [[2, 3]]},
            "the encoders: .* 2 is not a block of the student, which has 2: write a whole",
        ),
        ("explicit", "pairs", {"encoder": [], "decoder": []}, "'explicit' has no pairs: write some as .student block"),
        ("explicit", "pairs", {}, "'explicit' has no pairs: write some as .student block"),
        ("forward", "pairs", {"encoder": [[0, 1]]}, "strategy 'forward' does not read this option"),
        (
            "all_to_one",
            "target_block",
            {"encoder": 4},
            "the encoders: target_block 4 is not a block of the teacher, which has 4",
        ),
        (
            "all_to_one",
            "target_block",
            3,
            "the decoders: .*, which has 3: .* each stack its own: matching.target_block: {encoder",
        ),
        ("forward", "target_block", {"encoder": 4}, "strategy 'forward' does not read this option"),
        (
            "pkd_last",
            "embedding",
            False,
            "the decoders: .* leaves out the student's last block, and the student has no other",
        ),
    ],
)
def test_a_mistake_in_a_stacks_map_names_the_stack(
    tiny: Path, strategy: str, key: str, value: Any, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        recipe = two_stacks(tiny, **{"matching.strategy": strategy, f"matching.{key}": value})
        recipe_map.maps_of(recipe, (2, 1), (4, 3))


def test_a_decoder_deeper_than_its_teachers_is_named(tiny: Path) -> None:
    with pytest.raises(InputError, match="the decoders: the student has 4 blocks and the teacher 3: give the stu"):
        recipe_map.maps_of(two_stacks(tiny), (2, 4), (4, 3))


@pytest.mark.parametrize(
    ("strategy", "key", "value", "sentence"),
    [
        (
            "explicit",
            "pairs",
            {"encoder": [[0, 1]]},
            r"matching\.pairs: .* one stack of blocks; write it plainly, e\.g\. \[\[0, 1",
        ),
        (
            "all_to_one",
            "target_block",
            {"encoder": 1},
            r"matching\.target_block: .*one stack of blocks; write it plainly, e\.g\. 2",
        ),
    ],
)
def test_models_of_one_stack_are_not_matched_by_stack(
    tiny: Path, strategy: str, key: str, value: Any, sentence: str
) -> None:
    recipe = two_stacks(tiny, **{"matching.strategy": strategy, f"matching.{key}": value, "stones": {"kl": 1.0}})
    for of in (recipe_map.pairs_of, recipe_map.stones_of):
        with pytest.raises(InputError, match=sentence):
            of(recipe, 3, 6)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            "matching.pairs={encoder: [[0]]}",
            r"matching\.pairs: .*\[\[0\]\]} can't be read; write e\.g\. \[\[0, 3\], .* or {decoder:",
        ),
        ("matching.pairs={encodr: [[0, 1]]}", r"matching\.pairs: .*encodr.* can't be read; write e\.g\. \[\[0, 3\],"),
        ("matching.pairs=3", r"matching\.pairs: 3 can't be read; write e\.g\."),
        (
            "matching.target_block={decoder: -1}",
            r"matching\.target_block: .*-1} can't be read; write e\.g\. 5 or {decoder: 1, enc",
        ),
        ("matching.target_block=-1", r"matching\.target_block: -1 can't be read; write e\.g\. 5 or"),
    ],
)
def test_what_is_neither_plain_nor_by_stack_is_refused_by_its_key(tiny: Path, value: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_recipe(tiny / "recipe.yaml", [value])


def test_pairs_by_stack_stand_in_the_recipe_and_change_no_other_fingerprint(tiny: Path, tmp_path: Path) -> None:
    apart = explicit(tiny, {"encoder": [[0, 1]], "decoder": [[0, 2]]})
    (tmp_path / "again.yaml").write_text(dump_recipe(apart))
    assert load_recipe(tmp_path / "again.yaml") == apart
    inputs = training_inputs(explicit(tiny, [[0, 1], [1, 2]]))
    assert inputs["matching.pairs"] == [[0, 1], [1, 2]] and "matching.target_block" not in inputs
    assert "matching.pairs" not in training_inputs(two_stacks(tiny))
    assert training_inputs(apart) != training_inputs(explicit(tiny, {"encoder": [[0, 1]], "decoder": [[0, 1]]}))


def test_each_pair_of_both_stacks_has_a_weight(tiny: Path) -> None:
    assert (
        len(recipe_map.maps_of(two_stacks(tiny, **{"matching.pair_weights": [1.0, 2.0, 3.0, 4.0]}), (2, 2), (4, 4)))
        == 4
    )
    with pytest.raises(InputError, match="2 weights for the 4 pairs enc 0<1, enc 1<3, dec 0<1, dec 1<3; write one for"):
        recipe_map.maps_of(two_stacks(tiny, **{"matching.pair_weights": [1.0, 2.0]}), (2, 2), (4, 4))


def test_random_maps_of_the_two_stacks_are_drawn_apart(tiny: Path) -> None:
    """With 4 blocks, one order in 24 would be the same by chance."""
    same = 0
    for seed in range(24):
        recipe = two_stacks(tiny, **{"matching.strategy": "random", "seed": seed})
        pairs = recipe_map.maps_of(recipe, (4, 4), (8, 8))
        assert pairs == recipe_map.maps_of(recipe, (4, 4), (8, 8))
        first, second = pairs[:4], tuple((s - 4, t - 8) for s, t in pairs[4:])
        assert sorted(t for _, t in first) == sorted(t for _, t in second) == [1, 3, 5, 7]
        same += first == second
    assert same < 6


def test_each_redraw_of_the_two_stacks_is_drawn_apart(tiny: Path) -> None:
    """The first draw is the map that the run was begun with; encoder and decoder follow draws of their own."""
    recipe = two_stacks(tiny, **{"matching.strategy": "in_order_random", "matching.embedding": True})
    draws = [recipe_map.maps_of(recipe, (2, 3), (8, 9), draw) for draw in range(12)]
    assert draws[0] == recipe_map.maps_of(recipe, (2, 3), (8, 9))
    assert len(set(draws)) == 12
    for pairs in draws:
        first, second = pairs[:3], pairs[3:]
        assert [s for s, _ in first] == [EMBEDDING, 0, 1] and [s for s, _ in second] == [DECODER_EMBEDDING, 2, 3, 4]
        assert all(0 <= t < 8 for _, t in first[1:]) and all(8 <= t < 17 for _, t in second[1:])
    alike = (recipe_map.maps_of(recipe, (3, 3), (9, 9), draw) for draw in range(20))
    assert sum([t for _, t in p[1:4]] == [t - 9 for _, t in p[5:]] for p in alike) < 5  # 1 in 84 by chance


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ([[0, 1], [1, 1]], "from pair to pair of 0<1 and 1<1 the teacher's state stays the same"),
        ([[0, 1], [0, 2]], "the pairs 0<1 and 0<2 do not go upwards"),
        ([[1, 1], [0, 2]], "the pairs 1<1 and 0<2 do not go upwards"),
    ],
)
def test_a_map_without_differences_is_refused(tiny: Path, pairs: list[list[int]], sentence: str) -> None:
    changes = {"matching.strategy": "explicit", "matching.pairs": pairs, "matching.compare": "differences"}
    with pytest.raises(InputError, match=re.escape(sentence)):
        recipe_map.maps_of(two_stacks(tiny, **changes), (3,), (6,))
    in_each_stack = two_stacks(tiny, **{**changes, "matching.pairs": [[0, 1], [1, 2]]})
    assert len(recipe_map.maps_of(in_each_stack, (3, 3), (6, 6))) == 4


def test_differences_from_normed_states_and_through_checkpointed_projectors_are_refused(
    tiny: Path, tmp_path: Path, world: Any
) -> None:
    with pytest.raises(InputError, match=r"matching\.final_state: a normed state less a raw one"):
        two_stacks(tiny, **{"matching.compare": "differences", "matching.final_state": "normed"})
    changes = {
        "matching.compare": "differences",
        "matching.projector": "always",
        "train.activation_checkpointing": True,
    }
    with pytest.raises(InputError, match=r"train\.activation_checkpointing: not with matching\.compare: differences"):
        train(world, jobs.distil_job(world, two_stacks(tiny, **changes), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher.placement": "pipeline"}, "logit_lens reads the teacher's states through its final norm and head"),
        ({"loss.report_norms_every": 2}, "loss.report_norms_every: the gradient of logit_lens is not measured"),
        (
            {"matching.final_state": "normed"},
            "matching.final_state: logit_lens reads states as blocks give them; write raw",
        ),
        (
            {"matching.compare": "differences"},
            "matching.compare: logit_lens reads states as blocks give them; write states",
        ),
    ],
)
def test_what_a_logit_lens_cannot_read_is_refused(tiny: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        two_stacks(tiny, **{"matching.distance": "logit_lens", **changes})


def test_a_logit_lens_is_for_decoders(tmp_path: Path, world: Any) -> None:
    recipe = family_recipe(tmp_path, "encoder", new(ENCODERS["bert"](4), "encoder"))
    recipe = recipe.changed({"matching.distance": "logit_lens"})
    with pytest.raises(InputError, match="logit_lens has not been shown to read a"):
        jobs.distil_job(world, recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "lacks", "sentence"),
    [
        (
            {},
            True,
            r"^train\.compile: compiled blocks take a C\+\+ compiler .*, which is missing here; install it, or write none$",
        ),
        (
            {"teacher.placement": "zero3", "teacher.offload": "nvme"},
            False,
            r"^train\.compile: from NVMe .*; write none, or off",
        ),
        (
            {"data.batching": "packed"},
            False,
            r"^train\.compile: attention within packed .*; write none, or data\.batching: grouped$",
        ),
        (
            {"train.deepspeed": "zero3_offload_nvme"},
            False,
            r"^train\.compile: from NVMe .*; write none, or offload to the cpu$",
        ),
    ],
)
def test_blocks_that_can_not_be_compiled_are_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], lacks: bool, sentence: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if lacks else name)
    monkeypatch.delenv("CXX", raising=False)
    recipe = load_recipe(tiny / "recipe.yaml")
    checks.check_kernels(recipe.changed(changes), gpu=False)  # nothing is compiled
    with pytest.raises(InputError, match=sentence):
        checks.check_kernels(recipe.changed({**changes, "train.compile": "blocks"}), gpu=False)
    if not lacks:
        checks.check_kernels(recipe.changed({"train.deepspeed": "zero2", "train.compile": "blocks"}), gpu=False)


def test_a_model_s_own_blocks_are_not_compiled() -> None:
    class Block(nn.Module):
        pass

    with pytest.raises(InputError, match=r"^train\.compile: Block is a model's own code, .*; write none$"):
        compile_blocks([Block()])
