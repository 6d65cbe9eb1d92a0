"""A packed weight, and what a format must be able to do with one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PACKED_SUFFIXES = ("weight", "weight_mask", "weight_offsets", "weight_scale")  # the last one only with int8 values


@dataclass(frozen=True, eq=False)
class Packed:
    """A pruned weight [N, K] as three tensors, or four; `tensors` says how they are called under a layer.

    weight: [n] kept values, zero padding included, in the dtype of the dense weight; or int8, multiplied by scale.
    mask: int32 [R, C, 32], bit patterns; R = ceil(N / 16), C = ceil(K / 64).
    offsets: int32 [R * C + 1], bit patterns of u32, units of 8 values.
    shape: (N, K).
    scale: of int8 values, float32 [N] or [N, ceil(K / 128)]: W[n, k] = value * scale[n, k // 128]. None for floats.
    activations: torch.int8 where kernels may round x to 8 bits beside int8 values: each token's in units of 1 / 127 of
        the largest of 128 columns. None: they round no coarser than to 16 bits. Nothing of it is stored, and beside
        floats it means nothing.
    """

    weight: Tensor
    mask: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    scale: Tensor | None = None
    activations: torch.dtype | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored of a layer P, by what follows `P.`: weight, weight_mask, weight_offsets, weight_scale."""
        found = {"weight": self.weight, "weight_mask": self.mask, "weight_offsets": self.offsets}
        return found if self.scale is None else {**found, "weight_scale": self.scale}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def density(self) -> float:
        """Values / weights, padding included: what kernels read for each weight of W."""
        return self.weight.numel() / (self.shape[0] * self.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.weight.dtype

    @property
    def dense_dtype(self) -> torch.dtype:
        """Dtype that holds a dense row without rounding it further: that of the values; float32 for int8."""
        return self.weight.dtype if self.scale is None else self.scale.dtype

    @property
    def bytes_allowed(self) -> bool:
        """Whether kernels may multiply bytes by bytes."""
        return self.dtype == self.activations == torch.int8

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return self.weight.device

    def map(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        """The same packed weight with every tensor replaced by `change(tensor)`."""
        return self.of([change(tensor) for tensor in self.tensors.values()])

    def of(self, tensors: Sequence[Tensor]) -> "Packed":
        """The same packed weight made of others, which come in the order of `tensors`."""
        scale = None if self.scale is None else tensors[3]
        return Packed(*tensors[:3], self.shape, scale, self.activations)

    def to(self, device: torch.device | str) -> "Packed":
        """The same packed weight on another device."""
        return self.map(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class Format:
    """One way to store a pruned weight.

    pack(weight [N, K], mask bool [N, K] | None, scale | None) -> Packed. Without a mask every weight that is not +0 or
        -0 is kept. An int8 weight comes with its scale, a float one without.
    unpack(packed) -> (weight [N, K] with the packed bits and +0 elsewhere, mask bool [N, K]); int8 gives the integers.
    dense(packed, dtype | None) -> the same as a dense layer holds it: int8 multiplied by its scale, in float32 if None.
    nbytes(shape, kept, dtype, scales per row = 0) -> bytes that packing never exceeds.
    kept(packed) -> weights kept.
    validate(packed, name): ValueError naming the layer if the tensors disagree; kernels trust the rest.
    """

    name: str
    pack: Callable[..., Packed]
    unpack: Callable[[Packed], tuple[Tensor, Tensor]]
    dense: Callable[..., tuple[Tensor, Tensor]]
    nbytes: Callable[..., int]
    kept: Callable[[Packed], int]
    validate: Callable[[Packed, str], None]
