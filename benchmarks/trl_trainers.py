"""TRL's own trainers on the benchmark's batches: their data path, loss, backward pass and optimizer step, one step at a time.

Two of TRL's trainers distil logits. `GKDTrainer` (trl.experimental) makes whole logits of both models. `DistillationTrainer` computes
the divergence in tiles (by Triton kernels on a GPU) and is meant for texts that the student has just written; here it is given the
batch's completions, so that nothing is generated. Both compute a divergence alone, no cross-entropy. GKDTrainer has no fused Liger loss
any more (TRL 1.16): Liger replaces the models' layers, and the saving of memory is DistillationTrainer's.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.contestants import Terms
from benchmarks.shapes import PAD, Work, labels
from llmkd.distributed.ds_configs import zero_stage
from llmkd.distributed.ranks import World
from llmkd.models.make import new_tokenizer


def kinds(device: torch.device) -> tuple[str, ...]:
    """The contestants that TRL gives; with Liger's kernels (norms, rotary positions, MLP) too where they can run."""
    liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    return ("trl/gkd", *(["trl/gkd liger"] if liger else []), "trl/distillation")


KL_ALONE = Terms(ce=0.0)


def version() -> str | None:
    """TRL's version, None where it is not installed."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return None


class TrlStep:
    """One of TRL's trainers as a contestant. `setting_up` is a step on which its loop makes engine and optimizer."""

    terms: Terms | None = KL_ALONE

    def __init__(
        self,
        name: str,
        world: World,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        ds_config: dict[str, Any],
        setting_up: Work,
    ) -> None:
        self.name = name
        if zero_stage(ds_config) == 3:  # TRL shards the teacher whenever it shards the student
            teacher = copy.deepcopy(teacher)
        self.teacher = teacher
        self._given: Any = None
        self._distils = name == "trl/distillation"
        # GKDTrainer divides by the tokens of all ranks, and DeepSpeed averages over the ranks again: what it minimises is 1/ranks of
        # the loss. Only what is compared is put right.
        self._short = 1 if self._distils else world.size
        settings = _settings(ds_config, student.dtype, on_cpu=world.device.type == "cpu", liger=name.endswith("liger"))
        make = self._distillation if self._distils else self._gkd
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self._give(setting_up)
            self._trainer: Any = make(student, teacher, settings, len(setting_up.rows) * world.size)
            self._trainer.train()
        self._device = world.device

    @property
    def engine(self) -> Any:
        return self._trainer.model_wrapped

    @property
    def student(self) -> PreTrainedModel:
        return self._trainer.model

    @contextmanager
    def turn(self) -> Iterator[Callable[[Work], Tensor]]:
        yield self._step

    def _step(self, work: Work) -> Tensor:
        """An epoch of one step, in the trainer's own loop."""
        trainer = self._trainer
        self._give(work)
        trainer._tr_loss = torch.zeros((), device=self._device)
        trainer._run_epoch(
            model=trainer.model_wrapped,
            epoch=0,
            train_dataloader=[self._given],
            steps_in_epoch=1,
            num_update_steps_per_epoch=1,
            trial=None,
            ignore_keys_for_eval=None,
            start_time=0.0,
            resume_from_checkpoint=None,
            epochs_trained=0,
            steps_trained_in_current_epoch=0,
        )
        return trainer._tr_loss * self._short

    def _give(self, work: Work) -> None:
        self._given = distillation_inputs(work) if self._distils else gkd_inputs(work)

    def _gkd(self, student: Any, teacher: Any, settings: dict[str, Any], rows: int) -> Any:
        from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]

        return GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(lmbda=0.0, beta=0.0, temperature=1.0, max_length=None, **settings),
            train_dataset=Dataset.from_list([{"labels": [0]}] * rows),
            data_collator=lambda rows: self._given,
            processing_class=new_tokenizer(["a benchmark"], 300),
        )

    def _distillation(self, student: Any, teacher: Any, settings: dict[str, Any], rows: int) -> Any:
        from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportMissingImports]

        given = self

        class OnGivenTexts(DistillationTrainer):
            """TRL's trainer, with the completions of the batch in place of generated ones."""

            def _generate_and_score_completions(self, inputs: Any) -> Any:
                return dict(given._given)

        return OnGivenTexts(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(beta=0.0, temperature=1.0, **settings),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * rows),
            processing_class=new_tokenizer(["a benchmark"], 300),
        )


class OnPolicy(TrlStep):
    """GKDTrainer on texts that the student writes in each step (lmbda 1), by the symmetric Jensen-Shannon divergence.

    A micro-batch gives the prompts; its completions only say how many tokens will be written of each, and count them.
    """

    terms = Terms(ce=0.0, divergence="jsd")

    def __init__(self, *given: Any) -> None:
        self.writing = 0.0
        """Seconds spent so far on writing."""
        self.written = torch.empty(0, dtype=torch.long)
        """[B, P + N] the last step's prompts, padded on the left, and texts."""
        super().__init__("trl/gkd", *given)

    def _give(self, work: Work) -> None:
        prompts, mask = _padded([row.prompt for row in work.rows], left=True)
        self._longest = max(len(row.completion) for row in work.rows)
        self._given = {**gkd_inputs(work), "prompts": prompts, "prompt_attention_mask": mask}

    def _gkd(self, student: Any, teacher: Any, settings: dict[str, Any], rows: int) -> Any:
        from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]

        step = self

        class Timed(GKDTrainer):
            """TRL's trainer, with a clock around its writing."""

            @staticmethod
            def generate_on_policy_outputs(*given: Any) -> Any:
                began = time.perf_counter()
                made = GKDTrainer.generate_on_policy_outputs(*given)
                step.writing += time.perf_counter() - began
                step.written = made[0]
                return made

        how = dict(lmbda=1.0, seq_kd=False, beta=0.5, temperature=1.0, max_new_tokens=self._longest, max_length=None)
        return Timed(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(**how, **settings),
            train_dataset=Dataset.from_list([{"labels": [0]}] * rows),
            data_collator=lambda rows: self._given,
            processing_class=new_tokenizer(["a benchmark"], 300),
        )


def gkd_inputs(work: Work) -> dict[str, Tensor]:
    """The micro-batch as GKDTrainer's collator gives it."""
    mask = work.batch.attended.long()
    return {"input_ids": work.batch.input_ids, "attention_mask": mask, "labels": labels(work.batch)}


def distillation_inputs(work: Work) -> dict[str, Tensor]:
    """The micro-batch as DistillationTrainer makes it: prompts padded on the left, completions on the right."""
    device = work.batch.input_ids.device
    prompts, prompt_mask = _padded([row.prompt for row in work.rows], left=True)
    completions, completion_mask = _padded([row.completion for row in work.rows], left=False)
    return {
        "prompt_ids": prompts.to(device),
        "prompt_mask": prompt_mask.to(device),
        "completion_ids": completions.to(device),
        "completion_mask": completion_mask.to(device),
        "num_items_in_batch": torch.tensor(float(work.trained), device=device),
    }


def _padded(rows: list[tuple[int, ...]], *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, at], mask[number, at] = torch.tensor(row), 1
    return ids, mask


def _settings(ds_config: dict[str, Any], dtype: torch.dtype, *, on_cpu: bool, liger: bool) -> dict[str, Any]:
    """The trainer's settings: the same engine as everybody, no recomputation, nothing logged or saved."""
    return dict(
        output_dir=tempfile.mkdtemp(prefix="benchmark-trl-"),
        max_steps=1,
        per_device_train_batch_size=ds_config["train_micro_batch_size_per_gpu"],
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        learning_rate=0.0,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=ds_config["gradient_clipping"],
        bf16=dtype == torch.bfloat16,
        use_cpu=on_cpu,
        use_liger_kernel=liger,
        deepspeed=copy.deepcopy(ds_config),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
