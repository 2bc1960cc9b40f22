"""From its import on, what this process and its children load of a checkpoint is tensors, numbers, texts and three classes of DeepSpeed's.

DeepSpeed reads checkpoints by torch.load(weights_only=False), which runs whatever code a file from elsewhere holds; torch's own switch
overrides that everywhere.
"""

from __future__ import annotations

import copyreg
import os

import torch

from llmkd.distributed.ranks import World  # noqa: F401  (sets the accelerator before DeepSpeed is imported)

# isort: split
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
# Python 3.11.0 to 3.11.3 would pickle an enum's member as a call of getattr, which is not among them.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))
