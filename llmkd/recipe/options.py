"""The command-line options that choose a recipe, declared once for `llmkd` and for `deepspeed llmkd/train.py`.

Only click is imported, so that `llmkd --help` answers at once.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

Command = Callable[..., Any]


class FiniteRange(click.FloatRange):
    """A number within bounds; click itself takes nan for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


class OutputPath(click.Path):
    """Where a command writes; `~` is the home folder, as in a recipe."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        text = str(value)
        if not text or "\0" in text:
            self.fail(f"{text!r} names no place; name one, or leave the option out", param, ctx)
        return Path(os.path.expanduser(text))


class Part(NamedTuple):
    """The part of a study that one of several machines does: `number`, from 1, of `count`."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


class _Part(click.ParamType):
    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Part:
        match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(
                f"{value!r}: write which machine of how many, e.g. 1/4, 2/4, 3/4 and 4/4 on four machines", param, ctx
            )
        return Part(int(match[1]), int(match[2]))


def _not_here(context: click.Context, option: click.Parameter, folder: Path | None) -> Path | None:
    """The folder of one run, which holds nothing else."""
    if folder == Path("."):
        raise click.BadParameter("is the folder that you are in; name one for this run", context, option)
    return folder


SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key, e.g. train.steps=100."
)
SHARD = click.option(
    "--shard",
    type=_Part(),
    default="1/1",
    metavar="I/N",
    help="Do part I of N of the study, on one of N machines that share its folder.",
)
_TRAIN_OPTIONS = (
    click.option("--recipe", "-r", default="quickstart", show_default=True, help="Recipe file, or a name in recipes/."),
    click.option("--strategy", help="Layer map; overrides matching.strategy."),
    click.option("--seed", type=int, help="Overrides seed."),
    SET,
    click.option("--ds-config", help="DeepSpeed JSON; overrides train.deepspeed."),
    click.option(
        "--output",
        type=OutputPath(),
        callback=_not_here,
        help="Folder of this run [default: OUTPUT/NAME/students/STRATEGY-sSEED].",
    ),
)


def train_options(command: Command) -> Command:
    """Give a command the options of one training run. It is called with `recipe`, `overrides` and `output`.

    --strategy, --seed and --ds-config are short forms of --set, and come after it.
    """

    @functools.wraps(command)
    def with_overrides(
        *, strategy: str | None, seed: int | None, ds_config: str | None, overrides: tuple[str, ...], **options: Any
    ) -> Any:
        short_forms = {"matching.strategy": strategy, "seed": seed, "train.deepspeed": ds_config}
        sets = tuple(f"{key}={json.dumps(value)}" for key, value in short_forms.items() if value is not None)
        return command(overrides=(*overrides, *sets), **options)

    wrapped: Command = with_overrides
    for option in reversed(_TRAIN_OPTIONS):
        wrapped = option(wrapped)
    return wrapped
