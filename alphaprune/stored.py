"""The tensors of a checkpoint as a dense model has them, however they are stored.

A layer is dense, packed by this package, or in one of the two layouts of compressed-tensors that nothing else reads any
more. A mask that the files hold is kept, so a 2:4 layer stays 2:4 where a kept value is 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from alphaprune import bitmask, formats, hf
from alphaprune.formats import Packed
from alphaprune.layer import PACKED_SUFFIXES
from alphaprune.shards import DTYPES, Shards

VALUE_TYPES = ("float32", "float16", "bfloat16")


class Stored:
    """The tensors of a folder as a dense model has them, by name: what `Shards` is for a dense folder."""

    def __init__(self, raw: Shards, skeleton: nn.Module, plain: torch.dtype) -> None:
        """plain: the dtype of int8 layers when they were dense."""
        self.raw, self.plain = raw, plain
        self._names = set(raw.names())
        self.bitmasks = bitmask.find(self._names)
        self.linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
        self.packed = {name: layer for name, layer in self.linears.items() if f"{name}.weight_mask" in self._names}
        for name, layer in self.packed.items():
            hf.check_entries(name, layer, self._entries(name))

    def names(self) -> list[str]:
        parts = {f"{stem}.{part}" for stem in self.bitmasks.values() for part in bitmask.PARTS}
        parts |= {f"{name}.{suffix}" for name in self.packed for suffix in PACKED_SUFFIXES}
        plain = [name for name in self.raw.names() if name not in parts]
        return [*plain, *(f"{name}.weight" for name in (*self.bitmasks, *self.packed))]

    def layout(self, layer: str) -> str:
        """How the weight of a layer is stored."""
        if layer in self.bitmasks:
            return "sparse-24-bitmask" if bitmask.is_pairs(self.raw, self.bitmasks[layer]) else "sparse-bitmask"
        return "sbt" if layer in self.packed else "dense"

    def is_rounded(self, layer: str) -> bool:
        """Whether a layer is packed with int8 values."""
        return layer in self.packed and self.raw.dtype(f"{layer}.weight") == "int8"

    def shape(self, name: str) -> tuple[int, ...]:
        layer = name.removesuffix(".weight")
        if layer in self.bitmasks:
            return bitmask.shape_of(self.raw, layer, self.bitmasks[layer])
        if layer in self.packed:
            return self.packed[layer].out_features, self.packed[layer].in_features
        return self.raw.shape(name)

    def tensor(self, name: str) -> Tensor:
        """The dense values; of a dense tensor mapped from the file."""
        layer = name.removesuffix(".weight")
        if layer in self.bitmasks:
            return self._bitmask(layer).dense()
        if layer in self.packed:
            packed = self._packed(layer)
            return formats.get("sbt").dense(packed, None if packed.scale is None else self.plain)[0]
        return self.raw.tensor(name)

    def mask(self, layer: str) -> Tensor | None:
        """Which weights the files keep, bool [N, K]; None where a layer is dense."""
        if layer in self.bitmasks:
            return self._bitmask(layer).mask
        return formats.get("sbt").unpack(self._packed(layer))[1] if layer in self.packed else None

    def check(self, progress: Callable[[str], None] | None = None) -> None:
        """ValueError naming the first tensor that cannot be written, or the first layer whose tensors disagree.

        Dense values are not read for it.
        """
        for layer in dict.fromkeys((*self.linears, *self.bitmasks)):
            if layer in self.bitmasks:
                self._bitmask(layer)
            elif layer in self.packed:
                formats.get("sbt").validate(self._packed(layer), layer)
            if progress is not None:
                progress("")
            name = f"{layer}.weight"
            if self.layout(layer) == "dense" and name in self._names and self.raw.dtype(name) not in VALUE_TYPES:
                raise ValueError(f"{layer}: holds {self.raw.dtype(name)}; wanted one of {', '.join(VALUE_TYPES)}")
        for name in self.raw.names():
            if self.raw.dtype(name) not in DTYPES:
                raise ValueError(f"{name}: holds {self.raw.dtype(name)}, which is not written here")

    def _bitmask(self, layer: str) -> bitmask.Bitmask:
        return bitmask.read(self.raw, layer, self.bitmasks[layer])

    def _packed(self, layer: str) -> Packed:
        values, mask, offsets, scale = (
            self.raw.tensor(f"{layer}.{suffix}") if f"{layer}.{suffix}" in self._names else None
            for suffix in PACKED_SUFFIXES
        )
        return Packed(values, mask, offsets, self.shape(f"{layer}.weight"), scale)

    def _entries(self, layer: str) -> dict[str, dict]:
        names = (f"{layer}.{suffix}" for suffix in PACKED_SUFFIXES)
        found = {name: self.raw.dtype(name) for name in names if name in self._names}
        return {n: {"shape": list(self.raw.shape(n)), "dtype": DTYPES.get(d, d)} for n, d in found.items()}
