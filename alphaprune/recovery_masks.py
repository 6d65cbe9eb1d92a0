"""Which weights recovery trains: the kept ones of the prunable layers."""

import torch
from torch import Tensor, nn

from alphaprune import model as models
from alphaprune.formats import sbt
from alphaprune.layer import SparseLinear


def packed_of(model: nn.Module) -> dict[str, SparseLinear]:
    """The packed layers of the blocks by full name; an output layer that was rounded stays as it is."""
    inside = f"{models.open_source(model).prefix}."
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    return {name: layer for name, layer in found.items() if name.startswith(inside)}


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """{prunable layer: [N, K] bool, True = keep}: what packed layers say, and what is not 0 in dense ones."""
    found = {}
    for name, layer in packed_of(model).items():
        sbt.validate(layer.packed, name)
        found[name] = sbt.unpack(layer.packed)[1]
    for block in models.open_source(model).blocks():
        found |= {name: layer.weight.detach() != 0 for name, layer in block.linears.items()}
    return found


def check_masks(model: nn.Module, masks: dict[str, Tensor], rank: int) -> None:
    """ValueError naming the first layer whose mask or rank does not fit, or if there is no zero in any."""
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | SparseLinear):
            raise ValueError(f"{name}: the mask names a layer that is no nn.Linear or SparseLinear of this model")
        shape = (layer.out_features, layer.in_features)
        if tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise ValueError(f"{name}: wanted a mask of bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
        if rank > min(shape):
            raise ValueError(
                f"{name}: rank {rank} is more than a layer of {shape[0]}×{shape[1]} has: at most {min(shape)}"
            )
        if isinstance(layer, SparseLinear) and layer.weight_scale is not None:
            raise ValueError(
                f"{name}: int8 values do not train; recover the model before it is rounded, or expand it with "
                f"model.dequantize() and round it again afterwards"
            )
        if isinstance(layer, nn.Linear) and bool((layer.weight.detach()[~mask.to(layer.weight.device)] != 0).any()):
            raise ValueError(f"{name}: the mask drops weights that are not 0; prune the model by it first")
    if all(bool(mask.all()) for mask in masks.values()):
        raise ValueError("no layer of this model has a zero, so there is nothing to recover; prune it first")
