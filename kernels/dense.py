"""Dense products of a few tokens on CPUs where torch reads the weight slower than memory gives it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import native
from alphaprune.kernels import cpu

ISAS = {torch.bfloat16: "avx512bf16"}  # that have such a product for a dtype
# From 9 tokens on torch, which shares rows between tokens, is as fast (bench/dense.py on a Zen 4).
MOST_TOKENS = 8


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x [..., K] → y [..., N] = x Wᵀ + bias, without gradients: torch's functional.linear, or ours where it is faster.

    weight: [N, K]; it may get other memory later. bias: [N] or None.
    """
    isa = ISAS.get(weight.dtype)
    fits = weight.dim() == 2 and weight.device.type == "cpu" and (bias is None or bias.dtype == weight.dtype)
    if isa is None or not fits or native.load() is None or cpu.missing(isa):
        return lambda x: functional.linear(x, weight, bias)
    n, k = weight.shape
    multiply = native.load().Dense(n, k, cpu.CODES[weight.dtype], isa).multiply
    code = cpu.CODES[weight.dtype]

    def run(x: Tensor) -> Tensor:
        few = x.dtype == weight.dtype and x.shape[-1] == k and 0 < x.numel() <= MOST_TOKENS * k
        if not few or torch.compiler.is_compiling() or not weight.is_contiguous():
            return functional.linear(x, weight, bias)
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], n)
        place = 0 if bias is None else bias.data_ptr()
        multiply(weight.data_ptr(), x.data_ptr(), x.numel() // k, place, code, y.data_ptr())
        return y

    return run
