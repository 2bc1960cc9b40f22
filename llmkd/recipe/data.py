"""The rows that a run trains on, and those by which it is validated."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmkd.data.formats import RowFormat, check_names, check_option_names
from llmkd.data.splits import may_overlap
from llmkd.errors import InputError
from llmkd.recipe.section import NO_EFFECT, Section

_OF_A_SOURCE = ("source", "name", "split", "rows", "records_seed", "format", "columns", "template_options")

Format = Literal["auto", "prompt_completion", "messages", "sharegpt", "alpaca", "text", "prompts", "classification"]


class Validation(Section):
    """Rows that are never trained on, by which a run is validated (`train.validate_every`). They are given in one of three ways: `share`,
    another `split` of the same source, or a `source` of their own. All students of a study are validated on the same rows."""

    share: float | None = Field(default=None, gt=0, lt=1)
    """This share of the rows is held out. Which rows, `seed` alone decides."""
    split: str | None = None
    """A split of `data.source`; with `source`, the split of that (default: train)."""
    source: str | None = None
    """Rows of another source, named as in `data.source`."""
    name: str | None = None
    """The configuration of a hub data set given as `source`."""
    format: Format | None = None
    """What a row of `source` holds; default: `data.format`."""
    columns: dict[str, str] | None = None
    """Other names of columns of `source`; default: `data.columns`."""
    template_options: dict[str, Any] | None = None
    """What the chat template is told beside the chats of `source`; default: `data.template_options`."""
    rows: int = Field(default=256, gt=0)
    """At most so many rows are validated: of a source or split the first ones, of a share some that `seed` decides."""
    seed: int = Field(default=0, ge=0)
    """Seed of what `share` holds out; not the recipe's, so that students of several seeds have the same rows."""

    @model_validator(mode="after")
    def _one_way(self) -> Validation:
        elsewhere = self.split is not None or self.source is not None
        if (self.share is not None) == elsewhere:
            raise ValueError("share: give exactly one of share, split (of data.source) and source (other rows)")
        for key in ("name", "format", "columns", "template_options"):
            if getattr(self, key) is not None and self.source is None:
                raise ValueError(f"{key}: it belongs to a source of its own; give source too, or leave {key} out")
        if self.seed and self.share is None:
            raise ValueError("seed: it decides which rows a share holds out; write share, or leave seed out")
        try:
            check_names(self.columns or {})
            check_option_names(self.template_options or {})
        except InputError as error:
            raise ValueError(str(error).removeprefix("data.")) from error
        return self


class Rows(Section):
    """Where rows are, and what they hold."""

    source: str = "records"
    """`records` (the built-in task); a local .jsonl, .json, .parquet or .csv file (may be .gz) or a folder of them; or a hub name."""
    name: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    """The split to read, or a slice of it as `datasets` writes one: `train[:10%]`, `train[100:200]`. Local files that are streamed have no
    slices; of a folder of files the rows of a split are counted together."""
    rows: int | None = Field(default=None, gt=0)
    """Use the first `rows` rows; the built-in task is endless and needs it."""
    records_seed: int = 0
    """Seed of the built-in task's rows."""
    format: Format = "auto"
    """What a row holds; `auto` goes by the column names. `prompt_completion`: columns prompt and completion (texts, or lists of turns), of
    which the completion is trained. `messages`: a chat of turns with role and content, of which the assistant's turns and calls of tools
    are trained. `sharegpt`: the same in a column conversations, of turns with from and value; a column system comes first. `alpaca`:
    columns instruction, output and perhaps input; the output is trained, as the answer in a chat, or, where the tokenizer has no chat
    template, after instruction and input with an empty line below each. A column tools of a chat is given to the template. `text`: every
    token is trained. `prompts`: a column prompt alone, a text or a list of turns, which the student continues (section rollouts, share 1).
    `classification` (encoders): columns text, or text_a and text_b, and label. Encoder-decoders read the prompt and write the completion.
    Rows without anything to write are dropped and counted."""
    columns: dict[str, str] = {}
    """Other names of columns, the data's own -> the format's: `{question: prompt, answer: completion}`. All else goes by the new names."""
    template_options: dict[str, Any] = {}
    """What the chat template is told beside the chat, in training and whenever a model answers: `{enable_thinking: false}`."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        try:
            check_names(self.columns)
            check_option_names(self.template_options)
        except InputError as error:
            raise ValueError(str(error).removeprefix("data.")) from error
        return self

    @property
    def row_format(self) -> RowFormat:
        """How these rows are read."""
        return RowFormat(self.format, self.columns, self.template_options)


def _share_rows(one: Rows, other: Rows) -> bool:
    """Whether two sources that are named alike may have a row in common, whatever each reads of it."""
    named_alike = (one.source, one.name, one.records_seed) == (other.source, other.name, other.records_seed)
    return named_alike and may_overlap(one.split, other.split)


class MixtureSource(Rows):
    """One of several sources that are trained on together."""

    weight: float | None = Field(default=None, gt=0)
    """How much of the batches it gives, beside the others' weights: a share of rows, or of sequences where they are packed. Given to all
    sources or to none; default: the number of its rows or sequences."""


class Data(Rows):
    """The rows that models are trained on."""

    sources: tuple[MixtureSource, ...] = ()
    """Several sources in place of `source`, mixed by weight in every step: `[{source: a.jsonl, weight: 2}, {source: b, weight: 1}]`."""
    streaming: bool = False
    """Read and tokenize rows as training goes, for a source too large to tokenize first; it begins again when it ends. The length of such a
    run is `train.steps`, and rows of validation need a split or source of their own."""
    shuffle_rows: int = Field(default=10_000, gt=0)
    """Of a stream, how many rows each rank reads and shuffles together."""
    max_length: int = Field(default=512, gt=1)
    """Longest row in tokens; for an encoder-decoder, of prompt and completion each."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What is done with a row of more than `max_length` tokens; how many there are is logged."""
    batching: Literal["grouped", "packed"] = "grouped"
    """`grouped`: rows of similar length are padded together. `packed`: rows fill sequences of `max_length` tokens, by best fit, with
    attention kept within each row; `train.batch_size` and `train.micro_batch_size` then count sequences."""
    validation: Validation | None = None
    """The rows that a run is validated on; if left out, there are none."""
    tokens: Annotated[str | None, NO_EFFECT] = None
    """The folder in which rows are kept as tokens, for all runs that have the same; default: tokens/ in `output`."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.sources:
            own = [key for key in _OF_A_SOURCE if getattr(self, key) != type(self).model_fields[key].default]
            if own:
                raise ValueError(
                    f"{own[0]}: sources says where the rows are and how they are read; write {own[0]} there, or leave one of the two out"
                )
        for number, part in enumerate(self.sources):
            if part.weight is None and any(other.weight for other in self.sources):
                raise ValueError(
                    f"sources.{number}.weight: other sources have one; give every source a weight, or none"
                )
            if part.source == "records" and part.rows is None:
                raise ValueError(
                    f"sources.{number}.rows: the built-in task is endless; write how many to use, e.g. rows: 20000"
                )
        return self

    @model_validator(mode="after")
    def _stream_is_possible(self) -> Self:
        shuffled = type(self).model_fields["shuffle_rows"].default
        if not self.streaming and self.shuffle_rows != shuffled:
            raise ValueError(
                "shuffle_rows: all rows are shuffled where they are tokenized first; write streaming: true, or leave shuffle_rows out"
            )
        if not self.streaming:
            return self
        whole = "write streaming: false, which tokenizes all rows first"
        if self.sources:
            raise ValueError(f"streaming: several sources can't be mixed as streams yet; {whole}, or give one source")
        if self.source == "records":
            raise ValueError(f"streaming: the built-in task is made in memory; {whole}")
        if self.rows is not None:
            raise ValueError(f"rows: a stream is read as far as train.steps takes it; leave rows out, or {whole}")
        if self.validation is not None and self.validation.share is not None:
            raise ValueError(
                "validation.share: a stream's rows are not counted, so no share of them can be held out; give a split or a source, or "
                f"{whole}"
            )
        return self

    @property
    def parts(self) -> tuple[Rows, ...]:
        """Where the rows are: each source, or the only one."""
        return self.sources or (self,)

    @property
    def weights(self) -> tuple[float | None, ...]:
        """Of each part; None where it is the number of its rows."""
        return tuple(part.weight for part in self.sources) or (None,)

    @property
    def names(self) -> tuple[str, ...]:
        """The parts' names in logs: a file's or a hub name's last part, with its split where it is not `train`."""
        names: list[str] = []
        for part in self.parts:
            name = PurePath(part.source).name.partition(".")[0] + ("" if part.split == "train" else f"-{part.split}")
            names.append(name if name not in names else f"{name}-{len(names) + 1}")
        return tuple(names)

    @model_validator(mode="after")
    def _validation_is_apart(self) -> Data:
        if self.validation is not None and self.validation.share is not None:
            for number, part in enumerate(self.parts):
                if any(_share_rows(part, earlier) for earlier in self.parts[:number]):
                    raise ValueError(
                        f"sources.{number}.source: {part.source!r} is there twice, and what validation.share holds out of the one would be "
                        "trained on in the other; write it once, with the sum of the weights, or give validation a source of its own"
                    )
        for part in () if self.held_out is None else self.held_out.parts:
            for other in self.parts:
                if _share_rows(part, other):
                    raise ValueError(
                        f"validation.split: the split {part.split!r} of {part.source!r} is trained on, or a part of it (split "
                        f"{other.split!r}); write another split, or slices that meet nowhere (train[5%:], train[:5%]), or share: 0.05"
                    )
        return self

    @property
    def held_out(self) -> Data | None:
        """The rows of `validation` that are in a split or source of their own, as a section; None for a share of these rows."""
        given = self.validation
        if given is None or given.share is not None:
            return None
        if given.source is None and self.sources:
            share = {"split": given.split, "rows": max(1, given.rows // len(self.sources))}
            return self.model_copy(
                update={"validation": None, "sources": tuple(part.model_copy(update=share) for part in self.sources)}
            )
        changes: dict[str, object] = {
            "validation": None,
            "streaming": False,
            "rows": given.rows,
            "split": given.split or "train",
        }
        if given.source is not None:
            columns = self.columns if given.columns is None else given.columns
            changes |= {"source": given.source, "name": given.name, "columns": columns, "sources": ()}
            changes["format"] = given.format or self.format
            if given.template_options is not None:
                changes["template_options"] = given.template_options
        return self.model_copy(update=changes)
