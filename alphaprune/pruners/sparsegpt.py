"""Optimal brain surgery in column blocks (Frantar & Alistarh 2023, "SparseGPT", algorithm 1), with exact counts.

Published: (G + δI)⁻¹ = UᵀU, then column after column: of the pruned weights E_j = w_j / U_jj, of the columns behind
them w ← w − E_j U_j. Summed up, W − Ŵ = E U. With R = U⁻¹, which one Cholesky gives (gram.py), that is (W − Ŵ) R = E:
what a block of columns inherits from those before it is S = (W − Ŵ)[:, before] R[before, block], one product, and the
weights that the published rule has there are W + S U_bb, with U_bb the inverse of the 128×128 block R_bb.

Everything is transposed, so that a column of the weight is contiguous.
"""

import torch
from torch import Tensor

from alphaprune.calibrate import InputStat
from alphaprune.counts import share_counts
from alphaprune.gram import full_float32
from alphaprune.mask import keep_mask
from alphaprune.pattern import NM
from alphaprune.pruners import Cut, Pruner

BLOCK = 128  # columns whose mask is chosen together, as published
STEP = 32  # columns between two products inside a block
AHEAD = 4  # blocks that share the product with all columns before them


def prune(weight: Tensor, inputs: InputStat, cut: Cut) -> tuple[Tensor, Tensor]:
    """The new weight [N, K] float32 and the mask; see `Pruner`. By row, every block takes as many of every row.

    Weights of dead inputs go first in their block and stay as they are if they stay.
    Raises ValueError as `Gram.factor` does, and for an N:M pattern that does not fit K.
    """
    (rows, columns), gram = weight.shape, inputs.gram
    width = max(BLOCK // cut.pattern.of, 1) * cut.pattern.of if isinstance(cut.pattern, NM) else BLOCK
    starts = range(0, columns, width)
    counts = _block_counts(rows, [min(width, columns - start) for start in starts], cut)
    factor, dead = gram.factor().matrix, gram.dead()  # R [K, K], [K]
    difference = weight.detach().t().float().contiguous()  # [K, N]: W, and block after block W − Ŵ
    new = torch.empty(rows, columns, device=weight.device)
    keep = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
    with full_float32():
        for start, zeros in zip(starts, counts, strict=True):
            block = slice(start, start + width)
            far = start // (AHEAD * width) * AHEAD * width
            if far == start:  # what several blocks inherit from all before them, in one larger product
                ahead = slice(start, start + AHEAD * width)
                inherited = factor[:start, ahead].t() @ difference[:start]  # S [AHEAD·b, N]
            own, before = factor[block, block], inherited[start - far : start - far + width]
            before.addmm_(factor[far:start, block].t(), difference[far:start])
            identity = torch.eye(len(own), device=own.device)
            upper = torch.linalg.solve_triangular(own, identity, upper=True)  # U_bb [b, b]
            current = difference[block].addmm(upper.t(), before)  # [b, N]
            kept = _prune_block(current, upper, dead[block], zeros, cut)
            difference[block] -= current
            new[:, block], keep[:, block] = current.t(), kept.t()
    return new, keep


def _block_counts(rows: int, widths: list[int], cut: Cut) -> list[int]:
    """The zeros of each block of columns, in proportion to its width."""
    columns = sum(widths)
    if isinstance(cut.pattern, NM):
        drop, of = cut.pattern.of - cut.pattern.keep, cut.pattern.of
        if columns % of or cut.zeros != rows * columns // of * drop:
            raise ValueError(f"pattern {cut.pattern} on shape {(rows, columns)} does not make {cut.zeros} zeros")
        return [rows * width // of * drop for width in widths]
    if cut.selection == "matrix":
        sizes = [rows * width for width in widths]
        return share_counts(sizes, [cut.zeros / sum(sizes)] * len(sizes), cut.zeros, 0, 1)
    count, more = divmod(cut.zeros, rows)
    counts = share_counts(widths, [count / columns] * len(widths), count, 0, 1)
    roomy = max(range(len(widths)), key=lambda block: widths[block] - counts[block])
    return [rows * c + more * (block == roomy) for block, c in enumerate(counts)]


def _prune_block(current: Tensor, upper: Tensor, dead: Tensor, zeros: int, cut: Cut) -> Tensor:
    """The mask [b, N] of a block, whose weights `current` [b, N] become the new ones.

    upper: U_bb [b, b].   The loss of removing a weight is (w / U_jj)² (Hassibi & Stork 1992): the lowest go.
    N:M groups are chosen when all columns before them are done, everything else before the first.
    """
    grouped = isinstance(cut.pattern, NM)
    step = cut.pattern.of if grouped else STEP
    inverse = 1 / upper.diagonal()[:, None]  # [b, 1]
    weigh = inverse.masked_fill(dead[:, None], 0)

    def choose(part: slice, count: int) -> Tensor:
        scores = current[part].abs() * weigh[part]
        if grouped or cut.selection == "row":
            return keep_mask(scores.t().contiguous(), count, cut.pattern, cut.selection).t().contiguous()
        return keep_mask(scores, count)

    keep = torch.empty(current.shape, dtype=torch.bool, device=current.device)
    if not grouped:
        keep[:] = choose(slice(None), zeros)
    errors = torch.empty_like(current)  # E [b, N]
    errors_of, upper_of = errors.t(), upper.t().contiguous().unbind()
    for first in range(0, len(current), step):
        part = slice(first, first + step)
        if first:
            current[part].addmm_(upper[:first, part].t(), errors[:first], alpha=-1)
        if grouped:
            keep[part] = choose(part, zeros * step // len(current))
        # 1 / U_jj where a weight goes. Bool times float is twenty times slower on a CPU than by way of uint8.
        removed = (~keep[part]).view(torch.uint8).float().mul_(inverse[part]).unbind()
        columns, faults = current[part].unbind(), errors[part].unbind()
        for j, column in enumerate(columns):
            if j:
                column.addmv_(errors_of.narrow(1, first, j), upper_of[first + j].narrow(0, first, j), alpha=-1)
            torch.mul(column, removed[j], out=faults[j])
    current.mul_(keep)
    return keep


PRUNER = Pruner("sparsegpt", "gram", "matrix", prune)
