"""Macro tiles turned into weights by Triton, one per warp, and with that the expansion into dense rows.

Lane l of a warp takes row l // 4 and the 4 columns from 4 (l % 4) on of every sub-tile of 8 rows x 16 columns, that is
of four mask words. One count of bits then serves four weights, the values that a warp loads together are neighbours,
and what the lanes hold is what mma.m16n8k16 takes as its first operand: nothing passes through shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaprune.formats import Packed, sbt
from alphaprune.kernels import expansion
from alphaprune.kernels.base import Bound

WARPS = 4
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
INTERPRETED = triton.knobs.runtime.interpret


def stored(dtype: torch.dtype) -> torch.dtype:
    """What kernels compute and write for a tensor of `dtype`: itself.

    Triton's interpreter gets bfloat16 arithmetic wrong and does not round to it: there it is float32.
    """
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


@triton.jit
def popcount(v):
    """Bits set in each uint32, int32; LLVM knows the idiom and takes one instruction."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def step(start, words, before, index: tl.constexpr, T: tl.constexpr):
    """Weights of 16 columns of T tiles, [2 halves of 8 rows x T x 32 lanes, 2, 2]: the last two make 4 columns.

    start: [1, T, 1] pointers to a tile's values. words: uint32 [1, T, 32]. before: int32 [1, T, 32], values before a
    word.
    """
    # All four steps in one tensor would be shorter, but LLVM then packs the predicates: 17 % more instructions. And
    # what is loaded has one dimension, because Triton 3.6 gives addresses of several an order of lanes of its own.
    lane = tl.arange(0, 32)[None, None, :]
    source = (tl.arange(0, 2)[:, None, None] * 4 + index * 8 + lane // 8).broadcast_to(2, T, 32)
    word = tl.gather(words.broadcast_to(2, T, 32), source, 2)
    shift = (lane % 8 * 4).to(tl.uint32)
    nibble = (word >> shift).to(tl.int32).reshape(2 * T * 32)
    first, second, third, fourth = nibble & 1, (nibble >> 1) & 1, (nibble >> 2) & 1, (nibble >> 3) & 1
    at = start + (tl.gather(before.broadcast_to(2, T, 32), source, 2) + popcount(word & ((1 << shift) - 1)))
    at = at.reshape(2 * T * 32)
    w0 = tl.load(at, mask=first != 0, other=0)
    at += first
    w1 = tl.load(at, mask=second != 0, other=0)
    at += second
    w2 = tl.load(at, mask=third != 0, other=0)
    w3 = tl.load(at + third, mask=fourth != 0, other=0)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def decode(values, mask, offsets, tile, inside, T: tl.constexpr):
    """Weights of T tiles, 0 where nothing is kept: [2 halves of 8 rows, T, 8 rows, 4 x 2 x 2 columns, 2 x 2 steps].

    The last two dimensions are the higher and the lower bit of a step. tile: int64 [T]. inside: bool [T]; tiles that
    are not give zeros.
    """
    lane = tl.arange(0, 32)[None, :]
    words = tl.load(mask + tile[:, None] * 32 + lane, mask=inside[:, None], other=0).to(tl.uint32, bitcast=True)
    count = popcount(words)
    before = (tl.cumsum(count, 1) - count)[None]
    words = words[None]
    units = tl.load(offsets + tile, mask=inside, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    start = (values + units * 8)[None, :, None]
    even = tl.join(step(start, words, before, 0, T), step(start, words, before, 2, T))
    odd = tl.join(step(start, words, before, 1, T), step(start, words, before, 3, T))
    return tl.join(even, odd).reshape(2, T, 8, 4, 2, 2, 2, 2)


@triton.jit(do_not_specialize=["first", "last", "groups", "col_tiles"])
def expand_kernel(values, mask, offsets, scale, out, first, last, cols, groups, col_tiles, T: tl.constexpr):
    """Rows [first, last) into out [last - first, cols], bits unchanged; or times scale [rows, groups] if given."""
    row_tile = first // 16 + tl.program_id(0).to(tl.int64)
    col_tile = tl.program_id(1) * T + tl.arange(0, T)
    found = decode(values, mask, offsets, row_tile * col_tiles + col_tile, col_tile < col_tiles, T)
    dense = found.permute(1, 0, 2, 6, 7, 3, 4, 5).reshape(T, 16, 64)
    row = (row_tile * 16 + tl.arange(0, 16))[None, :, None]
    col = (col_tile * 64)[:, None, None] + tl.arange(0, 64)[None, None, :]
    if scale is not None:
        group = tl.where(groups > 1, col_tile // 2, 0)[:, None, None]
        size = tl.load(scale + row * groups + group, mask=(row < last) & (group < groups), other=0)
        dense = dense.to(tl.float32) * size
    tl.store(out + (row - first) * cols + col, dense.to(out.dtype.element_ty), mask=(row < last) & (col < cols))


def expand(packed: Packed, first: int, last: int, out: Tensor) -> Tensor:
    """Rows [first, last) of W in `out` [last - first, K], contiguous; first: a multiple of 16.

    out: in the dtype of float values, whose bits it gets; of int8 values in any float: the product with their scale,
    rounded to float32 and then to it. Nothing is allocated on the device and nothing waits.
    """
    if first == last:
        return out
    values, written, groups = packed.weight, out, 1
    if packed.scale is None:
        values, written = (tensor.view(BITS[packed.dtype.itemsize]) for tensor in (values, out))
    else:
        written = out if stored(out.dtype) == out.dtype else out.new_empty(out.shape, dtype=stored(out.dtype))
        groups = packed.scale[0].numel()
    col_tiles = packed.mask.shape[1]
    grid = triton.cdiv(last - first, sbt.ROWS), triton.cdiv(col_tiles, WARPS)
    with torch.cuda.device_of(out):
        expand_kernel[grid](
            *(values, packed.mask, packed.offsets, packed.scale, written, first, last, packed.shape[1], groups),
            *(col_tiles, WARPS),
            num_warps=WARPS,
        )
    return out if written.dtype != torch.float32 or out.dtype == torch.float32 else out.copy_(written)


def bind(packed: Packed) -> Bound:
    """The product for many tokens with one packed weight: rows expanded into a scratch, multiplied by torch."""
    return lambda x, bias: expansion.multiply(x, packed, bias, expand)
