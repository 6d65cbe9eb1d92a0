"""SBT to the pairs of columns that csrc/cuda/pair_mma.cu and pair_wgmma.cu multiply: bytes for fewer instructions.

Two neighbouring columns 2 i and 2 i + 1 of a row are a value of 32 bits, kept where one of them is, with +0 in the
place of a weight that is pruned. The matrix of these values [N, 16 ceil(K / 32)], each 16 of them in the order in which
the lanes of mma.m16n8k16 have them (0, 4, 8, 12, 1, 5, ...), is packed as SBT is (csrc/layout.h), so a bit and a load
serve two weights. Of random weights of density d a share 1 - (1 - d)^2 of the pairs is kept, of 4 bytes each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import Packed, sbt

STEP = 16  # pairs, of 32 columns
COLS = 2 * STEP
ORDER = tuple(pair + 4 * i for pair in range(4) for i in range(4))  # of the pairs of a step, as lanes have them
CHUNK = 1 << 24  # weights that are handled at a time: the temporaries are some 20 times their size
EVEN = 0x55555555  # of a mask word, the bits of even columns


@dataclass(frozen=True, eq=False)
class Pairs:
    """A weight [N, K] of 16-bit floats by pairs of columns.

    packed: SBT [N, 16 ceil(K / 32)] of "float32", whose bits are two weights, that of the even column below.
    dtype: of the weights. shape: (N, K).
    """

    packed: Packed
    dtype: torch.dtype
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.packed.nbytes


def build(packed: Packed, name: str = "the weight") -> Pairs:
    """The pairs of a packed weight in float16 or bfloat16, on its device; bits of the values unchanged.

    ValueError on other dtypes.
    """
    if packed.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: pairs are of float16 or bfloat16, got {packed.dtype}; convert the weight first")
    n, k = packed.shape
    tiles, per_row = packed.mask.shape[:2]
    step, order = max(1, CHUNK // (k * sbt.ROWS)), torch.tensor(ORDER, device=packed.device)
    values, masks, offsets, units = [], [], [], 0
    for begin in range(0, tiles, step):
        end = min(begin + step, tiles)
        rows = min(end * sbt.ROWS, n) - begin * sbt.ROWS
        there = packed.offsets[begin * per_row : end * per_row + 1]
        dense, keep = sbt.unpack_torch(Packed(packed.weight, packed.mask[begin:end], there, (rows, k)))
        two, kept = functional.pad(dense.view(torch.int16), (0, -k % COLS)), functional.pad(keep, (0, -k % COLS))
        bits, any_kept = two.view(torch.int32).unflatten(1, (-1, STEP)), kept.view(rows, -1, STEP, 2).any(-1)
        made = sbt.pack(*(part[..., order].flatten(1) for part in (bits.view(torch.float32), any_kept)))
        count = int(made.offsets[-1])
        values.append(made.weight[: count * sbt.UNIT] if end < tiles else made.weight)
        masks.append(made.mask)
        offsets.append((made.offsets if end == tiles else made.offsets[:-1]) + units)
        units += count
    found = Packed(torch.cat(values), torch.cat(masks), torch.cat(offsets), (n, -(-k // COLS) * STEP))
    return Pairs(found, packed.dtype, packed.shape)


def counts(packed: Packed) -> Tensor:
    """int64 [row tiles, ceil(K / 128)]: kept pairs of each of the macro tiles that `build` makes."""
    found = sbt.popcount((packed.mask | packed.mask >> 1) & EVEN).sum(-1)  # [row tiles, column tiles]
    return functional.pad(found, (0, found.shape[1] % 2)).unflatten(1, (-1, 2)).sum(-1)


def nbytes(packed: Packed) -> int:
    """Bytes of what `build` makes."""
    kept = counts(packed)
    units = int((-(-kept // sbt.UNIT)).sum())
    values = (units * sbt.UNIT * 4 + 3 * sbt.TAIL - 1) // sbt.TAIL * sbt.TAIL
    return values + kept.numel() * 4 * (sbt.WORDS + 1) + 4


def bytes_per_weight(density: float) -> float:
    """About those of random weights of which so much is kept, without padding."""
    return 2 * (1 - (1 - density) ** 2) + 1 / 16


def unpack(pairs: Pairs) -> Tensor:
    """The dense weight [N, K], bits of the kept values unchanged and +0 elsewhere."""
    dense, _ = sbt.unpack_torch(pairs.packed)
    places = torch.tensor(ORDER, device=dense.device).argsort()
    bits = dense.view(torch.int32).unflatten(1, (-1, STEP))[..., places].flatten(1)
    return bits.view(torch.int16)[:, : pairs.shape[1]].contiguous().view(pairs.dtype)
