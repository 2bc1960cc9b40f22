"""The projectors between a student's states and the teacher's, where their widths differ: as training drew them and as it left them."""

from __future__ import annotations

import torch
from torch import nn

from llmkd.distributed.shards import saved_weights
from llmkd.errors import InputError
from llmkd.evaluation.angles.students import TrainedStudent, fix_for_pairs
from llmkd.models.load import DTYPES
from llmkd.student.distiller import make_projectors
from llmkd.training import checkpoint
from llmkd.training.checksums import damage

Widths = tuple[int, int]
"""Of the student's and of the teacher's states."""


def drawn_projectors(student: TrainedStudent, widths: Widths, device: torch.device) -> dict[int, nn.Module]:
    """The projectors as training drew them, by student block; a block of several pairs has its first pair's."""
    return _by_block(student, _drawn(student, widths), device)


def trained_projectors(
    student: TrainedStudent, widths: Widths, device: torch.device
) -> tuple[str, dict[int, nn.Module]]:
    """(the checkpoint's name, its projectors by student block). Raises InputError where the run kept none."""
    problem = f"its states are {widths[0]} wide and the teacher's {widths[1]}"
    saved = checkpoint.whole(student.train / "checkpoints")
    if not student.pairs or not saved:
        folder = student.train / "checkpoints"
        why = "the run matched no pair" if not student.pairs else f"no checkpoint is left in {folder}"
        raise InputError(
            f"{problem}, and {why}, so no trained projector stands between them; train it again {fix_for_pairs(student)}and keep its "
            "checkpoints, or give a student of the teacher's width"
        )
    if (fault := damage(saved[-1])) is not None:
        raise InputError(f"{saved[-1]}: {fault}; put the file back, or train the student again")
    weights = saved_weights(saved[-1] / checkpoint.TAG, "projectors.")
    if not weights:
        raise InputError(
            f"{problem}, and {saved[-1]} holds no projector; train it again with a distance that has projectors, or give a student of "
            "the teacher's width"
        )
    projectors = _drawn(student, widths)
    projectors.load_state_dict(weights)
    return f"{saved[-1].parent.name}/{saved[-1].name}", _by_block(student, projectors, device)


def _drawn(student: TrainedStudent, widths: Widths) -> nn.ModuleList:
    """The projectors of the run's pairs as its recipe draws them, nn.Identity where a pair has none."""
    recipe, count = student.recipe, len(student.pairs)
    projectors = make_projectors(
        count,
        *widths,
        bias=recipe.matching.projector_bias,
        seed=recipe.seed,
        without=recipe.matching.unprojected(count),
    )
    assert projectors is not None, "the widths differ and there are pairs"
    return projectors


def _by_block(student: TrainedStudent, projectors: nn.ModuleList, device: torch.device) -> dict[int, nn.Module]:
    """In float32, rounded as training's dtype rounded them."""
    projectors = projectors.to(DTYPES[student.recipe.train.dtype]).to(device, torch.float32).requires_grad_(False)
    by_block: dict[int, nn.Module] = {}
    for (block, _), projector in zip(student.pairs, projectors, strict=True):
        if block >= 0 and not isinstance(projector, nn.Identity):  # a negative block is the embeddings
            by_block.setdefault(block, projector)
    return by_block
