"""Slices of SBT weights, for ranks that share a layer: rows for column-parallel layers, columns for row-parallel ones.

A column-parallel rank holds some rows of W and computes that part of y; a row-parallel rank holds some columns and
computes a summand of y (Megatron-LM, https://arxiv.org/abs/1909.08053, 3). On tile boundaries, multiples of 16 rows and
of 64 columns, bits are only copied: rows are one range of every tensor, columns are one range of the values per row of
tiles. Off them the tiles that a boundary cuts are packed anew, with the same bits in the values.

Weights that share x can be stacked into one, which takes one launch. Only what a slice needs is touched, so that of
tensors that are mapped from a file only that is read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alphaprune.formats import quantize, sbt
from alphaprune.formats.packed import Packed

UNIT = sbt.UNIT


def share(total: int, ranks: int, rank: int, what: str = "rows") -> tuple[int, int]:
    """[first, last) of `total` that a rank holds, as many on each.

    ValueError that names counts of ranks that divide it if this one does not. what: is shared, for the sentence.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}: ranks are counted from 0 and there is at least one")
    if total % ranks:
        counts = [str(n) for n in range(2, total + 1) if total % n == 0][:6] or ["1"]
        raise ValueError(f"{total} {what} cannot be shared by {ranks} ranks; use {_listed(counts)} ranks")
    size = total // ranks
    return rank * size, (rank + 1) * size


def rows(packed: Packed, first: int, last: int) -> Packed:
    """Rows [first, last) of a packed weight: what `pack` makes of those rows of the dense one, values bit for bit.

    On boundaries of 16 rows values, mask and scale are views, in which the values after the last one are another
    slice's, not zeros. ValueError if the range is empty or outside, or the offsets are damaged.
    """
    n, k = packed.shape
    _check(first, last, n, "rows")
    top, bottom = first // sbt.ROWS, -(-last // sbt.ROWS)
    per_row = packed.mask.shape[1]
    offsets = sbt._unsigned(packed.offsets[top * per_row : bottom * per_row + 1])
    _check_offsets(packed, offsets)
    start, length = int(offsets[0]), sbt._length(int(offsets[-1] - offsets[0]), packed.dtype)
    scale = packed.scale
    outer = Packed(
        packed.weight[start * UNIT :][:length],
        packed.mask[top:bottom],
        _bits(offsets - start),
        (min(bottom * sbt.ROWS, n) - top * sbt.ROWS, k),
        None if scale is None else scale[top * sbt.ROWS : bottom * sbt.ROWS],
    )
    return _cut(outer, (first - top * sbt.ROWS, last - top * sbt.ROWS), (0, k))


def columns(packed: Packed, first: int, last: int) -> Packed:
    """Columns [first, last) of a packed weight: what `pack` makes of those columns of the dense one, bit for bit.

    The scale of int8 values: that of each row as it is, or the groups of 128 columns in the range. ValueError if the
    range is empty or outside, would cut a group of 128 columns at its start, or the offsets are damaged.
    """
    n, k = packed.shape
    _check(first, last, k, "columns")
    grouped = packed.scale is not None and packed.scale.dim() == 2
    if grouped and first % quantize.GROUP:
        raise ValueError(cut_group(first))
    left, right = first // sbt.COLS, -(-last // sbt.COLS)
    r, c = packed.mask.shape[:2]
    offsets = sbt._unsigned(packed.offsets)
    _check_offsets(packed, offsets)
    starts = offsets[:-1].view(r, c)[:, left:right]  # [R, columns of tiles in the slice]
    begins, ends = starts[:, 0], offsets[1:].view(r, c)[:, right - 1]
    lengths = ends - begins
    places = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))  # where each row of tiles begins in the slice
    units = int(places[-1])
    values = torch.zeros(sbt._length(units, packed.dtype), dtype=packed.dtype, device=packed.device)
    for place, begin, length in (torch.stack((places[:-1], begins, lengths), 1) * UNIT).tolist():
        values[place : place + length] = packed.weight[begin : begin + length]
    moved = starts - (begins - places[:-1])[:, None]
    scale = packed.scale
    outer = Packed(
        values,
        packed.mask[:, left:right].contiguous(),
        _bits(torch.cat((moved.flatten(), places[-1:]))),
        (n, min(right * sbt.COLS, k) - left * sbt.COLS),
        scale[:, first // quantize.GROUP : -(-last // quantize.GROUP)].contiguous() if grouped else scale,
    )
    return _cut(outer, (0, n), (first - left * sbt.COLS, last - left * sbt.COLS))


def stack(parts: Sequence[Packed]) -> Packed:
    """The rows of several weights one below the other: what `pack` makes of the dense ones so stacked, bit for bit.

    ValueError, which `unlike` gives beforehand, if they do not fit together.
    """
    if reason := unlike(parts):
        raise ValueError(reason)
    values, offsets, total = [], [], 0
    for part in parts:
        own = sbt._unsigned(part.offsets)
        _check_offsets(part, own)
        values.append(part.weight[: int(own[-1]) * UNIT])
        offsets.append(own[:-1] + total)
        total += int(own[-1])
    first = parts[0]
    tail = first.weight.new_zeros(sbt._length(total, first.dtype) - total * UNIT)
    return Packed(
        torch.cat([*values, tail]),
        torch.cat([part.mask for part in parts]),
        _bits(torch.cat([*offsets, offsets[0].new_tensor([total])])),
        (sum(part.shape[0] for part in parts), first.shape[1]),
        None if first.scale is None else torch.cat([part.scale for part in parts]),
    )


def unlike(parts: Sequence[Packed]) -> str | None:
    """Why weights cannot be stacked, or None."""
    kinds = {
        (part.shape[1], part.dtype, part.device, None if part.scale is None else part.scale.shape[1:]) for part in parts
    }
    if len(kinds) != 1:
        return "weights that are stacked have the same columns, dtype, device and groups of scales, and there is one"
    odd = [part.shape[0] for part in parts[:-1] if part.shape[0] % sbt.ROWS]
    return f"{odd[0]} rows have no others below them: wanted a multiple of {sbt.ROWS}" if odd else None


def _cut(packed: Packed, in_rows: tuple[int, int], in_columns: tuple[int, int]) -> Packed:
    """What is left of a packed weight after its edges, which are less than a tile, are cut off."""
    if in_rows == (0, packed.shape[0]) and in_columns == (0, packed.shape[1]):
        return packed
    weight, kept = (part[slice(*in_rows), slice(*in_columns)] for part in sbt.unpack(packed))
    return sbt.pack(weight, kept, None if packed.scale is None else packed.scale[slice(*in_rows)])


def cut_group(first: int) -> str:
    """Why int8 values with a scale per group of columns cannot be cut there."""
    return (
        f"columns from {first} on start inside a group of {quantize.GROUP} that shares a scale; use fewer ranks, "
        f"or pack with one scale per row"
    )


def _check(first: int, last: int, total: int, what: str) -> None:
    if not 0 <= first < last <= total:
        raise ValueError(f"{what} {first} to {last} of a weight that has {total}: wanted a range inside, not empty")


def _check_offsets(packed: Packed, offsets: Tensor) -> None:
    """ValueError unless values can be read by these offsets, int64; kernels check the slice that is made of them."""
    if (offsets.diff() < 0).any() or int(offsets[-1]) * UNIT > packed.weight.numel():
        raise ValueError("the sbt offsets do not fit the values; the file is damaged, fetch or pack it again")


def _bits(offsets: Tensor) -> Tensor:
    """Numbers below 2³² as the int32 bit patterns that are stored."""
    return offsets.to(torch.int32)


def _listed(counts: list[str]) -> str:
    return counts[0] if len(counts) == 1 else f"{', '.join(counts[:-1])} or {counts[-1]}"
