"""Scores → keep-mask with an exact count of zeros.

Of equal scores the lower index goes first, as a stable ascending sort would have it, so masks are the same on every
machine. Nothing is sorted: one order statistic gives the threshold, and only ties at it need a second look.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from alphaprune.pattern import NM, Pattern, Unstructured

PAIRWISE_MAX = 16  # groups up to this size are ranked by comparing pairs, which beats a sort along so short a dimension


def keep_mask(
    scores: Tensor, zeros: int, pattern: Pattern | None = None, selection: Literal["matrix", "row"] = "matrix"
) -> Tensor:
    """[N, K] bool, True = keep, with exactly `zeros` entries False: the lowest scores.

    scores: [N, K] floating point, larger = keep; infinities are ordered as numbers are.
    selection: "matrix" compares all scores; "row" takes floor(zeros / N) of every row and one more of the first
    zeros mod N rows. An N:M pattern compares within its groups along K, and `zeros` must be what it implies.

    Raises ValueError for NaN scores, a count out of range, or K not divisible by M.
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"scores: wanted [N, K] floating point, got {tuple(scores.shape)} {scores.dtype}")
    if not 0 <= zeros <= scores.numel():
        raise ValueError(f"zeros: wanted 0 to {scores.numel()} for shape {tuple(scores.shape)}, got {zeros}")
    if torch.isnan(scores.sum()) and torch.isnan(scores).any():  # the sum is twenty times faster, and NaN if one is
        raise ValueError("scores hold NaN, which has no rank; weights and activations must be finite")
    scores = scores.detach()
    if isinstance(pattern, NM):
        return _along_k(scores, zeros, pattern)
    if pattern is not None and not isinstance(pattern, Unstructured):
        raise ValueError(f"pattern {pattern!r}: wanted Unstructured or NM")
    if selection == "matrix":
        return _lowest_of_all(scores.reshape(-1), zeros).reshape(scores.shape)
    if selection != "row":
        raise ValueError(f"selection {selection!r}: wanted 'row' or 'matrix'")
    rows = scores.shape[0]
    count, more = divmod(zeros, rows) if rows else (0, 0)
    return torch.cat([_lowest_of_rows(scores[:more], count + 1), _lowest_of_rows(scores[more:], count)])


def _lowest_of_all(scores: Tensor, zeros: int) -> Tensor:
    """[n] bool, False at the `zeros` lowest of scores [n]."""
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _order_statistics(scores[None], zeros)[0]
    keep = scores > threshold
    surplus = int(scores.numel() - zeros) - int(keep.count_nonzero())  # ties at the threshold that stay: the last ones
    if surplus:
        keep[torch.nonzero(scores == threshold)[-surplus:, 0]] = True
    return keep


def _order_statistics(scores: Tensor, rank: int) -> Tensor:
    """The rank-th smallest (from 1) of every row of scores [R, K]: [R, 1]."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # numpy selects with vector instructions: some eight times faster than kthvalue.
        found = np.partition(scores.numpy(), rank - 1, axis=1)[:, rank - 1 : rank]
        return torch.from_numpy(found.copy())  # [R, 1]; a view would keep all of the partition alive
    return scores.kthvalue(rank, dim=1, keepdim=True).values


def _lowest_of_rows(scores: Tensor, zeros: int) -> Tensor:
    """[R, K] bool, False at the `zeros` lowest of every row of scores [R, K]."""
    if zeros == 0 or scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _order_statistics(scores, zeros)  # [R, 1]
    keep = scores > threshold
    surplus = scores.shape[1] - zeros - keep.sum(1)  # [R] ties at the threshold that stay: the last ones
    tied = torch.nonzero(surplus)[:, 0]
    if len(tied):
        equal = scores[tied] == threshold[tied]
        place = equal.sum(1, keepdim=True) - equal.cumsum(1)  # ties behind this one
        keep[tied] |= equal & (place < surplus[tied, None])
    return keep


def _along_k(scores: Tensor, zeros: int, pattern: NM) -> Tensor:
    """[N, K] bool that keeps the `pattern.keep` highest of every `pattern.of` scores along K."""
    (rows, columns), drop = scores.shape, pattern.of - pattern.keep
    if columns % pattern.of:
        raise ValueError(f"pattern {pattern} needs K % {pattern.of} == 0, got K = {columns}")
    implied = rows * columns // pattern.of * drop
    if zeros != implied:
        raise ValueError(f"pattern {pattern} on shape {(rows, columns)} makes {implied} zeros, not {zeros}")
    if pattern.of > PAIRWISE_MAX:
        order = scores.reshape(-1, pattern.of).sort(dim=1, stable=True).indices
        keep = torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, :drop], False)
        return keep.reshape(rows, columns)
    places = scores.reshape(-1, pattern.of).t().contiguous()  # [M, groups]
    rank = torch.zeros(places.shape, dtype=torch.uint8, device=scores.device)  # how many go before this one
    for later in range(1, pattern.of):
        before = places[:later] <= places[later]  # an equal score at a lower index goes first
        rank[later] += before.sum(0, dtype=torch.uint8)
        rank[:later] += ~before
    return (rank >= drop).t().reshape(rows, columns)
