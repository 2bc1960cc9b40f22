"""What is minimised: which blocks are compared and how, the loss and its schedules, stepping stones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmkd.layer_map import OPTIONS, STRATEGIES
from llmkd.losses.distance_sum import KNOWN, terms_of
from llmkd.losses.divergences import DIVERGENCES, with_parameters
from llmkd.losses.objective import Change
from llmkd.recipe.section import Positions, Section, one_of, weighted

Stack = Literal["encoder", "decoder"]
BlockPairs = tuple[tuple[int, int], ...]
Block = Annotated[int, Field(ge=0)]


class Matching(Section):
    strategy: str = "forward"
    """One of llmkd.layer_map.STRATEGIES: `nearest` is measured before the first step, `explicit` takes its `pairs` from here."""
    pairs: BlockPairs | dict[Stack, BlockPairs] | None = Field(
        default=None, examples=[[[0, 3], [1, 7]], {"encoder": [[0, 1], [1, 3]], "decoder": [[0, 2]]}]
    )
    """(student block, teacher block), 0-based, for strategy explicit. Of an encoder-decoder a list is for both stacks; given by stack, one
    that is left out has no pair."""
    target_block: Block | dict[Stack, Block] | None = Field(default=None, examples=[5, {"encoder": 2, "decoder": 1}])
    """The one teacher block of all_to_one, of an encoder-decoder of both stacks or by stack; default the middle one."""
    redraw_every: int = Field(default=0, ge=0)
    """in_order_random: draw the map again after so many steps; 0 draws it once."""
    distance: str | dict[str, float] | tuple[str | dict[str, float], ...] = Field(
        default="normalized_mse", examples=["procrustes", {"procrustes": 1.0, "mse": 0.1}]
    )
    """One of llmkd.losses.distance_sum.KNOWN, or several with their weights: {procrustes: 1.0, mse: 0.1}; or a list of these, one for
    each pair in the map's order (the embeddings' first)."""
    pair_weights: tuple[float, ...] | None = None
    """What each pair counts in the hidden loss, in the map's order (the embeddings' first); default 1 each."""
    tokens: int | None = Field(default=None, gt=1)
    """Compare so many tokens per micro-batch and rank, drawn anew each time; default all. It makes set-level distances cheap."""
    scope: Literal["micro_batch", "batch"] = "micro_batch"
    """What a set-level distance is over: a rank's own micro-batch, or the micro-batches (or samples) of all ranks together."""
    positions: Positions = "attended"
    """Match every token that is not padding, or only those whose next token is trained."""
    final_state: Literal["raw", "normed"] = "raw"
    """Compare the last blocks' outputs before or after the final norm (the layer-selection paper's Qwen3 code: after)."""
    embedding: bool = False
    """Match the embeddings' outputs too (the paper does for BERT, BART and T5, not for Qwen3)."""
    projector: Literal["if_needed", "always"] = "if_needed"
    """Learn a linear map per pair from the student's states to the teacher's: where the widths differ, or at equal widths too."""
    projector_bias: bool = False

    @model_validator(mode="after")
    def _known(self) -> Matching:
        one_of("matching.strategy", self.strategy, STRATEGIES)
        if not self.mixes:
            raise ValueError("matching.distance: the list is empty; write a distance for each pair, or one for all")
        for number, mix in enumerate(self.mixes):
            weighted(
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

    @property
    def mixes(self) -> tuple[dict[str, float], ...]:
        """Each distance's weight in a pair's sum: one for all pairs, or as many as the recipe lists."""
        given = self.distance if isinstance(self.distance, tuple) else (self.distance,)
        return tuple({one: 1.0} if isinstance(one, str) else one for one in given)

    @property
    def distances(self) -> tuple[str, ...]:
        """All distances that any pair has, each once."""
        return tuple(dict.fromkeys(name for mix in self.mixes for name in mix))

    def mixes_of(self, pairs: int) -> tuple[dict[str, float], ...]:
        """Each pair's, of so many; there may be none although the recipe lists some."""
        if not isinstance(self.distance, tuple):
            return self.mixes * pairs
        assert pairs in (0, len(self.mixes)), "recipe_map has counted them"
        return self.mixes[:pairs]

    def unprojected(self, pairs: int) -> tuple[int, ...]:
        """Which of so many pairs need no projector, as all their distances compare states of any widths."""
        mixes = enumerate(self.mixes_of(pairs))
        return tuple(number for number, mix in mixes if all(term.width_free for term in terms_of(mix)))

    def projects(self, student_width: int, teacher_width: int) -> bool:
        """Whether a learned map stands between states of these widths, of any pair."""
        free = all(term.width_free for mix in self.mixes for term in terms_of(mix))
        return not free and (self.projector == "always" or student_width != teacher_width)


class Schedule(Section):
    """How a weight of the loss moves from the value that `loss` gives it; a function of the step alone."""

    shape: Literal["constant", "linear", "cosine"] = "cosine"
    final: float | None = Field(default=None, ge=0)
    """Where it ends."""
    until: float = Field(default=1.0, gt=0, le=1)
    """The share of the run after which it stands there."""

    @model_validator(mode="after")
    def _ends(self) -> Schedule:
        if (self.final is None) == (self.shape in ("linear", "cosine")):
            cure = "leave it out" if self.final is not None else "say where it ends, e.g. final: 0.0"
            raise ValueError(
                f"final: shape {self.shape} {'does not read' if self.final is not None else 'needs'} it; {cure}"
            )
        if self.until != 1 and self.shape not in ("linear", "cosine"):
            raise ValueError(f"until: shape {self.shape} does not read it; leave it out, or write shape: linear")
        return self

    @property
    def change(self) -> Change | None:
        """The same for the floors below; None where nothing changes."""
        if self.final is None or self.shape not in ("linear", "cosine"):
            return None
        return Change("linear" if self.shape == "linear" else "cosine", self.final, self.until)


class TemperatureSchedule(Schedule):
    shape: Literal["constant", "linear", "cosine", "dynamic"] = "cosine"  # type: ignore[assignment]
    """`dynamic`: by the gap between the student's and the teacher's cross-entropy (llmkd.losses.schedules.dynamic_temperature)."""
    final: float | None = Field(default=None, gt=0)
    minimum: float | None = Field(default=None, gt=0)
    """dynamic: the least aim; default half of loss.temperature."""
    maximum: float | None = Field(default=None, gt=0)
    """dynamic: the largest aim; default loss.temperature."""
    every: int = Field(default=10, gt=0)
    """dynamic: steps from one change to the next; at that step the two cross-entropies are waited for."""

    @model_validator(mode="after")
    def _bounds(self) -> TemperatureSchedule:
        usual = {
            "minimum": None,
            "maximum": None,
            "every": 10,
        }  # by value: a recipe that was written out names every key
        given = [key for key, value in usual.items() if getattr(self, key) != value]
        if given and self.shape != "dynamic":
            raise ValueError(f"{given[0]}: shape {self.shape} does not read it; leave it out, or write shape: dynamic")
        return self


class Schedules(Section):
    ce: Schedule | None = None
    kl: Schedule | None = None
    hidden: Schedule | None = None
    temperature: TemperatureSchedule | None = None
    stones: Schedule | None = None
    """A factor on all weights of `stones`, from 1."""
    distances: dict[str, Schedule] | None = None
    """By name, the weight of a distance within matching.distance, in each pair from its own: {procrustes: {shape: linear, final: 0.0}}."""
    divergences: dict[str, Schedule] | None = None
    """By name, the weight of a divergence within the sum that loss.divergence is."""

    def change(self, part: str) -> Change | None:
        """How the weight of ce, kl or hidden moves, or the factor on stones, if it does."""
        found: Schedule | None = getattr(self, part)
        return None if found is None else found.change


def within(
    what: str, part: str, schedules: dict[str, Schedule] | None, names: tuple[str, ...], known: Mapping[str, Any]
) -> None:
    """Raise ValueError where the weight of a distance or divergence moves that is none of several."""
    where = f"loss.schedules.{what}s"
    for name in schedules or {}:
        one_of(where, name, known)
        if len(names) == 1:
            raise ValueError(
                f"{where}.{name}: there is one {what}, {names[0]}, which has no weight beside another; write loss.schedules.{part}"
            )
        if name not in names:
            raise ValueError(f"{where}.{name}: it is not among {', '.join(names)}; name one of these, or leave it out")


class Loss(Section):
    ce: float = Field(default=1.0, ge=0)
    kl: float = Field(default=1.0, ge=0)
    hidden: float = Field(default=3.0, ge=0)
    divergence: str | dict[str, float] = Field(
        default="forward_kl", examples=["jsd", {"forward_kl": 0.5, "reverse_kl": 0.5}]
    )
    """One of llmkd.losses.divergences.DIVERGENCES, or several with their weights: {forward_kl: 0.5, reverse_kl: 0.5}."""
    beta: float | None = Field(default=None, ge=0, le=1)
    """jsd: the teacher's share of the mixture; default 0.5, which is symmetric."""
    skew: float | None = Field(default=None, ge=0, lt=1)
    """skew_kl and skew_reverse_kl: how much of its own first side the mixture holds; default 0.1."""
    akl_mu: float | None = Field(default=None, ge=0, le=1)
    """akl: how much of the teacher's probability is its head; default 0.5."""
    top_k: int | None = Field(default=None, gt=0)
    """top_k: how many of the teacher's likeliest tokens are compared one by one; default 64."""
    temperature: float = Field(default=1.0, gt=0)
    kl_positions: Positions = "trained"
    """Where the divergence is taken: where the next token is trained, or at every token that is not padding (the paper's code)."""

    schedules: Schedules | None = None
    """How the weights and the temperature move while the student learns; left out, they stand."""
    report_norms_every: int = Field(default=0, ge=0)
    """Steps between reports of the norm of each part's gradient (llmkd.student.gradient_norms), each stone's parts among them; 0 reports
    none."""

    @model_validator(mode="after")
    def _known(self) -> Loss:
        weighted("loss.divergence", self.divergences, DIVERGENCES)
        with_parameters(self.divergence, self.parameters)
        for part in ("ce", "kl", "hidden"):
            if self.schedules is not None and getattr(self.schedules, part) is not None and getattr(self, part) == 0:
                raise ValueError(
                    f"loss.schedules.{part}: it starts at loss.{part}, which is 0, and a part that begins without weight is left out of "
                    f"the run; write loss.{part}: 1e-6, say, or leave the schedule out"
                )
        if self.schedules is not None:
            within("divergence", "kl", self.schedules.divergences, tuple(self.divergences), DIVERGENCES)
        dynamic = None if self.schedules is None else self.schedules.temperature
        low, high = (None, None) if dynamic is None else (dynamic.minimum, dynamic.maximum)
        if (low or self.temperature / 2) > (high or self.temperature):
            raise ValueError(
                f"loss.schedules.temperature.minimum: {low or self.temperature / 2} is above the maximum, {high or self.temperature}; "
                "write both, the smaller as minimum"
            )
        return self

    @property
    def divergences(self) -> dict[str, float]:
        """Each divergence's weight in the divergence part."""
        return {self.divergence: 1.0} if isinstance(self.divergence, str) else self.divergence

    @property
    def parameters(self) -> dict[str, float | None]:
        """What the divergence may read besides the temperature, by its own names."""
        return {"beta": self.beta, "skew": self.skew, "akl_mu": self.akl_mu, "top_k": self.top_k}


class Stones(Section):
    """Block-wise logit distillation: the student's lower blocks under the teacher's upper ones, beside the student's own loss."""

    pairs: Literal["from_map"] | tuple[tuple[int, int], ...] = Field(
        "from_map", examples=["from_map", [[0, 3], [1, 7]]]
    )
    """One stone per (student block, teacher block): the teacher goes on from after its block. `from_map`: the layer map's pairs."""
    ce: float = Field(default=1.0, ge=0)
    """Weight of the stones' cross-entropy; of n stones, by student block, the i-th counts 1/2^(n-i)."""
    kl: float = Field(default=1.0, ge=0)
    """Weight of the stones' divergence from the teacher, at loss.divergence, the step's temperature and loss.kl_positions."""
    cross: float = Field(default=0.0, ge=0)
    """Weight of the divergence of each stone and of the student from the stones' mean logits, which carry no gradient."""
    sample: Literal["all", "one"] = "all"
    """`one`: a stone drawn per step, in proportion to its share, with the weight of all: unbiased, at a fraction of the cost."""
    connector_batches: int = Field(default=4, gt=0)
    """Batches of train.batch_size rows on which the connectors are fitted before the first step."""
    checkpoint: bool = True
    """Keep the teacher blocks' inputs alone, and run each again for its gradient. A zero3 teacher needs it."""

    @model_validator(mode="after")
    def _consistent(self) -> Stones:
        if not (self.ce or self.kl or self.cross):
            raise ValueError("stones: ce, kl and cross are all 0; give one of them a weight, or leave out stones")
        if self.sample == "one" and self.cross:
            raise ValueError("stones.sample: the cross term needs every stone's logits; write all, or cross: 0")
        if isinstance(self.pairs, tuple):
            students = [student for student, _ in self.pairs]
            if not students or len(set(students)) != len(students):
                raise ValueError(
                    f"stones.pairs: {[list(pair) for pair in self.pairs]} must name at least one pair, and each student block once; "
                    "write e.g. [[0, 3], [1, 7]]"
                )
        return self
