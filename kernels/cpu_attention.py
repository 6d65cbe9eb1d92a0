"""Attention on a CPU: of a decode step norms of heads, rotation, store and softmax of all sequences in one call, and of
prompts in half precision the products of torch, whose own attention takes two to three times as long.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from alphaprune.formats import native
from alphaprune.kernels import cpu, neighbours
from alphaprune.kernels.spmm import needs_op

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that csrc/cpu/attention.h knows
HeadNorm = tuple[Tensor, float]  # weight [dim], epsilon
LEAST = 1 << 13  # queries times keys, below which torch's own attention is as fast
QUERIES = 64  # of a prompt that meet their keys together: fewer would be small products, more see keys in vain
SCORES = 64 << 13  # of a head in memory at once, unless the keys are so many that 16 queries have more


def takes(q: Tensor, cache: Tensor) -> bool:
    """Whether the native call computes attention of q over a cache [2, pages, page, key heads, dim]."""
    dim = cache.shape[-1]
    fits = q.dtype == cache.dtype and q.dtype in DTYPES and dim % 32 == 0 and dim <= 512 and cache.stride(-1) == 1
    here = q.device.type == "cpu" and native.load() is not None
    return fits and here and not (torch.compiler.is_compiling() or needs_op(q, None))


def attend_new(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    table: Tensor,
    turns: tuple[Tensor, Tensor],
    window: int | None = None,
    norms: tuple[HeadNorm, HeadNorm] | None = None,
    isa: str | None = None,
) -> Tensor:
    """Attention [M, heads · dim] of one new token per sequence, whose key and value go to their place in the cache.

    q: [M, heads · dim]; k, v: [M, key heads · dim]. cache: [2, pages, page, key heads, dim], keys and values, with any
    strides but for the last. slots: [M] int64, the row of `table` [slots, pages of a sequence] int64, whose entry i is
    the page of positions i · page and on. positions: [M] int64, of the new tokens. turns: cosine and sine, each
    [M or 1, dim / 2], of the new positions. window, norms, isa: as attention.attend_new has them.
    """
    if norms is not None and not all(weight.dtype == q.dtype and weight.is_contiguous() for weight, _ in norms):
        (q, k), norms = neighbours.norm_heads(q, k, norms), None
    _, _, page, key_heads, dim = cache.shape
    heads, sequences = q.shape[1] // dim, len(q)
    code, strides = native.DTYPES[q.dtype], cache.stride()[1:4]
    bound = _bound(heads, key_heads, dim, code, window or 0, page, strides, isa or cpu.best())
    q, k, v = (part if part.stride(1) == 1 else part.contiguous() for part in (q, k, v))
    cos, sin = turns
    weights, epsilons = ((0, 0), (0.0, 0.0)) if norms is None else _addresses(norms)
    keys = cache.data_ptr()
    out = q.new_empty(sequences, heads * dim)
    bound.run(
        (q.data_ptr(), k.data_ptr(), v.data_ptr()),
        (q.stride(0), k.stride(0), v.stride(0)),
        out.data_ptr(),
        keys,
        keys + cache.stride(0) * cache.itemsize,
        (cos.data_ptr(), sin.data_ptr()),
        cos.stride(0) if len(cos) > 1 else 0,
        table.data_ptr(),
        table.stride(0),
        slots.data_ptr(),
        positions.data_ptr(),
        sequences,
        weights,
        epsilons,
    )
    return out


def takes_prompts(q: Tensor, count: int, keys: int) -> bool:
    """Whether `attend_prompt` is the faster one for so many new tokens of a sequence of `keys` positions, like q."""
    if count < 2 or count * keys < LEAST:
        return False
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type != "cpu" or not half or torch.compiler.is_compiling() or needs_op(q, None):
        return False
    return cpu.fast_in_torch(q.dtype)


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, start: int, first: int = 0, window: int | None = None) -> Tensor:
    """Attention [batch, heads, count, dim] of queries of positions `start` and on, in their dtype.

    q: [batch, heads, count, dim]; k, v: [batch, key heads, keys, dim], of positions `first` to that of the last query.
    window: how many positions back a query sees, itself included. Scores are rounded to the dtype before the softmax,
    which is of float32, and its weights before they meet the values, as transformers' eager attention has it.
    """
    batch, heads, count, dim = q.shape
    groups = batch * k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    together = max(16, min(QUERIES, SCORES // k.shape[2]))
    for begin in range(0, count, together):
        end = min(count, begin + together)
        oldest = first if window is None else max(first, start + begin - window + 1)
        keys, values = (part[:, :, oldest - first : start + end - first].flatten(0, 1) for part in (k, v))
        rows = q[:, :, begin:end].reshape(groups, -1, dim)  # [groups, heads of a key head × queries, dim]
        scores = q.new_empty(groups, rows.shape[1], keys.shape[1])
        torch.baddbmm(scores, rows, keys.transpose(1, 2), beta=0, alpha=dim**-0.5, out=scores)
        seen = visible(oldest, start + begin, start + end, window, q.device)
        weights = scores.view(groups, -1, *seen.shape).masked_fill_(~seen, -torch.inf).softmax(-1)
        found = torch.bmm(weights.view_as(scores), values)
        out[:, :, begin:end] = found.view(batch, heads, end - begin, dim)
    return out


def visible(first: int, start: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the keys [first, end) each query in [start, end) sees: bool [end - start, end - first]."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


@functools.lru_cache(maxsize=256)
def _bound(
    heads: int, key_heads: int, dim: int, code: int, window: int, page: int, strides: tuple[int, ...], isa: str
) -> Any:
    return native.load().Attention(heads, key_heads, dim, code, window, page, *strides, isa)


def _addresses(norms: tuple[HeadNorm, HeadNorm]) -> tuple[tuple[int, int], tuple[float, float]]:
    """Of the weights, and the epsilons."""
    (q_weight, q_epsilon), (k_weight, k_epsilon) = norms
    return (q_weight.data_ptr(), k_weight.data_ptr()), (q_epsilon, k_epsilon)
