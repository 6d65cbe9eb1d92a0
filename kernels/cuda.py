"""The compiled CUDA module, what all of its kernels share, and those on SBT as it lies in memory."""

import contextlib
import functools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune import devices
from alphaprune.formats import Packed, native
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
def opened(index: int) -> tuple[int, int, int]:
    """(capability, multiprocessors, shared bytes) of a device that is ready for launches."""
    found = load().device(index)
    if found[0] < OLDEST:
        raise ValueError(f"cuda:{index} {devices.older(found[0])}")
    load().prepare(index)
    return found


@contextlib.contextmanager
def looking_ahead(nbytes: int) -> Iterator[None]:
    """Has a small launch behind each product fetch so many bytes of the next one's weight into the second-level cache.

    Which one is next each learns from the one that comes after it: call everything once, and again to record it. What
    is fetched must be there for as long as what was recorded runs. From compute capability 9.0 on. 0: nothing changes.
    """
    if nbytes:
        load().ahead(nbytes)
    try:
        yield
    finally:
        if nbytes:
            load().ahead(0)


def in_order(made: Any, *tensors: Tensor) -> Any:
    """A native weight that tells those before it what it reads the most of."""
    made.reads([(tensor.data_ptr(), tensor.nbytes) for tensor in tensors])
    return made


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
    opened(index)
    aligned, shared = packed.map(_aligned), (stage_units(packed, load().CHUNK_TILES), index)
    scale, groups = (0, 0) if aligned.scale is None else (aligned.scale.data_ptr(), aligned.scale[0].numel())
    addresses = aligned.weight.data_ptr(), aligned.mask.data_ptr(), aligned.offsets.data_ptr(), scale
    made = {
        dtype: in_order(
            load().Weight(*addresses, *packed.shape, groups, native.DTYPES[dtype], *shared),
            *(aligned.weight, aligned.mask),
        )
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


def bound(made: Any, packed: Packed, *alive: Any, rows: Callable[[Tensor], Tensor] | None = None) -> Bound:
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
    bounds = {dtype: bound(one, packed, aligned) for dtype, one in made.items()}
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


def together(
    weights: Sequence[Packed],
    swiglu: bool,
    native_of: Callable[[Packed], tuple[Any, Any]],
    rows: Callable[[Tensor], Tensor] | None = None,
) -> Together | None:
    """One launch of the native weights that `native_of` gives with what they read; None where they do not share one.

    rows: as `joined` takes it.
    """
    if swiglu or not _may_share(weights):
        return None
    made, alive = zip(*map(native_of, weights), strict=True)
    sizes, (_, cols) = [packed.shape[0] for packed in weights], weights[0].shape
    return joined(type(made[0]).joined(made), sizes, cols, weights[0].device, len(sizes), *alive, rows=rows)


def _may_share(weights: Sequence[Packed]) -> bool:
    """Whether a launch takes these weights that share x."""
    kinds = {(p.dtype, p.device, p.shape[1], None if p.scale is None else p.scale.shape[1:]) for p in weights}
    return len(weights) <= MOST_MEMBERS and len(kinds) == 1


def bind_wide(packed: Packed) -> Bound:
    """sbt_wgmma with one packed weight."""
    made, aligned = native_wide(packed)
    return bound(made, packed, aligned, rows=_on_16_bytes)


def bind_wide_group(weights: Sequence[Packed], swiglu: bool) -> Together | None:
    """sbt_wgmma with up to 3 weights, where they lie."""
    return together(weights, swiglu, native_wide, _on_16_bytes)


def native_wide(packed: Packed) -> tuple[Any, Packed]:
    """The native weight, and what it reads."""
    _, aligned = handles(packed)  # those of sbt_mma, which has fewer tokens of it
    addresses = aligned.weight.data_ptr(), aligned.mask.data_ptr(), aligned.offsets.data_ptr()
    units, index = stage_units(packed, load().CHUNK_TILES), packed.device.index or 0
    made = load().WideWeight(*addresses, *packed.shape, native.DTYPES[packed.dtype], units, index)
    return in_order(made, aligned.weight, aligned.mask), aligned


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


# Where one is taken by itself is what was fastest on an H200 (bench/results/gpu.jsonl), and on others a prediction,
# until `alphaprune bench --tune --device cuda` has written a table.
KERNELS = (
    Kernel(
        *("sbt_wgmma", "cuda", missing_wide, supports, bind_wide),
        **{"most_tokens": 256, "least_tokens": 17, "bind_group": bind_wide_group, "adds": True},
    ),
    Kernel("sbt_mma", "cuda", missing, supports_mma, bind, most_tokens=64, bind_group=bind_mma_group, adds=True),
)
