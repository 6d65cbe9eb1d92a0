"""Second moments of a layer's inputs, and what is computed from them once for every layer and method that shares them.

The output error of a layer whose weight changes from W to Ŵ is ‖(Ŵ − W)X‖² = tr((Ŵ − W) G (Ŵ − W)ᵀ) with G = XXᵀ, so
all methods that weigh a weight by what it does to the outputs need no more of the calibration text than G.

Damping: δ = 1 % of the mean diagonal, as SparseGPT and ALPS were published, and ten times more as often as it takes
until a factorisation succeeds; G is singular with fewer tokens than columns, or with duplicate tokens.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal
BLOCK = 512  # columns that are factorized, or solved for, together
DAMPINGS = 3  # how often it is tried, ten times larger each time, in float32 and then in float64
# The published rule puts 1 on the diagonal of H = 2G where an input is dead; it counts in the mean that damping is of.
DEAD_DIAGONAL = 0.5


class Gram:
    """G = Σ x xᵀ of a layer's inputs.

    matrix: [K, K] float32, the sum over all tokens divided by the number of samples.   tokens: how many were seen.
    """

    def __init__(self, matrix: Tensor, tokens: int) -> None:
        self.matrix, self.tokens = matrix, tokens
        self._factor: Factor | None = None

    def check(self) -> None:
        """Raises ValueError if G holds NaN or infinity."""
        # The sum is read at memory's speed; only if it overflows are the entries looked at.
        if not bool(torch.isfinite(self.matrix.sum())) and not bool(torch.isfinite(self.matrix).all()):
            raise ValueError(
                "the second moments of its inputs hold NaN or infinity; load the model in a dtype with more range, or "
                "choose other calibration text"
            )

    def dead(self) -> Tensor:
        """[K] bool, True where an input was zero for every token: whatever its weights are, no output changes."""
        return self.matrix.diagonal() == 0

    def living_diagonal(self) -> Tensor:
        """[K] the diagonal of G, with a positive number in the place of dead inputs."""
        return self.matrix.diagonal().masked_fill(self.dead(), DEAD_DIAGONAL)

    def damping(self) -> float:
        """δ before any failure."""
        return DAMPING * float(self.living_diagonal().mean(dtype=torch.float64))

    def factor(self) -> "Factor":
        """Of G + δI with the living diagonal; made once and kept.

        Raises ValueError for NaN, infinity, or a matrix that is not positive semidefinite.
        """
        if self._factor is None:
            self.check()
            self._factor = factorize(self.matrix, self.living_diagonal(), self.damping())
        return self._factor

    def error(self, difference: Tensor) -> float:
        """tr(D G Dᵀ), the summed square of the outputs of a weight `difference` D [N, K], per sample."""
        difference = difference.to(self.matrix.device, torch.float32)
        with full_float32():
            return float((difference @ self.matrix).mul_(difference).sum(dtype=torch.float64))

    def relative_error(self, weight: Tensor, dense: Tensor) -> float:
        """‖(W − W₀)X‖² / ‖W₀X‖² of a `weight` that replaces `dense`, both [N, K]; 0 where nothing reaches the layer."""
        whole = self.error(dense)
        return self.error(weight.float() - dense.float()) / whole if whole > 0 else 0.0


@dataclass(frozen=True)
class Factor:
    """R with a positive diagonal in R Rᵀ = A, a symmetric positive definite matrix.

    matrix: R [K, K] float32, upper triangular.   damping: the δ that A holds on its diagonal.
    inverses: those of the blocks on R's diagonal by their first column, from the last to the first.

    U = R⁻¹ is the upper factor of the inverse, A⁻¹ = UᵀU, that SparseGPT was published with: Cholesky, inverse and
    Cholesky again there, 4/3 K³ operations, and the first K³/3 of them here.
    """

    matrix: Tensor
    damping: float
    inverses: dict[int, Tensor]

    def solve_(self, right: Tensor) -> Tensor:
        """X [N, K] with X A = `right` [N, K], which is overwritten. All but the diagonal blocks are products."""
        factor, blocks = self.matrix, [slice(s, s + len(inverse)) for s, inverse in self.inverses.items()]
        with full_float32():
            for block in blocks:  # Y Rᵀ = right, from the last to the first
                part = right[:, block]
                if block.stop < len(factor):
                    part.addmm_(right[:, block.stop :], factor[block, block.stop :].t(), alpha=-1)
                part.copy_(part @ self.inverses[block.start].t())
            for block in reversed(blocks):  # X R = Y
                part = right[:, block]
                if block.start:
                    part.addmm_(right[:, : block.start], factor[: block.start, block], alpha=-1)
                part.copy_(part @ self.inverses[block.start])
        return right


def factorize(matrix: Tensor, diagonal: Tensor, damping: float) -> Factor:
    """The factor of `matrix` [K, K] with `diagonal` [K] + δ in the place of its own; δ = `damping` unless that fails.

    matrix: finite and symmetric, float32.   Raises ValueError if no δ is enough.
    """
    for dtype in (torch.float32, torch.float64):
        for attempt in range(DAMPINGS):
            delta = damping * 10**attempt
            factor = matrix.to(dtype, copy=True)
            factor.diagonal().copy_(diagonal.to(dtype) + delta)
            inverses = _factorize_(factor)
            if inverses is not None:
                return Factor(factor.triu_().float(), delta, {start: inverses[start].float() for start in inverses})
    raise ValueError(
        f"the second moments of its inputs are not positive semidefinite, even with {delta:.3g} added to the diagonal; "
        f"compute them anew in float32 from finite inputs"
    )


def _factorize_(matrix: Tensor) -> dict[int, Tensor] | None:
    """Overwrites the upper triangle by R and returns the inverses of its diagonal blocks, or None where it fails.

    Block columns from the last to the first: R_jb R_bbᵀ = A_jb − Σ_later R_jl R_blᵀ. Nearly all of it is products, at
    the speed of products, which a library's Cholesky on a CPU reaches half of.
    """
    inverses = {}
    with full_float32():
        for end in range(len(matrix), 0, -BLOCK):
            block = slice(max(end - BLOCK, 0), end)
            panel = matrix[:end, block]
            if end < len(matrix):
                panel.addmm_(matrix[:end, end:], matrix[block, end:].t(), alpha=-1)
            # With J, which reverses the order: J A J = L Lᵀ gives R = J L J, upper because L is lower.
            lower, info = torch.linalg.cholesky_ex(matrix[block, block].flip(0, 1))
            own = lower.flip(0, 1)
            if int(info) or not bool(torch.isfinite(own.diagonal()).all()):
                return None
            identity = torch.eye(len(own), dtype=own.dtype, device=own.device)
            inverses[block.start] = torch.linalg.solve_triangular(own, identity, upper=True)
            matrix[block, block] = own
            matrix[: block.start, block] = panel[: block.start] @ inverses[block.start].t()
    return inverses


_precision = {"inside": 0, "before": "highest"}
_precision_lock = threading.Lock()


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 products in float32 (no TF32, no bfloat16), whatever the user has set for the model, until the last of
    all threads that want it so is done."""
    with _precision_lock:
        if not _precision["inside"]:
            _precision["before"] = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        _precision["inside"] += 1
    try:
        yield
    finally:
        with _precision_lock:
            _precision["inside"] -= 1
            if not _precision["inside"]:
                torch.set_float32_matmul_precision(_precision["before"])
