"""Weight and activation statistic → scores; larger = keep.

Shapes: weight [N, K], norms [K], or [N, K] where rows have inputs of their own (convolutions in groups), scores [N, K].
"""

import torch
from torch import Tensor

RIA_POWER = 0.5  # the exponent of the activations that was published


def magnitude(weight: Tensor) -> Tensor:
    """|W|, float32."""
    return weight.detach().float().abs()


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij|·‖X_j‖₂, float32 (Sun et al. 2023, "A Simple and Effective Pruning Approach for LLMs", eq. 1).

    norms: float32, the root of the mean square of each input over samples; a common factor changes no order.
    """
    return weight.detach().float().abs() * norms.reshape(-1, weight.shape[1])


def ria(weight: Tensor, norms: Tensor) -> Tensor:
    """(|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|)·‖X_j‖₂^½, float32 (Zhang et al. 2024, "Plug-and-Play").

    A weight counts by its share of its column and of its row, so no row or column loses all. Rows and columns of zeros
    score 0. norms: as for `wanda`.
    """
    size = weight.detach().float().abs()
    least = torch.finfo(torch.float32).tiny
    share = size / size.sum(0, keepdim=True).clamp_min(least) + size / size.sum(1, keepdim=True).clamp_min(least)
    return share * norms.reshape(-1, weight.shape[1]) ** RIA_POWER
