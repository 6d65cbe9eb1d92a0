"""Rows of W expanded into a scratch that stays in cache, multiplied by torch: for many tokens, and for gradients."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import Packed, native, quantize, sbt
from alphaprune.kernels import cpu, cuda, portable
from alphaprune.kernels.base import Bound, Kernel

CHUNK_BYTES = 8 << 20  # of dense rows on a CPU: large enough for the matmul, small enough for the last-level cache
# Of dense rows on a GPU: whole layers of most models. Chunks that would stay in its cache leave the matmul too few
# tiles for all multiprocessors: with 256 tokens 11008x4096 took an H200 104 us so, and 79 us as a whole.
GPU_CHUNK_BYTES = 256 << 20
GEMM_ROWS = 128  # that chunks on a GPU are a multiple of, as the tiles of its matmuls are


def expand(packed: Packed, first: int = 0, last: int | None = None, out: Tensor | None = None) -> Tensor:
    """Rows [first, last) of W, dense [last - first, K], into `out` if given.

    Floats keep their bits and dtype. int8 values come multiplied by their scale, in float32 or the dtype of `out`.
    packed: validated. first: a multiple of 16. ValueError if the rows are not in W or `out` does not fit.
    """
    n, k = packed.shape
    last = n if last is None else last
    if not 0 <= first <= last <= n or first % sbt.ROWS:
        raise ValueError(f"rows {first} to {last} of a weight {packed.shape}: wanted a start that 16 divides, in order")
    if out is None:
        out = packed.weight.new_empty((last - first, k), dtype=packed.dense_dtype)
    fits = out.dtype == packed.dtype if packed.scale is None else out.dtype in cpu.FLOATS
    if out.shape != (last - first, k) or not fits or not out.is_contiguous():
        wanted = f"{(last - first, k)} {packed.dense_dtype}"
        raise ValueError(f"expand needs a contiguous out {wanted}, got {tuple(out.shape)} {out.dtype}")
    if first == last:
        return out
    if native.load() is not None and packed.device.type == "cpu":
        cpu.handle(packed).expand(first, last, out.data_ptr(), cpu.CODES[out.dtype])
        return out
    if packed.device.type == "cuda" and packed.dtype in cuda.HALVES and cuda.missing() is None:
        return expand_on_gpu(packed, first, last, out)
    if packed.device.type == "cuda" and portable.available() is None:
        from alphaprune.kernels import triton_expand  # imports Triton

        return triton_expand.expand(packed, first, last, out)
    c = packed.mask.shape[1]
    begin, end = first // sbt.ROWS, -(-last // sbt.ROWS)
    offsets = packed.offsets[begin * c : end * c + 1]
    part = Packed(packed.weight, packed.mask[begin:end], offsets, (last - first, k))
    rows, _ = sbt.unpack_torch(part)
    return out.copy_(rows if packed.scale is None else quantize.dequantize(rows, packed.scale[first:last], out.dtype))


def expand_on_gpu(packed: Packed, first: int, last: int, out: Tensor) -> Tensor:
    """`expand` by the compiled CUDA kernel, of 16-bit floats, on the current stream."""
    made, _ = cuda.handles(packed)
    made[packed.dtype].expand(first, last, out.data_ptr(), cuda.stream(out.device))
    return out


Fill = Callable[[Packed, int, int, Tensor], Tensor]  # (packed, first, last, out) -> out, as `expand`


def chunk_rows(shape: tuple[int, int], itemsize: int, on_gpu: bool) -> int:
    """Rows of W [N, K] = shape that are expanded at a time, a multiple of 16.

    On a GPU all chunks are about as large, so that the last one does not leave most of the device idle.
    """
    n, k = shape
    if not on_gpu:
        return max(sbt.ROWS, CHUNK_BYTES // (k * itemsize) // sbt.ROWS * sbt.ROWS)
    most = max(GEMM_ROWS, GPU_CHUNK_BYTES // (k * itemsize) // GEMM_ROWS * GEMM_ROWS)
    return -(-n // -(-n // most) // GEMM_ROWS) * GEMM_ROWS


def chunks(packed: Packed, fill: Fill = expand) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, dense rows), from the top of W to the bottom; the rows are overwritten by the next."""
    n, k = packed.shape
    step = chunk_rows((n, k), packed.dense_dtype.itemsize, packed.device.type == "cuda")
    scratch = packed.weight.new_empty((min(step, n), k), dtype=packed.dense_dtype)
    for first in range(0, n, step):
        last = min(first + step, n)
        yield first, last, fill(packed, first, last, scratch[: last - first])


@functools.cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit float at once; where not, torch is faster in float32.

    Measured on a Cascade Lake, 1024 tokens, 2048 x 2048, 2 threads: bfloat16 0.175 s, the same in float32 0.041 s.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    if dtype == torch.float32 or known.get("architecture") != "x86_64":
        return True
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return bool(known.get(f"avx512_{name}") or known.get(f"amx_{name}"))


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None, fill: Fill = expand) -> Tensor:
    """y [..., N] = x [..., K] Wᵀ + bias [N] in x's dtype, accumulated in float32; mixed dtypes compute in float32."""
    same = packed.dense_dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    if same and x.is_cuda:
        return multiply_in_place(x, packed, bias, fill)
    compute = x.dtype if same and packed.scale is None and has_instructions(x.dtype) else torch.float32
    wide, y = x.to(compute), x.new_empty(*x.shape[:-1], packed.shape[0])
    for first, last, rows in chunks(packed, fill):
        part = None if bias is None else bias[first:last].to(compute)
        y[..., first:last] = functional.linear(wide, rows.to(compute), part)
    return y


def multiply_in_place(x: Tensor, packed: Packed, bias: Tensor | None, fill: Fill) -> Tensor:
    """`multiply` where all have one dtype: each product is written where it belongs, without a copy between."""
    y = x.new_empty(*x.shape[:-1], packed.shape[0])
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.view(-1, packed.shape[0])  # [M, K], [M, N]
    for first, last, rows in chunks(packed, fill):
        out = y_rows[:, first:last]
        if bias is None:
            torch.mm(x_rows, rows.mT, out=out)
        else:
            torch.addmm(bias[first:last], x_rows, rows.mT, out=out)
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


def bind_on_gpu(packed: Packed) -> Bound:
    """`multiply` for one packed weight whose rows the compiled CUDA kernel expands."""
    cuda.handles(packed)  # now, because it waits for the device
    return lambda x, bias: multiply(x, packed, bias, expand_on_gpu)


KERNELS = (
    Kernel("expand", "cpu", available, cpu.supports, bind),
    Kernel("sbt_expand", "cuda", cuda.missing, cuda.supports, bind_on_gpu),
)
