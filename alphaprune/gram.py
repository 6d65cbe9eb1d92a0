"""Second moments of a layer's inputs, and what is computed from them once for every layer and method that shares them.

The output error of a layer whose weight changes from W to Ŵ is ‖(Ŵ − W)X‖² = tr((Ŵ − W) G (Ŵ − W)ᵀ) with G = XXᵀ, so
all methods that weigh a weight by what it does to the outputs need no more of the calibration text than G.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Gram:
    """G = Σ x xᵀ of a layer's inputs.

    matrix: [K, K] float32, the sum over all tokens divided by the number of samples.   tokens: how many were seen.
    """

    def __init__(self, matrix: Tensor, tokens: int) -> None:
        self.matrix, self.tokens = matrix, tokens

    def dead(self) -> Tensor:
        """[K] bool, True where an input was zero for every token: whatever its weights are, no output changes."""
        return self.matrix.diagonal() == 0

    def error(self, difference: Tensor) -> float:
        """tr(D G Dᵀ), the summed square of the outputs of a weight `difference` D [N, K], per sample."""
        difference = difference.to(self.matrix.device, torch.float32)
        with full_float32():
            return float((difference @ self.matrix).mul_(difference).sum(dtype=torch.float64))

    def relative_error(self, weight: Tensor, dense: Tensor) -> float:
        """‖(W − W₀)X‖² / ‖W₀X‖² of a `weight` that replaces `dense`, both [N, K]; 0 where nothing reaches the layer."""
        whole = self.error(dense)
        return self.error(weight.float() - dense.float()) / whole if whole > 0 else 0.0


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 products in float32 (no TF32, no bfloat16), whatever the user has set for the model."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
