"""Products to try kernels on, the same ones in every file."""

import torch
from tolerance import assert_product
from torch import Tensor

from alphaprune.formats import Packed, quantize, sbt
from alphaprune.kernels import cpu, spmm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = (*DTYPES, "int8", "int8/128")  # of values: floats, integers with a scale per row, and per 128 columns
Kind = torch.dtype | str
Problem = tuple[Tensor, Packed, Tensor]


def problem(n: int, k: int, tokens: int, density: float, weight: Kind, x: torch.dtype, seed: int = 0) -> Problem:
    """(dense weight with zeros, the same packed, activations); of int8 values the dense weight is in float64."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, k, generator=generator) < density
    mask[n // 2] = False  # an empty row
    values = torch.randn(n, k, generator=generator)
    activations = torch.randn(tokens, k, generator=generator).to(x)
    if isinstance(weight, torch.dtype):
        dense = values.to(weight) * mask
        return dense, sbt.pack(dense, mask), activations
    group = 128 if weight == "int8/128" else None
    integers, scale, _ = quantize.quantize(values, mask, group)
    return exact_weight(integers, scale), sbt.pack(integers, mask, scale), activations


def exact_weight(integers: Tensor, scale: Tensor) -> Tensor:
    """integers [N, K] times their scale [N] or [N, ceil(K / 128)] in float64."""
    wide = scale[:, None] if scale.dim() == 1 else scale.repeat_interleave(128, 1)[:, : integers.shape[1]]
    return integers.double() * wide.double()


def may_round(kernel: str, packed: Packed, x: torch.dtype) -> bool:
    """Whether the kernel may use 16-bit integers for x: a native one, of int8 values, where x has 16 bits itself."""
    return kernel in cpu.ISAS and packed.scale is not None and x.itemsize == 2


def check(kernel: str, problem: Problem, bias: Tensor | None = None) -> None:
    """One product of one kernel against float64."""
    dense, packed, x = problem
    y = spmm.prepare(packed, "layer", kernel)(x, bias)
    assert_product(y, x, dense, bias, may_round(kernel, packed, x.dtype))
