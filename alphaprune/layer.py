"""SparseLinear, the drop-in for nn.Linear, and `sparsify`, which puts it into a model."""

from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import formats
from alphaprune.formats import Packed
from alphaprune.kernels import spmm as op
from alphaprune.model import open_source

PACKED_SUFFIXES = ("weight", "weight_mask", "weight_offsets")


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with W stored as its kept values and a bitmap (format SBT); called as nn.Linear is.

    Buffers (not parameters: adapters train on top of them, they do not train):
    weight [n] values in the dtype of the dense weight, padded; weight_mask [R, C, 32] int32; weight_offsets
    [R·C + 1] int32 with R = ceil(N/16), C = ceil(K/64).   bias: [N] parameter or None.
    Differentiable in x and bias.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.register_buffer("weight", packed.weight)
        self.register_buffer("weight_mask", packed.mask)
        self.register_buffer("weight_offsets", packed.offsets)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.name = ""  # of the layer in its model, for error messages
        self._prepared: op.Prepared | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> "SparseLinear":
        """The sparse twin of `linear`; values keep their dtype and bits.

        mask: [N, K] bool, True = keep; without it, the weights that are not zero are kept.
        """
        packed = formats.get("sbt").pack(linear.weight.detach(), mask)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        if bias is not None:
            bias.requires_grad_(linear.bias.requires_grad)
        made = cls(packed, bias)
        made.train(linear.training)
        return made

    @classmethod
    def empty(
        cls, shape: tuple[int, int], values: int, bias: bool, dtype: torch.dtype, bias_dtype: torch.dtype
    ) -> "SparseLinear":
        """A layer on the meta device, for a loader to fill: `values` is the padded length of the values tensor."""
        n, k = shape
        rows, columns = -(-n // 16), -(-k // 64)
        packed = Packed(
            torch.empty(values, dtype=dtype, device="meta"),
            torch.empty(rows, columns, 32, dtype=torch.int32, device="meta"),
            torch.empty(rows * columns + 1, dtype=torch.int32, device="meta"),
            shape,
        )
        return cls(packed, torch.empty(n, dtype=bias_dtype, device="meta") if bias else None)

    @property
    def packed(self) -> Packed:
        buffers = self._buffers
        shape = (self.out_features, self.in_features)
        return Packed(buffers["weight"], buffers["weight_mask"], buffers["weight_offsets"], shape)

    def to_linear(self) -> nn.Linear:
        """The dense twin: the kept weights, and zeros."""
        weight, _ = formats.get("sbt").unpack(self.packed)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        linear.train(self.training)
        return linear

    def prepared(self) -> "op.Prepared":
        """The packed weight, validated once for as long as its tensors stay the same objects."""
        found, buffers = self._prepared, self._buffers
        if (
            found is None
            or found.packed.weight is not buffers["weight"]
            or found.packed.mask is not buffers["weight_mask"]
            or found.packed.offsets is not buffers["weight_offsets"]
        ):
            found = op.prepare(self.packed, self.name or "SparseLinear")
            self._prepared = found
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in x's dtype."""
        if torch.compiler.is_compiling():
            return op.spmm(x, self.packed, self.bias)
        return self.prepared()(x, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format=sbt, bytes={self.packed.nbytes}"
        )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: Any) -> None:
        # Another pruning of the same layer has another number of values: take its size, then its content.
        self._prepared = None
        for suffix in PACKED_SUFFIXES:
            incoming, own = state_dict.get(prefix + suffix), self._buffers[suffix]
            if incoming is not None and suffix == "weight" and incoming.ndim == 1 and incoming.shape != own.shape:
                self._buffers[suffix] = own.new_empty(incoming.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict:
        # Addresses mean nothing in a copy or another process.
        return {**self.__dict__, "_prepared": None}


def worth_packing(weight: Tensor, mask: Tensor | None) -> bool:
    """Whether SBT is smaller than dense: the one rule for what is stored packed, the same on every machine."""
    kept = int(mask.sum()) if mask is not None else int((weight != 0).sum())
    return formats.get("sbt").nbytes(tuple(weight.shape), kept, weight.dtype) < weight.nbytes


def sparsify(model: nn.Module, masks: dict[str, Tensor] | None = None) -> nn.Module:
    """Replaces nn.Linear layers by SparseLinear, in place, where that is smaller; returns the model.

    masks: {layer: [N, K] bool, True = keep} as `prune` returns them; without masks, the zeros that are there count.
    Raises ValueError if a mask names no linear layer or has another shape.
    """
    if masks is None:
        layers = {name: layer for block in open_source(model).blocks() for name, layer in block.linears.items()}
    else:
        modules = dict(model.named_modules())
        layers = {name: modules.get(name) for name in masks}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name}: the mask names a layer that is no nn.Linear of this model")
        mask = masks[name] if masks is not None else None
        if mask is not None and mask.shape != layer.weight.shape:
            raise ValueError(f"{name}: mask has shape {tuple(mask.shape)}, the weight {tuple(layer.weight.shape)}")
        if worth_packing(layer.weight, mask):
            sparse = SparseLinear.from_linear(layer, mask)
            sparse.name = name
            model.set_submodule(name, sparse)
        elif mask is not None:
            layer.weight.data = layer.weight.data.masked_fill(~mask, 0)
    return model
