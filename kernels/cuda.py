"""The compiled CUDA kernels: on SBT as it lies in memory, and on layouts that are made of it when a weight is bound."""

import functools
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune import devices
from alphaprune.formats import Packed, native
from alphaprune.kernels import delta_layout, nm_layout, pair_layout
from alphaprune.kernels.base import Bound, Kernel, Norm, Together

OLDEST = 10 * devices.OLDEST[0] + devices.OLDEST[1]  # for cp.async and mma.m16n8k16 in bfloat16
HALVES = (torch.float16, torch.bfloat16)
HOPPER = 90  # the one capability that has wgmma and TMA as sbt_wgmma uses them: H100, H200
MOST_DELTA_TOKENS = 4  # csrc/cuda/launch.h
MOST_MEMBERS = 3  # the same


@functools.cache
def _find() -> tuple[ModuleType | None, str]:
    """The module and an empty string, or None and the reason."""
    return native.find("_cuda")


def load() -> ModuleType | None:
    """alphaprune._cuda, or None where it was not built."""
    return _find()[0]


def status() -> str:
    """`built: …` with compiler and architectures, or `not built: ` and the reason."""
    module, reason = _find()
    return f"not built: {reason}" if module is None else f"built: {module.COMPILER}; {module.ARCHITECTURES}"


@functools.cache
def missing() -> str | None:
    """Why the CUDA kernels do not run here, or None; a newer driver or another device needs a new process."""
    module, reason = _find()
    if module is None:
        return f"not built: {reason}"
    count, why = module.devices()
    if why:
        made_for = re.search(r"\d+(\.\d+)?", module.COMPILER)
        known = f"{devices.no_device(made_for[0])} " if made_for else ""
        return f"the driver offers no device to this build ({module.COMPILER}): {known}({why.split(':')[0]})"
    if not count:
        return "no CUDA device is visible; CUDA_VISIBLE_DEVICES may hide it"
    if reason := devices.no_cuda():
        return reason
    capabilities = [module.device(index)[0] for index in range(count)]
    if max(capabilities) < OLDEST:
        return f"the newest device {devices.older(max(capabilities))}"
    return None


@functools.cache
def missing_wide() -> str | None:
    """As `missing`, for sbt_wgmma, which runs where every visible device has wgmma."""
    if reason := missing():
        return reason
    found = [load().device(index)[0] for index in range(load().devices()[0])]
    others = [f"cuda:{i} has {one / 10}" for i, one in enumerate(found) if one != HOPPER]
    if not others:
        return None
    hint = "; CUDA_VISIBLE_DEVICES can hide it" if len(others) < len(found) else ""
    return f"it needs compute capability 9.0 (H100, H200) on every visible device, and {', '.join(others)}{hint}"


@functools.cache
def _device(index: int) -> tuple[int, int, int]:
    """(capability, multiprocessors, shared bytes) of a device that is ready for launches."""
    found = load().device(index)
    if found[0] < OLDEST:
        raise ValueError(f"cuda:{index} {devices.older(found[0])}")
    load().prepare(index)
    return found


def stream(device: torch.device) -> int:
    """The current stream's handle; 0 for tensors of the host, which only the emulated module takes."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def stage_units(packed: Packed, tiles: int) -> int:
    """The largest number of 8-value units in `tiles` neighbouring macro tiles of a row tile: what a kernel stages.

    Reads one number back from the device, so it is asked once for a weight.
    """
    rows, columns = packed.mask.shape[:2]
    offsets = packed.offsets.to(torch.int64) & 0xFFFFFFFF
    row = torch.arange(rows, device=packed.device)[:, None] * columns
    first = torch.arange(0, columns, tiles, device=packed.device)
    return int((offsets[row + (first + tiles).clamp_max(columns)] - offsets[row + first]).max())


Handles = tuple[dict[torch.dtype, Any], Packed]
_handles: "weakref.WeakKeyDictionary[Packed, Handles]" = weakref.WeakKeyDictionary()


def handles(packed: Packed) -> Handles:
    """Native weights on their device by the dtype of x, and the tensors that they read, which they do not keep alive.

    Made once: one for float values, of int8 one for each dtype that they are multiplied with. ValueError if the device
    is too old.
    """
    if packed in _handles:
        return _handles[packed]
    index = packed.device.index or 0
    _device(index)
    aligned, shared = packed.map(_aligned), (stage_units(packed, load().CHUNK_TILES), index)
    scale, groups = (0, 0) if aligned.scale is None else (aligned.scale.data_ptr(), aligned.scale[0].numel())
    addresses = aligned.weight.data_ptr(), aligned.mask.data_ptr(), aligned.offsets.data_ptr(), scale
    made = {
        dtype: load().Weight(*addresses, *packed.shape, groups, native.DTYPES[dtype], *shared)
        for dtype in (HALVES if groups else (packed.dtype,))
    }
    _handles[packed] = made, aligned  # `aligned` is another object: the key must not be reachable from its value
    return made, aligned


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it does not start on 16 bytes, as asynchronous copies need it."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _on_16_bytes(x: Tensor) -> Tensor:
    """Contiguous x [..., K] with rows that all start on 16 bytes, in a copy with zeros behind each where need be."""
    return functional.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else _aligned(x)


def _bound(made: Any, packed: Packed, *alive: Any, rows: Callable[[Tensor], Tensor] | None = None) -> Bound:
    """The product with a native weight: nothing is allocated but y and what `rows` makes of x, nothing waits.

    alive: what it reads. With `into` y is added to it in place.
    """
    multiply, (n, k), device = made.multiply, packed.shape, packed.device

    def run(x: Tensor, bias: Tensor | None, into: Tensor | None = None, alive: tuple = alive) -> Tensor:
        y = x.new_empty(*x.shape[:-1], n) if into is None else into
        residual = 0 if into is None else into.data_ptr()
        given = x if rows is None else rows(x)
        multiply(given.data_ptr(), x.numel() // k, _biases([bias]), residual, y.data_ptr(), stream(device))
        return y

    return run


def _biases(biases: Sequence[Tensor | None] | None) -> list[tuple[int, int]]:
    """Addresses and dtypes; none where there is no bias."""
    if biases is None or all(bias is None for bias in biases):
        return []
    return [(0, 0) if bias is None else (bias.data_ptr(), native.DTYPES[bias.dtype]) for bias in biases]


def joined(
    made: Any,
    members: Sequence[int],
    cols: int,
    device: torch.device,
    outputs: int,
    *alive: Any,
    nbytes: int = 0,
    rows: Callable[[Tensor], Tensor] | None = None,
) -> Together:
    """The product with a native weight of several members, N_i = members[i], of which the first `outputs` have a y.

    alive: what it reads. rows: what it is given of x.
    """

    def run(
        x: Tensor, biases: Sequence[Tensor | None] | None, norm: Norm | None = None, alive: tuple = alive
    ) -> list[Tensor]:
        tokens, sizes = x.numel() // cols, members[:outputs]
        y = x.new_empty(tokens * sum(sizes))  # of the members one after the other
        around = () if norm is None else (norm[0].data_ptr(), norm[1])
        given = x if rows is None else rows(x)
        made.multiply(given.data_ptr(), tokens, _biases(biases), 0, y.data_ptr(), stream(device), *around)
        parts = y.split([tokens * n for n in sizes])
        return [part.view(*x.shape[:-1], n) for part, n in zip(parts, sizes, strict=True)]

    return Together(run, nbytes=nbytes)


def bind(packed: Packed) -> Bound:
    """sbt_mma with one packed weight, of 16-bit floats or int8."""
    made, aligned = handles(packed)
    bounds = {dtype: _bound(one, packed, aligned) for dtype, one in made.items()}
    return bounds[packed.dtype] if packed.scale is None else lambda x, *given: bounds[x.dtype](x, *given)


def bind_mma_group(weights: Sequence[Packed], swiglu: bool) -> Together | None:
    """sbt_mma with up to 3 weights of one dtype and kind of scales, where they lie: nothing is copied."""
    if swiglu or not _may_share(weights):
        return None
    made = [handles(packed)[0] for packed in weights]
    rows, (_, cols) = [packed.shape[0] for packed in weights], weights[0].shape
    found = {
        dtype: joined(load().Weight.joined([one[dtype] for one in made]), rows, cols, weights[0].device, len(rows))
        for dtype in made[0]
    }
    return Together(lambda x, *given: found[x.dtype].run(x, *given)) if len(found) > 1 else found.popitem()[1]


def _may_share(weights: Sequence[Packed]) -> bool:
    """Whether a launch takes these weights that share x."""
    kinds = {(p.dtype, p.device, p.shape[1], None if p.scale is None else p.scale.shape[1:]) for p in weights}
    return len(weights) <= MOST_MEMBERS and len(kinds) == 1


def bind_wide(packed: Packed) -> Bound:
    """sbt_wgmma with one packed weight."""
    made, aligned = _wide(packed)
    return _bound(made, packed, aligned, rows=_on_16_bytes)


def bind_wide_group(weights: Sequence[Packed], swiglu: bool) -> Together | None:
    """sbt_wgmma with up to 3 weights, where they lie."""
    if swiglu or not _may_share(weights):
        return None
    made, alive = zip(*map(_wide, weights), strict=True)
    rows, (_, cols) = [packed.shape[0] for packed in weights], weights[0].shape
    found = load().WideWeight.joined(made)
    return joined(found, rows, cols, weights[0].device, len(rows), *alive, rows=_on_16_bytes)


def _wide(packed: Packed) -> tuple[Any, Packed]:
    """The native weight, and what it reads."""
    _, aligned = handles(packed)  # those of sbt_mma, which has fewer tokens of it
    addresses = aligned.weight.data_ptr(), aligned.mask.data_ptr(), aligned.offsets.data_ptr()
    units, index = stage_units(packed, load().CHUNK_TILES), packed.device.index or 0
    return load().WideWeight(*addresses, *packed.shape, native.DTYPES[packed.dtype], units, index), aligned


def bind_delta(packed: Packed) -> Bound:
    """delta_spmv with one packed weight, of which it makes and keeps nibble-delta rows: about 2.6 bytes per value."""
    made, rows = _delta(packed)
    return _bound(made, packed, rows)


def bind_delta_group(weights: Sequence[Packed], swiglu: bool) -> Together | None:
    """delta_spmv with up to 3 weights, whose rows it keeps together; of two their SwiGLU."""
    shapes = [packed.shape for packed in weights]
    if len(weights) > MOST_MEMBERS or (swiglu and (len(weights) != 2 or shapes[0] != shapes[1])):
        return None
    made, rows = _delta(*weights, pairs=swiglu)
    outputs = 1 if swiglu else len(weights)
    found = joined(made, rows.members, rows.cols, weights[0].device, outputs, rows, nbytes=rows.nbytes)
    return replace(found, norms=rows.blocks == 1)


def _delta(*weights: Packed, pairs: bool = False) -> tuple[Any, delta_layout.DeltaRows]:
    """The native weight, and what it reads."""
    device = weights[0].device
    index = device.index or 0
    _device(index)
    rows = delta_layout.build(*weights, pairs=pairs)
    if device.type == "cuda":  # the kernel may read its weight before those that came earlier have ended
        torch.cuda.current_stream(device).synchronize()
    addresses = [tensor.data_ptr() if tensor.numel() else 0 for tensor in rows.tensors]
    code = native.DTYPES[weights[0].dtype]
    return load().DeltaWeight(addresses, rows.members, rows.sizes, rows.pairs, code, index), rows


def bind_nm(packed: Packed) -> Bound:
    """nm_mma_sp with one packed weight, of which it makes and keeps 2:4 panels: 9/8 bytes per weight."""
    made, panels = _nm(packed)
    return _bound(made, packed, panels)


def bind_nm_group(weights: Sequence[Packed], swiglu: bool) -> Together | None:
    """nm_mma_sp with up to 3 weights, on the panels that each of them has for itself."""
    if swiglu or not _may_share(weights):
        return None
    made, panels = zip(*map(_nm, weights), strict=True)
    rows, (_, cols) = [packed.shape[0] for packed in weights], weights[0].shape
    return joined(load().NmWeight.joined(made), rows, cols, weights[0].device, len(rows), *panels)


def _nm(packed: Packed) -> tuple[Any, nm_layout.NmPanels]:
    """The native weight, and the panels that it reads."""
    index = packed.device.index or 0
    _device(index)
    panels = _layout(packed, nm_layout.build)
    return load().NmWeight(panels.panels.data_ptr(), *packed.shape, native.DTYPES[packed.dtype], index), panels


def bind_pairs(packed: Packed) -> Bound:
    """pair_mma with one packed weight, of which it makes and keeps pairs of columns."""
    made, pairs = _pairs(packed)
    return _bound(made, packed, pairs)


def bind_pairs_group(weights: Sequence[Packed], swiglu: bool) -> Together | None:
    """pair_mma with up to 3 weights, on the pairs that each of them has for itself."""
    if swiglu or not _may_share(weights):
        return None
    made, pairs = zip(*map(_pairs, weights), strict=True)
    rows, (_, cols) = [packed.shape[0] for packed in weights], weights[0].shape
    return joined(load().PairWeight.joined(made), rows, cols, weights[0].device, len(rows), *pairs)


def _pairs(packed: Packed) -> tuple[Any, pair_layout.Pairs]:
    """The native weight, and the pairs that it reads."""
    index = packed.device.index or 0
    _device(index)
    pairs = _layout(packed, pair_layout.build)
    addresses = [tensor.data_ptr() for tensor in (pairs.packed.weight, pairs.packed.mask, pairs.packed.offsets)]
    units = stage_units(pairs.packed, 1)
    return load().PairWeight(*addresses, *packed.shape, native.DTYPES[packed.dtype], units, index), pairs


def pair_density() -> float:
    """Up to which density pairs are faster by themselves: they read more bytes, and issue half of the instructions.

    On an H200 they were at 70 % sparsity, and not at 50 % (bench/results/pairs.jsonl). Between, and where bytes count
    for more, as on an A100 with less bandwidth for a multiprocessor, it is a prediction.
    """
    return 0.2 if missing_wide() else 0.32


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


def supports(shape: tuple[int, int], tokens: int, weight: torch.dtype, x: torch.dtype) -> str | None:
    """None for float16 or bfloat16, the same for weights and activations."""
    if weight == x and x in HALVES:
        return None
    return f"it computes with float16 or bfloat16 on both sides, not {weight} with {x}"


def supports_mma(shape: tuple[int, int], tokens: int, weight: torch.dtype, x: torch.dtype) -> str | None:
    """As `supports`, and None for int8 values with either of them."""
    if weight == torch.int8:
        return None if x in HALVES else f"it multiplies int8 values with float16 or bfloat16, not {x}"
    return supports(shape, tokens, weight, x)


def supports_delta(shape: tuple[int, int], tokens: int, weight: torch.dtype, x: torch.dtype) -> str | None:
    """As `supports`, for a few tokens."""
    if tokens > MOST_DELTA_TOKENS:
        return f"it multiplies up to {MOST_DELTA_TOKENS} tokens, not {tokens}"
    return supports(shape, tokens, weight, x)


# In order of preference. Where one is taken by itself is what was fastest on an H200 (bench/results/gpu.jsonl), and on
# others a prediction, until `alphaprune bench --tune --device cuda` has written a table.
KERNELS = (
    Kernel(
        *("nm_mma_sp", "cuda", missing, supports, bind_nm),
        **{"most_tokens": 64, "fits": crowded, "bind_group": bind_nm_group, "adds": True},
    ),
    Kernel(
        *("delta_spmv", "cuda", missing, supports_delta, bind_delta),
        **{"most_tokens": 2, "most_density": 0.5, "bind_group": bind_delta_group, "adds": True},
    ),
    Kernel(
        *("pair_mma", "cuda", missing, supports, bind_pairs),
        **{"most_tokens": 64, "least_tokens": 17, "most_density": pair_density, "bind_group": bind_pairs_group},
        adds=True,
    ),
    Kernel(
        *("sbt_wgmma", "cuda", missing_wide, supports, bind_wide),
        **{"most_tokens": 256, "least_tokens": 17, "bind_group": bind_wide_group, "adds": True},
    ),
    Kernel("sbt_mma", "cuda", missing, supports_mma, bind, most_tokens=64, bind_group=bind_mma_group, adds=True),
)
