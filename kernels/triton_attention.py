"""Attention of one query per sequence over keys and values in pages, by Triton: a range of keys for each program.

The ranges of a sequence are added afterwards (flash decoding: Dao et al., 2023). What a program reads follows from the
lengths on the device, so one launch, and one CUDA graph, serves all lengths up to its reach.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # that a program takes at a time
PROGRAMS_PER_SM = 4  # that the ranges are made for; a prediction, not measured


@triton.jit(do_not_specialize=["pages", "page", "span", "window"])
def range_kernel(
    q, cache, table, lengths, out, parts, logs, value_offset, scale,
    pages, page, span, window, key_heads, dim,
    SHARED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Program (sequence and key head, range): SHARED queries over up to `span` keys.

    With one range to out [M, heads, dim]; with more, sums to parts [M · heads, RANGES, dim] and the logarithms of
    their weights to logs [M · heads, RANGES], float32. window: 0 for all keys.
    """
    sequence = (tl.program_id(0) // key_heads).to(tl.int64)
    head = tl.program_id(0) % key_heads
    length = tl.load(lengths + sequence).to(tl.int32)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    begin = first + tl.program_id(1) * span
    end = tl.minimum(begin + span, length)
    group, lane = tl.arange(0, GROUP), tl.arange(0, DIM)
    row = (sequence * key_heads + head) * SHARED + group  # of the queries: [M, heads]
    asked = (group < SHARED)[:, None] & (lane < dim)[None, :]
    queries = tl.load(q + row[:, None] * dim + lane[None, :], mask=asked, other=0)  # [GROUP, DIM]
    most = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.full((GROUP,), 0, tl.float32)
    sums = tl.full((GROUP, DIM), 0, tl.float32)
    for start in range(begin, end, N):
        key = start + tl.arange(0, N)
        inside = key < end
        at = tl.load(table + sequence * pages + key // page, mask=inside, other=0) * page + key % page
        place = (at * key_heads + head)[:, None] * dim + lane[None, :]
        known = inside[:, None] & (lane < dim)[None, :]
        keys = tl.load(cache + place, mask=known, other=0)  # [N, DIM]
        if GROUP == 1:
            scores = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)[None, :]
        else:
            scores = tl.dot(queries, keys.trans(1, 0), input_precision="ieee")
        scores = tl.where(inside[None, :], scores * scale, float("-inf"))  # [GROUP, N]
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(most - higher)
        total = total * fade + tl.sum(weights, 1)
        values = tl.load(cache + value_offset + place, mask=known, other=0)
        if GROUP == 1:
            added = tl.sum(weights.reshape(N, 1) * values.to(tl.float32), 0)[None, :]
        else:
            added = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        sums = sums * fade[:, None] + added
        most = higher
    if RANGES == 1:
        tl.store(out + row[:, None] * dim + lane[None, :], (sums / total[:, None]).to(out.dtype.element_ty), mask=asked)
    else:
        # A range without keys weighs nothing: its logarithm is −inf, its sums are 0.
        share = sums / tl.where(total > 0, total, 1)[:, None]
        place = row * RANGES + tl.program_id(1)
        tl.store(parts + place[:, None] * dim + lane[None, :], share, mask=asked)
        tl.store(
            logs + place,
            tl.where(total > 0, most + tl.log(tl.where(total > 0, total, 1)), float("-inf")),
            mask=group < SHARED,
        )


@triton.jit
def join_kernel(parts, logs, out, dim, ranges, DIM: tl.constexpr, RANGES: tl.constexpr):
    """Adds the ranges of one query, out [M · heads, dim]."""
    row = tl.program_id(0).to(tl.int64)
    part, lane = tl.arange(0, RANGES), tl.arange(0, DIM)
    weight = tl.load(logs + row * ranges + part, mask=part < ranges, other=float("-inf"))
    weight = tl.exp(weight - tl.max(weight, 0))
    inside = (part < ranges)[:, None] & (lane < dim)[None, :]
    share = tl.load(parts + (row * ranges + part)[:, None] * dim + lane[None, :], mask=inside, other=0)
    found = tl.sum(share * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * dim + lane, found.to(out.dtype.element_ty), mask=lane < dim)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def ranges(programs: int, keys: int, multiprocessors: int) -> tuple[int, int]:
    """How many ranges the keys of a sequence are cut into, and the keys of one, a multiple of KEYS."""
    wanted = max(1, min(-(-PROGRAMS_PER_SM * multiprocessors // programs), -(-keys // KEYS), 64))
    one = -(-keys // wanted)
    span = -(-one // KEYS) * KEYS
    return -(-keys // span), span


def attend(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, page: int, reach: int, window: int | None = None
) -> Tensor:
    """As neighbours.attend."""
    (sequences, heads, dim), key_heads = q.shape, cache.shape[2]
    shared, keys = heads // key_heads, reach if window is None else min(reach, window)
    multiprocessors = _multiprocessors(q.device.index or 0) if q.is_cuda else 8
    count, span = ranges(sequences * key_heads, keys, multiprocessors)
    out = q.new_empty(sequences, heads * dim)
    parts = logs = out
    if count > 1:
        parts = q.new_empty(sequences * heads, count, dim, dtype=torch.float32)
        logs = q.new_empty(sequences * heads, count, dtype=torch.float32)
    wide = triton.next_power_of_2(dim)
    with torch.cuda.device_of(q):
        range_kernel[(sequences * key_heads, count)](
            *(q.contiguous(), cache, table.contiguous(), lengths, out, parts, logs, cache.stride(0), dim**-0.5),
            *(table.shape[1], page, span, window or 0, key_heads, dim),
            *(shared, group(shared), max(16, wide), KEYS, count),
        )
        if count > 1:
            join_kernel[(sequences * heads,)](parts, logs, out, dim, count, wide, triton.next_power_of_2(count))
    return out


def group(shared: int) -> int:
    """Rows of the products: one query alone is no product of matrices, and tensor cores take 16 rows."""
    return 1 if shared == 1 else max(16, triton.next_power_of_2(shared))
