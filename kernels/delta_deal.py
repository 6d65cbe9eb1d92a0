"""How the packs of nibble-delta rows are dealt: rows to shares, and the packs of a share to threads in equal runs."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

WARPS = 12  # of a share: kDeltaWarps
BLOCKS = 2  # shares of a multiprocessor: kDeltaBlocks
THREADS = 32 * WARPS
LEAST = 2  # packs of a thread, where there would be fewer there are fewer shares


@dataclass(frozen=True, eq=False)
class Places:
    """Where packs stand.

    at: int64 [N, blocks], of the first pack of a row in a block of columns among all of its part; packs: how many they
    are; part: which. totals: int64 [parts], packs of a part.
    """

    at: Tensor
    packs: Tensor
    part: Tensor
    totals: Tensor

    @functools.cached_property
    def lines(self) -> Tensor:
        """Of each part: 32 packs each, one per lane."""
        return -(-self.totals // 32)

    @functools.cached_property
    def most(self) -> int:
        """Lines of the largest part."""
        return int(self.lines.max())

    @property
    def steps(self) -> int:
        """Packs of a thread at most, and no fewer than one."""
        return max(1, -(-self.most // WARPS))

    def of(self, pack: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(step in its thread's run, thread, place among all packs) of the pack-th of a part."""
        steps, more = self.lines[part] // WARPS, self.lines[part] % WARPS  # the first `more` warps take a step more
        border = more * (steps + 1) * 32
        late = pack >= border
        length = torch.where(late, steps.clamp_min(1), steps + 1)
        rest = torch.where(late, pack - border, pack)
        thread = (torch.where(late, more * 32, 0) + rest // length).clamp_max(THREADS - 1)
        step = rest % length
        return step, thread, (part * self.most + step * WARPS) * 32 + thread

    def end(self, begins: Tensor) -> None:
        """Marks in begins [parts, steps, threads] the empty packs behind a part's last: rows of nobody's."""
        part = torch.arange(self.totals.numel(), device=begins.device)[:, None].expand(-1, 32)
        pack = self.totals[:, None] + torch.arange(32, device=begins.device)
        there = pack < 32 * self.lines[:, None]
        part = part[there]
        step, thread, _ = self.of(pack[there], part)
        begins[part[step > 0], step[step > 0], thread[step > 0]] = True


def count_shares(n: int, packs: int, multiprocessors: int, most: int = THREADS) -> int:
    """Shares of N rows with so many packs: BLOCKS per multiprocessor or a multiple of it, fewer of a small weight.

    most: rows of a share at most.
    """
    at_once = BLOCKS * multiprocessors
    shares = max(1, min(at_once, n, math.ceil(packs / (LEAST * THREADS))))
    if shares * most >= n:
        return shares
    needed = -(-n // most)
    return needed if needed <= at_once else -(-needed // at_once) * at_once


def deal(packs: Tensor, multiprocessors: int, pairs: bool = False) -> tuple[Places, Tensor]:
    """(places, rows [shares, rows of a share]) for packs [N, blocks]: long rows first, to and fro over the shares.

    pairs: rows i and N / 2 + i stand side by side, the former in an even place.
    """
    device, blocks, together = packs.device, packs.shape[1], 1 + pairs
    units = packs.view(together, -1, blocks).sum((0, 2))  # what is dealt as one
    shares = count_shares(len(units), int(units.sum()), multiprocessors, THREADS // together)
    order = units.argsort(descending=True, stable=True)
    rank = torch.arange(len(units), device=device)
    turn, share = rank // shares, rank % shares
    share = torch.where(turn % 2 == 1, shares - 1 - share, share)
    rows = torch.full((shares, together * -(-len(units) // shares)), -1, device=device)
    for i in range(together):
        rows[share, together * turn + i] = order + i * len(units)
    table = torch.zeros(*rows.shape, blocks, dtype=torch.int64, device=device)
    table[rows >= 0] = packs[rows[rows >= 0]]
    before = table.cumsum(1) - table
    at, part = torch.empty_like(packs), torch.empty_like(packs)
    at[rows[rows >= 0]] = before[rows >= 0]
    part[rows[rows >= 0]] = ((rows >= 0).nonzero()[:, :1] * blocks) + torch.arange(blocks, device=device)
    return Places(at, packs, part, table.sum(1).flatten()), rows


def number_sums(places: Places, rows: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
    """(sums [parts, rows of a share], number of each thread's first sum [parts, threads]), int32.

    A thread ends a sum with its run and before each pack that begins a row; they are numbered in order of the packs.
    """
    ended = begins.cumsum(1, dtype=torch.int32)  # [parts, steps, threads], by a thread before it adds a pack
    each = ended[:, -1] + 1
    starts = each.cumsum(1, dtype=torch.int32) - each
    number = lambda pack: (  # noqa: E731
        starts[places.part, pack[1]] + ended[places.part, pack[0], pack[1]]
    )
    first = number(places.of(places.at, places.part))
    last = number(places.of((places.at + places.packs - 1).clamp_min(0), places.part))
    words = torch.where(places.packs > 0, first | (last + 1) << 16, 0)  # [N, blocks]
    there = rows >= 0
    sums = torch.zeros(*rows.shape, words.shape[1], dtype=torch.int32, device=rows.device)
    sums[there] = words[rows[there]]
    return sums.movedim(2, 1).reshape(-1, rows.shape[1]).contiguous(), starts
