"""What is minimised: which blocks are compared and how, the loss and its schedules, stepping stones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmkd.errors import InputError
from llmkd.layer_map import OPTIONS, STRATEGIES
from llmkd.losses.distance_sum import KNOWN, READ, terms_of
from llmkd.losses.divergences import DIVERGENCES, PARAMETERS, Divergence, Mix, with_parameters
from llmkd.losses.objective import Change
from llmkd.recipe.section import NO_EFFECT, Positions, Section, check_name, check_weights

Stack = Literal["encoder", "decoder"]
BlockPairs = tuple[tuple[int, int], ...]
Block = Annotated[int, Field(ge=0)]
Candidates = Annotated[int, Field(ge=2)]


class Matching(Section):
    """Which teacher block teaches which student block, and how their states are compared (the hidden loss)."""

    strategy: str = "forward"
    """One of `llmkd maps` (forward, reverse, ...); `nearest`, measured before the first step; `learned`, mixtures of teacher blocks whose
    weights are trained with the student; or `explicit` with `pairs`."""
    pairs: BlockPairs | dict[Stack, BlockPairs] | None = Field(
        default=None, examples=[[[0, 3], [1, 7]], {"encoder": [[0, 1], [1, 3]], "decoder": [[0, 2]]}]
    )
    """(student block, teacher block), 0-based, for strategy explicit. For an encoder-decoder a list holds for both stacks; in a mapping by
    stack, a stack that is left out has no pair."""
    target_block: Block | dict[Stack, Block] | None = Field(default=None, examples=[5, {"encoder": 2, "decoder": 1}])
    """The one teacher block of all_to_one, for an encoder-decoder that of both stacks or by stack; default: the middle one."""
    redraw_every: int = Field(default=0, ge=0)
    """in_order_random: draw a new map after so many steps; 0 keeps the first."""
    candidates: Candidates | dict[Stack, Candidates] | None = Field(
        default=None, examples=[8, {"encoder": 4, "decoder": 6}]
    )
    """learned: how many teacher blocks a student block may learn from, spread as `forward` spreads them; default: all."""
    start: Literal["forward", "uniform"] = "forward"
    """learned: `forward` gives the block of `forward` a score of 1 and the others 0, `uniform` all the same."""
    temperature: float = Field(default=0.2, ge=0.001, le=1000)
    """learned: a block's weight is the softmax of the scores over this. At 0.2 `start: forward` gives the block of `forward` 0.93 of 12
    blocks' weight, 0.81 of 36 blocks'."""
    entropy: float = Field(default=0.0, ge=-1000, le=1000)
    """learned: weight of the entropy of a student block's weights beside its distance; above 0 it sharpens them, below 0 it evens them."""
    learning_rate: float = Field(default=0.01, gt=0)
    """learned: the scores' peak learning rate, which follows train's schedule."""
    distance: str | dict[str, float] | tuple[str | dict[str, float], ...] = Field(
        default="normalized_mse", examples=["procrustes", {"procrustes": 1.0, "mse": 0.1}]
    )
    """mse, normalized_mse, cosine, standardized_mse, cka, procrustes, gram or logit_lens; or several with their weights,
    {procrustes: 1.0, mse: 0.1}; or a list of these, one for each pair in the map's order (the embeddings' first)."""
    pair_weights: tuple[float, ...] | None = None
    """Weight of each pair in the hidden loss, in the map's order (the embeddings' first); default: 1 each."""
    tokens: int | None = Field(default=None, gt=1)
    """Compare so many tokens per micro-batch and rank, drawn anew each time; default: all. It makes set-level distances cheap."""
    scope: Literal["micro_batch", "batch"] = "micro_batch"
    """The tokens that a set-level distance compares: those of a rank's own micro-batch, or those of all ranks' micro-batches together."""
    positions: Positions = "attended"
    """`attended`: compare every token that is not padding. `trained`: only those whose next token is trained."""
    final_state: Literal["raw", "normed"] = "raw"
    """Compare the last blocks' outputs before (`raw`) or after (`normed`) the final norm; the layer-selection paper's Qwen3 code: after."""
    compare: Literal["states", "differences"] = "states"
    """`differences`: compare what each model has added to its state since the pair before, in place of the state. The first pair (of an
    encoder-decoder that of either stack) has none before it: its states are compared; with `embedding: true` it is the embeddings'."""
    embedding: bool = False
    """Compare the embeddings' outputs too, as the layer-selection paper does for BERT, BART and T5, but not for Qwen3."""
    projector: Literal["if_needed", "always"] = "if_needed"
    """Learn a linear map per pair from the student's states to the teacher's: only where the widths differ, or at equal widths too."""
    projector_bias: bool = False
    """Give the projectors a bias."""

    @model_validator(mode="after")
    def _known(self) -> Matching:
        check_name("matching.strategy", self.strategy, STRATEGIES)
        if not self.mixes:
            raise ValueError("matching.distance: the list is empty; write a distance for each pair, or one for all")
        for number, mix in enumerate(self.mixes):
            check_weights(
                f"matching.distance[{number}]" if isinstance(self.distance, tuple) else "matching.distance", mix, KNOWN
            )
        terms = [term for mix in self.mixes for term in terms_of(mix)]
        if self.scope == "batch" and not any(term.of_set for term in terms):
            raise ValueError(
                f"matching.scope: {' and '.join(self.distances)} compares token by token, wherever the tokens are; leave it out"
            )
        if self.projector == "always" and all(term.width_free for term in terms):
            raise ValueError(
                f"matching.projector: {' and '.join(self.distances)} compares states as they are; add another distance, or leave it out"
            )
        if self.reads_logits and (self.final_state == "normed" or self.compare == "differences"):
            key, value = ("final_state", "raw") if self.final_state == "normed" else ("compare", "states")
            raise ValueError(f"matching.{key}: logit_lens reads states as blocks give them; write {value}")
        if self.compare == "differences" and self.final_state == "normed":
            raise ValueError(
                "matching.final_state: a normed state less a raw one is nothing that blocks have added; write raw, or compare: states"
            )
        if self.pair_weights is not None and not (min(self.pair_weights, default=0) >= 0 and any(self.pair_weights)):
            raise ValueError(
                f"matching.pair_weights: {list(self.pair_weights)}; write numbers from 0 up, one of them above 0"
            )
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The strategies' options that are given."""
        values = {key: getattr(self, key) for key in OPTIONS}
        return {key: value for key, value in values.items() if value != type(self).model_fields[key].default}

    def without_others(self, strategy: str) -> dict[str, object]:
        """The recipe keys of options that are given and that this strategy does not read, each with its default."""
        if strategy not in STRATEGIES:  # refused by its name, once the recipe is changed
            return {}
        unread = self.options.keys() - set(STRATEGIES[strategy].options)
        return {f"matching.{option}": type(self).model_fields[option].default for option in unread}

    def check_options(self, strategies: Sequence[str]) -> None:
        """Raise InputError for an option that none of these strategies reads."""
        for option in self.options:
            if not any(option in STRATEGIES[name].options for name in strategies if name in STRATEGIES):
                names = ", ".join(strategies)
                reader = (
                    f"strategy {names!r} does not read" if len(strategies) == 1 else f"no strategy of {names} reads"
                )
                raise InputError(
                    f"matching.{option}: {reader} this option; leave it out, or use strategy {OPTIONS[option]!r}"
                )

    @property
    def mixes(self) -> tuple[dict[str, float], ...]:
        """`distance` in its one form, weights by name: a single mix for all pairs, or one per pair where the recipe lists them."""
        mixes = self.distance if isinstance(self.distance, tuple) else (self.distance,)
        return tuple({mix: 1.0} if isinstance(mix, str) else mix for mix in mixes)

    @property
    def reads_logits(self) -> bool:
        """Whether a distance compares what the heads read from states."""
        return any(name in READ for name in self.distances)

    @property
    def distances(self) -> tuple[str, ...]:
        """The names of all distances, each once."""
        return tuple(dict.fromkeys(name for mix in self.mixes for name in mix))

    def mixes_of(self, pairs: int) -> tuple[dict[str, float], ...]:
        """The mix of each of so many pairs. A map without pairs takes none, whatever the recipe lists."""
        if not isinstance(self.distance, tuple):
            return self.mixes * pairs
        assert pairs in (0, len(self.mixes)), "llmkd.training.pairs compares the numbers"
        return self.mixes[:pairs]

    def unprojected(self, pairs: int) -> tuple[int, ...]:
        """Which of so many pairs need no projector."""
        return tuple(number for number, mix in enumerate(self.mixes_of(pairs)) if _width_free(mix))

    def projects(self, student_width: int, teacher_width: int) -> bool:
        """Whether any pair has a projector, for states of these widths."""
        return not all(map(_width_free, self.mixes)) and (self.projector == "always" or student_width != teacher_width)


def _width_free(mix: Mapping[str, float]) -> bool:
    """Whether all distances of a mix compare states of any two widths, so that no projector is needed."""
    return all(term.width_free for term in terms_of(mix))


class Schedule(Section):
    """How a weight changes over the run, from its value in the recipe to `final`."""

    shape: Literal["constant", "linear", "cosine"] = "cosine"
    """The shape of the curve."""
    final: float | None = Field(default=None, ge=0)
    """The last value; required by linear and cosine."""
    until: float = Field(default=1.0, gt=0, le=1)
    """The fraction of the run after which the value is `final`."""

    @model_validator(mode="after")
    def _ends(self) -> Schedule:
        if (self.final is None) == (self.shape in ("linear", "cosine")):
            if self.final is None:
                raise ValueError(f"final: shape {self.shape} needs it; write the last value, e.g. final: 0.0")
            raise ValueError(f"final: shape {self.shape} does not read it; leave it out")
        if self.until != 1 and self.shape not in ("linear", "cosine"):
            raise ValueError(f"until: shape {self.shape} does not read it; leave it out, or write shape: linear")
        return self

    @property
    def change(self) -> Change | None:
        """The schedule as the losses take it; None where nothing changes."""
        if self.final is None or self.shape not in ("linear", "cosine"):
            return None
        return Change("linear" if self.shape == "linear" else "cosine", self.final, self.until)


class TemperatureSchedule(Schedule):
    """How the temperature changes over the run, from `loss.temperature`."""

    shape: Literal["constant", "linear", "cosine", "dynamic"] = "cosine"  # type: ignore[assignment]
    """The shape of the curve; `dynamic` follows the gap between the student's and the teacher's cross-entropy."""
    final: float | None = Field(default=None, gt=0)
    """The last value; required by linear and cosine."""
    minimum: float | None = Field(default=None, gt=0)
    """dynamic: the lowest target; default: half of loss.temperature."""
    maximum: float | None = Field(default=None, gt=0)
    """dynamic: the highest target; default: loss.temperature."""
    every: int = Field(default=10, gt=0)
    """dynamic: steps from one change to the next; each change waits for the two cross-entropies of its step."""

    @model_validator(mode="after")
    def _bounds(self) -> TemperatureSchedule:
        # compared by value, as a recipe that was written out holds every key
        keys = ("minimum", "maximum", "every")
        changed = [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]
        if changed and self.shape != "dynamic":
            raise ValueError(
                f"{changed[0]}: shape {self.shape} does not read it; leave it out, or write shape: dynamic"
            )
        return self


class Schedules(Section):
    """Which weights change over the run; those left out stay as they are."""

    ce: Schedule | None = None
    """Schedule of loss.ce."""
    kl: Schedule | None = None
    """Schedule of loss.kl."""
    hidden: Schedule | None = None
    """Schedule of loss.hidden."""
    temperature: TemperatureSchedule | None = None
    """Schedule of loss.temperature."""
    stones: Schedule | None = None
    """Schedule of a factor on all weights of `stones`, which starts at 1."""
    distances: dict[str, Schedule] | None = None
    """By name, schedules of the weights within matching.distance, in each pair from its own: {procrustes: {shape: linear, final: 0.0}}."""
    divergences: dict[str, Schedule] | None = None
    """By name, schedules of the weights within loss.divergence."""

    def change(self, part: str) -> Change | None:
        """The schedule of ce, kl, hidden or stones, as the losses take it."""
        schedule: Schedule | None = getattr(self, part)
        return None if schedule is None else schedule.change


def within(
    what: str, part: str, schedules: dict[str, Schedule] | None, names: tuple[str, ...], known: Mapping[str, Any]
) -> None:
    """Raise ValueError for a schedule of a distance or divergence (`what`) that is not one of several in `names`."""
    where = f"loss.schedules.{what}s"
    for name in schedules or {}:
        check_name(where, name, known)
        if len(names) == 1:
            raise ValueError(
                f"{where}.{name}: {names[0]} is the only {what}, so it has no weight relative to another; write loss.schedules.{part}"
            )
        if name not in names:
            raise ValueError(f"{where}.{name}: the recipe uses {', '.join(names)}; name one of these, or leave it out")


class Loss(Section):
    """What is minimised: `ce` × cross-entropy + `kl` × divergence + `hidden` × distance of the states + `router` × load balance."""

    ce: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy with the data."""
    kl: float = Field(default=1.0, ge=0)
    """Weight of the divergence from the teacher's distribution."""
    hidden: float = Field(default=3.0, ge=0)
    """Weight of the distance between matched states (section `matching`), a mean over pairs and tokens."""
    router: float = Field(default=0.0, ge=0)
    """Weight of the load balance of a Qwen3-MoE student's routers: transformers' auxiliary loss, taken row by row (packed: by document) and
    averaged over all tokens, so that micro-batches change nothing. Validations and report_norms_every leave it out."""
    divergence: str | dict[str, float] = Field(
        default="forward_kl", examples=["jsd", {"forward_kl": 0.5, "reverse_kl": 0.5}]
    )
    """forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd, akl or top_k; or several with their weights,
    {forward_kl: 0.5, reverse_kl: 0.5}."""
    own_divergence: str | dict[str, float] | None = Field(default=None, examples=["skew_reverse_kl"])
    """The divergence on texts that the student wrote (section rollouts), where it is another than `divergence`, with the same parameters.
    DistiLLM-2's pair: divergence skew_kl, own_divergence skew_reverse_kl, rollouts.by both."""
    beta: float | None = Field(default=None, ge=0, le=1)
    """jsd: the teacher's share of the mixture; default: 0.5, which is symmetric."""
    skew: float | None = Field(default=None, ge=0, lt=1)
    """skew_kl and skew_reverse_kl: the share of the first distribution in the mixture that it is compared with; default: 0.1."""
    akl_mu: float | None = Field(default=None, ge=0, le=1)
    """akl: the share of the teacher's probability that counts as its head; default: 0.5."""
    top_k: int | None = Field(default=None, gt=0)
    """top_k: how many of the teacher's likeliest tokens are compared one by one; default: 64."""
    temperature: float = Field(default=1.0, ge=0.01, le=1000)
    """Temperature of both distributions in the divergence."""
    kl_positions: Positions = "trained"
    """`trained`: the divergence is taken where the next token is trained. `attended`: at every token that is not padding (the paper's
    code)."""
    schedules: Schedules | None = None
    """How weights and temperature change over the run; if left out, they do not."""
    report_norms_every: Annotated[int, NO_EFFECT] = Field(default=0, ge=0)
    """Steps between reports of the norm of each part's gradient; 0 reports none."""

    @model_validator(mode="after")
    def _known(self) -> Loss:
        check_weights("loss.divergence", self.divergences, DIVERGENCES)
        if self.own_divergence is not None:
            check_weights("loss.own_divergence", self.own_divergences, DIVERGENCES)
            if self.report_norms_every and len(self.divergences) + len(self.own_divergences) > 2:
                raise ValueError(
                    "loss.report_norms_every: it names each divergence of a sum, and the student's own texts have another; write 0, or one "
                    "divergence each"
                )
        self.divergence_of(self.divergence)
        for part in ("ce", "kl", "hidden"):
            if self.schedules is not None and getattr(self.schedules, part) is not None and getattr(self, part) == 0:
                raise ValueError(
                    f"loss.schedules.{part}: it starts at loss.{part}, which is 0, and a part that starts at 0 is left out of the "
                    f"run; write e.g. loss.{part}: 1e-6, or leave the schedule out"
                )
        if self.schedules is not None:
            within("divergence", "kl", self.schedules.divergences, tuple(self.divergences), DIVERGENCES)
        dynamic = None if self.schedules is None else self.schedules.temperature
        low, high = (None, None) if dynamic is None else (dynamic.minimum, dynamic.maximum)
        if (low or self.temperature / 2) > (high or self.temperature):
            raise ValueError(
                f"loss.schedules.temperature.minimum: {low or self.temperature / 2} is above the maximum, {high or self.temperature}; "
                "write both, the smaller one as minimum"
            )
        return self

    @property
    def divergences(self) -> dict[str, float]:
        """Each divergence's weight in the divergence part."""
        return {self.divergence: 1.0} if isinstance(self.divergence, str) else self.divergence

    @property
    def own_divergences(self) -> dict[str, float]:
        """Each divergence's weight on the student's own texts where they have another; else empty."""
        own = self.own_divergence or {}
        return {own: 1.0} if isinstance(own, str) else own

    def divergence_of(self, mix: Mix) -> Divergence:
        """This divergence, or the sum of several. Raises InputError for a parameter that none of the recipe's divergences reads."""
        return with_parameters(mix, self.parameters, beside={**self.divergences, **self.own_divergences})

    @property
    def parameters(self) -> dict[str, float | None]:
        """The divergences' own parameters, by name."""
        return {name: getattr(self, name) for name in PARAMETERS}
