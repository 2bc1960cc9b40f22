"""How far the shape of a set of student states is from the shape of the teacher's: one number for all N tokens together.

`SET_DISTANCES["procrustes"](student, teacher)` takes `[N, H_s]` and `[N, H_t]` of any float dtype and gives `[]`, in float32
(float64 when either is float64), differentiable by autograd. cka, procrustes and gram centre each side over its tokens and give it
unit Frobenius norm, so that neither a shift nor a scale of either side changes them, nor a rotation of its columns; H_s and H_t may
differ. Forms: the reviews of Bhattarai et al., arXiv 2509.25253, name D_P, D_FG and D_CKA; whether that paper squares them is not
known. Equal states give exactly 0. A side without spread (all its tokens alike) counts as zero and gets no gradient. NaN is passed
on: positions that may hold it are cut out before.

A set's distance is no mean over its tokens: it depends on which tokens stand together, so two micro-batches do not add up to one.

Cost for H_s = H_t = d, value and gradient together: cka and gram 12 N d² FLOPs (6 products width by width), for N < d 8 N² d (4
products tokens by tokens); procrustes 6 N d² and one SVD, some 20 min(N, d)³ FLOPs that a GPU runs slowly and the host waits for
(for N < d 20 N² d, most of it in two QR of d x N, in place of 6 N d²). Memory while it is worked out: 11 to 16 tensors of N x d in
fp32. `matching.tokens` lowers N: 512 tokens of width 4096 need an SVD of 512 x 512 where 8192 tokens need one of 4096 x 4096.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmkd.errors import InputError
from llmkd.losses.distances import same_shape

SetDistance = Callable[[Tensor, Tensor], Tensor]
SMALLEST_SPREAD = 1e-6
"""A side whose norm falls to this part once centred (or, with this as the norm of a token, is this small) has no spread: what is left
is the mean's rounding. It bounds the gradient too."""


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """`1 - CKA`, CKA = `‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)`, `[N, H_s]`, `[N, H_t]` -> `[]` from 0 to 1: one minus linear CKA.

    Kornblith et al., arXiv 1905.00414. The largest principal components decide it; procrustes also sees the others. Against a side
    without spread it is 1/2, as if both sides' normed Grams were compared.
    """
    x, y = _shape(student), _shape(teacher)
    own, cross, other = _gram_products(x, y)
    sides = own * other
    flat = sides == 0
    norms = sides.masked_fill(flat, 1.0).sqrt()
    spread = ((own != 0).to(norms.dtype) + (other != 0).to(norms.dtype)) / 2
    return spread - (cross / norms).masked_fill(flat, 0.0)


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    """`‖XXᵀ - YYᵀ‖² = ‖XᵀX‖² - 2 ‖XᵀY‖² + ‖YᵀY‖²`, `[N, H_s]`, `[N, H_t]` -> `[]`: D_FG, the feature Grams compared.

    For N below the narrower width the N x N form, which loses no digits; above it the form of widths, whose terms cancel: near 0 its
    error in fp32 is some 1e-7 of `‖XᵀX‖²`.
    """
    x, y = _shape(student), _shape(teacher)
    if x.shape[0] < min(x.shape[1], y.shape[1]):
        return (x @ x.T - y @ y.T).square().sum()
    own, cross, other = _gram_products(x, y)
    return own - 2 * cross + other


def procrustes(student: Tensor, teacher: Tensor) -> Tensor:
    """`min_Q ‖XQ - Y‖²` over rotations and reflections Q, `[N, H_s]`, `[N, H_t]` -> `[]` from 0 to 2: D_P = 2 - 2 ‖XᵀY‖_*.

    Q = UVᵀ from the SVD of XᵀY is taken as a constant: at the best Q the distance does not change with it to first order (the
    envelope theorem), and an SVD's own derivative is infinite where singular values are tied or 0. So the gradient is `2 (X - YQᵀ)`.
    The narrower side is the one rotated, into the wider one's space; no projector, no padding.
    """
    x, y = _shape(student), _shape(teacher)
    narrow, wide = (x, y) if x.shape[1] <= y.shape[1] else (y, x)
    with torch.no_grad():
        factors = _rotation(narrow, wide)
    turned = narrow
    for factor in factors:
        turned = turned @ factor
    if narrow.shape != wide.shape:
        return (turned - wide).square().sum()
    # The identity is a rotation too: where it is the best, as for equal states, no SVD's rounding is left in the distance.
    best, as_it_is = (turned - wide).square().sum(), (narrow - wide).square().sum()
    return torch.where(as_it_is <= best, as_it_is, best)


def standardized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two sides that were standardised whole, `[N, H]`, `[N, H]` -> `[]`.

    One mean and one spread for all N x H numbers of a side (not per token), as the T5 code of arXiv 2502.04499 does with
    `F.layer_norm` over (batch, seq, dim), its epsilon of 1e-5 included; padding, which that code lets into the mean and the
    spread, is left out here. Raises InputError on unequal shapes.
    """
    x, y = (torch.nn.functional.layer_norm(side, side.shape) for side in same_shape(student, teacher))
    return (x - y).square().mean()


SET_DISTANCES: dict[str, SetDistance] = {
    "cka": cka,
    "procrustes": procrustes,
    "gram": gram,
    "standardized_mse": standardized_mse,
}
WIDTH_FREE = ("cka", "procrustes", "gram")
"""Those that compare states of different widths as they are, without a projector."""


def similarity(grams_a: Tensor, grams_b: Tensor) -> Tensor:
    """Linear CKA of every pair of two lists of centred Gram matrices, `[A, N, N]`, `[B, N, N]` -> `[A, B]`; 0 where one has no spread."""
    a, b = (side.flatten(1) / side.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-30) for side in (grams_a, grams_b))
    return a @ b.T


def centred_gram(states: Tensor) -> Tensor:
    """`XXᵀ` of states centred over their tokens and of unit norm, `[N, H]` -> `[N, N]`."""
    x = _shape(states)
    return x @ x.T


def _gram_products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(‖XᵀX‖², ‖XᵀY‖², ‖YᵀY‖²), by the smaller of the two forms. For equal states all three are the same number, to the bit."""
    if x.shape[0] < min(x.shape[1], y.shape[1]):
        a, b = x @ x.T, y @ y.T
        return a.square().sum(), (a * b).sum(), b.square().sum()
    return (x.T @ x).square().sum(), (x.T @ y).square().sum(), (y.T @ y).square().sum()


def _rotation(narrow: Tensor, wide: Tensor) -> list[Tensor]:
    """Q `[h, H]`, h <= H, that brings XQ nearest to Y among all with orthonormal rows, as the factors whose product it is.

    For N < h only the part that N tokens decide, of rank N: X and Y have none beside it.
    """
    narrow, wide = (
        narrow.nan_to_num(),
        wide.nan_to_num(),
    )  # an SVD of NaN raises; the value gets its NaN from the states
    if narrow.shape[0] >= narrow.shape[1]:
        left, _, right = torch.linalg.svd(narrow.T @ wide, full_matrices=False)
        return [left @ right]
    # XᵀY has rank N at most: its SVD is that of an N x N matrix between two orthonormal bases, and no matrix of widths is made
    basis, coefficients = torch.linalg.qr(narrow.T)
    basis_of_wide, coefficients_of_wide = torch.linalg.qr(wide.T)
    left, _, right = torch.linalg.svd(coefficients @ coefficients_of_wide.T)
    return [basis, left @ right, basis_of_wide.T]


def _shape(states: Tensor) -> Tensor:
    """The states centred over their tokens and of unit Frobenius norm, in float32 at least, `[N, H]` -> `[N, H]`."""
    if states.ndim != 2:
        raise InputError(
            f"states are {list(states.shape)}: a set of tokens is [N, H]; cut out and flatten the positions"
        )
    states = states.to(torch.promote_types(states.dtype, torch.float32)).contiguous()
    centred = states - states.mean(0)
    norm = torch.linalg.matrix_norm(centred)
    # `<=` and not its opposite: NaN must stay NaN. The inner fill keeps the unused branch's gradient finite.
    flat = norm <= SMALLEST_SPREAD * torch.linalg.matrix_norm(states).clamp(min=states.shape[0] ** 0.5)
    return (centred / norm.masked_fill(flat, 1.0)).masked_fill(flat, 0.0)
