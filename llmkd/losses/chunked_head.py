"""Cross-entropy and divergence from final states and head weights, a chunk of tokens at a time; [B, T, V] never exists.

The gradients are computed in the forward pass, so no logit outlives its chunk. A chunk's logits are made by one product per head, in
the states' dtype; all that follows is done on a few rows at a time, in buffers that are used again and again, and the gradient takes
the student's logits' place. Pure tensors: what is sharded is gathered by the caller (llmkd.student.distiller).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkd.losses.closed_forms import buckets, closed_form, infinite_where_blocked
from llmkd.losses.compiled_rows import losses_compiled
from llmkd.losses.head_inputs import IGNORED, TeacherHead, Terms, TopK
from llmkd.losses.head_kernels import HeadKernel, takes_in

ELEMENTS_AT_ONCE = {"cpu": 2**20, "cuda": 2**23}
"""Logits worked on in one go: few enough for the buffers to stay in a CPU's cache, enough for a GPU not to wait for its next kernel."""
BUFFERS = {"ce": 2, "kl": 5}
"""How many tensors of so many logits, in fp32, cross-entropy takes alone and with a divergence."""
InOneKernel = Callable[[Tensor, Any, Tensor, Tensor, Terms], tuple[Tensor, Tensor]]


def head_losses(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: TeacherHead | TopK | None,
    targets: Tensor,
    compared: Tensor,
    terms: Terms,
    *,
    chunk: int,
    kernel: HeadKernel = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy sum, divergence sum) of N positions; the loss = ce_scale * CE + kl_scale * KL carries the gradient.

    states [N, H], weight [V, H], targets [N] (-100: no cross-entropy there), compared [N] bool (where the divergence counts).
    The divergence is over the columns both heads have; a wider head's further columns are left out on that side, as if masked
    with -inf. Products run in the states' dtype, everything after them in fp32 (float64 stays). The divergences of
    `llmkd.losses.divergences` take their gradients from `llmkd.losses.closed_forms`, any other from autograd. Where the teacher is a
    `TopK`, the divergence is forward KL with all other tokens in one bucket, whatever `terms` names (`top_k_masses`).
    `kernel`: run what follows the products as that one, where it takes in the divergence and the dtype (`llmkd.losses.head_kernels`).
    """
    teacher = None if terms.kl_scale == 0 else teacher
    in_one = _in_one_kernel(kernel, teacher, terms, states.dtype)
    return _HeadLosses.apply(states, weight, bias, teacher, targets, compared, terms, chunk, in_one)  # type: ignore[no-any-return, no-untyped-call]


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: TeacherHead | TopK | None,
        targets: Tensor,
        compared: Tensor,
        terms: Terms,
        chunk: int,
        in_one: InOneKernel | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        work = _Workspace(states, weight, teacher, chunk, buffered=in_one is None)
        ce_sum, kl_sum = (torch.zeros((), dtype=work.wide, device=states.device) for _ in range(2))
        grad_states = torch.empty_like(states) if needs_states else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros(weight.shape[0], dtype=work.wide, device=states.device) if needs_bias else None
        for part in work.chunks:
            counts = compared[part] | (targets[part] != IGNORED)
            ours = _kept(states[part], counts)
            student_logits = _product(ours, weight, bias, work.student)
            teacher_logits: Tensor | TopK | None = None
            if isinstance(teacher, TopK):
                teacher_logits = _kept_top_k(teacher.at(part), compared[part])
            elif teacher is not None:
                theirs, shared = _kept(teacher.states[part], compared[part]), work.shared
                bias_t = None if teacher.bias is None else teacher.bias[:shared]
                teacher_logits = _product(theirs, teacher.weight[:shared], bias_t, work.teacher)
            if in_one is not None:
                ce, kl = in_one(student_logits, teacher_logits, targets[part], compared[part], terms)
                if grad_bias is not None:
                    grad_bias += student_logits.sum(0, dtype=work.wide)
            else:
                ce, kl = _losses(student_logits, teacher_logits, targets[part], compared[part], terms, work, grad_bias)
            ce_sum, kl_sum = ce_sum + ce, kl_sum + kl
            gradient = student_logits  # overwritten by either
            if grad_states is not None:
                torch.mm(gradient, weight, out=grad_states[part])
            if needs_weight:
                grad_weight = _plus_product(grad_weight, gradient.T, ours, work.total)
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)  # no position here, but the other ranks wait for this gradient
        # Not save_for_backward: activation checkpointing would drop these and ask for the pass again.
        ctx.gradients = (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        return terms.ce_scale * ce_sum + terms.kl_scale * kl_sum, ce_sum, kl_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(grads[0]) for g in gradients), *(None,) * 6)


class _Workspace:
    """The tensors of width V that all chunks share: both sides' logits [n, V], and the buffers of a few rows."""

    def __init__(
        self, states: Tensor, weight: Tensor, teacher: TeacherHead | TopK | None, chunk: int, *, buffered: bool
    ) -> None:
        count, vocabulary = states.shape[0], weight.shape[0]
        # Chunks of one size: a last one of a few rows would read both heads for next to nothing.
        size = -(-count // max(1, -(-count // chunk)))
        self.chunks = [slice(start, min(start + size, count)) for start in range(0, count, max(1, size))]
        self.wide = torch.promote_types(states.dtype, torch.float32)
        self.total = states.dtype if len(self.chunks) == 1 else self.wide  # of the weight's gradient
        self.shared = min(vocabulary, teacher.weight.shape[0]) if isinstance(teacher, TeacherHead) else 0
        self.student = states.new_empty(size, vocabulary)
        self.teacher = (teacher.states if isinstance(teacher, TeacherHead) else states).new_empty(size, self.shared)
        self.rows = rows_at_once(size, vocabulary, states.device.type)
        buffers = BUFFERS["ce" if teacher is None else "kl"] if buffered else 0
        self._buffers = [states.new_empty(self.rows, vocabulary, dtype=self.wide) for _ in range(buffers)]

    def buffer(self, number: int, rows: int, columns: int) -> Tensor:
        """A contiguous [rows, columns] of one of the buffers; what it holds is arbitrary."""
        return self._buffers[number].view(-1)[: rows * columns].view(rows, columns)


def rows_at_once(chunk: int, vocabulary: int, device: str) -> int:
    """How many of a chunk's rows are worked on in one go."""
    return max(1, min(chunk, ELEMENTS_AT_ONCE[device] // vocabulary))


def _in_one_kernel(
    kernel: HeadKernel, teacher: TeacherHead | TopK | None, terms: Terms, dtype: torch.dtype
) -> InOneKernel | None:
    """What does `_losses` of a whole chunk as that kernel; None where it is done an operation at a time."""
    divergence = None if teacher is None else terms.divergence
    if not takes_in(kernel, divergence, stored_top_k=isinstance(teacher, TopK), dtype=dtype):
        return None
    if kernel == "compiled":
        return losses_compiled
    from llmkd.losses.triton_rows import losses_by_triton  # Triton is not there where nothing asks for it

    return losses_by_triton


def _losses(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    targets: Tensor,
    compared: Tensor,
    terms: Terms,
    work: _Workspace,
    grad_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(CE sum, KL sum) of a chunk; the gradient of the scaled loss takes the place of `student_logits` [n, V]."""
    sums = []
    for start in range(0, student_logits.shape[0], work.rows):
        rows = slice(start, start + work.rows)
        theirs = teacher_logits.at(rows) if isinstance(teacher_logits, TopK) else teacher_logits
        theirs = theirs[rows] if isinstance(theirs, Tensor) else theirs
        ce, kl, gradient = _few_rows(student_logits[rows], theirs, targets[rows], compared[rows], terms, work)
        sums.append(torch.stack([ce, kl]))
        student_logits[rows] = gradient
        if grad_bias is not None:
            grad_bias += gradient.sum(0)
    ce, kl = torch.stack(sums).sum(0).unbind()
    return ce, kl


def _few_rows(
    ours: Tensor, theirs: Tensor | TopK | None, targets: Tensor, compared: Tensor, terms: Terms, work: _Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """(CE sum, KL sum, gradient of the scaled loss with respect to these logits) of a few rows [r, V]."""
    logits = work.buffer(0, *ours.shape).copy_(ours)
    softmax, log_total = _softmax(logits, out=work.buffer(1, *ours.shape))
    scored, at = targets != IGNORED, targets.clamp(min=0)[:, None]
    ce = torch.where(scored, log_total - logits.gather(-1, at).squeeze(-1), 0.0).sum()
    kl = torch.zeros_like(ce)
    ce_factor = scored.to(logits.dtype).mul_(terms.ce_scale)[:, None]
    if theirs is None:
        softmax.mul_(ce_factor)
    else:
        value, gradient = _compared(logits, softmax, log_total, theirs, terms, work)
        kl = torch.where(compared, value, 0.0).sum()
        kl_factor = compared.to(logits.dtype).mul_(terms.kl_scale)[:, None]
        softmax.mul_(ce_factor)[:, : gradient.shape[1]].addcmul_(gradient, kl_factor)
    return ce, kl, softmax.scatter_add_(-1, at, -ce_factor)


def _compared(
    logits: Tensor, softmax: Tensor, log_total: Tensor, theirs: Tensor | TopK, terms: Terms, work: _Workspace
) -> tuple[Tensor, Tensor]:
    """(divergence [r], its gradient [r, shared columns]); the student's logits are lost, their softmax at temperature 1 is kept."""
    if isinstance(theirs, TopK):
        return _compared_top_k(logits[:, : theirs.columns], theirs, terms.temperature, work)
    logits, temperature = logits[:, : theirs.shape[1]], terms.temperature
    form = closed_form(terms.divergence)
    if form is None:
        return _by_autograd(logits, theirs, terms)
    log_p = work.buffer(2, *theirs.shape).copy_(theirs)
    if temperature != 1:
        logits.div_(temperature)
        log_p.div_(temperature)
    if temperature == 1 and logits.shape == softmax.shape:  # cross-entropy and divergence read one softmax
        q, log_total_q = softmax, log_total
    else:
        q, log_total_q = _softmax(logits, out=work.buffer(4, *theirs.shape))
    p, log_total_p = _softmax(log_p, out=work.buffer(3, *theirs.shape))
    value, gradient = form(q, _less(logits, log_total_q), p, _less(log_p, log_total_p))
    # The divergence is times temperature²; of that, the logits' own division takes one.
    return infinite_where_blocked(value) * temperature**2, gradient if temperature == 1 else gradient.mul_(temperature)


def _compared_top_k(logits: Tensor, theirs: TopK, temperature: float, work: _Workspace) -> tuple[Tensor, Tensor]:
    """As `_compared`, for a teacher's top k."""
    q, log_total = _softmax(logits.div_(temperature), out=work.buffer(4, *logits.shape))
    log_q = _less(work.buffer(2, *logits.shape).copy_(logits), log_total)
    p, log_p, p_rest = theirs.masses(logits.shape[1], temperature, q.dtype)
    value, gradient = buckets(q, log_q, theirs.ids.long(), p, log_p, p_rest)
    return infinite_where_blocked(value) * temperature**2, gradient.mul_(temperature)


def _by_autograd(logits: Tensor, theirs: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """As `_compared`, for a divergence without a closed form."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = terms.divergence(leaf, theirs.to(logits.dtype), terms.temperature)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def _softmax(logits: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax [r, V], logsumexp [r]); the latter is read off the softmax's largest entry, which is exp(0) over the sum."""
    torch.softmax(logits, -1, out=out)
    out.div_(out.sum(-1, keepdim=True))  # its own sum over 150,000 fp32 numbers is off by 5e-6; this one by 1e-7
    return out, logits.amax(-1) - out.amax(-1).log()


def _less(logits: Tensor, log_total: Tensor) -> Tensor:
    """Log-probabilities in place; -inf becomes the least finite number, so that 0 times it is 0."""
    return logits.sub_(log_total[:, None]).clamp_(min=torch.finfo(logits.dtype).min)


def _product(states: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """states @ weight.T + bias in the first rows of `out`."""
    out = out[: states.shape[0]]
    return torch.mm(states, weight.T, out=out) if bias is None else torch.addmm(bias, states, weight.T, out=out)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b in that dtype, in place where there is a total."""
    if dtype != a.dtype and a.is_cuda:  # one product into the wide sum, without a second pass over it
        total = torch.zeros(a.shape[0], b.shape[1], dtype=dtype, device=a.device) if total is None else total
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if dtype == a.dtype else total.add_(a @ b)


def _kept_top_k(top_k: TopK, where: Tensor) -> TopK:
    """As `_kept`: an unused position gets K times the first token, each with probability 1."""
    unused = ~where[:, None]
    ids, log_p = top_k.ids.masked_fill(unused, 0), top_k.log_probabilities.masked_fill(unused, 0.0)
    return TopK(ids, log_p, top_k.columns)


def _kept(states: Tensor, where: Tensor) -> Tensor:
    """The states where they count, zeros elsewhere: unused positions may hold anything, NaN too, and stay out of every product."""
    return states.masked_fill(~where[:, None], 0.0)
