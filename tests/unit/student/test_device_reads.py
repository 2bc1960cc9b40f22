"""A micro-batch never waits for the device: nothing of the models or the losses reads a tensor's value, and no mask is made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from llmkd.data.batches import Batch, collate
from llmkd.models import load, parts
from llmkd.models.model_types import MODEL_TYPES
from llmkd.teachers.resident import ResidentTeacher
from tests.passes import distiller, step_settings

READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero"}
"""Operations whose result the host waits for."""


class Reads(TorchDispatchMode):
    """Counts the operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _batch(*, packed: bool = False) -> Batch:
    rows = [{"input_ids": list(range(2, 2 + n)), "trained": [False] * 2 + [True] * (n - 2)} for n in (9, 4, 6)]
    return collate(rows, pad_id=0, packed=packed)


@pytest.mark.parametrize("strategy", ["forward", "all_to_one"])
def test_a_micro_batch_of_padded_rows_reads_nothing(tiny: Path, strategy: str) -> None:
    def load_model() -> Any:
        return load.load_causal_lm(tiny / "teacher", dtype=torch.float32, ds_config=None, attention="sdpa")

    pairs = ((0, 1), (1, 3)) if strategy == "forward" else ((0, 5), (1, 5))
    uses = [block for _, block in pairs]
    teacher, student = ResidentTeacher(load_model(), uses, normed_last=False, ds_config=None), load_model()
    module, batch = distiller(student, pairs), _batch()
    with Reads() as reads:
        signal = teacher.signals(batch)
        module(batch, signal, step_settings(pairs)).loss.backward()
    assert not reads.counts
    with Reads() as reads:  # the count is no count of nothing
        batch.attended.all().item()
    assert reads.counts == {"_local_scalar_dense": 1}


@pytest.mark.parametrize("name", sorted(name for name, row in MODEL_TYPES.items() if row.takes_masks))
def test_a_model_that_takes_masks_gives_the_states_of_one_that_makes_them(name: str) -> None:
    """At the tokens of padded rows, with sdpa; eager attention, which sees ahead without a mask, is given none ready-made."""
    config = AutoConfig.for_model(
        name, vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    batch = _batch()
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        with torch.no_grad(), Reads() as reads:
            state = parts.final_state(model, batch)
        assert bool(reads.counts) == (attention == "eager")
        expected = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        torch.testing.assert_close(state[batch.attended], expected[batch.attended], rtol=1e-4, atol=1e-5)
