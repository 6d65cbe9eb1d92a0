"""Attention of a decode step: one new token for each sequence, over keys and values in pages.

One Triton kernel on a GPU (triton_attention.py), one native call on a CPU (cpu_attention.py), plain torch elsewhere.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.kernels import cpu_attention, neighbours
from alphaprune.kernels.cpu_attention import HeadNorm

PADDING = 2  # sequences go together while padding to the longest costs no more than this factor


class Keys:
    """Where the keys and values of sequences lie, and the new token of each, for one step of all of them.

    slots: [M] int64, the row of `table` [slots, pages of a sequence] int64, whose page i holds its positions from
    i · page on. positions: [M] int64, of the new token, which is the last that it sees. reach: no sequence has more
    positions with it. cos, sin: [positions, dim / 2]. known: positions + 1, where the host knows them and may let them
    decide: then a long sequence does not make short ones pay.
    """

    def __init__(
        self,
        slots: Tensor,
        positions: Tensor,
        table: Tensor,
        page: int,
        reach: int,
        cos: Tensor,
        sin: Tensor,
        known: Sequence[int] | None = None,
    ) -> None:
        self.slots, self.positions, self.table, self.page, self.reach = slots, positions, table, page, reach
        self.cos, self.sin = cos, sin
        self._known = known
        self._rows: dict[int | None, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def groups(self) -> "list[tuple[Tensor, Keys]]":
        """Places of sequences and their keys, where those of different lengths are better computed apart."""
        found = [] if self._known is None else together(self._known)
        groups = []
        for places in found if len(found) > 1 else []:
            index = torch.tensor(places, device=self.table.device)
            most = max(self._known[place] for place in places)
            given = self.slots[index], self.positions[index], self.table, self.page, most, self.cos, self.sin
            groups.append((index, Keys(*given)))
        return groups

    @functools.cached_property
    def pages(self) -> Tensor:
        """Pages of the sequences up to their reach, [M, pages]."""
        return self.table[self.slots, : -(-self.reach // self.page)]

    @functools.cached_property
    def place(self) -> Tensor:
        """Rows of the cache [M] of the new tokens."""
        position = self.positions[:, None]
        return (self.pages.gather(1, position // self.page) * self.page + position % self.page)[:, 0]

    @functools.cached_property
    def turns(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine [M, dim / 2] of the new positions."""
        return self.cos[self.positions], self.sin[self.positions]

    def rows(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows of the cache [M · span] that the sequences read, and the mask [M, 1, 1, span], 0 or −inf."""
        if window not in self._rows:
            last = self.positions[:, None]
            first = 0 if window is None else (last + 1 - window).clamp_min(0)
            span = self.reach if window is None else min(self.reach, window)
            position = first + torch.arange(span, device=self.table.device)  # [M, span]
            outside = position > last
            # Past the end a sequence reads its own first key: another's could hold NaN, which a mask does not stop.
            position = torch.where(outside, first, position)
            rows = self.pages.gather(1, position // self.page) * self.page + position % self.page
            mask = torch.zeros(outside.shape, dtype=dtype, device=rows.device).masked_fill(outside, -torch.inf)
            self._rows[window] = rows.flatten(), mask[:, None, None]
        return self._rows[window]


def together(lengths: Sequence[int]) -> list[list[int]]:
    """Places of sequences that share one padded product, the longest first."""
    found: list[list[int]] = []
    longest = total = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if found and longest * (len(found[-1]) + 1) <= PADDING * (total + lengths[place]):
            found[-1].append(place)
            total += lengths[place]
        else:
            found.append([place])
            longest = total = lengths[place]
    return found


def counters(x: Tensor) -> Tensor | None:
    """What attend_new needs to count with, beside x: zero between steps, for one stream at a time. None on a CPU."""
    if neighbours.fused(x):
        from alphaprune.kernels import triton_attention  # imports Triton

        return triton_attention.counters(x)
    return None


def attend_new(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    keys: Keys,
    counters: Tensor | None,
    window: int | None = None,
    norms: tuple[HeadNorm, HeadNorm] | None = None,
    isa: str | None = None,
) -> Tensor:
    """Attention [M, heads · dim] of one new token per sequence, whose key and value go to their row of the cache.

    q: [M, heads · dim]; k, v: [M, key heads · dim]. cache: [2, pages · page, key heads, dim], keys and values. norms:
    RMSNorm of each head of q and of k before they are rotated. window: only the last so many keys. counters: as the
    function of that name gives them. isa: of csrc/cpu; the best one if none is named.
    Softmax of q·k / √dim (Vaswani et al., 2017); queries share keys as heads / key heads (Ainslie et al., 2023).
    """
    if neighbours.fused(q):
        from alphaprune.kernels import triton_attention

        return triton_attention.attend_new(q, k, v, cache, keys, window, norms, counters)
    paged = cache.unflatten(1, (-1, keys.page))  # [2, pages, page, key heads, dim]
    if cpu_attention.takes(q, paged):
        where = keys.slots, keys.positions, keys.table
        return cpu_attention.attend_new(q, k, v, paged, *where, keys.turns, window, norms, isa)
    q, k = neighbours.norm_heads(q, k, norms)
    return _attend(neighbours.rotate_store(q, k, v, *keys.turns, keys.place, cache), cache, keys, window)


def _attend(q: Tensor, cache: Tensor, keys: Keys, window: int | None) -> Tensor:
    """Attention [M, heads · dim] of rotated queries [M, heads, dim] over a cache that has their keys."""
    sequences, heads, dim = q.shape
    if keys.groups:
        out = q.new_empty(sequences, heads * dim)
        for index, part in keys.groups:
            out[index] = _attend(q[index], cache, part, window)
        return out
    rows, mask = keys.rows(window, q.dtype)
    k, v = (
        part.index_select(0, rows).view(sequences, -1, cache.shape[2], dim).transpose(1, 2) for part in cache.unbind(0)
    )
    grouped = q.view(sequences, cache.shape[2], -1, dim)  # queries that share a key head are rows of one product
    return functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(sequences, heads * dim)
