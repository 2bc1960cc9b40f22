"""How tokens are chosen, for all backends."""

from __future__ import annotations

from dataclasses import dataclass

Ids = list[int]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where a text ends."""

    max_new_tokens: int
    stops: tuple[int, ...]
    """Token ids that end a text, and stay in it."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    """What a prompt's tokens are drawn by, with its number; a prompt may have a seed of its own."""
    seeds: tuple[int, ...] | None = None
    """Each prompt's own."""
    limits: tuple[int, ...] | None = None
    """Each prompt's most new tokens; None: `max_new_tokens`."""
    batch_size: int = 64
    """Prompts at once on the hf backend."""
    trust_remote_code: bool = False
    """Run the model folder's own Python code."""

    def of(self, prompts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(each prompt's most new tokens, its seed)."""
        limits = self.limits or (self.max_new_tokens,) * prompts
        return limits, self.seeds or tuple(range(self.seed, self.seed + prompts))
