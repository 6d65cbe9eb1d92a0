"""ADMM on the column-normalised Gram matrix, then least squares on its support (Meng et al. 2024, "ALPS").

With E = diag(G + δI)^½, G' = E⁻¹(G + δI)E⁻¹ and weights Ŵ E → Ŵ, the problem min ‖(W − Ŵ)X‖² over W with so many zeros
is split in W = D, D sparse, with the scaled dual V (theirs divided by ρ):

    W ← Ŵ + (D − V − Ŵ)(G'/ρ + I)⁻¹        T = W + V        D ← the largest of T        V ← T − D

D and V never overlap, so T and the mask hold both. Each ρ costs one Cholesky, each iteration a pair of triangular
solves; the eigenvectors that were published cost as much as some forty of those factorisations on a CPU.
"""

import torch
from torch import Tensor

from alphaprune.calibrate import InputStat
from alphaprune.gram import Gram, factorize
from alphaprune.mask import keep_mask
from alphaprune.pruners import Cut, Pruner
from alphaprune.refit import refit

# As in the published code, but for its lower ρ where the support does not change at first.
RHO = 0.1
ITERATIONS = 300
REFITS = 10  # iterations on the support that was found
SAMPLE = 256  # rows, at least, that say which support is better
CHECK = 3  # iterations between two looks at the support
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # ρ grows by this if more than so much of the support has changed
SETTLED = (30, 0.0003)  # from this iteration on, a smaller change than this ends the search


def prune(weight: Tensor, inputs: InputStat, cut: Cut) -> tuple[Tensor, Tensor]:
    """The new weight [N, K] float32 and the mask; see `Pruner`.

    On inputs without correlations the dual leads away from the support that ADMM starts from, which is best there: it
    is taken if its weights, as they were, leave a smaller error than ADMM's after the refit.
    Raises ValueError for a Gram matrix with NaN or infinity, or a pattern that does not fit.
    """
    gram, dense = inputs.gram, weight.detach().float()
    start, mask, first = search(dense, gram, cut)
    found = refit(start, dense, mask, gram, REFITS)
    sample = slice(None, None, max(1, len(dense) // SAMPLE))  # of rows: a product with all would cost an iteration
    if gram.error(dense[sample].masked_fill(first[sample], 0)) <= gram.error(found[sample] - dense[sample]):
        return refit(dense, dense, first, gram, REFITS), first
    return found, mask


def search(dense: Tensor, gram: Gram, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """T [N, K] and the mask where ADMM ends, and the mask where it started; T is not yet zero where not kept.

    Elementwise steps are float32 and in place: at K = 1000 they would take as long as the products otherwise.
    """
    gram.check()
    diagonal = gram.living_diagonal() + gram.damping()  # [K]
    scale = diagonal.sqrt()
    matrix = gram.matrix / scale / scale[:, None]  # [K, K] G' but for its diagonal
    target = dense * scale  # [N, K] Ŵ
    mask = looked = first = _largest(target, cut)
    total = target * mask  # T
    kept = max(int(mask.sum()), 1)
    rho, wanted, fading, factor = RHO, RHO, 1.0, None
    for iteration in range(1, ITERATIONS + 1):
        if factor is None:
            factor = factorize(matrix, torch.ones_like(diagonal), wanted)
            rho, fading = factor.damping, rho / factor.damping
        keep = mask.view(torch.uint8).float()  # much faster than from bool
        aim = total * keep  # D
        total.sub_(aim).mul_(fading)  # V, which is divided by another ρ now
        aim.sub_(total).sub_(target)
        total.add_(factor.solve_(aim), alpha=rho).add_(target)
        mask, fading = _largest(total, cut), 1.0
        if iteration % CHECK == 0:
            change = int((mask ^ looked).sum()) / kept
            looked = mask
            if change == 0 or (iteration > SETTLED[0] and change < SETTLED[1]):
                break
            growth = next(growth for least, growth in GROWTH if change > least)
            wanted, factor = rho * growth, None
    return total.div_(scale), mask, first


def _largest(weight: Tensor, cut: Cut) -> Tensor:
    return keep_mask(weight.abs(), cut.zeros, cut.pattern, cut.selection)


PRUNER = Pruner("alps", "gram", "matrix", prune)
