"""Weights as compressed-tensors up to 0.14 stored them, read: `sparse-bitmask` and `sparse-24-bitmask`.

Of a layer P there are `P.shape`, the dense shape; `P.compressed`, the kept values in row order; `P.bitmask`, uint8
[…, ceil(K / 8)], column c = bit c % 8 of byte c // 8; and `P.row_offsets`, int64, how many values come before each row.
The 2:4 layout has none: its values are [N, K / 2]. Early releases called the tensors `P.weight.shape` and so on.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alphaprune.shards import Shards, dtype_name

PARTS = ("shape", "compressed", "bitmask", "row_offsets")
VALUE_TYPES = (torch.float32, torch.float16, torch.bfloat16)
AGAIN = "the file is damaged, copy it again"


@dataclass(frozen=True)
class Bitmask:
    """One stored weight; made by `read`, which has checked it.

    shape: of the dense weight.   compressed: [kept] values.   mask: bool of that shape, True = kept.
    pairs: whether it is the 2:4 layout, in which a kept value may be 0.
    """

    shape: tuple[int, ...]
    compressed: Tensor
    mask: Tensor
    pairs: bool

    def dense(self) -> Tensor:
        """The weight, the bits of kept values unchanged and +0 elsewhere."""
        weight = torch.zeros(self.shape, dtype=self.compressed.dtype)
        weight[self.mask] = self.compressed
        return weight


def find(names: Iterable[str]) -> dict[str, str]:
    """Layers stored in one of the layouts: {P: the prefix of its tensors, P or P.weight}."""
    stems = (name.rsplit(".", 1)[0] for name in names if name.rsplit(".", 1)[-1] in PARTS[1:])
    return {stem.removesuffix(".weight"): stem for stem in stems}


def is_pairs(shards: Shards, stem: str) -> bool:
    """Whether the tensors under `stem` are in the 2:4 layout, by their header."""
    names, values = set(shards.names()), f"{stem}.compressed"
    return f"{stem}.row_offsets" not in names and values in names and len(shards.shape(values)) == 2


def shape_of(shards: Shards, layer: str, stem: str) -> tuple[int, ...]:
    """The dense shape of a stored weight; ValueError naming the layer if it has none."""
    stored = tuple(_part(shards, layer, stem, "shape").flatten().tolist())
    if not stored or any(not isinstance(size, int) or size < 1 for size in stored):
        raise ValueError(f"{layer}: its stored shape is {list(stored)}; {AGAIN}")
    return stored


def read(shards: Shards, layer: str, stem: str) -> Bitmask:
    """The weight of a layer; ValueError naming it if a tensor is missing or they disagree."""
    pairs, shape = is_pairs(shards, stem), shape_of(shards, layer, stem)
    compressed, bitmask = (_part(shards, layer, stem, part) for part in PARTS[1:3])
    if compressed.dtype not in VALUE_TYPES:
        kind = dtype_name(compressed.dtype)
        raise ValueError(f"{layer}: its values are {kind}; wanted float32, float16 or bfloat16, before quantization")
    bits = _bits(layer, bitmask, shape)  # […, 8 · ceil(K / 8)]
    if bits[..., shape[-1] :].any():
        raise ValueError(f"{layer}: its bitmask keeps weights past column {shape[-1]}; {AGAIN}")
    counts = bits.sum(-1, dtype=np.int64).reshape(-1)  # [N]
    if pairs:
        _check_pairs(layer, bits, shape, compressed)
    else:
        _check_rows(layer, counts, _part(shards, layer, stem, "row_offsets"), compressed)
    mask = torch.from_numpy(bits[..., : shape[-1]].astype(bool))
    return Bitmask(shape, compressed.reshape(-1), mask, pairs)


def _part(shards: Shards, layer: str, stem: str, part: str) -> Tensor:
    if f"{stem}.{part}" not in shards.names():
        raise ValueError(f"{layer}: the tensor {stem}.{part} is missing from the checkpoint; copy it again")
    return shards.tensor(f"{stem}.{part}")


def _bits(layer: str, bitmask: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 0 or 1, a row's columns up to whole bytes."""
    wanted = (*shape[:-1], -(-shape[-1] // 8))
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != wanted:
        raise ValueError(
            f"{layer}: a weight {shape} needs a uint8 bitmask of shape {wanted}, "
            f"the file has {dtype_name(bitmask.dtype)} {tuple(bitmask.shape)}"
        )
    return np.unpackbits(bitmask.numpy(), axis=-1, bitorder="little")


def _check_rows(layer: str, counts: np.ndarray, offsets: Tensor, compressed: Tensor) -> None:
    kept = int(counts.sum())
    if compressed.dim() != 1 or compressed.numel() != kept:
        raise ValueError(
            f"{layer}: its bitmask keeps {kept} weights, the file has {tuple(compressed.shape)} values; {AGAIN}"
        )
    if offsets.dtype != torch.int64 or offsets.numel() != len(counts):
        raise ValueError(
            f"{layer}: {len(counts)} rows need as many int64 row_offsets, "
            f"the file has {dtype_name(offsets.dtype)} {tuple(offsets.shape)}"
        )
    wrong = np.flatnonzero(offsets.numpy().reshape(-1) != np.cumsum(counts) - counts)
    if wrong.size:
        raise ValueError(f"{layer}: its row_offsets disagree with its bitmask from row {wrong[0]} on; {AGAIN}")


def _check_pairs(layer: str, bits: np.ndarray, shape: tuple[int, ...], compressed: Tensor) -> None:
    if len(shape) != 2 or shape[1] % 4:
        raise ValueError(f"{layer}: stored as 2 of every 4 in a row, but its shape is {shape}; {AGAIN}")
    wanted = (shape[0], shape[1] // 2)
    if tuple(compressed.shape) != wanted:
        raise ValueError(f"{layer}: 2:4 of {shape} keeps {wanted} values, the file has {tuple(compressed.shape)}")
    fours = bits[:, : shape[1]].reshape(shape[0], -1, 4).sum(-1)
    wrong = np.argwhere(fours != 2)
    if wrong.size:
        row, four = wrong[0]
        raise ValueError(
            f"{layer}: its bitmask keeps {fours[row, four]} of 4 in row {row} at column {4 * four}, not 2; {AGAIN}"
        )
