"""The rows that a run trains on."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llmkd.data.formats import RowFormat, check_names, check_option_names
from llmkd.errors import InputError
from llmkd.recipe.section import Section


class Data(Section):
    """The rows that models are trained on."""

    source: str = "records"
    """`records` (the built-in task); a local .jsonl, .json, .parquet or .csv file (may be .gz) or a folder of them; or a hub name."""
    name: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    """The split to train on."""
    rows: int | None = Field(default=None, gt=0)
    """Use the first `rows` rows; the built-in task is endless and needs it."""
    records_seed: int = 0
    """Seed of the built-in task's rows."""
    format: Literal["auto", "prompt_completion", "messages", "sharegpt", "alpaca", "text", "classification"] = "auto"
    """What a row holds; `auto` goes by the column names. `prompt_completion`: columns prompt and completion (texts, or lists of turns), of
    which the completion is trained. `messages`: a chat of turns with role and content, of which the assistant's turns and calls of tools
    are trained. `sharegpt`: the same in a column conversations, of turns with from and value; a column system comes first. `alpaca`:
    columns instruction, output and perhaps input; the output is trained, as the answer in a chat, or, where the tokenizer has no chat
    template, after instruction and input with an empty line below each. A column tools of a chat is given to the template. `text`: every
    token is trained. `classification` (encoders): columns text, or text_a and text_b, and label. Encoder-decoders read the prompt and
    write the completion. Rows without anything to write are dropped and counted."""
    columns: dict[str, str] = {}
    """Other names of columns, the data's own -> the format's: `{question: prompt, answer: completion}`. All else goes by the new names."""
    template_options: dict[str, Any] = {}
    """What the chat template is told beside the chat, in training and whenever a model answers: `{enable_thinking: false}`."""
    max_length: int = Field(default=512, gt=1)
    """Longest row in tokens; for an encoder-decoder, of prompt and completion each."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What is done with a row of more than `max_length` tokens; how many there are is logged."""
    batching: Literal["grouped", "packed"] = "grouped"
    """`grouped`: rows of similar length are padded together. `packed`: rows are laid end to end, with attention kept within each."""

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
