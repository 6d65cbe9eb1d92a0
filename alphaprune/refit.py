"""A fixed mask → the kept weights that bring the layer's outputs closest to the dense ones.

Every row is a least squares problem of its own, min over w on the row's support of (w − w₀) G (w − w₀)ᵀ. All of them
are solved together by conjugate gradients with the diagonal of G as preconditioner: one product with G per iteration.
"""

import torch
from torch import Tensor

from alphaprune.gram import Gram, full_float32

ITERATIONS = 20
TOLERANCE = 1e-3  # a row is done when its preconditioned residual has fallen to this share
DAMPING = 1e-4  # of each diagonal entry: where G is singular, of all solutions the one near the dense weights
ROWS = 1024  # at once; what they need beside the weights stays small


def refit(weight: Tensor, dense: Tensor, mask: Tensor, gram: Gram, iterations: int = ITERATIONS) -> Tensor:
    """[N, K] float32, zero where not kept: argmin ‖(W − W₀)X‖² over W on the support of `mask`, from `weight`.

    weight, dense W₀: [N, K].   mask: [N, K] bool, True = keep.   gram: of the layer's inputs.
    No row is left with a larger error than it came with. Kept weights of dead inputs get their dense values.
    Raises ValueError if G holds NaN or infinity.
    """
    gram.check()
    diagonal, dead = gram.living_diagonal(), gram.dead()
    result = dense.detach().to(torch.float32, copy=True)
    with full_float32():
        for first in range(0, len(result), ROWS):
            rows = slice(first, first + ROWS)
            wanted, keep = result[rows], mask[rows].view(torch.uint8).float()  # much faster than from bool
            start = torch.where(dead, wanted, weight[rows].detach().float()).mul_(keep).sub_(wanted)
            wanted.add_(_solve(start, keep, gram.matrix, diagonal, iterations)).mul_(keep)
    return result


def _solve(start: Tensor, keep: Tensor, matrix: Tensor, diagonal: Tensor, iterations: int) -> Tensor:
    """The best W − W₀ [n, K] from `start` that changes only where `keep`: conjugate gradients, row by row.

    keep: [n, K] float32, 1 where kept. Everything is done in place: new tensors of this size cost more than sums.
    """
    damped, inverse = DAMPING * diagonal, 1 / diagonal  # [K]
    reached, scratch = start @ matrix, torch.empty_like(start)
    before = _dots(start, reached, scratch)  # [n, 1] the errors
    residual = torch.addcmul(reached, start, damped).neg_().mul_(keep)
    found, search = start.clone(), residual * inverse
    size = _dots(residual, search, scratch)
    enough = TOLERANCE**2 * size
    for _ in range(iterations):
        active = size > enough
        if not bool(active.any()):
            break
        torch.mm(search, matrix, out=reached).addcmul_(search, damped)
        curvature = _dots(search, reached, scratch)
        length = torch.where(active & (curvature > 0), size / curvature, 0)
        found.addcmul_(length, search)
        residual.addcmul_(length, reached.mul_(keep), value=-1)
        scaled = torch.mul(residual, inverse, out=reached)
        last, size = size, _dots(residual, scaled, scratch)
        search.mul_(torch.where(active, size / last, 0)).add_(scaled)
    better = _dots(found, torch.mm(found, matrix, out=reached), scratch) < before
    return torch.where(better, found, start)


def _dots(left: Tensor, right: Tensor, scratch: Tensor) -> Tensor:
    """[n, 1] the inner products of the rows of two matrices [n, K]; `scratch` [n, K] is overwritten."""
    return torch.mul(left, right, out=scratch).sum(1, keepdim=True)
