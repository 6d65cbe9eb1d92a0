"""The compiled CUDA kernels on layouts of their own, which are made of a packed weight when it is bound."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from alphaprune.formats import Packed, native
from alphaprune.kernels import cuda, delta_layout, nm_layout, pair_layout
from alphaprune.kernels.base import Bound, Kernel, Together


def bind_delta(packed: Packed) -> Bound:
    """delta_spmv with one packed weight, of which it makes and keeps nibble-delta rows: about 2.6 bytes per value."""
    made, rows = _delta(packed)
    return cuda.bound(made, packed, rows)


def bind_delta_group(weights: Sequence[Packed], swiglu: bool) -> Together | None:
    """delta_spmv with up to 3 weights, whose rows it keeps together; of two their SwiGLU."""
    shapes = [packed.shape for packed in weights]
    if len(weights) > cuda.MOST_MEMBERS or (swiglu and (len(weights) != 2 or shapes[0] != shapes[1])):
        return None
    made, rows = _delta(*weights, pairs=swiglu)
    outputs = 1 if swiglu else len(weights)
    found = cuda.joined(made, rows.members, rows.cols, weights[0].device, outputs, rows, nbytes=rows.nbytes)
    return replace(found, norms=rows.blocks == 1)


def _delta(*weights: Packed, pairs: bool = False) -> tuple[Any, delta_layout.DeltaRows]:
    """The native weight, and what it reads."""
    device = weights[0].device
    index = device.index or 0
    cuda.opened(index)
    rows = delta_layout.build(*weights, pairs=pairs)
    if device.type == "cuda":  # the kernel may read its weight before those that came earlier have ended
        torch.cuda.current_stream(device).synchronize()
    addresses = [tensor.data_ptr() if tensor.numel() else 0 for tensor in rows.tensors]
    code = native.DTYPES[weights[0].dtype]
    made = cuda.load().DeltaWeight(addresses, rows.members, rows.sizes, rows.pairs, code, index)
    return cuda.in_order(made, *rows.tensors[:2]), rows


def bind_nm(packed: Packed) -> Bound:
    """nm_mma_sp with one packed weight, of which it makes and keeps 2:4 panels: 9/8 bytes per weight."""
    made, panels = native_nm(packed)
    return cuda.bound(made, packed, panels)


def bind_nm_group(weights: Sequence[Packed], swiglu: bool) -> Together | None:
    """nm_mma_sp with up to 3 weights, on the panels that each of them has for itself."""
    return cuda.together(weights, swiglu, native_nm)


def native_nm(packed: Packed) -> tuple[Any, nm_layout.NmPanels]:
    """The native weight, and the panels that it reads."""
    index = packed.device.index or 0
    cuda.opened(index)
    panels = _layout(packed, nm_layout.build)
    made = cuda.load().NmWeight(panels.panels.data_ptr(), *packed.shape, native.DTYPES[packed.dtype], index)
    return cuda.in_order(made, panels.panels), panels


def bind_pairs(packed: Packed) -> Bound:
    """pair_mma with one packed weight, of which it makes and keeps pairs of columns."""
    made, pairs = native_pairs(packed)
    return cuda.bound(made, packed, pairs)


def bind_pairs_group(weights: Sequence[Packed], swiglu: bool) -> Together | None:
    """pair_mma with up to 3 weights, on the pairs that each of them has for itself."""
    return cuda.together(weights, swiglu, native_pairs)


def native_pairs(packed: Packed) -> tuple[Any, pair_layout.Pairs]:
    """The native weight, and the pairs that it reads."""
    index = packed.device.index or 0
    cuda.opened(index)
    pairs = _layout(packed, pair_layout.build)
    addresses = [tensor.data_ptr() for tensor in (pairs.packed.weight, pairs.packed.mask, pairs.packed.offsets)]
    units = cuda.stage_units(pairs.packed, 1)
    made = cuda.load().PairWeight(*addresses, *packed.shape, native.DTYPES[packed.dtype], units, index)
    return cuda.in_order(made, pairs.packed.weight, pairs.packed.mask), pairs


def pair_density() -> float:
    """Up to which density pairs are faster by themselves: they read more bytes, and issue half of the instructions.

    On an H200 they were at 70 % sparsity, and not at 50 % (bench/results/pairs.jsonl). Between, and where bytes count
    for more, as on an A100 with less bandwidth for a multiprocessor, it is a prediction.
    """
    return 0.2 if cuda.missing_wide() else 0.32


def fewest_of_pairs() -> int:
    """From how many tokens on, of such weights: on an H200 (bench/results/pairs.jsonl), and elsewhere a prediction."""
    return 17 if cuda.missing_wide() else 3


def prompts_of_nm() -> int | None:
    """From how many tokens on nm_wgmma is the fastest, which nm_mma_sp is for them, on an H200.

    Of 4 layers of LLaMA-2-7B together: at 128 tokens sbt_wgmma takes 0.8 times as long, at 256 nm_wgmma does
    (bench/results/prompts.jsonl and wide.jsonl).
    """
    return None if cuda.missing_wide() else 192


_layouts: "dict[Callable[[Packed], Any], weakref.WeakKeyDictionary[Packed, weakref.ref[Any]]]" = {}


def _layout(packed: Packed, build: Callable[[Packed], Any]) -> Any:
    """What `build` makes of a packed weight: the one that there is, as long as anyone keeps it."""
    made = _layouts.setdefault(build, weakref.WeakKeyDictionary())
    found = made[packed]() if packed in made else None
    if found is None:
        found = build(packed)
        if packed.device.type == "cuda":  # the kernel may read it before those before it in the stream have ended
            torch.cuda.current_stream(packed.device).synchronize()
        made[packed] = weakref.ref(found)
    return found


def crowded(packed: Packed) -> str | None:
    """Why a weight does not go through sparse tensor cores: 4 neighbouring columns keep more than 2. None if they can.

    The nibbles of a mask word are such fours; their bits are counted side by side.
    """
    words = packed.mask
    pairs = words - (words >> 1 & 0x55555555)  # int32 wraps, as the counts need it
    counts = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)  # 0 to 4 in each nibble
    if bool((counts & (counts >> 1) & 0x11111111 | counts & 0x44444444).any()):
        return "it takes at most 2 of 4 neighbouring columns; prune with --pattern 2:4 for it"
    return None


def supports_delta(shape: tuple[int, int], tokens: int, weight: torch.dtype, x: torch.dtype) -> str | None:
    """As `supports`, for a few tokens."""
    if tokens > cuda.MOST_DELTA_TOKENS:
        return f"it multiplies up to {cuda.MOST_DELTA_TOKENS} tokens, not {tokens}"
    return cuda.supports(shape, tokens, weight, x)


# Where one is taken by itself: as in cuda.py.
KERNELS = (
    Kernel(
        *("nm_mma_sp", "cuda", cuda.missing, cuda.supports, bind_nm),
        **{"most_tokens": 64, "fits": crowded, "bind_group": bind_nm_group, "adds": True, "again_from": prompts_of_nm},
    ),
    Kernel(
        *("delta_spmv", "cuda", cuda.missing, supports_delta, bind_delta),
        **{"most_tokens": 2, "most_density": 0.5, "bind_group": bind_delta_group, "adds": True},
    ),
    Kernel(
        *("pair_mma", "cuda", cuda.missing, cuda.supports, bind_pairs),
        **{"most_tokens": 64, "least_tokens": fewest_of_pairs, "most_density": pair_density},
        **{"bind_group": bind_pairs_group, "adds": True},
    ),
)
