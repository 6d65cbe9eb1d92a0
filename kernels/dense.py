"""Dense products on CPUs where torch has no fast one of 16 bits, or reads the weight slower than memory gives it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import native
from alphaprune.kernels import cpu

HALVES = (torch.bfloat16, torch.float16)
ISAS = ("avx512bf16", "avx512", "avx512vnni", "avx512bw", "avxvnni", "avx2")  # that have such a product for these
# Where torch's product is fast it shares rows between tokens, and from 9 on it is as fast as that of VDPBF16PS, which
# reads them as streams (bench/dense.py on a Zen 4).
FEW = 8
MOST_TOKENS = 1 << 20


def most_tokens(isa: str, dtype: torch.dtype) -> int:
    """Up to how many tokens the dense product of `isa` is taken instead of torch's; 0 for none."""
    if isa not in ISAS or dtype not in HALVES:
        return 0
    if not cpu.fast_in_torch(dtype):
        return MOST_TOKENS
    return FEW if (isa, dtype) == ("avx512bf16", torch.bfloat16) else 0


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x [..., K] → y [..., N] = x Wᵀ + bias, without gradients: torch's functional.linear, or ours where it is faster.

    weight: [N, K]; it may get other memory later. bias: [N] or None.
    """
    isa = cpu.best()
    return ours(weight, bias, isa, most_tokens(isa, weight.dtype) if isa else 0)


def ours(weight: Tensor, bias: Tensor | None, isa: str | None, most: int) -> Callable[[Tensor], Tensor]:
    """As `linear`, with the product of an instruction set for up to `most` tokens, where it takes these tensors."""
    fits = weight.dim() == 2 and weight.device.type == "cpu" and (bias is None or bias.dtype == weight.dtype)
    if not most or not fits:
        return lambda x: functional.linear(x, weight, bias)
    n, k = weight.shape
    multiply = native.load().Dense(n, k, cpu.CODES[weight.dtype], isa).multiply
    code = cpu.CODES[weight.dtype]

    def run(x: Tensor) -> Tensor:
        few = x.dtype == weight.dtype and x.shape[-1] == k and 0 < x.numel() <= most * k
        if not few or torch.compiler.is_compiling() or not weight.is_contiguous():
            return functional.linear(x, weight, bias)
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], n)
        place = 0 if bias is None else bias.data_ptr()
        multiply(weight.data_ptr(), x.data_ptr(), x.numel() // k, place, code, y.data_ptr())
        return y

    return run
