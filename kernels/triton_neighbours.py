"""What stands between the products of a step, by Triton: a pass over memory and a launch for each.

The equations and their rounding are those of neighbours.py, whose functions call these.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaprune.kernels import triton_early
from alphaprune.kernels.triton_early import let_next_begin, wait_for_kernels_before

ELEMENTS = 1024  # of one program of the activation, or of a row of the embedding
WARPS = 4
SCORES = 16384  # that a program looks at at a time for the largest


@triton.jit
def norm_kernel(h, delta, weight, order, x, cols, epsilon, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One row of x [M, cols]. h takes delta in place; delta and order may be None."""
    begin = tl.program_id(0).to(tl.int64) * cols
    col = tl.arange(0, BLOCK)
    inside = col < cols
    dtype = h.dtype.element_ty
    let_next_begin(EARLY)
    if order is None:
        factor = tl.load(weight + col, mask=inside, other=0).to(tl.float32)
    wait_for_kernels_before(EARLY)
    value = tl.load(h + begin + col, mask=inside, other=0).to(tl.float32)
    if delta is not None:
        value = (value + tl.load(delta + begin + col, mask=inside, other=0).to(tl.float32)).to(dtype).to(tl.float32)
    picked = value
    if order is not None:  # read before anything is written: the sum below waits for every thread of the row
        source = begin + tl.load(order + col, mask=inside, other=0)
        picked = tl.load(h + source, mask=inside, other=0).to(tl.float32)
        if delta is not None:
            picked = (picked + tl.load(delta + source, mask=inside, other=0).to(tl.float32)).to(dtype).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / cols + epsilon)
    if delta is not None:
        tl.store(h + begin + col, value.to(dtype), mask=inside)
    if order is not None:
        factor = tl.load(weight + tl.load(order + col, mask=inside, other=0), mask=inside, other=0).to(tl.float32)
    normed = (picked * scale).to(dtype).to(tl.float32) * factor
    tl.store(x + begin + col, normed.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["count"])
def swiglu_kernel(gate, up, y, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """y [count] = silu(gate) up."""
    let_next_begin(EARLY)
    wait_for_kernels_before(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    active = (value / (1 + tl.exp(-value))).to(gate.dtype.element_ty).to(tl.float32)
    product = active * tl.load(up + at, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, product.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    q, k, v, cos, sin, place, cache, turned, value_offset,
    heads, key_heads, half, HEADS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token: queries to `turned` (program 0 of axis 1), keys (1) and values (2) to row place of the cache."""
    let_next_begin(EARLY)
    wait_for_kernels_before(EARLY)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    count = tl.where(part == 0, heads, key_heads)
    head, lane = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < count) & (lane < half)
    at = head * (2 * half) + lane
    row = tl.load(place + token) * key_heads * 2 * half
    dtype = q.dtype.element_ty
    if part == 2:
        source, target = v + token * key_heads * 2 * half + at, cache + value_offset + row + at
        tl.store(target, tl.load(source, mask=inside, other=0), mask=inside)
        tl.store(target + half, tl.load(source + half, mask=inside, other=0), mask=inside)
    else:
        near, far = tl.arange(0, HALF)[None, :] < half, token * half + lane
        c = tl.load(cos + far, mask=near, other=0).to(tl.float32)
        s = tl.load(sin + far, mask=near, other=0).to(tl.float32)
        if part == 0:
            source, target = q + token * heads * 2 * half + at, turned + token * heads * 2 * half + at
        else:
            source, target = k + token * key_heads * 2 * half + at, cache + row + at
        first = tl.load(source, mask=inside, other=0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0).to(tl.float32)
        ac, bs = (first * c).to(dtype).to(tl.float32), (second * s).to(dtype).to(tl.float32)
        bc, sa = (second * c).to(dtype).to(tl.float32), (first * s).to(dtype).to(tl.float32)
        tl.store(target, (ac - bs).to(dtype), mask=inside)
        tl.store(target + half, (bc + sa).to(dtype), mask=inside)


@triton.jit
def begin_kernel(
    tokens, lengths, slots, embedding, h, positions, cols, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Program (row, part): a part of row tokens[slots[row]] of the embedding; the first one the position, too."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    let_next_begin(EARLY)
    wait_for_kernels_before(EARLY)
    slot = tl.load(slots + row)
    token = tl.load(tokens + slot)
    tl.store(h + row * cols + col, tl.load(embedding + token * cols + col, mask=col < cols, other=0), mask=col < cols)
    if tl.program_id(1) == 0:
        tl.store(positions + row, tl.load(lengths + slot))


@triton.jit(do_not_specialize=["nobody"])
def end_kernel(
    logits, new, slots, positions, tokens, lengths, vocabulary, nobody,
    LIKELIEST: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row: its token, which is the likeliest or the one in `new`, and its length to the tables of the slots."""
    row = tl.program_id(0).to(tl.int64)
    let_next_begin(EARLY)
    wait_for_kernels_before(EARLY)
    slot = tl.load(slots + row)
    if LIKELIEST:
        # Numbers whose order is that of the logits, NaN above all; of equal ones the first, by the low half.
        best = tl.full((BLOCK,), -(2**63), tl.int64)
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * vocabulary + at, mask=at < vocabulary, other=0).to(tl.float32)
            bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
            size = tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
            key = (size.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)
            best = tl.maximum(best, tl.where(at < vocabulary, key, -(2**63)))
        token = 0x7FFFFFFF - (tl.max(best, 0) & 0x7FFFFFFF)
        tl.store(new + row, token)
    else:
        token = tl.load(new + row)
    tl.store(tokens + slot, token)
    # Several rows may be nobody's: they write the same length.
    tl.store(lengths + slot, tl.where(slot == nobody, 0, tl.load(positions + row) + 1))


def add_norm(h: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, order: Tensor | None = None) -> Tensor:
    """As neighbours.add_norm; h and delta contiguous."""
    cols = h.shape[-1]
    x, block = h.new_empty(h.shape), triton.next_power_of_2(cols)
    if h.numel():
        delta = None if delta is None else delta.contiguous()
        with torch.cuda.device_of(h):
            norm_kernel[(h.numel() // cols,)](
                *(h, delta, weight, order, x, cols, epsilon, block),
                num_warps=max(1, min(16, block // 512)),
                **triton_early.options(h),
            )
    return x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As neighbours.swiglu; a new tensor."""
    gate, up = gate.contiguous(), up.contiguous()
    y, count = gate.new_empty(gate.shape), gate.numel()
    if count:
        with torch.cuda.device_of(gate):
            swiglu_kernel[(triton.cdiv(count, ELEMENTS),)](
                *(gate, up, y, count, ELEMENTS), num_warps=WARPS, **triton_early.options(gate)
            )
    return y


def rotate_store(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, place: Tensor, cache: Tensor) -> Tensor:
    """As neighbours.rotate_store."""
    tokens, (key_heads, dim) = len(q), cache.shape[2:]
    heads = q[0].numel() // dim
    q, k, v, cos, sin = (part.contiguous() for part in (q, k, v, cos, sin))
    turned = q.new_empty(tokens, heads, dim)
    with torch.cuda.device_of(q):
        rotate_kernel[(tokens, 3)](
            *(q, k, v, cos, sin, place, cache, turned, cache.stride(0), heads, key_heads, dim // 2),
            *(triton.next_power_of_2(heads), triton.next_power_of_2(dim // 2)),
            num_warps=WARPS,
            **triton_early.options(q),
        )
    return turned


def begin(tokens: Tensor, lengths: Tensor, slots: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """As neighbours.begin."""
    rows, cols = len(slots), embedding.shape[1]
    h, positions = embedding.new_empty(rows, cols), slots.new_empty(rows)
    with torch.cuda.device_of(h):
        begin_kernel[(rows, triton.cdiv(cols, ELEMENTS))](
            *(tokens, lengths, slots, embedding, h, positions, cols, ELEMENTS),
            num_warps=WARPS,
            **triton_early.options(h),
        )
    return h, positions


def end(
    logits: Tensor, chosen: Tensor | None, slots: Tensor, positions: Tensor, tokens: Tensor, lengths: Tensor
) -> Tensor:
    """As neighbours.end."""
    new = slots.new_empty(len(slots)) if chosen is None else chosen
    block = min(SCORES, triton.next_power_of_2(logits.shape[1])) if chosen is None else 1
    with torch.cuda.device_of(logits):
        end_kernel[(len(slots),)](
            *(logits.contiguous(), new, slots, positions, tokens, lengths, logits.shape[1], len(lengths) - 1),
            *(chosen is None, block),
            num_warps=max(1, min(16, block // 1024)),
            **triton_early.options(logits),
        )
    return new
