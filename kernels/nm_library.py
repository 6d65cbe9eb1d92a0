"""2:4 products of many tokens by cuSPARSELt, which torch brings: tensor cores do half of the work there.

It keeps a copy of the weight in the library's own layout, 9/16 of the dense bytes, made with the first call of so many
tokens. It is taken where it is asked for, or where a time table says that it is faster: by torch's calls, a prompt of
2048 tokens took LLaMA-2-7B 143 ms on an H200, and 53 ms by sbt_expand.
"""

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune import devices
from alphaprune.formats import Packed
from alphaprune.kernels import cuda, expansion
from alphaprune.kernels.base import Bound, Kernel

MULTIPLE = 16  # of N and K in 16-bit floats: torch.sparse.semi_structured
LEAST_TOKENS = 512  # a prediction, from measurements that others published on an H100


def missing() -> str | None:
    """None, or why torch's cuSPARSELt does not run here."""
    if reason := devices.no_cuda():
        return reason
    if not torch.backends.cusparselt.is_available():
        return f"PyTorch {torch.__version__} has no cuSPARSELt; install a wheel from PyTorch's CUDA index"
    return devices.too_old()


def supports(shape: tuple[int, int], tokens: int, weight: torch.dtype, x: torch.dtype) -> str | None:
    """None for float16 or bfloat16 on both sides and sizes that the library takes."""
    if reason := cuda.supports(shape, tokens, weight, x):
        return reason
    if shape[0] % MULTIPLE or shape[1] % MULTIPLE:
        return f"cuSPARSELt takes multiples of {MULTIPLE} rows and columns, not {shape[0]} x {shape[1]}"
    return None


def nbytes(packed: Packed) -> int:
    """Bytes of the library's copy of a weight: half of the dense values, and two bits for each of them."""
    n, k = packed.shape
    return n * k * 9 // 16 * packed.dtype.itemsize


def bind(packed: Packed) -> Bound:
    """cuSPARSELt's product with one packed weight that keeps at most 2 of 4 neighbouring columns."""
    sparse = torch.sparse.to_sparse_semi_structured(expansion.expand(packed))

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.view(-1, x.shape[-1])  # [M, K]
        fused = bias if bias is not None and bias.dtype == x.dtype else None
        y = functional.linear(rows, sparse, fused)  # [M, N]
        # Sparse tensor cores never see what pruned weights would meet: a token that is not finite is NaN throughout.
        y += 0 * torch.linalg.vector_norm(rows, float("inf"), -1, keepdim=True)
        if bias is not fused:
            y += bias
        return y.view(*x.shape[:-1], -1)

    return run


KERNELS = (Kernel("nm_cusparselt", "cuda", missing, supports, bind, fits=cuda.crowded, least_tokens=LEAST_TOKENS),)
