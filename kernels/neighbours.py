"""What stands between the products of a decoder block: one Triton kernel each on a GPU, plain torch elsewhere.

Their cost is launches and passes over memory, not arithmetic: on a GPU a step of a 7B model has some 30 products per
millisecond, and four more launches beside each of them would take as long as the products.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.kernels import portable


@functools.cache
def why_not() -> str | None:
    """None, or why the Triton kernels do not run here, looked at once."""
    return portable.available()


def fused(x: Tensor) -> bool:
    """Whether Triton's kernels take a tensor."""
    return x.is_cuda and why_not() is None and not torch.compiler.is_compiling()


def add_norm(h: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, order: Tensor | None = None) -> Tensor:
    """x [M, K] = RMSNorm(h) · weight after h [M, K] += delta [M, K], in place; with `order` [K] its columns in order.

    Zhang and Sennrich, NeurIPS 2019, with transformers' rounding: in half precision once more before the weight.
    order: int64; column i of x is column order[i] of the norm.
    """
    if fused(h):
        from alphaprune.kernels import triton_neighbours  # imports Triton

        return triton_neighbours.add_norm(h, delta, weight, epsilon, order)
    if delta is not None:
        h.add_(delta)
    if weight.dtype == torch.float32:
        x = functional.rms_norm(h, tuple(weight.shape), weight, epsilon)
    else:
        x = functional.rms_norm(h, tuple(weight.shape), None, epsilon).mul_(weight)
    return x if order is None else x.index_select(-1, order)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, [M, K]; silu rounded to the dtype before the product, as in transformers. May reuse `gate`."""
    if fused(gate):
        from alphaprune.kernels import triton_neighbours

        return triton_neighbours.swiglu(gate, up)
    return functional.silu(gate, inplace=True).mul_(up)


def rotate_store(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, place: Tensor, cache: Tensor) -> Tensor:
    """Rotated queries [M, heads, dim]; rotated keys, and values, go to the rows `place` [M] of the cache.

    q: [M, heads · dim]; k, v: [M, key heads · dim]. cos, sin: [M, dim / 2] in their dtype (Su et al., 2021: halves of a
    head are the pairs). cache: [2, rows, key heads, dim], keys and values; place: int64.
    """
    key_heads, dim = cache.shape[2:]
    if fused(q):
        from alphaprune.kernels import triton_neighbours

        return triton_neighbours.rotate_store(q, k, v, cos, sin, place, cache)
    turned = _rotate(q.view(len(q), -1, dim), cos, sin)
    new = torch.stack((_rotate(k.view(len(k), key_heads, dim), cos, sin), v.view(len(v), key_heads, dim)))
    cache.index_copy_(1, place, new)
    return turned


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[M, heads, dim]: halves (a, b) → (a cos − b sin, b cos + a sin), each product rounded as in transformers."""
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)  # [M, heads, dim / 2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


PADDING = 2  # sequences go together while padding to the longest costs no more than this factor


class Keys:
    """Where the keys and values of sequences lie, for steps of one query each.

    table: [M, pages of a sequence] int64, the page that holds its positions from i · page on. lengths: [M] int64, keys
    of each sequence, from 1 to `reach`. known: the lengths, where the host knows them and may let them decide: then a
    long sequence does not make short ones pay.
    """

    def __init__(
        self, table: Tensor, lengths: Tensor, page: int, reach: int, known: Sequence[int] | None = None
    ) -> None:
        self.table, self.lengths, self.page, self.reach = table, lengths, page, reach
        self._rows: dict[int | None, tuple[Tensor, Tensor]] = {}
        self.groups: list[tuple[Tensor, Keys]] = []
        found = [] if known is None else together(known)
        if len(found) > 1:
            for places in found:
                index = torch.tensor(places, device=table.device)
                most = max(known[place] for place in places)
                part = table[index, : -(-most // page)]
                self.groups.append((index, Keys(part, lengths[index], page, most)))

    def rows(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows of the cache [M · span] that the sequences read, and the mask [M, 1, 1, span], 0 or −inf."""
        if window not in self._rows:
            first = 0 if window is None else (self.lengths - window).clamp_min(0)[:, None]
            span = self.reach if window is None else min(self.reach, window)
            position = first + torch.arange(span, device=self.table.device)  # [M, span]
            outside = position >= self.lengths[:, None]
            # Past the end a sequence reads its own first key: another's could hold NaN, which a mask does not stop.
            position = torch.where(outside, first, position)
            rows = self.table.gather(1, position // self.page) * self.page + position % self.page
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


def attend(q: Tensor, cache: Tensor, keys: Keys, window: int | None = None) -> Tensor:
    """Attention [M, heads · dim] of one query per sequence, q [M, heads, dim], over its keys and values in pages.

    cache: [2, pages · page, key heads, dim]. window: only the last so many keys.
    Softmax of q·k / √dim (Vaswani et al., 2017); queries share keys as heads / key heads (Ainslie et al., 2023).
    """
    if fused(q):
        from alphaprune.kernels import triton_attention

        return triton_attention.attend(q, cache, keys.table, keys.lengths, keys.page, keys.reach, window)
    sequences, heads, dim = q.shape
    if keys.groups:
        out = q.new_empty(sequences, heads * dim)
        for index, part in keys.groups:
            out[index] = attend(q[index], cache, part, window)
        return out
    rows, mask = keys.rows(window, q.dtype)
    k, v = (
        part.index_select(0, rows).view(sequences, -1, cache.shape[2], dim).transpose(1, 2) for part in cache.unbind(0)
    )
    grouped = q.view(sequences, cache.shape[2], -1, dim)  # queries that share a key head are rows of one product
    return functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(sequences, heads * dim)
