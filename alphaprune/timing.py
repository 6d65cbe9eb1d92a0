"""Seconds of one linear layer, packed and dense side by side, from memory rather than from a cache."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune import formats
from alphaprune.kernels import spmm
from alphaprune.mask import keep_mask
from alphaprune.pattern import NM, Pattern, Unstructured

PROBE_BYTES = 1 << 29
MOST_COPIES = 1024  # smaller weights than a MB are not worth the minutes: their row says how much they went round
UNSTRUCTURED = Unstructured()


@dataclass(frozen=True)
class Row:
    """What one packed linear layer takes beside torch's dense one: medians of calls made by turns.

    seconds, dense_seconds: of one call. nbytes, dense_nbytes: of the weight. rotated: bytes of copies of the packed
    weight that the calls went round, so that none is found in a cache. bandwidth: measured read bytes/s of the machine.
    """

    machine: str
    threads: int
    shape: tuple[int, int]
    sparsity: float
    tokens: int
    dtype: str
    kernel: str
    calls: int
    rotated: int
    seconds: float
    dense_seconds: float
    nbytes: int
    dense_nbytes: int
    bandwidth: float

    @property
    def ratio(self) -> float:
        """How many times faster than dense."""
        return self.dense_seconds / self.seconds

    @property
    def weights_per_second(self) -> float:
        """Weights of the dense matrix, zeros included, per second."""
        return self.shape[0] * self.shape[1] / self.seconds

    @property
    def bytes_per_second(self) -> float:
        """Bytes of the packed weight per second."""
        return self.nbytes / self.seconds

    @property
    def of_bandwidth(self) -> float:
        """The share of the measured read bandwidth that the packed weight was read with."""
        return self.bytes_per_second / self.bandwidth


def machine() -> str:
    """The CPU's name and the cores that this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def read_bandwidth(repeats: int = 9) -> float:
    """Bytes per second that torch's threads read from memory together: the best of a few dot products.

    The best, where everything else here is a median, because it is a ceiling.
    """
    left = torch.ones(PROBE_BYTES // 8)
    right = torch.ones(PROBE_BYTES // 8)
    return PROBE_BYTES / min(_seconds(torch.dot, left, right) for _ in range(repeats))


def time_linear(
    shape: tuple[int, int],
    sparsity: float,
    tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    kernel: str | None = None,
    total_bytes: int = 1 << 30,
    repeats: int = 3,
    bandwidth: float | None = None,
    pattern: Pattern = UNSTRUCTURED,
) -> Row:
    """The median seconds of y = x Wᵀ with a packed random W [N, K] and with the dense one, called by turns.

    Both go round copies of their weight in distinct memory, `total_bytes` each but MOST_COPIES at most, `repeats` times
    the packed ones.
    bandwidth: of read_bandwidth(), measured if not given. pattern: N:M instead of zeros anywhere.
    ValueError if the kernel cannot run, or K does not fit the pattern.
    """
    n, k = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    packed = formats.get("sbt").pack(weight, _random_mask((n, k), sparsity, pattern, generator))
    x = torch.randn(tokens, k, generator=generator).to(dtype)
    name = spmm.prepare(packed, "bench", kernel).choice(tokens, dtype)[0].name
    sparse = [spmm.prepare(copy, "bench", kernel) for copy in copies(packed, total_bytes)]
    dense = [weight.clone() for _ in range(_count(weight.nbytes, total_bytes))]
    times, dense_times = [], []
    with torch.inference_mode():
        for i in range(max(repeats * len(sparse), 20)):
            times.append(_seconds(sparse[i % len(sparse)], x))
            dense_times.append(_seconds(functional.linear, x, dense[i % len(dense)]))
    return Row(
        machine=machine(),
        threads=torch.get_num_threads(),
        shape=shape,
        sparsity=sparsity,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        kernel=name,
        calls=len(times),
        rotated=len(sparse) * packed.nbytes,
        seconds=statistics.median(times),
        dense_seconds=statistics.median(dense_times),
        nbytes=packed.nbytes,
        dense_nbytes=weight.nbytes,
        bandwidth=bandwidth or read_bandwidth(),
    )


def _random_mask(shape: tuple[int, int], sparsity: float, pattern: Pattern, generator: torch.Generator) -> Tensor:
    scores = torch.rand(shape, generator=generator)
    if isinstance(pattern, NM):
        return keep_mask(scores, round(pattern.sparsity * scores.numel()), pattern)
    return scores >= sparsity


def _seconds(call: Callable[..., Tensor], *arguments: Tensor) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _count(nbytes: int, total: int) -> int:
    return min(max(2, -(-total // nbytes)), MOST_COPIES)


def copies(packed: formats.Packed, total: int) -> Iterator[formats.Packed]:
    """As many copies in distinct memory as fill `total` bytes."""
    for _ in range(_count(packed.nbytes, total)):
        tensors = packed.weight.clone(), packed.mask.clone(), packed.offsets.clone()
        yield formats.Packed(*tensors, packed.shape)
