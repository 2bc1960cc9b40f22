"""What a recipe with rollouts may not ask for, each with its cure; and prompts alone as rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkd.data.formats import RowFormat
from llmkd.data.rows import load_rows
from llmkd.data.tokens import tokenize
from llmkd.errors import InputError
from llmkd.models.load import load_tokenizer
from llmkd.recipe.recipe import load_recipe
from llmkd.recipe.rollouts import Rollouts

VLLM = {"rollouts.backend": "vllm"}
NEW = {"loss.ce": 0.0, "rollouts": {"max_new_tokens": 20}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss.ce": 1.0}, r"loss\.ce: the tokens of a text that the student wrote .* write loss\.ce: 0"),
        (
            {"teacher.placement": "cache"},
            r"rollouts: a teacher with .*cache.* has read all rows .* write placement: replicated",
        ),
        ({"teacher.share_cache": True}, r"rollouts: a teacher with .*share_cache.* share_cache: false"),
        ({"data.batching": "packed"}, r"data\.batching: packed sequences are laid out before .* write grouped"),
        ({"data.streaming": True}, r"data\.streaming: prompts are taken from rows on disk; write streaming: false"),
        ({"data.format": "text"}, r"data\.format: a text has no prompt to continue; give rows of prompt"),
        (
            {"rollouts.max_new_tokens": 64},
            r"rollouts\.max_new_tokens: 64 tokens leave no room .*max_length 64; write a smaller",
        ),
        ({"rollouts.by": "mixed", "rollouts.backend": "vllm"}, r"rollouts\.backend: vLLM runs one model, .* write hf"),
        ({"rollouts.alpha": 0.5}, r"rollouts\.alpha: it belongs to by: mixed"),
        (
            {"rollouts.by": "teacher", "rollouts.every": 4},
            r"rollouts\.every: it belongs to by: student or mixed or both",
        ),
        ({"rollouts.by": "teacher", "rollouts.samples": 4}, r"rollouts\.samples: it belongs to by: student or mixed"),
        (
            {"rollouts.devices": [4], "rollouts.by": "mixed"},
            r"rollouts\.devices: vLLM alone runs there",
        ),
        (
            {"rollouts.devices": [4], "rollouts.backend": "hf"},
            r"rollouts\.devices: vLLM alone runs there",
        ),
        ({"rollouts.tensor_parallel": 2}, r"rollouts\.tensor_parallel: only GPUs that no rank trains on can be joined"),
        (
            {**VLLM, "rollouts.devices": [4, 5, 6], "rollouts.tensor_parallel": 2},
            r"rollouts\.devices: \[4, 5, 6\] are not whole",
        ),
        ({**VLLM, "rollouts.devices": [4, 4]}, r"rollouts\.devices: \[4, 4\] are not whole groups of 1 different GPUs"),
        (
            {"rollouts.temperature": 0.0, "rollouts.samples": 2},
            r"rollouts\.temperature: at 0, .* the 2 samples of a prompt are one",
        ),
        ({"rollouts.samples": 3}, r"rollouts\.samples: 1 of batch_size 8 = 8 texts a step are no whole groups of 3"),
        (
            {"rollouts.samples": 2, "rollouts.share": 0.3},
            r"rollouts\.samples: 0\.3 of batch_size 8 = 2\.4 texts a step are no",
        ),
        (
            {"rollouts.share": 0.001},
            r"rollouts\.share: 0\.001 of 3 steps of 8 rows is less than one text; write a larger",
        ),
        (
            {"rollouts.share": 1e-9, "train.steps": 10**6},
            r"rollouts\.share: 1e-09 of 1000000 steps of 8 rows is less than one",
        ),
        (
            {"data.validation": {"source": "b.jsonl", "format": "prompts"}},
            r"data\.validation: prompts have no completion",
        ),
        ({"rollouts.by": "both"}, r"rollouts\.share: at 1 no text of a batch is the teacher's; .* or by: student"),
        (
            {"rollouts.by": "both", "rollouts.share": 0.0},
            r"rollouts\.share: at 0 no text .* the student's; .* by: teacher",
        ),
        ({"loss.own_divergence": "jsd"}, r"loss\.own_divergence: at a rollouts\.share of 1 all rows are the student's"),
        ({"rollouts.by": "teacher", "loss.own_divergence": "jsd"}, r"loss\.own_divergence: .* writes none; add"),
        ({"rollouts": None, "loss.own_divergence": "jsd"}, r"loss\.own_divergence: .* writes none; add the section"),
        (
            {"rollouts.share": 0.75, "loss.own_divergence": "jsd", "train.batch_size": 8, "train.micro_batch_size": 4},
            r"loss\.own_divergence: .* 0\.75 of batch_size 8 = 6 rows do not fill any of micro_batch_size 4",
        ),
        (
            {"loss.own_divergence": "jsd", "rollouts.share": 0.5, "loss.skew": 0.3},
            r"loss\.skew: forward_kl and jsd does not read it",
        ),
        (
            {"loss.own_divergence": {"jsd": 0.5, "tvd": 0.5}, "loss.report_norms_every": 1},
            r"loss\.report_norms_every: it names each divergence of a sum",
        ),
        ({"rollouts.by": "teacher", "data.streaming": True}, r"data\.streaming: prompts are taken from rows on disk"),
        (
            {"rollouts.share": 0.5, "data.format": "prompts"},
            r"data\.format: prompts have no completion .* a share of 1",
        ),
        ({"rollouts": None, "data.format": "prompts"}, r"data\.format: prompts have no completion to train on"),
        (
            {"data.format": "prompts", "data.validation": {"share": 0.1}},
            r"data\.validation: prompts have no completion to validate on; give a source",
        ),
    ],
)
def test_what_is_refused(tiny: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_recipe(tiny / "recipe.yaml").changed({**NEW, **changes})


def test_samples_and_shares_that_fill_whole_groups(tiny: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({**NEW, "rollouts.samples": 4})
    assert recipe.changed({"rollouts.share": 0.5}).rollouts is not None
    assert (
        recipe.changed({"rollouts.samples": 1, "rollouts.share": 0.05}).rollouts is not None
    )  # one text in 3 steps of 8


def test_a_share_of_zero_asks_for_nothing(tiny: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({"rollouts": {"share": 0.0}, "data.batching": "packed"})
    assert recipe.rollouts is not None and not recipe.rollouts.writes


@pytest.mark.parametrize(
    "changes", [{"loss.ce": 1.0}, {"teacher.placement": "cache"}, {"data.batching": "packed", "loss.ce": 1.0}]
)
def test_what_a_teacher_wrote_before_training_is_data_like_any(tiny: Path, changes: dict[str, Any]) -> None:
    recipe = load_recipe(tiny / "recipe.yaml")
    with pytest.raises(InputError, match="write by: teacher"):
        recipe.changed({**NEW, **changes})
    assert recipe.changed({**NEW, "rollouts.by": "teacher", **changes}).rollouts is not None


def test_devices_are_counted_among_the_visible_ones() -> None:
    section = Rollouts.model_validate({"devices": (4, 5), "backend": "vllm"})
    assert [section.gpus_among(visible) for visible in (None, "", "0,1", "0, 5", "3,4,5")] == [2, 2, 0, 1, 2]
    assert Rollouts().gpus_among("0,1") == 0
    assert section.model_copy(update={"share": 0.0}).gpus_among(None) == 0  # nothing is written


def test_prompts_are_rows_up_to_where_a_model_goes_on(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny / "teacher")
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    chat = [{"role": "user", "content": "red door"}]
    texts, chats = tmp_path / "texts.jsonl", tmp_path / "chats.jsonl"
    texts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ["red", "red " * 70, "blue house"]))
    chats.write_text(json.dumps({"prompt": chat}) + "\n")
    how: dict[str, Any] = {"row_format": RowFormat("prompts"), "max_length": 64, "too_long": "drop"}
    rows = tokenize(load_rows(str(texts), name=None, split="train", rows=None), tokenizer, **how)
    assert [tokenizer.decode(ids) for ids in rows["input_ids"]] == [
        "red",
        "blue house",
    ]  # one leaves no room for a text
    assert not any(any(trained) for trained in rows["trained"])
    rows = tokenize(load_rows(str(chats), name=None, split="train", rows=None), tokenizer, **how)
    assert [tokenizer.decode(ids) for ids in rows["input_ids"]] == ["<user>red door</><assistant>"]
    with pytest.raises(
        InputError, match=r"data\.too_long: a prompt whose end is cut off asks for something else; write drop"
    ):
        tokenize(
            load_rows(str(texts), name=None, split="train", rows=None), tokenizer, **{**how, "too_long": "truncate"}
        )
