"""Rows of W expanded into a scratch that stays in cache, multiplied by torch: for many tokens, and for gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import Packed, native, sbt
from alphaprune.kernels import cpu
from alphaprune.kernels.base import Bound, Kernel

CHUNK_BYTES = 8 << 20  # of dense rows: large enough for the matmul, small enough for the last-level cache


def expand(packed: Packed, first: int = 0, last: int | None = None, out: Tensor | None = None) -> Tensor:
    """Rows [first, last) of W, dense [last - first, K] in the packed dtype, bits unchanged, into `out` if given.

    packed: validated. first: a multiple of 16. ValueError if the rows are not in W.
    """
    n, k = packed.shape
    last = n if last is None else last
    if not 0 <= first <= last <= n or first % sbt.ROWS:
        raise ValueError(f"rows {first} to {last} of a weight {packed.shape}: wanted a start that 16 divides, in order")
    if out is None:
        out = packed.weight.new_empty(last - first, k)
    if (out.shape, out.dtype) != ((last - first, k), packed.dtype) or not out.is_contiguous():
        raise ValueError(f"expand needs a contiguous out {(last - first, k)} {packed.dtype}, got {tuple(out.shape)}")
    if first == last:
        return out
    if native.load() is not None and packed.device.type == "cpu":
        cpu.handle(packed).expand(first, last, out.data_ptr())
        return out
    c = packed.mask.shape[1]
    begin, end = first // sbt.ROWS, -(-last // sbt.ROWS)
    offsets = packed.offsets[begin * c : end * c + 1]
    part = Packed(packed.weight, packed.mask[begin:end], offsets, (last - first, k))
    return out.copy_(sbt.unpack_torch(part)[0])


def chunks(packed: Packed) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, dense rows), from the top of W to the bottom; the rows are overwritten by the next."""
    n, k = packed.shape
    step = max(sbt.ROWS, CHUNK_BYTES // (k * packed.dtype.itemsize) // sbt.ROWS * sbt.ROWS)
    scratch = packed.weight.new_empty(min(step, n), k)
    for first in range(0, n, step):
        last = min(first + step, n)
        yield first, last, expand(packed, first, last, scratch[: last - first])


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y [..., N] = x [..., K] Wᵀ + bias [N] in x's dtype, accumulated in float32; mixed dtypes compute in float32."""
    same = packed.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    compute = x.dtype if same else torch.float32
    wide, y = x.to(compute), x.new_empty(*x.shape[:-1], packed.shape[0])
    for first, last, rows in chunks(packed):
        part = None if bias is None else bias[first:last].to(compute)
        y[..., first:last] = functional.linear(wide, rows.to(compute), part)
    return y


def multiply_transposed(grad: Tensor, packed: Packed) -> Tensor:
    """grad_x [..., K] = grad_y [..., N] W in grad's dtype, accumulated in float32."""
    out = grad.new_zeros(*grad.shape[:-1], packed.shape[1], dtype=torch.float32)
    for first, last, rows in chunks(packed):
        out += grad[..., first:last].float() @ rows.float()
    return out.to(grad.dtype)


def bind(packed: Packed) -> Bound:
    """`multiply` for one packed weight."""
    return lambda x, bias: multiply(x, packed, bias)


def available() -> str | None:
    """None, or why the native expansion does not run; torch's own unpacking is the reference's route."""
    return native.status() if native.load() is None else None


KERNELS = (Kernel("expand", "cpu", available, cpu.supports, bind),)
