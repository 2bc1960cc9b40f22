"""What a run says of itself: sums stay on the device, are reduced once per interval, and go to the log, JSONL, TensorBoard and W&B."""

from __future__ import annotations

import json
import logging
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkd.distributed.ranks import World, highest, sum_tensor
from llmkd.losses.objective import PARTS, Divisors, Weights, means

log = logging.getLogger("llmkd")


class Meter:
    """Adds up a run's sums between two log lines. Nothing is read from the device until `flush`."""

    def __init__(self, world: World, weights: Weights, pair_names: Sequence[str]) -> None:
        self._world = world
        self._weights = weights
        self._pairs = tuple(pair_names)
        self._reset()

    def _reset(self) -> None:
        self._sums: Tensor | None = None
        self._weighted: Tensor | None = None
        self._divisors = [0, 0, 0]
        self._tokens = 0
        self._steps = 0
        self._since = time.perf_counter()

    def add(self, sums: Tensor, weights: Weights) -> None:
        """One micro-batch's sums on this rank: CE, KL, then each pair's distance; and the weights that they have in this step."""
        sums = sums.double()
        pairs = sums[2:].unbind()
        hidden = sum(
            (d if w == 1 else d * w for d, w in zip(pairs, weights.of_pairs(len(pairs)), strict=True)), 0 * sums[0]
        )
        weighted = torch.stack([sums[0] * weights.ce, sums[1] * weights.kl, hidden * weights.hidden])
        self._sums = sums if self._sums is None else self._sums + sums
        self._weighted = weighted if self._weighted is None else self._weighted + weighted

    def step(self, by: Divisors, tokens: int, weights: Weights) -> None:
        """A step is done: the global divisors of its parts, its tokens (padding not counted) and its weights.

        A step in which the divergence has come to weigh nothing is not counted in its mean: it was not worked out.
        """
        run = (True, weights.kl > 0, True)
        counts = (by.ce, by.kl, by.hidden)
        self._divisors = [old + new * ran for old, new, ran in zip(self._divisors, counts, run, strict=True)]
        self._tokens += tokens
        self._steps += 1

    def flush(self) -> dict[str, Any]:
        """The interval's means over all ranks (all ranks take part): loss, ce, kl, hidden, each pair's, tokens/s, memory."""
        assert self._sums is not None and self._weighted is not None
        found = sum_tensor(self._world, torch.cat([self._weighted, self._sums])).tolist()
        by = Divisors(*(max(count, 1) for count in self._divisors))
        values: dict[str, Any] = means(found[3:], found[:3], by, self._weights)
        distances = found[5:]
        # by.hidden counts positions x pairs; a pair's own mean is over the positions
        count = len(self._pairs)
        values["pairs"] = {name: d * count / by.hidden for name, d in zip(self._pairs, distances, strict=True)}
        seconds = time.perf_counter() - self._since
        values.update(tokens_per_second=self._tokens / seconds, seconds_per_step=seconds / self._steps)
        values["memory_gib"] = highest(self._world, peak_memory_gib())
        self._reset()
        return values


def peak_memory_gib() -> float:
    """The most memory this process has held: the GPU allocator's peak, or on a CPU machine the resident set's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def line(step: int, steps: int, values: dict[str, Any]) -> str:
    """One readable line of a log interval."""
    pairs = " ".join(f"{name}:{value:.4f}" for name, value in values["pairs"].items())
    text = f"step {step}/{steps} loss {values['loss']:.4f} ce {values['ce']:.4f} kl {values['kl']:.4f}"
    if pairs:
        text += f" hidden {values['hidden']:.4f} [{pairs}]"
    if "norms" in values:
        text += " norms " + " ".join(f"{part}:{values['norms'][part]:.3g}" for part in PARTS)
        for kind in ("distances", "divergences"):
            text += "".join(f" {name}:{norm:.3g}" for name, norm in values["norms"].get(kind, {}).items())
        for stone, parts in values["norms"].get("stones", {}).items():
            text += f" {stone} " + " ".join(f"{part}:{norm:.3g}" for part, norm in parts.items())
    if "temperature" in values:
        text += f" temperature {values['temperature']:.3f}"
    if "stones" in values:
        text += f" stones {values['stones']:.4f}"
    text += f" grad {values['grad_norm']:.3f} lr {values['learning_rate']:.2e}"
    return text + f" {values['tokens_per_second']:,.0f} tok/s {values['memory_gib']:.2f} GiB"


class Journal:
    """Writes a run's values: one log line, `metrics.jsonl`, TensorBoard, and W&B if asked for. Only rank 0 writes."""

    def __init__(
        self,
        world: World,
        folder: Path,
        *,
        start_step: int,
        wandb_project: str | None,
        recipe: dict[str, Any],
        run_name: str,
    ) -> None:
        self._main = world.is_main
        if not self._main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._file = folder / "metrics.jsonl"
        forget_after(self._file, start_step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._wandb = None
        if wandb_project is not None:
            import wandb  # type: ignore[import-not-found]

            self._wandb = wandb.init(
                project=wandb_project, name=run_name, dir=str(folder), config=recipe, id=run_name, resume="allow"
            )

    def write(self, step: int, steps: int, values: dict[str, Any]) -> None:
        """Record one interval."""
        if not self._main:
            return
        log.info(line(step, steps, values))
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        flat = _flat(values)
        for key, value in flat.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self._main:
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested values by names with slashes."""
    found: dict[str, float] = {}
    for key, value in values.items():
        found.update(_flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of steps that will be run again after a resume; what a killed run left half-written goes too."""
    if not file.is_file():
        return
    kept = []
    for text in file.read_text().splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text)
        except (json.JSONDecodeError, KeyError):
            continue
    tmp = file.with_suffix(".tmp")
    tmp.write_text("".join(text + "\n" for text in kept))
    os.replace(tmp, file)
