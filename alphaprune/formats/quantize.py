"""Kept weights as 8-bit integers: W[n, k] ≈ integers[n, k] · scale[n] or · scale[n, k // 128], symmetric, -127…127.

The largest kept weight of a row (or of a row's group of 128 columns) becomes ±127. A search for a smaller clipping
range lowers the error of 70 % pruned layers of the embedded model by 0.7 % of itself, so there is none.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 128  # columns that share a scale, where not the whole row does
# Of the integers, which lie in int8 whatever they are. 8: -127…127, 4: -7…7, 2: -1…1, so that each has a negative.
BITS = tuple(range(2, 9))
# Of fewer than 8 bits most steps would be spent on the largest weight: what part of it becomes the largest integer.
CLIPS = tuple(1 - 0.05 * i for i in range(14))
VALUES = ("int8",)
CHUNK = 1 << 22  # weights at a time: the temporaries are float32


class Error(NamedTuple):
    """How far the integers are from the kept weights, both 0 where nothing was lost.

    relative: ‖W - q·s‖ / ‖W‖, Frobenius norms. largest: max|W - q·s| / max|W|.
    """

    relative: float
    largest: float


class Quantized(NamedTuple):
    """integers: int8 [N, K], 0 where nothing is kept. scale: float32 [N] or [N, ceil(K / 128)]."""

    integers: Tensor
    scale: Tensor
    error: Error


def check(values: str | None, group: int | None) -> None:
    """ValueError unless `values` is None or int8, and `group` None or, for int8, 128."""
    if values is not None and values not in VALUES:
        raise ValueError(f"values {values!r}: wanted {', '.join(VALUES)}, or none to keep the bits of the weights")
    if group is not None and (values is None or group != GROUP):
        raise ValueError(f"group {group}: int8 values have one scale per row, or with group {GROUP} one per {GROUP}")


def groups(cols: int, group: int | None) -> int:
    """Scales per row of K weights."""
    return 1 if group is None else -(-cols // GROUP)


def quantize(
    weight: Tensor,
    mask: Tensor | None = None,
    group: int | None = None,
    bits: int = 8,
    importance: Tensor | None = None,
) -> Quantized:
    """The kept weights rounded to the nearest of 2^bits - 1 steps, ties to even, and the error of that.

    weight: [N, K] float. mask: [N, K] bool, True = keep; without it everything is kept. group: 128, or None for one
    scale per row. A scale whose weights are all 0 is 1. A kept weight may round to 0; it stays kept.
    bits: 2…8. Below 8 the scale of each row or group is that of CLIPS, of the largest weight, with the least squared
    error; importance: [K], what the squared error of a column is multiplied by in that choice, such as E[x²].
    ValueError if a kept weight is NaN or infinite.
    """
    check("int8", group)
    if bits not in BITS:
        raise ValueError(f"bits {bits!r}: wanted a whole number from {BITS[0]} to {BITS[-1]}")
    steps = 2 ** (bits - 1) - 1
    n, k = weight.shape
    scales = groups(k, group)
    width = -(-k // scales) if group is None else GROUP
    integers = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scale = torch.empty(n, scales, dtype=torch.float32, device=weight.device)
    lost = total = worst = top = 0.0
    step = max(1, CHUNK // k)
    weights = None
    if importance is not None:
        weights = functional.pad(importance.to(weight.device, torch.float32), (0, scales * width - k))
        weights = weights.view(scales, width)  # [G, columns of a group]
    for first in range(0, n, step):
        rows = weight[first : first + step].detach().float()
        if mask is not None:
            rows = rows.masked_fill(~mask[first : first + step].to(rows.device), 0)
        cut = functional.pad(rows, (0, scales * width - k)).view(-1, scales, width)  # [rows, G, columns of a group]
        largest = cut.abs().amax(-1, keepdim=True)
        if not largest.isfinite().all():
            raise ValueError("NaN and infinity have no place among int8 values; repair the checkpoint")
        size = largest / steps
        size = torch.where(size > 0, size, 1.0)
        if bits < 8:
            size = _best_clip(cut, size, steps, weights)
        whole = (cut / size).round_().clamp_(-steps, steps)
        off = whole * size - cut
        lost += off.double().square_().sum().item()
        total += cut.double().square_().sum().item()
        worst, top = max(worst, off.abs().max().item()), max(top, largest.max().item())
        integers[first : first + step] = whole.view(len(rows), -1)[:, :k]
        scale[first : first + step] = size[..., 0]
    error = Error((lost / total) ** 0.5 if total else 0.0, worst / top if top else 0.0)
    return Quantized(integers, scale.view(n) if group is None else scale, error)


def _best_clip(cut: Tensor, size: Tensor, steps: int, importance: Tensor | None) -> Tensor:
    """Of `size` [rows, G, 1] times each of CLIPS the one with the least error of `cut` [rows, G, columns]."""
    best, least = size, None
    for clip in CLIPS:
        trial = size * clip
        off = (cut / trial).round_().clamp_(-steps, steps).mul_(trial).sub_(cut).square_()
        off = (off if importance is None else off.mul_(importance)).sum(-1, keepdim=True)  # [rows, G, 1]
        best = trial if least is None else torch.where(off < least, trial, best)
        least = off if least is None else torch.minimum(off, least)
    return best


def dequantize(integers: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """integers · scale, dense [N, K]: the product rounded to float32, then to `dtype`.

    integers: int8 [N, K]. scale: float32 [N] or [N, ceil(K / 128)].
    """
    wide = scale[:, None] if scale.dim() == 1 else scale.repeat_interleave(GROUP, 1)[:, : integers.shape[1]]
    return (integers * wide).to(dtype)
