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
    parts = zip(weight.split(ROWS), dense.split(ROWS), mask.split(ROWS), strict=True)
    found = []
    with full_float32():
        for part, wanted, keep in parts:
            wanted = wanted.detach().float()
            start = torch.where(dead, wanted, part.detach().float()).masked_fill_(~keep, 0)
            found.append(_solve(start - wanted, keep, gram.matrix, diagonal, iterations).add_(wanted).mul_(keep))
    return torch.cat(found)


def _solve(start: Tensor, keep: Tensor, matrix: Tensor, diagonal: Tensor, iterations: int) -> Tensor:
    """The best W − W₀ [n, K] from `start` that changes only where `keep`: conjugate gradients, row by row."""
    damped, inverse = DAMPING * diagonal, 1 / diagonal  # [K]
    free = keep.to(start.dtype)  # masking by products is several times faster than by bool
    reached = torch.mm(start, matrix)
    scratch = torch.empty_like(start)

    def dots(left: Tensor, right: Tensor) -> Tensor:
        return torch.mul(left, right, out=scratch).sum(1, keepdim=True)  # [n, 1]

    before = dots(start, reached)
    residual = reached.addcmul_(start, damped).neg_().mul_(free)
    found, search = start.clone(), residual * inverse
    size = dots(residual, search)
    enough = TOLERANCE**2 * size
    reached = torch.empty_like(start)
    for _ in range(iterations):
        active = size > enough
        if not bool(active.any()):
            break
        torch.mm(search, matrix, out=reached).addcmul_(search, damped)
        curvature = dots(search, reached)
        length = torch.where(active & (curvature > 0), size / curvature, 0)
        found.addcmul_(length, search)
        residual.addcmul_(length, reached.mul_(free), value=-1)
        scaled = torch.mul(residual, inverse, out=reached)
        last, size = size, dots(residual, scaled)
        search.mul_(torch.where(active, size / last, 0)).add_(scaled)
    better = dots(found, torch.mm(found, matrix, out=reached)) < before
    return torch.where(better, found, start)
