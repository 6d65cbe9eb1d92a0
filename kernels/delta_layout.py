"""SBT to the nibble-delta rows that csrc/cuda/delta_spmv.cuh reads: about 2.6 bytes per kept 16-bit value.

The byte layout is described at DeltaView in csrc/cuda/launch.h. A row keeps a stream of values per block of columns;
where one is further from that before than a delta reaches stand zeros in pruned columns. Eight of the stream are a
pack. delta_deal.py deals rows to shares, and a share's packs to threads. Weights that share x may have one layout:
their rows are dealt together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaprune.formats import Packed, sbt
from alphaprune.kernels import delta_deal
from alphaprune.kernels.delta_deal import THREADS, WARPS

PACK = 8
REACH = {False: 16, True: 32}  # columns that a delta spans at most, by whether it has a fifth bit
MOST_COLS = 20480  # of a block: kMostBlockCols
GROUP = 4  # packs whose fifth bits are one word
MULTIPROCESSORS = 132  # where a weight is not on a device: an H100's
CHUNK = 1 << 22  # weights that are handled at a time: the temporaries are some 100 times their size


@dataclass(frozen=True, eq=False)
class DeltaRows:
    """Weights [N_i, K] as nibble-delta rows in shares; a part is a share's packs of one block of columns.

    values: [parts, lines, 32, 8], 16-bit floats. deltas: int32 [parts, lines, 32], bit patterns of eight nibbles.
    fifths: int32 [parts, groups, threads], the deltas' fifth bits, a byte per pack; groups is 0 without them.
    begins: int32 [parts, words, threads], a bit per pack: it begins a row, and not the thread's run.
    starts: int32 [parts, threads], column of the block where the run begins + 2^16 times the number of its first sum.
    counts: int32 [parts], lines that are in use.
    sums: int32 [parts, rows of a share], the first of a row's sums + 2^16 times the one past its last.
    rows: int32 [shares, rows of a share], the row, numbered over all weights; -1 past a share's last.
    members: N_i of each weight. cols: K. block_cols: columns of a block, a multiple of 8.
    pairs: of two weights, row i of the second stands behind that of the first, which is in an even place.
    """

    values: Tensor
    deltas: Tensor
    fifths: Tensor
    begins: Tensor
    starts: Tensor
    counts: Tensor
    sums: Tensor
    rows: Tensor
    members: tuple[int, ...]
    cols: int
    block_cols: int
    pairs: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the kernel reads."""
        return (
            self.values,
            self.deltas,
            self.fifths,
            self.begins,
            self.starts,
            self.counts,
            self.sums,
            self.rows,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """K, shares, rows of a share, lines of a part, words of a thread's begins, columns of a block."""
        return (
            self.cols,
            *self.rows.shape,
            self.values.shape[1],
            self.begins.shape[1],
            self.block_cols,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def blocks(self) -> int:
        """Blocks of columns."""
        return -(-self.cols // self.block_cols)


@dataclass(frozen=True, eq=False)
class _Streams:
    """Streams of some rows: entries in order of row, block and column.

    column: in its block; before: of the entry before it in the stream, -1 for the first; value: int16 bits;
    stream: row * blocks + block; position: in its stream. length: of each stream.
    """

    column: Tensor
    before: Tensor
    value: Tensor
    stream: Tensor
    position: Tensor
    length: Tensor


def block_cols(cols: int) -> int:
    """Columns per block: as few blocks as shared memory allows, of equal size."""
    blocks = -(-cols // MOST_COLS)
    return -(-cols // (8 * blocks)) * 8


def build(*weights: Packed, pairs: bool = False, name: str = "the weight") -> DeltaRows:
    """The nibble-delta rows of weights of one K in one of float16 and bfloat16, on their device; bits are unchanged.

    pairs: of two weights with as many rows, see DeltaRows. ValueError on other dtypes and on weights that differ.
    """
    n, k, dtype, device = sum(w.shape[0] for w in weights), weights[0].shape[1], weights[0].dtype, weights[0].device
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: nibble-delta rows hold float16 or bfloat16, got {dtype}; convert the weight")
    if any((w.shape[1], w.dtype, w.device) != (k, dtype, device) for w in weights):
        raise ValueError(f"{name}: weights that share x have the same columns, dtype and device")
    width, fifth = block_cols(k), _wide(_density(weights))
    reach, blocks = REACH[fifth], -(-k // width)
    chunks = _chunks(weights)
    lengths = torch.cat([_streams(dense, keep, width, reach).length for _, dense, keep in chunks()])  # [N * blocks]
    places, rows = delta_deal.deal((-(-lengths // PACK)).view(n, blocks), _multiprocessors(device), pairs)
    parts, steps = places.lines.numel(), places.steps

    total = parts * places.most * 32
    values = torch.zeros(total * PACK, dtype=torch.int16, device=device)
    deltas = torch.zeros(total * PACK, dtype=torch.uint8, device=device)
    columns = torch.zeros(parts, THREADS, dtype=torch.int32, device=device)
    begins = torch.zeros(parts, steps, THREADS, dtype=torch.bool, device=device)
    for top, dense, keep in chunks():
        s = _streams(dense, keep, width, reach)
        stream = top * blocks + s.stream
        part, within = places.part.flatten()[stream], s.position % PACK
        step, thread, pack = places.of(places.at.flatten()[stream] + s.position // PACK, part)
        values[pack * PACK + within] = s.value
        deltas[pack * PACK + within] = (s.column - s.before - 1).to(torch.uint8)
        first = (within == 0) & (step == 0)
        columns[part[first], thread[first]] = (s.before[first] + 1).to(torch.int32)
        first = (s.position == 0) & (step != 0)
        begins[part[first], step[first], thread[first]] = True
    places.end(begins)
    sums, starts = delta_deal.number_sums(places, rows, begins)
    deltas = deltas.view(parts, places.most, 32, PACK)
    return DeltaRows(
        values.view(dtype).view(deltas.shape),
        _packed([deltas[..., i] & 15 for i in range(PACK)], 4),
        _fifths(deltas, steps if fifth else 0),
        torch.stack([_packed(list(word.unbind(1)), 1) for word in begins.split(32, dim=1)], 1),
        columns | starts << 16,
        places.lines.to(torch.int32),
        sums,
        rows.to(torch.int32),
        tuple(w.shape[0] for w in weights),
        k,
        width,
        pairs,
    )


def nbytes(*weights: Packed) -> int:
    """Bytes of what `build` makes, about: as though kept columns lay anywhere, each as likely as the others."""
    n, k, density = sum(w.shape[0] for w in weights), weights[0].shape[1], _density(weights)
    blocks, fifth = -(-k // block_cols(k)), _wide(density)
    packs = _entries(density, REACH[fifth]) / PACK * k / blocks
    packs += (PACK - 1) / 2 / PACK if packs else 0  # of a row in a block of columns
    shares = delta_deal.count_shares(n, int(packs * n * blocks), _multiprocessors(weights[0].device))
    rows = -(-n // shares)
    lines = math.ceil((rows * packs + 2 * math.sqrt(packs)) / 32)  # of the largest part, as rows differ by a little
    steps = max(1, -(-lines // WARPS))
    words = 1 + -(-steps // 32) + (-(-steps // GROUP) if fifth else 0)
    return shares * (blocks * (lines * 32 * (2 * PACK + 4) + 4 * (words * THREADS + rows + 1)) + 4 * rows)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _density(weights: Sequence[Packed]) -> float:
    return sum(sbt.kept(w) for w in weights) / sum(math.prod(w.shape) for w in weights)


def _entries(density: float, reach: int) -> float:
    """Values and the zeros between them per weight, if kept columns lay anywhere."""
    skipped = (1 - density) ** reach  # the share of deltas that reach further, and further again
    return min(density / (1 - skipped) if density else 0, density + 1 / reach)


def _wide(density: float) -> bool:
    """Whether deltas of five bits take fewer bytes."""
    return (2 + 5 / 8) * _entries(density, REACH[True]) < (2 + 4 / 8) * _entries(density, REACH[False])


def bytes_per_weight(density: float) -> float:
    """Bytes of values and deltas per weight of the dense matrix, if kept columns lay anywhere."""
    wide = _wide(density)
    return (2 + (5 if wide else 4) / 8) * _entries(density, REACH[wide])


def _chunks(weights: Sequence[Packed]) -> Callable[[], Iterator[tuple[int, Tensor, Tensor]]]:
    """A function that yields (first row, dense int16 bits [rows, K], mask [rows, K]) from the top of all weights on."""
    k = weights[0].shape[1]
    step = max(1, CHUNK // (k * sbt.ROWS))  # row tiles

    def chunks() -> Iterator[tuple[int, Tensor, Tensor]]:
        top = 0
        for packed in weights:
            n, (tiles, per_row) = packed.shape[0], packed.mask.shape[:2]
            for begin in range(0, tiles, step):
                end = min(begin + step, tiles)
                rows = min(end * sbt.ROWS, n) - begin * sbt.ROWS
                offsets = packed.offsets[begin * per_row : end * per_row + 1]
                dense, keep = sbt.unpack_torch(Packed(packed.weight, packed.mask[begin:end], offsets, (rows, k)))
                yield top, dense.view(torch.int16), keep
                top += rows

    return chunks


def _streams(dense: Tensor, keep: Tensor, width: int, reach: int) -> _Streams:
    """The streams of dense rows (int16 bits), gaps filled with zeros."""
    rows, k = keep.shape
    blocks = -(-k // width)
    row, col = keep.nonzero(as_tuple=True)
    stream, column = row * blocks + col // width, col % width
    gap = column + 1  # from the column before the block's first
    gap[1:] = torch.where(stream[1:] == stream[:-1], column[1:] - column[:-1], gap[1:])
    fills = (gap - 1) // reach  # zeros before a value
    copies = fills + 1
    last = copies.cumsum(0) - 1  # place of each value among all entries
    source = torch.arange(column.numel(), device=column.device).repeat_interleave(copies)
    back = last[source] - torch.arange(source.numel(), device=column.device)  # entries until the value itself
    before = column[source] - gap[source] + reach * (fills[source] - back)  # 0, reach, … past the value before
    value = torch.where(back == 0, dense[row, col][source], 0)
    length = torch.zeros(rows * blocks, dtype=torch.int64, device=column.device)
    length.scatter_add_(0, stream, copies)
    position = torch.arange(source.numel(), device=column.device) - (length.cumsum(0) - length)[stream[source]]
    return _Streams(
        torch.where(back == 0, column[source], before + reach), before, value, stream[source], position, length
    )


def _packed(fields: list[Tensor], bits: int) -> Tensor:
    """int32 words of which the i-th field has so many bits from bit `bits` * i on."""
    word = torch.zeros(fields[0].shape, dtype=torch.int32, device=fields[0].device)
    for i, field in enumerate(fields):
        word |= field.to(torch.int32) << bits * i
    return word


def _fifths(deltas: Tensor, steps: int) -> Tensor:
    """The fifth bits of deltas [parts, lines, 32, 8]: a byte per pack, of the even ones, then of the odd ones."""
    parts, groups = deltas.shape[0], -(-steps // GROUP)
    high = _packed([deltas[..., i] >> 4 for i in (0, 2, 4, 6, 1, 3, 5, 7)], 1)
    padded = torch.zeros(parts, groups * GROUP, THREADS, dtype=torch.int32, device=deltas.device)
    if groups:
        padded.view(parts, -1, 32)[:, : deltas.shape[1]] = high
    bytes_ = padded.view(parts, groups, GROUP, THREADS)
    return _packed([bytes_[:, :, i] for i in range(GROUP)], 8)


def unpack(rows: DeltaRows) -> Tensor:
    """The dense weights [N, K], one below the other; bits of kept values unchanged, +0 elsewhere.

    Takes some 100 times their memory.
    """
    n, k = sum(rows.members), rows.cols
    parts, most = rows.counts.numel(), rows.values.shape[1]
    steps = max(1, -(-most // WARPS))
    by_run = lambda lines: (  # noqa: E731  [parts, lines, 32, 8] to [parts, threads, steps, 8]
        torch.nn.functional.pad(lines, (0, 0, 0, 0, 0, steps * WARPS - most))
        .view(parts, steps, THREADS, PACK)
        .movedim(1, 2)
    )
    moved = (rows.deltas[..., None] >> 4 * torch.arange(PACK, device=rows.deltas.device) & 15) + 1
    moved = by_run(moved)
    if rows.fifths.numel():
        byte = rows.fifths[:, :, None] >> 8 * torch.arange(GROUP, device=moved.device)[:, None]
        byte = byte.view(parts, -1, THREADS)[:, :steps].movedim(1, 2)
        places = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device=moved.device)
        moved = moved + 16 * (byte[..., None] >> places & 1)
    begins = rows.begins[:, :, None] >> torch.arange(32, device=moved.device)[:, None] & 1
    begins = begins.view(parts, -1, THREADS)[:, :steps].movedim(1, 2)  # [parts, threads, steps]
    along = moved.flatten(2).cumsum(2).view(moved.shape)
    offset = torch.where(begins == 1, moved[..., 0] - along[..., 0], 1 << 30)
    offset[..., 0] = rows.starts & 0xFFFF
    column = along + offset.cummin(2).values[..., None] - 1
    number = (rows.starts >> 16)[..., None] + begins.cumsum(2)

    first, end = (rows.sums & 0xFFFF).long(), (rows.sums >> 16).long()
    row = rows.rows.long().repeat_interleave(rows.blocks, 0)  # [parts, rows of a share]
    owner = torch.full((parts, int(number.max()) + 1), -1, device=moved.device)
    part = torch.arange(parts, device=moved.device)
    for i in range(row.shape[1]):
        inside = torch.arange(owner.shape[1], device=moved.device)
        inside = (inside >= first[:, i, None]) & (inside < end[:, i, None])
        owner = torch.where(inside, row[:, i, None], owner)
    to = owner[part[:, None, None], number.long()]
    column = column + (part % rows.blocks * rows.block_cols)[:, None, None, None]
    values = by_run(rows.values.view(torch.int16))
    there = (values != 0) & (to >= 0)[..., None]
    dense = torch.zeros(n, k, dtype=torch.int16, device=moved.device)
    dense[to[..., None].expand_as(values)[there], column[there]] = values[there]
    return dense.view(rows.values.dtype)
