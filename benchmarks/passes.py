"""What each contestant does between a micro-batch and its loss; all of them train the same student under the same engine.

A pass runs the teacher (`ask`), then computes the loss from its outputs (`forward`). The loss is this rank's share, scaled so that its
mean over the ranks, which is what DeepSpeed takes of gradients, is the loss of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.cheapest import cheapest_losses
from benchmarks.shapes import Work, labels
from llmkd.layer_map import Pairs
from llmkd.losses.distance_sum import Term
from llmkd.losses.distances import DISTANCES
from llmkd.losses.divergences import DIVERGENCES
from llmkd.losses.objective import Weights, divisors, scales
from llmkd.models.parts import backbone, head
from llmkd.student.distiller import Distiller
from llmkd.student.passes import StepSettings
from llmkd.teachers.resident import ResidentTeacher

HIDDEN_WEIGHT = 3.0
"""The layer-selection paper's weight of its hidden loss beside 1 for cross-entropy and 1 for KL."""
GPU = torch.cuda.is_available()
CHUNK = 4096 if GPU else 1024
"""Tokens whose logits exist at one time, the recipe's default."""
HEAD: dict[str, Any] = {"chunk": CHUNK, "kernel": "compiled" if GPU else "none"}
"""How llmkd computes the head's losses: on a GPU as one kernel, the recipe's default."""


def weights(pairs: Pairs, *, ce: float) -> Weights:
    """llmkd's default weights, with the hidden loss where there are pairs."""
    return Weights(
        ce=ce,
        kl=1.0,
        hidden=HIDDEN_WEIGHT if pairs else 0.0,
        kl_positions="trained",
        hidden_positions="attended",
    )


class Pass(nn.Module):
    """One contestant's way from a micro-batch to its loss."""

    def ask(self, work: Work) -> Any:
        """The teacher's outputs for the micro-batch."""
        raise NotImplementedError

    def start(self) -> None:
        """Called before a turn, whose end takes off every hook that was put on the teacher here."""


class Llmkd(Pass):
    """llmkd itself: its resident teacher, its student with hooks and chunked head."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        pairs: Pairs,
        *,
        ranks: int,
        divergence: str = "forward_kl",
        ce: float = 1.0,
        normed_last: bool = False,
    ) -> None:
        super().__init__()
        self.distiller = Distiller(student, [block for block, _ in pairs], normed_last=normed_last, **HEAD)
        # Many passes share the student. Registered under each of them it would get ZeRO-3's hooks once for each.
        self.distiller.__dict__["model"] = self.distiller._modules.pop("model")
        self._teacher_model: tuple[PreTrainedModel] = (teacher,)  # in a tuple, so that it is no part of what is trained
        self._weights, self._pairs, self._ranks, self._normed_last = weights(pairs, ce=ce), pairs, ranks, normed_last
        self._divergence = DIVERGENCES[divergence]
        self._resident: ResidentTeacher | None = None

    def start(self) -> None:
        uses = [block for _, block in sorted(self._pairs)]
        self._resident = ResidentTeacher(self._teacher_model[0], uses, normed_last=self._normed_last, ds_config=None)

    def ask(self, work: Work) -> Any:
        assert self._resident is not None, "`start` comes first"
        return self._resident.signals(work.batch)

    def forward(self, work: Work, signal: Any) -> Tensor:
        by = divisors(self._weights, trained=work.trained, attended=work.attended, pairs=len(self._pairs))
        settings = StepSettings(
            weights=self._weights,
            divisors=by,
            scales=scales(self._weights, by, self._ranks),
            pairs=self._pairs,
            terms=((Term(DISTANCES["normalized_mse"]),),) * len(self._pairs),
            divergence=self._divergence,
            temperature=1.0,
        )
        return self.distiller(work.batch, signal, settings).loss


class Unavoidable(Pass):
    """The compute no method can do without: both models to their final states, then the cheapest correct losses of the trained
    positions. No block is matched."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, *, ranks: int) -> None:
        super().__init__()
        self._models = (student, teacher)
        self._ranks = ranks
        self.weight = head(student).weight  # its own as well, so that ZeRO-3 gathers it here

    @torch.no_grad()
    def ask(self, work: Work) -> Tensor:
        return backbone(self._models[1])(**_inputs(work)).last_hidden_state

    def forward(self, work: Work, states: Tensor) -> Tensor:
        final = backbone(self._models[0])(**_inputs(work)).last_hidden_state
        at = work.batch.trained_at
        return cheapest_losses(
            final.flatten(0, 1)[at],
            self.weight,
            states.flatten(0, 1)[at],
            head(self._models[1]).weight,
            work.batch.targets.flatten()[at],
            scale=self._ranks / work.trained,
            chunk=CHUNK,
        )


class Plain(Pass):
    """The plain way: logits of every position and the states of every block from both models, losses as they read, autograd."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, pairs: Pairs, *, ranks: int) -> None:
        super().__init__()
        self._models = (student, teacher)
        self._pairs, self._ranks = pairs, ranks

    @torch.no_grad()
    def ask(self, work: Work) -> Any:
        return self._models[1](**_inputs(work), output_hidden_states=True)

    def forward(self, work: Work, theirs: Any) -> Tensor:
        ours = self._models[0](**_inputs(work), output_hidden_states=True)
        targets = work.batch.targets
        ce = F.cross_entropy(ours.logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        log_q, log_p = ours.logits.float().log_softmax(-1), theirs.logits.float().log_softmax(-1)
        per_position = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        loss = (ce + per_position[targets != -100].sum()) / work.trained
        if self._pairs:
            hidden = torch.zeros((), device=targets.device)
            for student_block, teacher_block in self._pairs:
                s, t = ours.hidden_states[student_block + 1], theirs.hidden_states[teacher_block + 1]
                distance = (F.normalize(s.float(), dim=-1) - F.normalize(t.float(), dim=-1)).square().sum(-1)
                hidden = hidden + distance[work.batch.attended].sum()
            loss = loss + HIDDEN_WEIGHT * hidden / (work.attended * len(self._pairs))
        return loss * self._ranks


class Paper(Pass):
    """The layer-selection paper's Qwen3 loss as its code computes it: KL over every attended position, and means over all positions,
    padding too, times the share that is not padding (arXiv 2502.04499, llm/sft_trainer.py)."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, pairs: Pairs) -> None:
        super().__init__()
        self._models = (student, teacher)
        self._pairs = pairs

    @torch.no_grad()
    def ask(self, work: Work) -> Any:
        return self._models[1](**_inputs(work), output_hidden_states=True)

    def forward(self, work: Work, theirs: Any) -> Tensor:
        ours = self._models[0](**_inputs(work), labels=labels(work.batch), output_hidden_states=True)
        valid = work.batch.attended.sum() / work.batch.attended.numel()
        kl = F.kl_div(ours.logits.log_softmax(-1), theirs.logits.softmax(-1), reduction="none").sum(-1).mean() * valid
        s = torch.stack([ours.hidden_states[block + 1] for block, _ in self._pairs])
        t = torch.stack([theirs.hidden_states[block + 1] for _, block in self._pairs])
        s, t = s / s.norm(dim=-1, keepdim=True), t / t.norm(dim=-1, keepdim=True)
        hidden = (t - s).square().sum(-1).mean() * valid
        return ours.loss + kl + HIDDEN_WEIGHT * hidden


class Passes(nn.Module):
    """All passes over one student, as one module for one engine."""

    def __init__(self, student: PreTrainedModel, passes: dict[str, Pass]) -> None:
        super().__init__()
        self.student = student
        self.passes = nn.ModuleDict(passes)

    def forward(self, name: str, work: Work, outputs: Any) -> Tensor:
        """The loss of the pass of that name."""
        return self.passes[name](work, outputs)


def _inputs(work: Work) -> dict[str, Any]:
    # Rows end in their padding, which no token before it sees: without a mask attention is at its fastest, here as in llmkd.
    return dict(input_ids=work.batch.input_ids, use_cache=False)
