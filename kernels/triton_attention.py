"""Attention of a decode step by Triton, in one launch: one new token for each sequence, keys and values in pages.

A program takes a range of the keys of a sequence for all queries that share a key head (flash decoding: Dao et al.,
2023), and the last one to end adds the ranges. What a program reads follows from the positions on the device, so one
launch, and one CUDA graph, serves all lengths up to its reach.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaprune.kernels import triton_early
from alphaprune.kernels.triton_early import let_next_begin, wait_for_kernels_before

KEYS = 64  # that a program takes at a time, of up to 128 numbers
MOST_RANGES = 64
PROGRAMS_PER_SM = 4  # all of them resident at a time; a prediction, not measured
WARPS = 4
ADDED = 8192  # numbers of ranges that the last program holds at a time


@triton.jit
def two(x, lane, twin, there):
    """float32 numbers at x: those of a head in their order, and for each of them its twin in a turn."""
    return (
        tl.load(x + lane, mask=there, other=0).to(tl.float32),
        tl.load(x + twin, mask=there, other=0).to(tl.float32),
    )


@triton.jit
def turned(
    x, lane, twin, there, sign, c, s, weight, twin_weight, epsilon,
    HEAD: tl.constexpr, TYPE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Heads [rows, DIM] at the addresses x [rows, 1]: normalised or not, and rotated, rounded as in neighbours.py."""
    value, other = two(x, lane, twin, there)
    if NORMED:
        norm = tl.rsqrt(tl.sum(value * value, 1) / HEAD + epsilon)[:, None]
        value = ((value * norm).to(TYPE).to(tl.float32) * weight).to(TYPE).to(tl.float32)
        other = ((other * norm).to(TYPE).to(tl.float32) * twin_weight).to(TYPE).to(tl.float32)
    return ((value * c).to(TYPE).to(tl.float32) + sign * (other * s).to(TYPE).to(tl.float32)).to(TYPE)


@triton.jit
def is_last(counter, all_of_them):
    """Whether this program is the last of so many to come here; then the counter is 0 again.

    One thread counts for its program. The barrier puts the count behind the stores of all threads, its release makes
    them seen by whoever counts later; its acquire, and the barrier that brings the answer to the other threads, put
    what is loaded afterwards behind the stores of those who counted before. Nobody waits for anybody.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == all_of_them - 1
    if last:
        tl.store(counter, 0)  # for the next launch, which waits for the end of this one
    return last


@triton.jit
def add_ranges(
    parts, logs, out, used, ranges,
    SHARED: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, MOST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out [SHARED, HEAD] from the ranges of SHARED queries, in their order, whoever came last.

    Read past the L1 cache (.cg), which may hold lines of these addresses from before others wrote to them.
    """
    ROWS: tl.constexpr = triton.next_power_of_2(SHARED)
    query, lane = tl.arange(0, ROWS), tl.arange(0, DIM)
    begin = tl.minimum(query, SHARED - 1)[:, None] * ranges
    every = tl.arange(0, MOST)[None, :]
    found = tl.load(logs + begin + every, mask=every < used, other=float("-inf"), cache_modifier=".cg")  # [ROWS, MOST]
    most = tl.max(found, 1)
    total = tl.sum(tl.exp(found - most[:, None]), 1)
    sums = tl.full((ROWS, DIM), 0, tl.float32)
    for start in range(0, used, CHUNK):
        part = start + tl.arange(0, CHUNK)[None, :]
        row, there = begin + part, part < used
        weight = tl.exp(tl.load(logs + row, mask=there, other=float("-inf"), cache_modifier=".cg") - most[:, None])
        place, inside = parts + row[:, :, None] * HEAD + lane, there[:, :, None] & (lane < HEAD)
        share = tl.load(place, mask=inside, other=0, cache_modifier=".cg")  # [ROWS, CHUNK, DIM]
        sums += tl.sum(share * weight[:, :, None], 1)
    asked = (query < SHARED)[:, None] & (lane < HEAD)[None, :]
    tl.store(out + query[:, None] * HEAD + lane, (sums / total[:, None]).to(out.dtype.element_ty), mask=asked)


@triton.jit
def see_new(
    queries, k, v, target, value_offset, scale, lane, twin, there, sign, c, s, weight, twin_weight, epsilon,
    GROUP: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, TYPE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Stores the new key and value at `target`; (highest score, sum of weights, sums) of queries that saw only them."""
    key = turned(
        k + tl.arange(0, 1)[:, None],
        *(lane, twin, there, sign, c, s, weight, twin_weight, epsilon, HEAD, TYPE, NORMED),
    )  # [1, DIM]
    value = tl.load(v + lane, mask=there, other=0)
    tl.store(target + lane, key, mask=there)
    tl.store(target + value_offset + lane, value, mask=there)
    most = tl.sum(queries.to(tl.float32) * key.to(tl.float32), 1) * scale
    return most, tl.full((GROUP,), 1, tl.float32), tl.broadcast_to(value.to(tl.float32), (GROUP, DIM))


@triton.jit
def rows_of(pages_at, start, end, N: tl.constexpr, PAGE: tl.constexpr):
    """Rows of the cache int32 [N] of the keys from `start` on, which N divides; anything past `end`.

    As few loads as there are pages, which then depend on nothing but `start`; gathered where a page is none of N keys.
    """
    key = tl.arange(0, N)
    if PAGE % N == 0:
        return tl.load(pages_at + start // PAGE).to(tl.int32) * PAGE + start % PAGE + key
    elif N % PAGE == 0 and N // PAGE <= 4:
        page = tl.full((N,), 0, tl.int32)
        for i in tl.static_range(N // PAGE):
            one = tl.load(pages_at + start // PAGE + i, mask=start + i * PAGE < end, other=0).to(tl.int32)
            page = tl.where(key // PAGE == i, one, page)
        return page * PAGE + key % PAGE
    else:
        key += start
        return tl.load(pages_at + key // PAGE, mask=key < end, other=0).to(tl.int32) * PAGE + key % PAGE


@triton.jit
def see_old(
    queries, heads, row, pages_at, first, begin, end, most, total, sums, value_offset, scale, lane, there,
    GROUP: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(highest score, sum of weights, sums) after the keys [begin, end) from `first` on, too, whose head is at heads.

    row: numbers of a row of the cache. N divides begin.
    """
    for start in range(begin, end, N):
        key = start + tl.arange(0, N)
        inside = (key >= first) & (key < end)
        place = heads + (rows_of(pages_at, start, end, N, PAGE).to(tl.int64) * row)[:, None] + lane
        known = inside[:, None] & there
        keys = tl.load(place, mask=known, other=0)  # [N, DIM]
        values = tl.load(place + value_offset, mask=known, other=0)
        if GROUP == 1:
            scores = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)[None, :]
        else:
            scores = tl.dot(queries, keys.trans(1, 0), input_precision="ieee")
        scores = tl.where(inside[None, :], scores * scale, float("-inf"))  # [GROUP, N]
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(most - higher)
        total = total * fade + tl.sum(weights, 1)
        if GROUP == 1:
            added = tl.sum(weights.reshape(N, 1) * values.to(tl.float32), 0)[None, :]
        else:
            added = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        sums = sums * fade[:, None] + added
        most = higher
    return most, total, sums


@triton.jit
def hand_in(
    out, parts, logs, counters, pair, part, used, ranges, most, total, sums, group, lane, asked,
    SHARED: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, TYPE: tl.constexpr, MOST: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """What a range found to out, if it is alone, or else to where the last one adds them."""
    query = pair.to(tl.int64) * SHARED
    out += query * HEAD
    share = sums / total[:, None]
    if used == 1:
        tl.store(out + group[:, None] * HEAD + lane, share.to(TYPE), mask=asked)
    elif counters is not None:
        parts += query * ranges * HEAD
        logs += query * ranges
        at = group * ranges + part
        tl.store(parts + at[:, None] * HEAD + lane, share, mask=asked)
        tl.store(logs + at, most + tl.log(total), mask=group < SHARED)
        if is_last(counters + pair, used):
            add_ranges(parts, logs, out, used, ranges, SHARED, HEAD, DIM, MOST, CHUNK)


@triton.jit
def cut(position, window, ranges, N: tl.constexpr):
    """The first key in the cache that is seen, where ranges begin, keys of one, and how many have keys or are first."""
    first = tl.where(window > 0, tl.maximum(position + 1 - window, 0), 0)
    begin = first - first % N
    span = tl.maximum(tl.cdiv(tl.cdiv(position - begin, ranges), N), 1) * N
    return first, begin, span, tl.maximum(tl.cdiv(position - begin, span), 1)


@triton.jit(do_not_specialize=["pages", "window", "ranges"])
def step_kernel(
    q, k, v, q_norm, k_norm, cos, sin, slots, positions, table, cache, out, parts, logs, counters,
    value_offset, scale, q_epsilon, k_epsilon, q_row, k_row, v_row, pages, window, key_heads, ranges,
    SHARED: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    N: tl.constexpr, MOST: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (sequence and key head, range): SHARED queries over a share of the keys, to out [M, heads, HEAD].

    Program 0 of a sequence and key head turns and stores the new key and takes it, and the value, from its registers:
    nobody reads that row of the cache. parts [M · heads, ranges, HEAD] and logs [M · heads, ranges], float32: the sums
    of a range and the logarithms of their weights; counters [M · key heads]: ranges that are there, 0 before and
    afterwards. window: 0 for all keys.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    sequence, head = (pair // key_heads).to(tl.int64), pair % key_heads
    HALF: tl.constexpr = HEAD // 2
    TYPE: tl.constexpr = q.dtype.element_ty
    NORMED: tl.constexpr = q_norm is not None
    group, lane = tl.arange(0, GROUP), tl.arange(0, DIM)[None, :]
    near, there = lane < HALF, lane < HEAD
    twin, sign = tl.where(near, lane + HALF, lane - HALF), tl.where(near, -1.0, 1.0)  # the other one of a pair
    let_next_begin(EARLY)
    q_weight, q_twin, k_weight, k_twin = 1.0, 1.0, 1.0, 1.0
    if NORMED:  # weights: no kernel of a step writes them
        q_weight, q_twin = two(q_norm, lane, twin, there)
        k_weight, k_twin = two(k_norm, lane, twin, there)
    wait_for_kernels_before(EARLY)
    pages_at = table + tl.load(slots + sequence) * pages
    position = tl.load(positions + sequence).to(tl.int32)
    first, begin, span, used = cut(position, window, ranges, N)
    if part >= used:
        return
    angle = position * HALF + tl.where(near, lane, lane - HALF)
    c = tl.load(cos + angle, mask=there, other=0).to(tl.float32)
    s = tl.load(sin + angle, mask=there, other=0).to(tl.float32)
    asked = (group < SHARED)[:, None] & there  # [GROUP, DIM]
    q += sequence * q_row + (head * SHARED + group[:, None]) * HEAD
    queries = turned(q, lane, twin, asked, sign, c, s, q_weight, q_twin, q_epsilon, HEAD, TYPE, NORMED)
    heads, row = cache + head * HEAD, key_heads * HEAD
    most = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.full((GROUP,), 0, tl.float32)
    sums = tl.full((GROUP, DIM), 0, tl.float32)
    if part == 0:
        at = tl.load(pages_at + position // PAGE) * PAGE + position % PAGE
        k += sequence * k_row + head * HEAD
        v += sequence * v_row + head * HEAD
        most, total, sums = see_new(
            *(queries, k, v, heads + at * row, value_offset, scale, lane, twin, there, sign),
            *(c, s, k_weight, k_twin, k_epsilon, GROUP, HEAD, DIM, TYPE, NORMED),
        )
    begin += part * span
    most, total, sums = see_old(
        *(queries, heads, row, pages_at, first, begin, tl.minimum(begin + span, position), most, total, sums),
        *(value_offset, scale, lane, there, GROUP, PAGE, N),
    )
    hand_in(
        *(out, parts, logs, counters, pair, part, used, ranges, most, total, sums, group, lane, asked),
        *(SHARED, HEAD, DIM, TYPE, MOST, CHUNK),
    )


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs(x: Tensor) -> int:
    """How many programs are made for tensors beside x where one for each key head is less: what is resident at once."""
    return PROGRAMS_PER_SM * (_multiprocessors(x.device.index or 0) if x.is_cuda else 8)


def counters(x: Tensor) -> Tensor:
    """For all launches of one stream, beside x; int32, zero.

    Sequences and key heads are more than `programs` only where each has one range, which counts nothing.
    """
    return torch.zeros(programs(x), dtype=torch.int32, device=x.device)


def ranges(pairs: int, keys: int, most: int) -> int:
    """Into how many ranges up to so many keys of each of `pairs` sequences and key heads are cut, for `most` programs.

    No more than `most`: the last ones would begin when the others end.
    """
    return max(1, min(most // pairs, -(-keys // KEYS), MOST_RANGES))


def group(shared: int) -> int:
    """Rows of the products: one query alone is no product of matrices, and tensor cores take 16 rows."""
    return 1 if shared == 1 else max(16, triton.next_power_of_2(shared))


def constants(shared: int, dim: int, page: int) -> dict[str, int]:
    """What step_kernel is compiled for."""
    wide, rows = max(16, triton.next_power_of_2(dim)), triton.next_power_of_2(shared)
    chunk = min(MOST_RANGES, max(1, ADDED // (wide * rows)))
    keys = max(16, KEYS * 128 // max(128, wide))
    fixed = {"SHARED": shared, "GROUP": group(shared), "HEAD": dim, "DIM": wide, "PAGE": page, "N": keys}
    return fixed | {"MOST": MOST_RANGES, "CHUNK": chunk}


def settings(dtype: torch.dtype, dim: int) -> dict[str, int]:
    """How step_kernel is compiled: with so few registers that PROGRAMS_PER_SM fit, where that spills none."""
    small = dtype.itemsize == 2 and dim <= 128
    return {"num_warps": WARPS} | ({"maxnreg": 65536 // (PROGRAMS_PER_SM * WARPS * 32)} if small else {})


def attend_new(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, keys, window: int | None, norms, counters) -> Tensor:
    """As attention.attend_new, with `counters` of this stream."""
    key_heads, dim = cache.shape[2:]
    sequences, shared = len(q), q.shape[1] // dim // key_heads
    heads = sequences * key_heads * shared
    reach = keys.reach if window is None else min(keys.reach, window)
    count = ranges(sequences * key_heads, reach, programs(q))
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    out, parts, logs = q.new_empty(sequences, heads // sequences * dim), None, None
    if count > 1:
        parts = q.new_empty(heads, count, dim, dtype=torch.float32)
        logs = q.new_empty(heads, count, dtype=torch.float32)
    (q_norm, q_epsilon), (k_norm, k_epsilon) = norms or ((None, 0.0), (None, 0.0))
    with torch.cuda.device_of(q):
        step_kernel[(sequences * key_heads, count)](
            *(q, k, v, q_norm, k_norm, keys.cos, keys.sin, keys.slots, keys.positions, keys.table, cache),
            *(out, parts, logs, counters if count > 1 else None),
            *(cache.stride(0), dim**-0.5, q_epsilon, k_epsilon, q.stride(0), k.stride(0), v.stride(0)),
            *(keys.table.shape[1], window or 0, key_heads, count),
            **constants(shared, dim, keys.page),
            **settings(q.dtype, dim),
            **triton_early.options(q),
        )
    return out
