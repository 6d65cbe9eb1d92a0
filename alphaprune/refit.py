"""A fixed mask → the kept weights that bring the layer's outputs closest to the dense ones."""

from torch import Tensor

from alphaprune.gram import Gram


def refit(weight: Tensor, dense: Tensor, mask: Tensor, gram: Gram) -> Tensor:
    """[N, K] float32, zero where not kept: argmin ‖(W − W₀)X‖² over W on the support of `mask`, from `weight`.

    weight, dense W₀: [N, K].   mask: [N, K] bool, True = keep.   gram: of the layer's inputs.
    """
    return weight.float()
