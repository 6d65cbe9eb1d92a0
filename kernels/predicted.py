"""What a GPU is expected to take, from bytes and counted instructions: predictions, not measurements.

A product takes as long as the slowest of its parts, which overlap: memory, instructions, shared memory, tensor cores;
and a launch. Counts per 1024 weights are those of the machine code (bench/cubins.py). Which shares of the data sheets'
rates are reached are assumptions; `alphaprune bench --tune` tells how far off all of it is.
"""

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

from alphaprune.kernels import delta_layout, pair_layout
from alphaprune.kernels.table import DENSE, Curve, Gpu, Table

UNIT = 1024
MEMORY, ISSUE, TENSOR, CACHE = 0.88, 0.8, 0.75, 2.5  # shares of the peaks; second-level cache over memory bandwidth
LAUNCH = 3e-6  # seconds that a kernel takes whatever it does
ISSUED = 4  # instructions per clock and multiprocessor
TYPICAL_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
TYPICAL_SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9)
SHAPES = ((4096, 4096), (28672, 4096))


@dataclass(frozen=True)
class Rates:
    """Of the data sheet: multiprocessors, clock in Hz, memory in bytes/s, 16-bit FMAs per clock and multiprocessor."""

    multiprocessors: int
    clock: float
    memory: float
    fmas: int
    arch: str

    @property
    def clocks(self) -> float:
        """Clocks of all multiprocessors in a second."""
        return self.multiprocessors * self.clock


# By what is in the device's name, the first that fits.
RATES = {
    "H200": Rates(132, 1.755e9, 4.8e12, 2048, "sm_90a"),
    "H100 PCIe": Rates(114, 1.755e9, 2.0e12, 2048, "sm_90a"),
    "H100": Rates(132, 1.755e9, 3.35e12, 2048, "sm_90a"),
    "A100 80GB": Rates(108, 1.41e9, 1.935e12, 1024, "sm_80"),
    "A100-SXM4-80GB": Rates(108, 1.41e9, 2.039e12, 1024, "sm_80"),
    "A100": Rates(108, 1.41e9, 1.555e12, 1024, "sm_80"),
}
# (kernel, tokens of one call): what a warp issues per 1024 weights (delta_spmv: kept ones), and its wavefronts of
# shared memory, simulated for sbt_mma and one for each load or store elsewhere. A test holds them to the counted rows.
COUNTS: dict[str, dict[tuple[str, int], tuple[float, float]]] = {
    "sm_80": {
        ("delta_spmv", 1): (250.0, 46.0),
        ("delta_spmv", 2): (354.0, 50.0),
        ("delta_spmv", 4): (484.0, 50.0),
        ("nm_mma_sp", 8): (15.5, 5.0),
        ("nm_mma_sp", 16): (22.5, 7.0),
        ("nm_mma_sp", 32): (36.75, 11.0),
        ("nm_mma_sp", 64): (64.25, 19.75),
        ("pair_mma", 8): (127.0, 36.0),
        ("pair_mma", 16): (144.5, 44.0),
        ("pair_mma", 32): (164.5, 60.0),
        ("pair_mma", 64): (207.25, 60.25),
        ("sbt_mma", 8): (208.0, 65.64),
        ("sbt_mma", 16): (217.5, 73.64),
        ("sbt_mma", 32): (240.0, 89.64),
        ("sbt_mma", 64): (302.0, 89.64),
        ("sbt_mma_int8", 8): (191.0, 59.0),
        ("sbt_mma_int8", 16): (203.0, 67.0),
        ("sbt_mma_int8", 32): (224.0, 83.0),
        ("sbt_mma_int8", 64): (311.5, 115.0),
    },
    "sm_90a": {
        ("delta_spmv", 1): (255.0, 46.0),
        ("delta_spmv", 2): (359.0, 50.0),
        ("delta_spmv", 4): (488.0, 50.0),
        ("nm_mma_sp", 8): (15.0, 5.0),
        ("nm_mma_sp", 16): (22.0, 7.0),
        ("nm_mma_sp", 32): (36.25, 11.0),
        ("nm_mma_sp", 64): (64.0, 20.0),
        ("nm_mma_sp_sm90", 8): (12.5, 3.75),
        ("nm_mma_sp_sm90", 16): (17.25, 4.75),
        ("nm_mma_sp_sm90", 32): (25.75, 7.0),
        ("nm_mma_sp_sm90", 64): (45.75, 11.0),
        ("nm_wgmma", 128): (42.5, 5.0),
        ("nm_wgmma", 256): (42.5, 5.0),
        ("pair_mma", 8): (129.0, 33.5),
        ("pair_mma", 16): (142.5, 41.5),
        ("pair_mma", 32): (167.0, 56.5),
        ("pair_mma", 64): (211.25, 57.75),
        ("pair_wgmma", 32): (107.0, 22.5),
        ("pair_wgmma", 64): (108.0, 23.5),
        ("sbt_mma", 8): (216.0, 65.64),
        ("sbt_mma", 16): (226.0, 73.64),
        ("sbt_mma", 32): (242.5, 89.64),
        ("sbt_mma", 64): (297.75, 89.64),
        ("sbt_mma_int8", 8): (199.5, 59.0),
        ("sbt_mma_int8", 16): (214.5, 67.0),
        ("sbt_mma_int8", 32): (239.5, 83.0),
        ("sbt_mma_int8", 64): (349.5, 115.0),
        ("sbt_wgmma", 32): (199.5, 42.0),
        ("sbt_wgmma", 64): (200.0, 42.0),
        ("sbt_wgmma", 128): (200.5, 42.0),
        ("sbt_wgmma", 256): (202.0, 42.0),
    },
}
MOST = {"delta_spmv": 4, "nm_mma_sp": 64, "pair_mma": 64, "sbt_mma": 64, "sbt_wgmma": 256}  # tokens of one call
SM90_MOST = MOST | {"nm_mma_sp": 1 << 20}  # which are done by units of the largest counted size
# What an H200 took over what the parts say, 28672x4096 at 50 % (bench/results/gpu.jsonl, wide.jsonl and prompts.jsonl):
# latencies are not hidden, and shared memory passes operand b of nm_wgmma once for 64 rows. Of int8 values a guess.
OVER = {
    ("nm_mma_sp", 128): 1.55,
    ("nm_mma_sp", 256): 1.55,
    ("sbt_mma", 32): 1.4,
    ("sbt_mma", 64): 2.4,
    ("sbt_wgmma", 32): 1.6,
    ("sbt_wgmma", 64): 1.8,
    ("sbt_wgmma", 128): 2.25,
    ("sbt_wgmma", 256): 1.6,
    ("sbt_mma_int8", 32): 1.4,
    ("sbt_mma_int8", 64): 1.5,
}
INT8 = {"sbt_mma": "sbt_mma_int8"}  # compiled kernels that multiply int8 values: under what name they are counted
# What runs for a kernel on sm_90a, and from how many tokens on.
SM90 = {"nm_mma_sp": {"nm_mma_sp_sm90": 0, "nm_wgmma": 128}, "pair_mma": {"pair_mma": 0, "pair_wgmma": 32}}
EXPANDED = ("sbt_expand", "triton_expand")


def rates_of(gpu: Gpu) -> Rates | None:
    """What is known of a GPU; None of those that are not in RATES."""
    return next((found for name, found in RATES.items() if name in gpu.gpu), None)


def seconds(
    kernel: str, gpu: Gpu, shape: tuple[int, int], density: float, tokens: int, itemsize: int = 2
) -> float | None:
    """Of one call with so many tokens on W [N, K] = shape of which `density` is kept, values of `itemsize` bytes.

    DENSE is torch's own product. None for a kernel or a GPU of which nothing is known.
    """
    rates, weights = rates_of(gpu), shape[0] * shape[1]
    if rates is None:
        return None
    passing = 2 * tokens * (shape[0] + shape[1])  # bytes of x and y
    memory = lambda nbytes: nbytes / (MEMORY * rates.memory)  # noqa: E731
    multiplied = weights * tokens / (TENSOR * rates.fmas * rates.clocks)
    packed = weights * (itemsize * density + 1 / 8 + 20 / UNIT)
    if kernel == DENSE:
        return LAUNCH + max(memory(2 * weights + passing), multiplied)
    if kernel == "nm_cusparselt":
        return LAUNCH + max(memory(9 / 8 * weights + passing), multiplied / 2)
    if kernel in EXPANDED:  # what is written is read again from the cache
        return 2 * LAUNCH + memory(packed + 4 * weights / CACHE) + max(memory(passing), multiplied)
    most, counts = (SM90_MOST if rates.arch == "sm_90a" else MOST).get(kernel), COUNTS[rates.arch]
    kernel = INT8.get(kernel, "") if itemsize == 1 else kernel
    counted = SM90[kernel] if kernel in SM90 and rates.arch == "sm_90a" else {kernel: 0}
    known = [(m, name) for name, m in sorted(counts) if name in counted and m >= counted[name]]
    sizes = {m: counts[name, m] for m, name in sorted(known)}
    if most is None or not sizes:
        return None
    calls, last = divmod(tokens, most)
    parts = [most] * calls + ([last] if last else [])
    return sum(_call(kernel, rates, weights, density, packed, part, sizes) for part in parts)


def _call(
    kernel: str,
    rates: Rates,
    weights: int,
    density: float,
    packed: float,
    tokens: int,
    sizes: dict[int, tuple[float, float]],
) -> float:
    size = next((m for m in sizes if m >= tokens), max(sizes))
    issued, wavefronts = sizes[size]
    times = math.ceil(tokens / size)
    units = times * weights / UNIT * (density if kernel == "delta_spmv" else 1)
    if kernel == "delta_spmv":
        packed = weights * delta_layout.bytes_per_weight(density)
    elif kernel == "nm_mma_sp":
        packed = weights * 9 / 8
    elif kernel == "pair_mma":
        packed = weights * pair_layout.bytes_per_weight(density)
    per_clock = 0 if kernel == "delta_spmv" else rates.fmas * (2 if kernel == "nm_mma_sp" else 1)
    parts = (
        packed / (MEMORY * rates.memory),
        issued * units / (ISSUE * ISSUED * rates.clocks),
        wavefronts * units / rates.clocks,
        times * weights * size / (TENSOR * per_clock * rates.clocks) if per_clock else 0.0,
    )
    return LAUNCH + OVER.get((kernel, size), 1.0) * max(parts)


def like(measured: Table) -> Table | None:
    """The predicted table of the same GPU, at the points that were measured; None if nothing is known of it.

    Of Triton's products nothing is known.
    """
    if not isinstance(measured.machine, Gpu) or rates_of(measured.machine) is None:
        return None
    curves = [found for curve in measured.curves if (found := _curve(measured.machine, curve))]
    return replace(measured, curves=tuple(curves), versions={}, path="") if curves else None


def _curve(gpu: Gpu, curve: Curve) -> Curve | None:
    itemsize = {"bfloat16": 2, "float16": 2, "int8": 1}.get(curve.weight)
    if itemsize is None or curve.x not in ("bfloat16", "float16"):
        return None
    found = [seconds(curve.kernel, gpu, curve.shape, 1 - curve.sparsity, tokens, itemsize) for tokens in curve.tokens]
    return None if None in found else replace(curve, seconds=tuple(float(f"{value:.4g}") for value in found))


def table_of(gpu: Gpu, kernels: Iterable[str]) -> Table | None:
    """The predicted table of a GPU for typical layers in bfloat16 and int8; None if nothing is known of it."""
    half, curves, blank = "bfloat16", [], (1.0,) * len(TYPICAL_TOKENS)
    for shape, kernel in itertools.product(SHAPES, (*kernels, DENSE)):
        shares = (0.0,) if kernel == DENSE else (0.5,) if kernel.startswith("nm_") else TYPICAL_SPARSITIES
        for values in (half, "int8") if kernel in INT8 else (half,):
            curves += [Curve(kernel, values, half, shape, share, TYPICAL_TOKENS, blank) for share in shares]
    return like(Table(gpu, 0, tuple(curves)))


def verdict(measured: Table) -> str | None:
    """One line that says how far the prediction of a measured table was off; None where there is none."""
    found = like(measured)
    if found is None:
        return None
    known = {(c.kernel, c.weight, c.shape, c.sparsity): c for c in found.curves}
    off: dict[str, list[float]] = {}
    for curve in measured.curves:
        if other := known.get((curve.kernel, curve.weight, curve.shape, curve.sparsity)):
            off.setdefault(curve.kernel, []).extend(a / b for a, b in zip(curve.seconds, other.seconds, strict=True))
    every = [ratio for ratios in off.values() for ratio in ratios]
    factor = math.exp(statistics.median(abs(math.log(ratio)) for ratio in every))
    each = ", ".join(f"{name} {statistics.median(ratios):.2f}" for name, ratios in sorted(off.items()))
    return (
        f"the prediction for {measured.machine.gpu} was off by a factor of {factor:.2f} (median of {len(every)} "
        f"times); measured over predicted: {each}"
    )


def of_int8(gpu: Gpu, density: float = 0.5) -> str | None:
    """What int8 values are predicted to gain over 16-bit ones on a GPU, in a sentence; None if nothing is known of it.

    Each by its fastest compiled kernel. Bytes halve; where instructions or tensor cores bind, time does not.
    """
    rates, shape, parts = rates_of(gpu), SHAPES[-1], []
    if rates is None:
        return None
    for tokens in (1, 16, 64, 128):
        half, quarter = (
            min(found for name in MOST if name != "nm_mma_sp" and (found := seconds(name, *case)) is not None)
            for case in ((gpu, shape, density, tokens, itemsize) for itemsize in (2, 1))
        )
        parts.append(f"{half / quarter:.2f}× at {tokens}")
    issued = {name: COUNTS[rates.arch][name, 8][0] for name in ("sbt_mma", "sbt_mma_int8")}
    return (
        f"int8 values at {1 - density:.0%} are predicted to be as fast as 16-bit ones times {', '.join(parts)} tokens: "
        f"decoding issues {issued['sbt_mma_int8']:g} instructions per {UNIT} weights, of 16-bit ones "
        f"{issued['sbt_mma']:g}"
    )
