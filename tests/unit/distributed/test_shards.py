"""What DeepSpeed pickles into a checkpoint can be read without running code, whatever the version of Python."""

from __future__ import annotations

import copyreg
import io

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from llmkd.distributed import unpickling


@pytest.mark.parametrize("stage", list(ZeroStageEnum))
def test_a_stage_is_stored_by_its_value(stage: ZeroStageEnum) -> None:
    """Python 3.11.2 would store it as a call of getattr, which torch does not open."""
    assert unpickling.__name__  # it tells pickle how
    assert copyreg.dispatch_table[ZeroStageEnum](stage) == (ZeroStageEnum, (stage.value,))  # type: ignore[arg-type]
    file = io.BytesIO()
    torch.save(stage, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) is stage
