"""Weight and activation statistic → scores; larger = keep. Shapes: weight [N, K], norms [K], scores [N, K]."""

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|W|, float32."""
    return weight.detach().float().abs()


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij|·‖X_j‖₂, float32 (Sun et al. 2023, "A Simple and Effective Pruning Approach for LLMs", eq. 1).

    norms: [K] float32, the root of the mean square of each input over samples; a common factor changes no order.
    """
    return weight.detach().float().abs() * norms.reshape(1, -1)
