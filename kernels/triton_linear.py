"""x Wᵀ + b by Triton straight from the bitmap; tensor cores wherever both operands fit one 16-bit float."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaprune.formats import Packed
from alphaprune.kernels.base import Bound
from alphaprune.kernels.triton_expand import decode, stored

TOKENS = (8, 16, 32, 64)  # that one program multiplies a macro tile with
MANY_ROW_TILES = 512  # fill a large GPU with programs of 4 warps
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=["tokens", "rows", "groups", "row_tiles", "col_tiles"])
def linear_kernel(
    x, values, mask, offsets, scale, bias, y,
    tokens, rows, cols, groups, row_tiles, col_tiles,
    TOKENS: tl.constexpr, T: tl.constexpr, COMPUTE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows] = x [tokens, cols] Wᵀ + bias: a program has one row tile and TOKENS tokens, T tiles at a time.

    Each warp sums tiles of its own in float32, in the order of the columns; the sums of the warps are added last.
    scale: of int8 values, [rows] or, if GROUPED, [rows, groups of two tiles]. scale and bias may be None.
    """
    row_tile = tl.program_id(0) % row_tiles
    token = (tl.program_id(0) // row_tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = row_tile * 16 + tl.arange(0, 16)
    sums = tl.full((T, 16, TOKENS), 0, tl.float32)
    for begin in range(0, col_tiles, T):
        col_tile = begin + tl.arange(0, T)
        inside = col_tile < col_tiles
        found = decode(values, mask, offsets, row_tile.to(tl.int64) * col_tiles + col_tile, inside, T)
        col = (col_tile * 64)[:, None, None] + tl.arange(0, 64)[None, None, :]
        known = (token < tokens)[None, :, None] & (col < cols)
        part = tl.load(x + token[None, :, None] * cols + col, mask=known, other=0).to(COMPUTE)  # [T, TOKENS, 64]
        # A product may take columns in any order. Lanes hold what its instruction wants if 8 columns of a lane follow
        # each other where values have 8 bits, 4 where they have 16.
        if values.dtype.element_ty == tl.int8:
            weights = found.permute(1, 0, 2, 6, 3, 7, 4, 5).reshape(T, 16, 64).to(COMPUTE)
            other = part.reshape(T, TOKENS, 2, 2, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(T, 64, TOKENS)
        else:
            weights = found.permute(1, 0, 2, 6, 7, 3, 4, 5).reshape(T, 16, 64).to(COMPUTE)
            other = part.permute(0, 2, 1)
        if GROUPED:
            at = (row * groups)[None, :] + (col_tile // 2)[:, None]
            size = tl.load(scale + at, mask=(row < rows)[None, :] & inside[:, None], other=0)
            sums += tl.dot(weights, other, input_precision="ieee") * size[:, :, None]
        else:
            sums = tl.dot(weights, other, sums, input_precision="ieee")
    total = tl.sum(sums, 0)
    if scale is not None and not GROUPED:
        total *= tl.load(scale + row, mask=row < rows, other=0)[:, None]
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    at = token[None, :] * rows + row[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(token < tokens)[None, :] & (row < rows)[:, None])


def compute(weight: torch.dtype, x: torch.dtype) -> torch.dtype:
    """What both operands are multiplied in without rounding either: x's dtype for weights of it and of int8."""
    return stored(x) if weight in (x, torch.int8) else torch.float32


def block(tokens: int, dtype: torch.dtype) -> int:
    """Tokens of one program; in float32, where every multiplication is an instruction, as few as there can be."""
    return TOKENS[0] if dtype == torch.float32 else next((n for n in TOKENS if n >= tokens), TOKENS[-1])


def warps(row_tiles: int, many: int) -> int:
    """Warps of a program: more of them where there are few programs, and activations leave room in shared memory.

    8 warps would stage 128 KB for 64 tokens; GPUs of compute capability 8.6 and 8.9 have 99 KB.
    """
    return 8 if row_tiles < MANY_ROW_TILES and many < TOKENS[-1] else 4


def bind(packed: Packed) -> Bound:
    """The product with one packed weight; what is launched depends on shapes alone."""
    (n, k), (row_tiles, col_tiles) = packed.shape, packed.mask.shape[:2]
    groups = 1 if packed.scale is None else packed.scale[0].numel()

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        tokens = x.numel() // k
        y = x.new_empty(*x.shape[:-1], n, dtype=stored(x.dtype))
        if tokens:
            dtype = compute(packed.dtype, x.dtype)
            many = block(tokens, dtype)
            together = warps(row_tiles, many)
            with torch.cuda.device_of(x):
                linear_kernel[(row_tiles * triton.cdiv(tokens, many),)](
                    *(x, packed.weight, packed.mask, packed.offsets, packed.scale, bias, y),
                    *(tokens, n, k, groups, row_tiles, col_tiles, many, together, TYPES[dtype], groups > 1),
                    num_warps=together,
                )
        return y.to(x.dtype)

    return run
