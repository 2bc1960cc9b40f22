"""The messages between the stages of a pipelined teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmkd.distributed.joining import LostRank, patience
from llmkd.distributed.ranks import World


@dataclass(frozen=True)
class PendingTransfer:
    """A tensor on its way to or from a member of a pipeline; it is kept alive until it has been waited for."""

    tensor: Tensor
    description: str
    work: Any

    def wait(self) -> Tensor:
        """The tensor, once it has been received (or the other side has taken it). Raises LostRank where that fails."""
        try:
            self.work.wait()
        except RuntimeError as error:  # gloo and NCCL have no type of error for it
            raise LostRank(f"{self.description}, in vain ({str(error).splitlines()[0]})") from error
        return self.tensor


class PipelineGroup:
    """Sends tensors between the members of a pipeline (consecutive ranks), and counts the bytes that this rank sends.

    NCCL needs all operations of a process group posted in the same order on every rank, so each pipeline has groups of its own, apart
    from the collectives of training.
    """

    def __init__(self, world: World, size: int) -> None:
        self._ranks: list[int] = []
        self._group: Any = None
        self._control: Any = None
        for first in range(0, world.size, size):  # every rank takes part in creating every group
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks, timeout=patience(dist.get_backend(), world.timeout))
            control = dist.new_group(ranks, timeout=world.timeout, backend="gloo")
            if world.rank in ranks:
                self._ranks, self._group, self._control = ranks, group, control
        if dist.get_backend(self._group) == "nccl":  # its first operation must be one that all members take part in
            dist.all_reduce(torch.zeros(1, device=world.device), group=self._group)
        self.member = world.rank - self._ranks[0]
        self.size = size
        self.sent_bytes = 0
        self._seconds = int(world.timeout.total_seconds())

    def gather(self, value: Any) -> list[Any]:
        """Every member's small value of CPU tensors and numbers (all take part)."""
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        dist.all_gather_object(values, value, group=self._control)
        return values

    def post(self, sends: Sequence[tuple[Tensor, int, bool]]) -> list[PendingTransfer]:
        """Start to send (True) or receive (False) each tensor to or from a member, all at once. Both sides post in one order."""
        if not sends:
            return []
        posts, descriptions = [], []
        for tensor, member, is_sent in sends:
            rank = self._ranks[member]
            posts.append(dist.P2POp(dist.isend if is_sent else dist.irecv, tensor, rank, self._group))
            verb = "take" if is_sent else "send"
            descriptions.append(f"waited for rank {rank} to {verb} a teacher's state, for up to {self._seconds} s")
            self.sent_bytes += tensor.nbytes if is_sent else 0
        works = dist.batch_isend_irecv(posts)
        if len(works) == 1:  # NCCL returns one for all
            works = works * len(posts)
        return [PendingTransfer(s[0], text, work) for s, text, work in zip(sends, descriptions, works, strict=True)]
