"""Where a teacher may live, and what each placement can do: the rest of the package asks for these properties, not for a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WithWeights = Literal["replicated", "zero3", "pipeline"]
PlacementName = Literal[WithWeights, "cache"]


@dataclass(frozen=True)
class Placement:
    """What a placement can do; the defaults are those of a whole teacher on every rank."""

    has_weights: bool = True
    """The teacher runs beside the student. Otherwise its signals were written earlier, by a teacher in a placement that has weights."""
    is_sharded: bool = False
    """Every rank runs all blocks, each gathered from the ranks' shards while it is used."""
    is_staged: bool = False
    """Each rank runs some of the blocks and sends their states on."""
    needs_fixed_map: bool = False
    """It gives the states of one map, known before training."""
    runs_upper_blocks: bool = True
    """It can go on from a student's state with its upper blocks."""
    takes_decoders_only: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether a rank runs the teacher without the other ranks."""
        return self.has_weights and not (self.is_sharded or self.is_staged)


_ONE_MAP = {"needs_fixed_map": True, "runs_upper_blocks": False, "takes_decoders_only": True}
PLACEMENTS: dict[PlacementName, Placement] = {
    "replicated": Placement(),
    "pipeline": Placement(is_staged=True, **_ONE_MAP),
    "zero3": Placement(is_sharded=True),
    "cache": Placement(has_weights=False, **_ONE_MAP),
}
"""By name, the simplest first."""
