"""2:4 products of many tokens by cuSPARSELt, which torch brings: tensor cores do half of the work there.

It keeps a copy of the weight in the library's own layout, 9/16 of the dense bytes, made with the first call of so many
tokens. Of the library's algorithms the fastest is searched for with the first product of its kind, which takes a while:
with the one that torch names otherwise, its first, an H200 took 2.1 to 3 times as long as for a dense product at every
number of tokens, 143 ms for a prompt of 2048 to LLaMA-2-7B, which sbt_expand takes 53 ms for. What the search gains was
NOT MEASURED: it is taken where it is asked for, or where a time table says that it is faster.
"""

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune import devices
from alphaprune.formats import Packed
from alphaprune.kernels import cuda, cuda_layouts, expansion
from alphaprune.kernels.base import Bound, Kernel

MULTIPLE, TOKENS = 16, 8  # of N and K, and of M, in 16-bit floats: torch.sparse.semi_structured
FIRST = 0  # the algorithm that torch names where none is asked for
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
    n, k = packed.shape
    compressed = torch._cslt_compress(expansion.expand(packed))

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.view(-1, k)  # [M, K]
        # Sparse tensor cores never see what pruned weights would meet: a token that is not finite is NaN throughout. It
        # is made so on the narrower side.
        nan = 0 * torch.linalg.vector_norm(rows, float("inf"), -1, keepdim=True)
        given = rows + nan if k < n else rows
        given = functional.pad(given, (0, 0, 0, -len(rows) % TOKENS))
        fused = bias if bias is not None and bias.dtype == x.dtype else None
        algorithm = fastest(compressed, given, n, fused)
        y = torch._cslt_sparse_mm(compressed, given.t(), bias=fused, transpose_result=True, alg_id=algorithm)
        y = y[: len(rows)]  # [M, N]
        if k >= n:
            y += nan
        if bias is not fused:
            y += bias
        return y.view(*x.shape[:-1], n)

    return run


_found: dict[tuple, int] = {}  # the library's fastest algorithm by kind of product


def fastest(compressed: Tensor, x: Tensor, n: int, bias: Tensor | None) -> int:
    """The number of the library's fastest algorithm for x [M, K] and weights [n, K]: searched for once for each device,
    shape and dtype, for M up to a power of two, with a bias and without. While a CUDA graph is captured nothing can be
    searched for: then torch's first."""
    kind = x.device, n, x.shape[1], x.dtype, (len(x) - 1).bit_length(), bias is None
    if kind not in _found:
        if torch.cuda.is_current_stream_capturing():
            return FIRST
        _found[kind] = torch._cslt_sparse_mm_search(compressed, x.t(), bias=bias, transpose_result=True)
    return _found[kind]


KERNELS = (
    Kernel("nm_cusparselt", "cuda", missing, supports, bind, fits=cuda_layouts.crowded, least_tokens=LEAST_TOKENS),
)
