"""The order in which a pipeline's process groups are made and first used, which NCCL prescribes; torch.distributed is pretended."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmkd.distributed import pipeline_group
from llmkd.distributed.pipeline_group import PipelineGroup


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize("rank", [0, 3])
def test_on_nccl_all_members_meet_before_a_first_message(
    monkeypatch: pytest.MonkeyPatch, rank: int, backend: str
) -> None:
    """Every rank makes every group, in one order; then the members of its own take part in one sum, before any message of two."""
    done: list[tuple[Any, ...]] = []

    def new_group(ranks: list[int], timeout: timedelta, backend: str | None = None) -> str:
        name = f"{ranks[0]}-{ranks[-1]} {backend or 'of tensors'}"
        done.append(("made", name))
        return name

    def batch_isend_irecv(posts: list[Any]) -> list[Any]:
        done.extend(("posted", post[3]) for post in posts)
        return [SimpleNamespace(wait=lambda: None) for _ in posts]

    dist = SimpleNamespace(
        new_group=new_group,
        get_backend=lambda *group: backend,
        all_reduce=lambda tensor, group: done.append(("summed", group)),
        isend="isend",
        irecv="irecv",
        P2POp=lambda *post: post,
        batch_isend_irecv=batch_isend_irecv,
    )
    monkeypatch.setattr(pipeline_group, "dist", dist)
    world: Any = SimpleNamespace(rank=rank, size=4, timeout=timedelta(60), device=torch.device("cpu"))
    group = PipelineGroup(world, 2)
    group.post([(torch.zeros(3), 1 - group.member, True)])
    made = [("made", f"{first}-{first + 1} {kind}") for first in (0, 2) for kind in ("of tensors", "gloo")]
    own = f"{rank // 2 * 2}-{rank // 2 * 2 + 1} of tensors"
    assert done == [*made, *[("summed", own)] * (backend == "nccl"), ("posted", own)]
    assert group.sent_bytes == 12
