"""The DeepSpeed configurations that a recipe asks for, completed with its numbers. Apart from `run`, which needs no torch."""

from __future__ import annotations

from llmkd.distributed.ds_configs import DsConfig, complete_ds_config, load_ds_config
from llmkd.files import ROOT
from llmkd.recipe.recipe import Recipe
from llmkd.recipe.run import Train


def completed_ds_config(
    train: Train, *, ranks: int, accumulation: int, nvme_path: str, key: str = "train.deepspeed"
) -> DsConfig:
    """The DeepSpeed configuration of a run. Raises InputError for what can't be used in its file, under `key`."""
    return complete_ds_config(
        load_ds_config(train.deepspeed, ROOT / "ds_configs"),
        world_size=ranks,
        micro_batch=train.micro_batch_size,
        accumulation=accumulation,
        clip=train.clip,
        dtype=train.dtype,
        nvme_path=nvme_path,
        name=f"{key} ({train.deepspeed})",
    )


def check_ds_configs(recipe: Recipe, ranks: int) -> None:
    """Refuse DeepSpeed files with all their faults before a process is started, each of which takes its time to begin."""
    trainings = {"train.deepspeed": recipe.train}
    if recipe.finetune is not None:
        trainings["finetune.train.deepspeed"] = recipe.finetune.train
    for key, train in trainings.items():
        accumulation = max(train.batch_size // (ranks * train.micro_batch_size), 1)
        completed_ds_config(train, ranks=ranks, accumulation=accumulation, nvme_path="", key=key)
