"""Which student a run keeps: the best so far by its validations is written out beside the checkpoints, and a run that gets no better stops.

    best/step-00000040/      an exported student, as the run's `model/` will be

A run that resumes from a checkpoint knows the validations up to it from the checkpoint's `state.json`. The best student as of every whole
checkpoint stays on the disk, so that it is there wherever the run may resume; all others are removed.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmkd.distributed.checksums import FILE, damage_together, write_checksums
from llmkd.distributed.ranks import World, on_main
from llmkd.errors import InputError
from llmkd.files import write_folder
from llmkd.recipe.run import Train
from llmkd.training import checkpoint, finite
from llmkd.training.build import export_options
from llmkd.training.prepare import PreparedRun
from llmkd.training.validation import Validated

log = logging.getLogger("llmkd")
MORE_IS_BETTER = ("validation/agreement",)


class Noted(NamedTuple):
    """A validation by what validations are compared by."""

    step: int
    value: float


def best_of(noted: Sequence[Noted], by: str) -> Noted | None:
    """The best of some validations, the first of equals; None where none gave a finite number."""
    sign = -1.0 if by in MORE_IS_BETTER else 1.0
    return min((n for n in noted if math.isfinite(n.value)), key=lambda n: (sign * n.value, n.step), default=None)


def is_over(noted: Sequence[Noted], train: Train) -> bool:
    """Whether the last `patience` validations all came after the best so far."""
    best = best_of(noted, train.keep_by)
    since = len(noted) if best is None else sum(n.step > best.step for n in noted)
    return train.patience is not None and since >= train.patience


class Keeping:
    """The validations of a run so far, and the students that are kept for them."""

    def __init__(self, world: World, run: PreparedRun) -> None:
        """All ranks take part. Raises InputError where the best student so far is no longer there."""
        self._world, self._run = world, run
        self._train = run.job.train
        self._folder = run.job.folder / "best"
        self.noted = [Noted(*noted) for noted in run.validations]
        if self._train.keep == "best":
            on_main(world, self._tidy)
            self._check()

    @property
    def best(self) -> Noted | None:
        """The best validation so far."""
        return best_of(self.noted, self._train.keep_by)

    @property
    def kept(self) -> Noted | None:
        """That of the student which is exported; None where it is the last step's."""
        return self.best if self._train.keep == "best" else None

    @property
    def rule(self) -> dict[str, object]:
        """By what a student is chosen, and on how many rows, as `summary.json` has it."""
        train = self._train
        chosen = {"keep": train.keep, "by": train.keep_by, "patience": train.patience} if train.chooses else {}
        return {"every": train.validate_every, "rows": self._run.validation_rows, **chosen}

    @property
    def is_over(self) -> bool:
        """Whether the run stops here, before its last step."""
        return is_over(self.noted, self._train)

    @property
    def model(self) -> Path:
        """Where the student of `kept` is."""
        assert self.kept is not None
        return self._place(self.kept)

    def note(self, step: int, validated: Validated) -> None:
        """Remember a validation; the student is written out if it is the best so far and the best is kept (all ranks take part)."""
        run, by = self._run, self._train.keep_by
        value = getattr(validated, by.removeprefix("validation/"))
        assert value is not None, "the recipe's check sees to it"
        self.noted.append(Noted(step, value))
        best = self.kept
        if best is not None and best.step == step:
            finite.check_weights(self._world, run.job, run.module, step)
            place = self._place(best)
            about = {"card": "", "meta": {"inputs": run.job.inputs, "step": step}, **export_options(run.job)}
            checkpoint.export(self._world, run.module.model, place, tokenizer_from=run.job.initial, **about)
            write_checksums(self._world, place)
            on_main(self._world, self._tidy)
            log.info("%s: step %d is the best so far by %s; its student is in %s", run.job.title, step, by, place)
        if self.is_over and self.best is not None:
            message = "%s: stopping after step %d: none of %d validations was better than %s %.4f of step %d"
            log.info(message, run.job.title, step, self._train.patience, by, self.best.value, self.best.step)

    def tidy(self) -> None:
        """Remove students that no resumed run can need, after a checkpoint was written (all ranks take part)."""
        if self._train.keep == "best":
            on_main(self._world, self._tidy)

    def publish(self, model: Path, *, card: str, meta: dict[str, object]) -> None:
        """Export the kept student to this folder (all ranks take part)."""

        def write(tmp: Path) -> None:
            shutil.copytree(self.model, tmp, ignore=shutil.ignore_patterns(FILE), dirs_exist_ok=True)
            (tmp / "README.md").write_text(card)
            (tmp / "llmkd.json").write_text(json.dumps(meta, indent=1))

        on_main(self._world, lambda: write_folder(model, write))

    def remove(self) -> None:
        """Remove what is kept, once the run is finished (rank 0 alone)."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _place(self, noted: Noted) -> Path:
        return self._folder / f"step-{noted.step:08d}"

    def _needed(self) -> set[Path]:
        """The best so far, and as of each checkpoint."""
        steps = [
            int(path.name.removeprefix("step-")) for path in checkpoint.whole(self._run.job.folder / "checkpoints")
        ]
        bests = [best_of([n for n in self.noted if n.step <= step], self._train.keep_by) for step in steps]
        return {self._place(noted) for noted in (*bests, self.best) if noted is not None}

    def _tidy(self) -> None:
        needed = self._needed()
        for path in self._folder.glob("step-*"):
            if path not in needed:
                shutil.rmtree(path)

    def _check(self) -> None:
        """Raise InputError where the best student so far, of an earlier start of this run, is gone or damaged (all ranks take part)."""
        if self.kept is None:
            return
        gone = not on_main(self._world, (self.model / "llmkd.json").is_file)
        fault = "is no longer here" if gone else damage_together(self._world, self.model)
        if fault is not None:
            checkpoints = self._run.job.folder / "checkpoints"
            raise InputError(
                f"{self.model}: the student of step {self.kept.step}, the best so far, {fault}; put it back, or "
                f"remove {checkpoints} to start from the beginning"
            )
