"""Packed weights that share x, in one native call or launch, with what stands around it where a kernel takes that."""

import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from alphaprune.kernels import copies, cpu, neighbours, spmm
from alphaprune.kernels.base import Norm, Together
from alphaprune.kernels.spmm import FLOATS, Prepared, needs_op

MOST_GROUPS = 64  # calls that a weight remembers, one for each count of tokens and company


def spmm_group(
    x: Tensor,
    prepared: Sequence[Prepared],
    biases: Sequence[Tensor | None] | None = None,
    norm: Norm | None = None,
    swiglu: bool = False,
) -> list[Tensor]:
    """[x W_iᵀ + b_i for every weight], each [..., N_i]; with `swiglu` [silu(y_0) · y_1] of two.

    norm: (weight [K], epsilon) of an RMSNorm that x takes first, see neighbours.add_norm. One native call where all
    weights have the same K, are bound to the same kernel, and no gradient is wanted; otherwise one call each. On CPUs
    the bits are those of separate calls; kernels of GPUs share the work otherwise and add up in another order.
    """
    if biases is not None and len(biases) != len(prepared):
        raise ValueError(f"{len(prepared)} packed weights and {len(biases)} biases: wanted one bias, or None, for each")
    given = [] if biases is None else [bias for bias in biases if bias is not None]
    if not (torch.compiler.is_compiling() or needs_op(x, None) or any(needs_op(x, bias) for bias in given)):
        found = _find(x, prepared, swiglu)
        if found is not None and (not given or all(map(_bias_fits, prepared, itertools.repeat(x), biases))):
            if norm is not None and not (found.norms and norm[0].dtype == x.dtype):
                x, norm = neighbours.add_norm(x, None, *norm), None
            every = [None if bias is None else bias.contiguous() for bias in biases] if given else None
            try:
                return found.run(x.contiguous(), every, norm)
            except RuntimeError as error:
                raise prepared[0].told(error, f"the products of {len(prepared)} weights with this x") from error
    if norm is not None:
        x = neighbours.add_norm(x, None, *norm)
    if swiglu:
        return [neighbours.swiglu(*spmm_group(x, prepared, biases))]
    every = [None] * len(prepared) if biases is None else biases
    return [one(x, bias) for one, bias in zip(prepared, every, strict=True)]


def ready(prepared: Sequence[Prepared], tokens: int, x_dtype: torch.dtype, swiglu: bool = False) -> None:
    """Makes now what the first call with so many tokens would make."""
    if len(prepared) > 1 and any(_bind(tokens, x_dtype, prepared, last) for last in (swiglu, False)):
        return
    for one in prepared:
        one.ready(tokens, x_dtype)


def _bias_fits(prepared: Prepared, x: Tensor, bias: Tensor | None) -> bool:
    return bias is None or (bias.numel() == prepared.rows and bias.dtype in FLOATS and bias.device == x.device)


def _find(x: Tensor, prepared: Sequence[Prepared], swiglu: bool) -> Together | None:
    """The native call for these weights and so many tokens, or None if they take one call each.

    Remembered by the first weight under the numbers of the others, which never come again: nothing is kept alive.
    """
    if len(prepared) < 2 or x.dim() == 0 or x.shape[-1] != prepared[0].cols or x.dtype not in FLOATS:
        return None
    groups, tokens = prepared[0].groups, x.numel() // prepared[0].cols
    key = (x.dtype, tokens, swiglu, *[one.number for one in prepared])
    if key not in groups:
        if any(p.cols != prepared[0].cols or p.packed.device != x.device for p in prepared):
            return None
        if len(groups) >= MOST_GROUPS:
            groups.clear()
        groups[key] = _bind(tokens, x.dtype, prepared, swiglu)
    return groups.get(key)


def _bind(tokens: int, x_dtype: torch.dtype, prepared: Sequence[Prepared], swiglu: bool) -> Together | None:
    kernel, *others = [p.choice(tokens, x_dtype)[0] for p in prepared]
    if any(other.name != kernel.name for other in others):
        return None
    weights = [p.packed for p in prepared]
    if kernel.name in cpu.ISAS:
        return None if swiglu else Together(cpu.bind_group(kernel.name, weights))
    if kernel.bind_group is None:
        return None
    made, key = prepared[0].made_groups, (kernel.name, swiglu, *[one.number for one in prepared])
    if key not in made:
        spmm.refuse_capture(prepared[0], kernel.name, tokens, x_dtype)
        found = made[key] = kernel.bind_group(weights, swiglu)
        if found is not None and kernel.name not in copies.TOGETHER:  # it works on what its weights keep
            for one in prepared:
                one.ready(tokens, x_dtype)
        for other in prepared[1:]:  # with one of the weights goes what was made of all
            weakref.finalize(other, _forget, weakref.ref(prepared[0]), key)
    return made[key]


def _forget(first: "weakref.ref[Prepared]", key: tuple) -> None:
    held = first()
    if held is not None:
        held.made_groups.pop(key, None)
        held.groups.clear()
