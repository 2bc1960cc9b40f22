"""What writing takes of a rank's memory, and of GPUs that are the engines' own."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Qwen3Config

from llmkd.planning import rollouts, shapes
from llmkd.planning.rows import GIB, Row
from llmkd.recipe.recipe import Recipe

STUDENT, TEACHER = (
    shapes.shapes(Qwen3Config(hidden_size=64, vocab_size=1000, num_hidden_layers=n, num_key_value_heads=2))
    for n in (2, 8)
)


def recipe(**section: Any) -> Recipe:
    return Recipe.model_validate({
        "name": "planned", "output": "runs", "teacher": {"path": "teacher"}, "student": {"blocks": 2}, "loss": {"ce": 0.0},
        "data": {"source": "rows.jsonl", "max_length": 256},
        "train": {"dtype": "bfloat16", "steps": 1, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
        "rollouts": {"batch_size": 8, "max_new_tokens": 100, **section},
    })  # fmt: skip


def planned(*, sharded: bool, **section: Any) -> dict[str, int]:
    return {
        row.what.split(" (")[0]: row.bytes
        for row in rollouts.rollout_rows(recipe(**section), STUDENT, TEACHER, sharded=sharded)
    }


KEPT = "keys and values of the texts"
COPY, HANDED = "a copy of the student, writing", "weights handed over"


def test_a_student_that_lends_its_weights_is_copied_only_where_it_is_sharded() -> None:
    cached = 8 * 256 * 2 * 2 * STUDENT.keys * 2
    assert planned(sharded=False, backend="hf") == {KEPT: cached}
    assert planned(sharded=True, backend="hf") == {KEPT: cached, COPY: 2 * STUDENT.parameters}
    assert planned(sharded=False, backend="vllm").keys() == {KEPT, COPY, HANDED}
    mixed = planned(sharded=False, by="mixed")
    assert mixed.keys() == {KEPT, "a whole teacher that writes"} and mixed[KEPT] > cached
    assert planned(sharded=False, backend="vllm", devices=(4,)) == {HANDED: 2 * STUDENT.parameters}
    assert planned(sharded=True, share=0.0) == {}


@pytest.mark.parametrize("by", ["student", "teacher", "both"])
def test_what_engines_hold_on_gpus_of_their_own_is_said(by: str) -> None:
    section = {"by": by, "share": 0.5, "backend": "vllm"}
    own = recipe(**section, devices=(4, 5, 6, 7), tensor_parallel=2)
    text = rollouts.engines_text(own, STUDENT, TEACHER, [], 80)
    assert text is not None and text.startswith(
        "GPUs 4, 5, 6, 7 of each node (rollouts.devices) are vLLM's: 2 engine(s) of 2 GPU(s)"
    )
    for who, model, size in (("the teacher", TEACHER, 2), ("the student", STUDENT, 2)):
        said = f"{who}, " in text
        assert said == (by in (who.removeprefix("the "), "both"))
        assert (f"{model.parameters * size / 2 / GIB:.3f} GiB of weights on each" in text) == said


KEEPS = [
    Row("weights", 30 * GIB, ""),
    Row("for a moment", 50 * GIB, "", ("backward",)),
    Row("resting", 9 * GIB, "", place="host"),
]


@pytest.mark.parametrize(
    ("section", "device", "ends"),
    [
        ({"gpu_share": 0.5}, 80, "beside 30.000 GiB that the training keeps there: together they fit"),
        ({"gpu_share": 0.625}, 80, "together they fit"),
        ({"gpu_share": 0.7}, 80, "together too much; write a gpu_share of 0.62 at most, or name GPUs of its own (rollouts.devices)"),
        ({"gpu_share": 0.5}, 30, "together too much; shard more, or name GPUs of its own (rollouts.devices)"),
        ({"gpu_share": 1e-9}, 80, "no room for keys and values; write a larger gpu_share, 0.62 at most"),
        ({"backend": "hf"}, 80, None),
        ({"by": "teacher"}, 80, None),  # nothing else is there yet
        ({"by": "mixed", "backend": "auto"}, 80, None),
    ],
)  # fmt: skip
def test_what_an_engine_holds_beside_the_training_is_said(
    section: dict[str, Any], device: float, ends: str | None
) -> None:
    text = rollouts.engines_text(recipe(**{"backend": "vllm", **section}), STUDENT, TEACHER, KEEPS, device)
    assert (text is None) if ends is None else (text is not None and text.endswith(ends))
    if ends is not None:
        assert text is not None and f"{section['gpu_share'] * device:.3f} GiB (rollouts.gpu_share" in text
