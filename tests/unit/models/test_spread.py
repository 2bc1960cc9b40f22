"""A model whose blocks are spread over several devices gives the states and texts that it gives on one."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from llmkd.inference import backends
from llmkd.inference.sampling import Sampling
from llmkd.models import spread
from llmkd.models.parts import blocks
from llmkd.models.spread import placed, shares
from tests.family_models import DECODERS, ENCODER_DECODERS, ENCODERS, new

CPU = torch.device("cpu")
MODELS: dict[str, Any] = {
    **{name: ("decoder", make, (3,)) for name, make in DECODERS.items()},
    **{name: ("encoder", make, (3,)) for name, make in ENCODERS.items()},
    **{name: ("encoder_decoder", make, (2, 3)) for name, make in ENCODER_DECODERS.items()},
}

# A device of no hardware, whose tensors hold nothing: an operation on tensors of two of them fails as it does on two GPUs.
ON_TWO = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.initialization import no_init_weights
_setup_privateuseone_for_python_backend("pretended")
from llmkd.models import spread
torch.nn.Module._apply = lambda self, move, recurse=True: [
    module._parameters.update({name: torch.nn.Parameter(move(weight), requires_grad=False)
                               for name, weight in module._parameters.items() if weight is not None})
    or module._buffers.update({name: move(value) for name, value in module._buffers.items() if value is not None})
    for module in (self.modules() if recurse else [self])
]
torch.nn.Module.to = lambda self, device: self._apply(lambda tensor: tensor.to(device))
sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
devices = [torch.device("pretended", number) for number in range(2)]

def states():
    with devices[0], no_init_weights():
        model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8))
    spread.placed(model, devices)
    print(sorted({str(next(block.parameters()).device) for block in model.model.layers}))
    ids = torch.zeros(2, 5, dtype=torch.long, device=devices[0])
    return model(input_ids=ids, attention_mask={"full_attention": None}, use_cache=False).logits

with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
    print(states().device)
    spread._run_on = lambda block, device, first: block.to(device)  # without hooks
    states()
"""


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_in_parts_computes_what_the_whole_does(name: str) -> None:
    """And each block's inputs and outputs are moved, so that a hook on a block meets one device."""
    kind, make, depths = MODELS[name]
    whole, parts = new(make(*depths), kind), new(make(*depths), kind)
    given: dict[str, Any] = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    given |= {"decoder_input_ids": torch.tensor([[0, 9, 10]])} if kind == "encoder_decoder" else {}
    expected = whole(**given).logits
    assert torch.equal(placed(parts, [CPU, CPU])(**given).logits, expected)
    assert parts.device == CPU and not parts.training
    for block in blocks(parts):
        assert len(block._forward_pre_hooks) == len(block._forward_hooks) == 1


def test_each_device_has_its_share_and_the_first_all_that_is_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4
    )
    model: Any = hf.AutoModelForCausalLM.from_config(config)
    listed = list(blocks(model))
    block, rest = (sum(w.nbytes for w in m.parameters()) for m in (listed[0], model))
    rest -= 8 * block
    assert rest < block
    assert shares(model, listed, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    model.lm_head = torch.nn.Linear(
        32, 64 * 20, bias=False
    )  # as much as four blocks: the first device has less of them
    assert Counter(shares(model, listed, 4))[0] == 0 and max(Counter(shares(model, listed, 4)).values()) <= 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert spread.all_devices() == [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.slow
def test_no_operation_meets_two_devices() -> None:
    """But for the hooks, one would."""
    done = subprocess.run([sys.executable, "-c", ON_TWO], capture_output=True, text=True, check=False)
    both = "['pretended:0', 'pretended:1']"
    assert done.stdout.splitlines() == [both, "pretended:0", both], done.stderr[-2000:]
    assert done.returncode and "at least two devices" in done.stderr, done.stderr[-2000:]


def test_texts_of_a_model_in_parts_are_those_of_the_whole(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block has its keys and values beside it."""
    how = Sampling(
        stops=(1,), max_new_tokens=6, temperature=0.0, top_p=1.0, seed=0, batch_size=2, trust_remote_code=False
    )
    prompts = [[5, 6, 7], [8], [9, 10]]
    whole = backends.by_hugging_face(tiny / "teacher", prompts, "float32", how).token_ids
    monkeypatch.setattr(backends, "all_devices", lambda: [CPU, CPU, CPU])
    assert backends.by_hugging_face(tiny / "teacher", prompts, "float32", how).token_ids == whole
