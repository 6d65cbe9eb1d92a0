"""A packed weight, and what a format must be able to do with one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """A pruned weight [N, K] as three tensors; under a layer P they are P.weight, P.weight_mask and P.weight_offsets.

    weight: [n] kept values in the dtype of the dense weight, zero padding included.
    mask: int32 [R, C, 32], bit patterns; R = ceil(N / 16), C = ceil(K / 64).
    offsets: int32 [R * C + 1], bit patterns of u32, units of 8 values.
    shape: (N, K).
    """

    weight: Tensor
    mask: Tensor
    offsets: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.weight.nbytes + self.mask.nbytes + self.offsets.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return self.weight.device

    def to(self, device: torch.device | str) -> "Packed":
        """The same packed weight on another device."""
        return Packed(self.weight.to(device), self.mask.to(device), self.offsets.to(device), self.shape)


@dataclass(frozen=True)
class Format:
    """One way to store a pruned weight.

    pack(weight [N, K], mask bool [N, K] | None) -> Packed. Without a mask every weight that is not +0 or -0 is kept.
    unpack(packed) -> (weight [N, K] with the packed bits and +0 elsewhere, mask bool [N, K]).
    nbytes(shape, kept, dtype) -> bytes that packing never exceeds.
    kept(packed) -> weights kept.
    validate(packed, name): ValueError naming the layer if the tensors disagree; kernels trust the rest.
    """

    name: str
    pack: Callable[[Tensor, Tensor | None], Packed]
    unpack: Callable[[Packed], tuple[Tensor, Tensor]]
    nbytes: Callable[[tuple[int, int], int, torch.dtype], int]
    kept: Callable[[Packed], int]
    validate: Callable[[Packed, str], None]
