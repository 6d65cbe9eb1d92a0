"""SBT to the nibble-delta rows that csrc/cuda/delta_spmv.cuh reads: about 2.5 bytes per kept 16-bit value.

The byte layout is described at DeltaView in csrc/cuda/launch.h. A row keeps a stream of values per block of columns;
between two whose columns are more than 16 apart stand zeros in pruned columns, 16 further each. Eight of the stream are
a pack; a few lanes share a row's packs, each a contiguous run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaprune.formats import Packed, sbt

PACK = 8
REACH = 16  # columns that one delta spans at most
MOST_COLS = 12240  # of a block: kMostBlockCols
LANES = (4, 8, 16, 32)  # that share a row
WARPS = 2048  # enough to fill a large GPU: fewer, longer rows are shared by more lanes
CHUNK = 1 << 22  # weights that are handled at a time: the temporaries are some 100 times their size


@dataclass(frozen=True, eq=False)
class DeltaRows:
    """A weight [N, K] as nibble-delta rows, rows in falling order of their packs.

    values: [packs, 8], 16-bit floats; pack 0 is empty.
    deltas: int32 [packs], bit patterns of eight nibbles.
    first: int32 [N * blocks + 1], of the rows in order, a block's packs after the other.
    starts: int16 [slots, blocks, 32], bit patterns of u16: the column of the block where a lane's run begins.
    slots: int32 [slots + 1], the first of a warp's rows in order * 8 + log2(lanes per row).
    row_of: int32 [N], which row of W that is.
    shape: (N, K). block_cols: columns of a block, a multiple of 8.
    """

    values: Tensor
    deltas: Tensor
    first: Tensor
    starts: Tensor
    slots: Tensor
    row_of: Tensor
    shape: tuple[int, int]
    block_cols: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the kernel reads."""
        return self.values, self.deltas, self.first, self.starts, self.slots, self.row_of

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def blocks(self) -> int:
        """Blocks of columns."""
        return -(-self.shape[1] // self.block_cols)


@dataclass(frozen=True, eq=False)
class _Streams:
    """Streams of some rows: entries in order of row, block and column.

    column: in its block; value: int16 bits; stream: row * blocks + block; position: in its stream.
    length: of each stream.
    """

    column: Tensor
    value: Tensor
    stream: Tensor
    position: Tensor
    length: Tensor


def block_cols(cols: int) -> int:
    """Columns per block: as few blocks as shared memory allows, of equal size."""
    blocks = -(-cols // MOST_COLS)
    return -(-cols // (8 * blocks)) * 8


def build(packed: Packed, name: str = "the weight") -> DeltaRows:
    """The nibble-delta rows of a packed weight in float16 or bfloat16, on its device; bits of the values unchanged.

    ValueError on other dtypes.
    """
    if packed.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: nibble-delta rows hold float16 or bfloat16, got {packed.dtype}; convert the weight")
    n, k = packed.shape
    width = block_cols(k)
    blocks = -(-k // width)
    chunks = _chunks(packed)
    lengths = torch.cat([_streams(dense, keep, width).length for _, dense, keep in chunks()])  # [N * blocks]
    packs = ((lengths + PACK - 1) // PACK).view(n, blocks)
    row_of = packs.sum(1).argsort(descending=True, stable=True)
    lanes = _lanes(packs[row_of])  # [N], in order
    slots, slot_of, within = _slots(lanes)
    ends = packs[row_of].flatten().cumsum(0) + 1
    first = torch.cat([ends.new_ones(1), ends])
    order = torch.empty_like(row_of).scatter_(0, row_of, torch.arange(n, device=row_of.device))  # the inverse

    total = int(ends[-1])
    values = torch.zeros(total * PACK, dtype=torch.int16, device=packed.device)
    nibbles = torch.zeros(total * PACK, dtype=torch.uint8, device=packed.device)
    starts = torch.zeros(slots.numel() - 1, blocks, 32, dtype=torch.int16, device=packed.device)
    for top, dense, keep in chunks():
        s = _streams(dense, keep, width)
        at = order[top + s.stream // blocks]  # [entries], the row in order
        block = s.stream % blocks
        share = lanes[at]
        lane, step, opens = _runs(s.position // PACK, packs.flatten()[top * blocks + s.stream], share)
        slot = (first[at * blocks + block] + step * share + lane) * PACK + s.position % PACK
        values[slot] = s.value
        opens &= s.position % PACK == 0
        before = torch.cat([s.column.new_zeros(1), s.column[:-1]])
        nibbles[slot] = torch.where(opens, 0, s.column - before - 1).to(torch.uint8)
        where = (slot_of[at], block, within[at] * share + lane)
        starts[tuple(index[opens] for index in where)] = s.column[opens].to(torch.int16)
    places = torch.arange(PACK, device=packed.device) * 4
    deltas = (nibbles.view(total, PACK).to(torch.int64) << places).sum(1)
    small = [tensor.to(torch.int32) for tensor in (deltas, first, slots, row_of)]
    words, first, slots, row_of = small
    return DeltaRows(values.view(packed.dtype).view(total, PACK), words, first, starts, slots, row_of, (n, k), width)


def nbytes(packed: Packed) -> int:
    """Bytes of what `build` makes, about: as though kept columns lay anywhere, each as likely as the others."""
    n, k = packed.shape
    streams, kept = n * -(-k // block_cols(k)), sbt.kept(packed)
    skipped = (1 - kept / (n * k)) ** REACH  # the share of deltas that reach further, and further again
    entries = min(kept / (1 - skipped) if kept else 0, kept + n * k / REACH)
    packs = 1 + (entries + streams * (PACK - 1) / 2) / PACK
    return int(packs * (2 * PACK + 4)) + 4 * (streams + n + 1) + 64 * streams  # as many lanes as may share a row


def _chunks(packed: Packed):
    """A function that yields (first row, dense int16 bits [rows, K], mask [rows, K]) from the top of W on."""
    n, k = packed.shape
    tiles, per_row = packed.mask.shape[:2]
    step = max(1, CHUNK // (k * sbt.ROWS))

    def chunks():
        for begin in range(0, tiles, step):
            end = min(begin + step, tiles)
            rows = min(end * sbt.ROWS, n) - begin * sbt.ROWS
            offsets = packed.offsets[begin * per_row : end * per_row + 1]
            dense, keep = sbt.unpack_torch(Packed(packed.weight, packed.mask[begin:end], offsets, (rows, k)))
            yield begin * sbt.ROWS, dense.view(torch.int16), keep

    return chunks


def _streams(dense: Tensor, keep: Tensor, width: int) -> _Streams:
    """The streams of dense rows (int16 bits), gaps filled with zeros."""
    rows, k = keep.shape
    blocks = -(-k // width)
    row, col = keep.nonzero(as_tuple=True)
    stream, column = row * blocks + col // width, col % width
    same = torch.zeros_like(stream, dtype=torch.bool)
    same[1:] = stream[1:] == stream[:-1]
    gap = torch.ones_like(column)
    gap[1:] = torch.where(same[1:], column[1:] - column[:-1], 1)
    fills = (gap - 1) // REACH  # zeros before a value
    copies = fills + 1
    last = copies.cumsum(0) - 1  # place of each value among all entries
    source = torch.arange(column.numel(), device=column.device).repeat_interleave(copies)
    back = last[source] - torch.arange(source.numel(), device=column.device)  # entries until the value itself
    filled = column[source] - gap[source] + REACH * (fills[source] - back + 1)  # 16, 32, … past the value before
    value = torch.where(back == 0, dense[row, col][source], 0)
    length = torch.zeros(rows * blocks, dtype=torch.int64, device=column.device)
    length.scatter_add_(0, stream, copies)
    position = torch.arange(source.numel(), device=column.device) - (length.cumsum(0) - length)[stream[source]]
    return _Streams(torch.where(back == 0, column[source], filled), value, stream[source], position, length)


def _lanes(packs: Tensor) -> Tensor:
    """How many lanes share each row, from packs [N, blocks] in falling order: never fewer than a later row has."""
    steps = (packs.sum() / (32 * WARPS)).round().clamp(4, 24)  # that a warp should take
    wanted = packs.sum(1) / packs.shape[1] / steps
    lanes = torch.full_like(packs[:, 0], LANES[0])
    for count in LANES[1:]:
        lanes[wanted > count // 2] = count
    return lanes


def _slots(lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of 32 lanes for rows in falling order of lanes: (slots int64 [slots + 1], slot of each row, row in it)."""
    starts, slot_of, within, row, slot = [], [], [], 0, 0
    for count in reversed(LANES):
        rows, each = int((lanes == count).sum()), 32 // count
        index = torch.arange(rows, device=lanes.device)
        slot_of.append(slot + index // each)
        within.append(index % each)
        starts.append((row + torch.arange(0, rows, each, device=lanes.device)) * 8 + count.bit_length() - 1)
        row, slot = row + rows, slot + -(-rows // each)
    return torch.cat([*starts, starts[0].new_tensor([row * 8])]), torch.cat(slot_of), torch.cat(within)


def _runs(pack: Tensor, packs: Tensor, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lane, step in its run, whether it opens the run) of the pack-th of `packs` that are shared by `lanes` lanes."""
    each, more = packs // lanes, packs % lanes  # the first `more` lanes have one more
    border = more * (each + 1)
    early = pack < border
    rest = (pack - border) // each.clamp_min(1)
    lane = torch.where(early, pack // (each + 1), more + rest)
    step = torch.where(early, pack % (each + 1), (pack - border) % each.clamp_min(1))
    return lane, step, step == 0


def unpack(rows: DeltaRows) -> Tensor:
    """The dense weight [N, K], bits of the kept values unchanged and +0 elsewhere; takes some 100 times its memory."""
    (n, k), blocks, device = rows.shape, rows.blocks, rows.values.device
    first = rows.first.to(torch.int64)
    packs = first.diff()  # [N * blocks], in order
    lanes, slot_of, within = _lanes_of(rows)
    stream = torch.arange(n * blocks, device=device).repeat_interleave(packs)  # [packs - 1]
    pack = torch.arange(stream.numel(), device=device) - (first[:-1] - 1)[stream]
    lane, step, _ = _runs(pack, packs[stream], lanes[stream // blocks])
    stored = first[stream] + step * lanes[stream // blocks] + lane
    places = torch.arange(PACK, device=device) * 4
    moved = (rows.deltas[stored, None] >> places & 15) + 1  # [packs - 1, 8]
    start = rows.starts[slot_of[stream // blocks], stream % blocks, (within * lanes)[stream // blocks] + lane]
    start = start.to(torch.int64) & 0xFFFF
    along = moved.flatten().cumsum(0).view(-1, PACK)
    opens = torch.where(step == 0, along[:, 0] - 1, 0).cummax(0).values  # the sum up to a run's first entry, less one
    column = start[:, None] + along - opens[:, None] - 1
    row = rows.row_of.to(torch.int64)[stream // blocks]
    dense = torch.zeros(n, blocks * rows.block_cols + PACK, dtype=torch.int16, device=device)
    at = row[:, None] * dense.shape[1] + (stream % blocks * rows.block_cols)[:, None] + column
    values = rows.values.view(torch.int16)[stored]
    there = values != 0
    dense.view(-1)[at[there]] = values[there]
    return dense[:, :k].contiguous().view(rows.values.dtype)


def _lanes_of(rows: DeltaRows) -> tuple[Tensor, Tensor, Tensor]:
    """(lanes, slot, row in the slot) of each row in order, from the slots."""
    begin = rows.slots.to(torch.int64) >> 3
    slot_of = torch.arange(begin.numel() - 1, device=begin.device).repeat_interleave(begin.diff())
    lanes = torch.ones_like(slot_of) << (rows.slots[:-1].to(torch.int64) & 7)[slot_of]
    return lanes, slot_of, torch.arange(slot_of.numel(), device=begin.device) - begin[slot_of]
