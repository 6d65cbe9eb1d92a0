"""What stands between the products of a decoder block, by Triton: a pass over memory and a launch for each.

The equations and their rounding are those of neighbours.py, whose functions call these.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of one program of the activation


@triton.jit
def norm_kernel(h, delta, weight, order, x, cols, epsilon, BLOCK: tl.constexpr):
    """One row of x [M, cols]. h takes delta in place; delta and order may be None."""
    begin = tl.program_id(0).to(tl.int64) * cols
    col = tl.arange(0, BLOCK)
    inside = col < cols
    dtype = h.dtype.element_ty
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
    weights = weight + col
    if order is not None:
        weights = weight + tl.load(order + col, mask=inside, other=0)
    normed = (picked * scale).to(dtype).to(tl.float32) * tl.load(weights, mask=inside, other=0).to(tl.float32)
    tl.store(x + begin + col, normed.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["count"])
def swiglu_kernel(gate, up, y, count, BLOCK: tl.constexpr):
    """y [count] = silu(gate) up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    active = (value / (1 + tl.exp(-value))).to(gate.dtype.element_ty).to(tl.float32)
    product = active * tl.load(up + at, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, product.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    q, k, v, cos, sin, place, cache, turned, value_offset,
    heads, key_heads, half, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token: queries to `turned` (program 0 of axis 1), keys (1) and values (2) to row place of the cache."""
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


def add_norm(h: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, order: Tensor | None = None) -> Tensor:
    """As neighbours.add_norm; h and delta contiguous."""
    cols = h.shape[-1]
    x, block = h.new_empty(h.shape), triton.next_power_of_2(cols)
    if h.numel():
        delta = None if delta is None else delta.contiguous()
        with torch.cuda.device_of(h):
            norm_kernel[(h.numel() // cols,)](
                h, delta, weight, order, x, cols, epsilon, block, num_warps=max(1, min(16, block // 512))
            )
    return x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As neighbours.swiglu; a new tensor."""
    gate, up = gate.contiguous(), up.contiguous()
    y, count = gate.new_empty(gate.shape), gate.numel()
    if count:
        with torch.cuda.device_of(gate):
            swiglu_kernel[(triton.cdiv(count, ELEMENTS),)](gate, up, y, count, ELEMENTS)
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
        )
    return turned
