"""Kept weights as lists of values and columns, a list per row, for one or two tokens at 80 % sparsity and more.

A bitmap costs a bit per weight and instructions for every zero; a list costs 16 bits per kept weight and nothing for
zeros, which pays where few are kept. The layout is made of the bitmap once, when a weight is bound.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import Packed, sbt
from alphaprune.kernels.base import Bound
from alphaprune.kernels.triton_expand import stored

SPAN = 1 << 16  # columns of a list; wider rows have several
CHUNK = 1 << 24  # weights whose lists are made at a time
ENTRIES = 256  # of a list that a warp takes at a time
COUNTED = 1024  # activations that one program looks at


@dataclass(frozen=True)
class Lists:
    """Kept weights in rows of B = ceil(K / 65536) lists, which follow each other without gaps.

    values: [n], in the dtype of the packed values. columns: int16 [n], bit patterns of u16: from the first column of
    the list on. starts: int64 [N * B + 1].
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    spans: int


def lists(packed: Packed) -> Lists:
    """The lists of a validated weight, on its device."""
    (n, k), col_tiles = packed.shape, packed.mask.shape[1]
    step = max(sbt.ROWS, CHUNK // k // sbt.ROWS * sbt.ROWS)
    values, columns, counts = [], [], []
    for first in range(0, n, step):
        last, begin = min(first + step, n), first // sbt.ROWS
        end = -(-last // sbt.ROWS)
        offsets = packed.offsets[begin * col_tiles : end * col_tiles + 1]
        dense, kept = sbt.unpack_torch(Packed(packed.weight, packed.mask[begin:end], offsets, (last - first, k)))
        counts += [torch.stack([part.sum(-1) for part in kept.split(SPAN, -1)], -1).flatten()]  # [rows * B]
        values += [dense[kept]]
        column = kept.nonzero()[:, 1] % SPAN
        columns += [torch.where(column < SPAN // 2, column, column - SPAN).to(torch.int16)]
    starts = functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    return Lists(torch.cat(values), torch.cat(columns), starts, -(-k // SPAN))


@triton.jit
def count_kernel(x, counts, cols, COUNTED: tl.constexpr):
    """counts [tokens, programs of a token]: activations that are not finite, of COUNTED each."""
    col = tl.program_id(0) * COUNTED + tl.arange(0, COUNTED)
    token = tl.program_id(1)
    value = tl.load(x + token * cols + col, mask=col < cols, other=0).to(tl.float32)
    found = tl.sum((1 - (tl.abs(value) < float("inf")).to(tl.int32)), 0)
    tl.store(counts + token * tl.num_programs(0) + tl.program_id(0), found)


@triton.jit(do_not_specialize=["rows", "cols", "groups", "spans", "counted"])
def ell_kernel(
    x, counts, values, columns, starts, scale, bias, y,
    rows, cols, groups, spans, counted,
    SPAN: tl.constexpr, TOKENS: tl.constexpr, COUNTS: tl.constexpr, ENTRIES: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """y [TOKENS, rows] = x [TOKENS, cols] Wᵀ + bias: a program is a warp with one row.

    counts: [TOKENS, counted] by count_kernel. scale: of int8 values, [rows] or, if GROUPED, [rows, groups of 128
    columns]. scale and bias may be None.
    """
    row = tl.program_id(0)
    token = tl.arange(0, TOKENS)
    xs = x + token[:, None] * cols
    sums = tl.full((TOKENS * ENTRIES,), 0, tl.float32)
    for span in range(0, spans):
        begin = tl.load(starts + row * spans + span)
        length = (tl.load(starts + row * spans + span + 1) - begin).to(tl.int32)
        for i in range(0, length, ENTRIES):
            place = i + tl.arange(0, ENTRIES)
            inside = place < length
            value = tl.load(values + begin + place, mask=inside, other=0).to(tl.float32)
            column = (tl.load(columns + begin + place, mask=inside, other=0).to(tl.int32) & 0xFFFF) + span * SPAN
            if GROUPED:
                value *= tl.load(scale + row * groups + column // 128, mask=inside, other=0)
            at = (xs + column[None, :]).reshape(TOKENS * ENTRIES)
            known = inside[None, :].broadcast_to(TOKENS, ENTRIES).reshape(TOKENS * ENTRIES)
            value = value[None, :].broadcast_to(TOKENS, ENTRIES).reshape(TOKENS * ENTRIES)
            sums += value * tl.load(at, mask=known, other=0).to(tl.float32)
    total = tl.sum(sums.reshape(TOKENS, ENTRIES), 1)
    # Zeros are in no list, but zero times an activation that is not finite is NaN, and so is then the row's sum, unless
    # all such activations of the token met kept weights.
    block = tl.arange(0, COUNTS)[None, :]
    wild = tl.sum(tl.load(counts + token[:, None] * counted + block, mask=block < counted, other=0), 1)
    if tl.sum(wild, 0) > 0:
        met = tl.full((TOKENS, ENTRIES), 0, tl.int32)
        for span in range(0, spans):
            begin = tl.load(starts + row * spans + span)
            length = (tl.load(starts + row * spans + span + 1) - begin).to(tl.int32)
            for i in range(0, length, ENTRIES):
                place = i + tl.arange(0, ENTRIES)
                inside = place < length
                column = tl.load(columns + begin + place, mask=inside, other=0).to(tl.int32) & 0xFFFF
                found = tl.load(xs + span * SPAN + column[None, :], mask=inside[None, :], other=0).to(tl.float32)
                met += 1 - (tl.abs(found) < float("inf")).to(tl.int32)
        total = tl.where(tl.sum(met, 1) < wild, float("nan"), total)
    if scale is not None and not GROUPED:
        total *= tl.load(scale + row)
    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)
    tl.store(y + token * rows + row, total.to(y.dtype.element_ty))


def bind(packed: Packed) -> Bound:
    """The product of one or two tokens with one packed weight, of which it makes lists."""
    (n, k), found, scale = packed.shape, lists(packed), packed.scale
    groups = 1 if scale is None else scale[0].numel()
    counted = triton.cdiv(k, COUNTED)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        tokens = x.numel() // k
        y = x.new_empty(*x.shape[:-1], n, dtype=stored(x.dtype))
        if tokens:
            counts = x.new_empty(tokens, counted, dtype=torch.int32)
            with torch.cuda.device_of(x):
                count_kernel[(counted, tokens)](x, counts, k, COUNTED, num_warps=4)
                ell_kernel[(n,)](
                    *(x, counts, found.values, found.columns, found.starts, scale, bias, y),
                    *(n, k, groups, found.spans, counted, SPAN, tokens),
                    *(triton.next_power_of_2(counted), ENTRIES, groups > 1),
                    num_warps=1,
                )
        return y.to(x.dtype)

    return run
