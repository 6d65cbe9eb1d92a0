"""Layouts of their own that kernels keep beside packed weights, made before the KV cache takes what is left.

A request then finds them there: nothing is kept for good once the server runs. What there is no room for is not made,
and other kernels run in its place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from alphaprune import memory
from alphaprune.console import size
from alphaprune.decoder import Decoder, why_not
from alphaprune.kernels import base, copies, group, spmm
from alphaprune.layer import SparseLinear


class Call(NamedTuple):
    """Packed weights that are called together, and whether with SwiGLU behind them."""

    weights: list[spmm.Prepared]
    swiglu: bool = False


def weights_of(model: nn.Module, direct: bool = True) -> list[spmm.Prepared]:
    """The packed weights of a model as its layers call them; direct: not by the op that torch.compile knows."""
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return [layer.prepared() if direct else spmm.of_op(layer.packed) for layer in layers]


def calls_of(model: nn.Module, direct: bool = True, ours: bool = True) -> list[Call]:
    """The packed weights of a model as they are called, each once. ours: by our decoder, where it runs the model."""
    found = []
    if direct and ours and why_not(model.config, model) is None:
        blocks = Decoder(model).blocks
        found = [Call(packed.weights, swiglu) for block in blocks for packed, swiglu in block.packed()]
    known = {id(weight) for call in found for weight in call.weights}
    return found + [Call([weight]) for weight in weights_of(model, direct) if id(weight) not in known]


def make(calls: Sequence[Call], most: int, dtype: torch.dtype, allowed: float) -> int:
    """Makes what the kernels for up to `most` tokens in `dtype` keep beside their weights; returns its bytes.

    allowed: bytes for all of it. While it would be more, the kernel for the most tokens is left out, as the log says.
    """
    while (wanted := _wanted(calls, most, dtype)) and sum(wanted.values()) > allowed:
        kernel, nbytes = wanted.popitem()
        left = size(max(0, allowed - sum(wanted.values())))
        base.log.warning(
            f"kernel {kernel} is left out: its copies of the weights are {size(nbytes)}, and there is room for {left}; "
            f"others run in its place"
        )
        for call in calls:
            for weight in call.weights:
                weight.leave_out(kernel, "there is no room in memory for its copies of the weights")
    for call in calls:
        for tokens, names in _stretches(call, most, dtype).items():
            if kept := _kept(call, names):
                first = call.weights[0]
                needs = {f"the copy of {first.name or 'a layer'} that {names[0]} keeps": sum(kept.values())}
                with memory.explained(needs, first.device, "give less --kv-memory"):
                    group.ready(call.weights, tokens, dtype, call.swiglu)
    return sum(weight.copied() for call in calls for weight in call.weights)


def _stretches(call: Call, most: int, dtype: torch.dtype) -> dict[int, list[str]]:
    """{the most tokens of a stretch: the kernel of each weight}, rising."""
    borders = sorted({tokens for weight in call.weights for tokens in weight.kernels(most, dtype)})
    return {tokens: [weight.choice(tokens, dtype)[0].name for weight in call.weights] for tokens in borders}


def _kept(call: Call, names: Sequence[str]) -> dict[tuple[str, int], int]:
    """Bytes by kernel and layout, where the weights have kernels of these names."""
    packed = [weight.packed for weight in call.weights]
    if len(set(names)) == 1 and names[0] in copies.TOGETHER:
        return {(names[0], 0): copies.nbytes(names[0], *packed)}
    each = {(name, place): copies.nbytes(name, packed[place]) for place, name in enumerate(names)}
    return {key: nbytes for key, nbytes in each.items() if nbytes}


def _wanted(calls: Sequence[Call], most: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by kernel, those for few tokens first."""
    first: dict[str, int] = {}  # kernel → the fewest tokens that a weight has it for
    nbytes: dict[str, int] = {}
    for call in calls:
        layouts: dict[tuple[str, int], int] = {}  # each once, whatever stretches have it
        for tokens, names in _stretches(call, most, dtype).items():
            kept = _kept(call, names)
            layouts |= kept
            first |= {name: min(first.get(name, most), tokens) for name, _ in kept}
        for (name, _), one in layouts.items():
            nbytes[name] = nbytes.get(name, 0) + one
    return {name: nbytes[name] for name in sorted(nbytes, key=first.__getitem__)}
