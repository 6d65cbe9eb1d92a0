"""Unpack, multiply by the scale where there is one, multiply in float32: the truth for every format and kernel."""

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import Packed, quantize, sbt
from alphaprune.kernels.base import Bound, Kernel


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y [M, N] = x [M, K] Wᵀ + bias [N] in x's dtype, computed in float32."""
    weight, _ = sbt.unpack_torch(packed)  # [N, K]
    if packed.scale is not None:
        weight = quantize.dequantize(weight, packed.scale)
    y = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return y.to(x.dtype)


def bind(packed: Packed) -> Bound:
    """`multiply` for one packed weight."""
    return lambda x, bias: multiply(x, packed, bias)


def supports(shape: tuple[int, int], tokens: int, weight: torch.dtype, x: torch.dtype) -> None:
    """Takes everything."""


KERNELS = (Kernel("reference", "any", lambda: None, supports, bind),)
