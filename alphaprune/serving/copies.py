"""Layouts of their own that kernels keep beside packed weights, made before the KV cache takes what is left.

A request then finds them there: nothing is kept for good once the server runs. What there is no room for is not made,
and other kernels run in its place.
"""

from collections.abc import Sequence

import torch
from torch import nn

from alphaprune import memory
from alphaprune.console import size
from alphaprune.kernels import base, copies, spmm
from alphaprune.layer import SparseLinear


def weights_of(model: nn.Module, direct: bool = True) -> list[spmm.Prepared]:
    """The packed weights of a model as its layers call them; direct: not by the op that torch.compile knows."""
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return [layer.prepared() if direct else spmm.of_op(layer.packed) for layer in layers]


def make(weights: Sequence[spmm.Prepared], most: int, dtype: torch.dtype, allowed: float) -> int:
    """Makes what the kernels for up to `most` tokens in `dtype` keep beside their weights; returns its bytes.

    allowed: bytes for all of it. While it would be more, the kernel for the most tokens is left out, as the log says.
    """
    while (wanted := _wanted(weights, most, dtype)) and sum(wanted.values()) > allowed:
        kernel, nbytes = wanted.popitem()
        left = size(max(0, allowed - sum(wanted.values())))
        base.log.warning(
            f"kernel {kernel} is left out: its copies of the weights are {size(nbytes)}, and there is room for {left}; "
            f"others run in its place"
        )
        for weight in weights:
            weight.leave_out(kernel, "there is no room in memory for its copies of the weights")
    for weight in weights:
        for tokens, kernel in weight.kernels(most, dtype).items():
            if copies.nbytes(kernel.name, weight.packed):
                needs = {f"the copy of {weight.name or 'a layer'} that {kernel.name} keeps": weight.packed.nbytes}
                with memory.explained(needs, weight.device, "give less --kv-memory"):
                    weight.ready(tokens, dtype)
    return sum(weight.copied() for weight in weights)


def _wanted(weights: Sequence[spmm.Prepared], most: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by kernel, those for few tokens first."""
    first: dict[str, int] = {}  # kernel → the fewest tokens that a weight has it for
    nbytes: dict[str, int] = {}
    for weight in weights:
        stretches = weight.kernels(most, dtype)
        for name in {kernel.name for kernel in stretches.values()}:
            kept = copies.nbytes(name, weight.packed)
            if kept:
                nbytes[name] = nbytes.get(name, 0) + kept
                first[name] = min(first.get(name, most), *(t for t, k in stretches.items() if k.name == name))
    return {name: nbytes[name] for name in sorted(nbytes, key=first.__getitem__)}
