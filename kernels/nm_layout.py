"""SBT to the 2:4 panels that csrc/cuda/nm_mma_sp.cuh reads: 9/8 bytes per 16-bit weight, metadata included.

The byte layout is described at NmView in csrc/cuda/launch.h. Four neighbouring columns may keep at most two values;
where they keep fewer, zeros in pruned columns fill up. Lanes hold operands as the PTX ISA lays out mma.sp.m16n8k32 with
ordered metadata: lane 4 g + t has rows g and g + 8, of each the kept values 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import Packed, sbt

ROWS, COLS, STEPS = 32, 128, 4  # of a panel; a step is one mma.sp of 32 columns
VALUES, META = ROWS * COLS // 2, ROWS * COLS // 16  # 16-bit numbers per panel: kept values, then metadata
CHUNK = 1 << 24  # weights that are handled at a time: the temporaries are some 20 times their size
# Of the four bits of a group's mask: the lower and the upper position, zeros filled up; too many is no 2:4.
LOW, HIGH = (0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 2, 0, 0, 0), (1, 1, 1, 1, 2, 2, 2, 0, 3, 3, 3, 0, 3, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class NmPanels:
    """A weight [N, K] that keeps at most 2 of 4 neighbouring columns, as panels of 32 rows x 128 columns.

    panels: [ceil(N / 32), ceil(K / 128), 2304], 16-bit floats; the last 256 are bit patterns of metadata.
    shape: (N, K).
    """

    panels: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the panels."""
        return self.panels.nbytes


def build(packed: Packed, name: str = "the weight") -> NmPanels:
    """The panels of a packed weight in float16 or bfloat16, on its device; bits of the values unchanged.

    ValueError on other dtypes, and where four columns keep more than two values.
    """
    if packed.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: 2:4 panels hold float16 or bfloat16, got {packed.dtype}; convert the weight first")
    n, k = packed.shape
    tiles, per_row = packed.mask.shape[:2]
    step = max(1, CHUNK // (k * ROWS)) * ROWS // sbt.ROWS
    low, high = (torch.tensor(position, device=packed.device) for position in (LOW, HIGH))
    parts = []
    for begin in range(0, tiles, step):
        end = min(begin + step, tiles)
        rows = min(end * sbt.ROWS, n) - begin * sbt.ROWS
        offsets = packed.offsets[begin * per_row : end * per_row + 1]
        dense, keep = sbt.unpack_torch(Packed(packed.weight, packed.mask[begin:end], offsets, (rows, k)))
        padding = (0, -k % COLS, 0, -rows % ROWS)
        group = functional.pad(dense.view(torch.int16), padding).unflatten(1, (-1, 4))  # [rows, groups, 4]
        kept = functional.pad(keep, padding).unflatten(1, (-1, 4))
        if (crowded := kept.sum(-1) > 2).any():
            row, at = crowded.nonzero()[0].tolist()
            raise ValueError(
                f"{name}: 2:4 panels keep at most 2 of 4 neighbouring columns, got {int(kept[row, at].sum())} in row "
                f"{begin * sbt.ROWS + row}, columns {4 * at} to {4 * at + 3}; take another kernel or prune to 2:4"
            )
        bits = (kept * torch.tensor([1, 2, 4, 8], device=packed.device)).sum(-1)
        places = torch.stack([low[bits], high[bits]], -1)  # [rows, groups, 2]
        parts.append(_panels(group.gather(-1, places).flatten(1), places[..., 0] | places[..., 1] << 2))
    return NmPanels(torch.cat(parts).view(packed.dtype), (n, k))


def nbytes(packed: Packed) -> int:
    """Bytes of the panels that `build` makes."""
    n, k = packed.shape
    return -(-n // ROWS) * -(-k // COLS) * (VALUES + META) * 2


def _panels(values: Tensor, pairs: Tensor) -> Tensor:
    """int16 [R, C, 2304] from kept values [32 R, 64 C] and positions [32 R, 32 C], both in order of columns."""
    r, c = values.shape[0] // ROWS, values.shape[1] * 2 // COLS
    # [R, tile, half of the rows, g, C, step, half of the kept values, t, pair]
    cut = values.view(r, 2, 2, 8, c, STEPS, 2, 4, 2)
    operands = cut.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(r, c, VALUES)
    cut = pairs.view(r, 2, 2, 8, c, 2, 4, 4)  # [R, tile, half of the rows, g, C, half, t, four groups of columns]
    words = (cut << torch.arange(4, device=pairs.device) * 4).sum(-1)  # 16 bits
    meta = words.permute(0, 4, 3, 6, 1, 5, 2).reshape(r, c, META)  # [R, C, g, t, tile, half, half of the rows]
    return torch.cat([operands, meta.to(torch.int16)], -1)


def unpack(nm: NmPanels) -> Tensor:
    """The dense weight [N, K], bits of the kept values unchanged and +0 elsewhere."""
    (n, k), (r, c) = nm.shape, nm.panels.shape[:2]
    bits = nm.panels.view(torch.int16)
    cut = bits[..., :VALUES].view(
        r, c, STEPS, 2, 8, 4, 2, 2, 2
    )  # [R, C, step, tile, g, t, half, half of the rows, pair]
    values = cut.permute(0, 3, 7, 4, 1, 2, 6, 5, 8).reshape(r * ROWS, -1, 2)
    words = bits[..., VALUES:].view(r, c, 8, 4, 2, 2, 2).permute(0, 4, 6, 2, 1, 5, 3).reshape(r * ROWS, -1, 1)
    pairs = (words.to(torch.int64) >> torch.arange(4, device=bits.device) * 4 & 15).flatten(1)  # [rows, groups]
    places = torch.stack([pairs & 3, pairs >> 2], -1)
    dense = bits.new_zeros(*pairs.shape, 4).scatter_(-1, places, values)
    return dense.flatten(1)[:n, :k].contiguous().view(nm.panels.dtype)
