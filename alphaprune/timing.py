"""Seconds of one linear layer, packed and dense side by side, from memory rather than from a cache."""

import contextlib
import itertools
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune import formats
from alphaprune.formats import native, quantize
from alphaprune.kernels import spmm, table
from alphaprune.mask import keep_mask
from alphaprune.pattern import NM, Pattern, Unstructured

PROBE_BYTES = 1 << 30
STREAMS = (1, 2, 3, 4)
FINALISTS = 8
MOST_COPIES = 1024  # smaller weights than a MB are not worth the minutes: their row says how much they went round
UNSTRUCTURED = Unstructured()


@dataclass(frozen=True)
class Row:
    """What one packed linear layer takes beside torch's dense one: medians of calls made by turns.

    seconds, dense_seconds: of one call. nbytes, dense_nbytes: of the weight. dense_dtype: what torch is fastest in,
    that of x or float32, which a CPU without bfloat16 arithmetic prefers. rotated: bytes of copies of the packed weight
    that the calls went round, so that none is found in a cache. bandwidth: measured read bytes/s of the machine.
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
    values: str  # dtype of the packed weight's values; `dtype` is that of x
    dense_dtype: str

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
    return str(table.Machine.here())


def read_bandwidth(total_bytes: int = PROBE_BYTES, repeats: int = 3) -> float:
    """Bytes per second that the kernels' threads read from memory together: the best of all loops of `read_loops`.

    The best, where everything else here is a median, because it is a ceiling. Each loop reads a quarter once, the
    fastest the whole. Without the native module, torch's dot.
    """
    if native.load() is None:
        left, right = torch.ones(total_bytes // 8), torch.ones(total_bytes // 8)
        return total_bytes / min(seconds_of(torch.dot, left, right) for _ in range(3 * repeats))
    blocks = _blocks(total_bytes)
    quarters = {pages: block[: block.nbytes // 256 * 64] for pages, block in blocks.items()}
    tried = itertools.product(native.load().read_loops(), blocks, STREAMS)
    ranked = sorted(tried, key=lambda way: _read_seconds(quarters, *way))
    best = min(_read_seconds(blocks, *way) for _ in range(repeats) for way in ranked[:FINALISTS])
    return blocks["normal"].nbytes / best


def read_loops(total_bytes: int = PROBE_BYTES, repeats: int = 3) -> Iterator[dict[str, str | int | float]]:
    """What every way to read this machine's memory gives: the best of `repeats` rounds over all of them by turns.

    Rows of loop (load width and prefetch, see csrc/cpu/bandwidth.h), pages (normal or huge), streams (places that a
    thread reads from at the same time), huge_bytes (on huge pages indeed), nbytes, bytes_per_second.
    ValueError without the native module.
    """
    module = native.load()
    if module is None:
        raise ValueError(f"the read loops are native code: {native.status()}")
    blocks = _blocks(total_bytes)
    tried = list(itertools.product(module.read_loops(), blocks, STREAMS))
    seconds = [[_read_seconds(blocks, *way) for way in tried] for _ in range(repeats)]
    for (loop, pages, streams), taken in zip(tried, map(min, zip(*seconds, strict=True)), strict=True):
        yield {
            "loop": loop,
            "pages": pages,
            "streams": streams,
            "huge_bytes": _on_huge_pages(blocks[pages].data_ptr()),
            "nbytes": blocks[pages].nbytes,
            "bytes_per_second": blocks[pages].nbytes / taken,
        }


def _read_seconds(blocks: dict[str, Tensor], loop: str, pages: str, streams: int) -> float:
    block = blocks[pages]
    return seconds_of(native.load().read_loop, loop, block.data_ptr(), block.nbytes, streams)


def _blocks(nbytes: int) -> dict[str, Tensor]:
    """Anonymous memory as bytes on normal and, as far as the system gives them, huge pages; each page touched."""
    blocks, nbytes = {}, max(1, nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    for pages, advice in (("normal", "MADV_NOHUGEPAGE"), ("huge", "MADV_HUGEPAGE")):
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # a system without transparent huge pages
            block.madvise(getattr(mmap, advice))
        blocks[pages] = torch.frombuffer(block, dtype=torch.uint8).fill_(1)  # keeps the mapping alive
    return blocks


def _on_huge_pages(address: int) -> int:
    """Bytes of the mapping at `address` that lie on huge pages, as Linux counts them; 0 where it does not say."""
    inside = False
    try:
        with open("/proc/self/smaps") as lines:
            for line in lines:
                if (bounds := line.split(" ", 1)[0]).count("-") == 1 and not bounds.endswith(":"):
                    first, last = (int(bound, 16) for bound in bounds.split("-"))
                    inside = first <= address < last
                elif inside and line.startswith("AnonHugePages:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


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
    values: torch.dtype | None = None,
) -> Row:
    """The median seconds of y = x Wᵀ with a packed random W [N, K] and with dense ones, called by turns.

    All go round copies of their weight in distinct memory, `total_bytes` each but MOST_COPIES at most, `repeats` times
    the packed ones.
    bandwidth: of read_bandwidth(), measured if not given. pattern: N:M instead of zeros anywhere. values: int8 to store
    the kept weights so. The dense layer beside them is in `dtype`, as x, or in float32 with x, whichever is faster.
    ValueError if the kernel cannot run, or K does not fit the pattern.
    """
    weight, packed = random_packed(shape, sparsity, dtype, values or dtype, pattern)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    name = spmm.prepare(packed, "bench", kernel).choice(tokens, dtype)[0].name
    sparse = [spmm.prepare(copy, "bench", kernel) for copy in copies(packed, total_bytes)]
    dense = {kind: _dense(weight.to(kind), total_bytes) for kind in dict.fromkeys((dtype, torch.float32))}
    times, dense_times = [], {kind: [] for kind in dense}
    with torch.inference_mode():
        for i in range(max(repeats * len(sparse), 20)):
            times.append(seconds_of(sparse[i % len(sparse)], x))
            for kind, copied in dense.items():
                dense_times[kind].append(seconds_of(functional.linear, x.to(kind), copied[i % len(copied)]))
    medians = {kind: statistics.median(found) for kind, found in dense_times.items()}
    best = min(medians, key=medians.get)
    return Row(
        machine=machine(),
        threads=torch.get_num_threads(),
        shape=shape,
        sparsity=sparsity,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        values=str(packed.dtype).removeprefix("torch."),
        kernel=name,
        calls=len(times),
        rotated=len(sparse) * packed.nbytes,
        seconds=statistics.median(times),
        dense_seconds=medians[best],
        dense_dtype=str(best).removeprefix("torch."),
        nbytes=packed.nbytes,
        dense_nbytes=dense[best][0].nbytes,
        bandwidth=bandwidth or read_bandwidth(),
    )


def _dense(weight: Tensor, total_bytes: int) -> list[Tensor]:
    return [weight.clone() for _ in range(copy_count(weight.nbytes, total_bytes))]


def random_packed(
    shape: tuple[int, int], sparsity: float, dtype: torch.dtype, values: torch.dtype, pattern: Pattern = UNSTRUCTURED
) -> tuple[Tensor, formats.Packed]:
    """A dense random weight [N, K] in `dtype`, and the same pruned and packed as `values`, int8 or `dtype` itself."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    scores = torch.rand(shape, generator=generator)
    if isinstance(pattern, NM):
        mask = keep_mask(scores, round(pattern.sparsity * scores.numel()), pattern)
    else:
        mask = scores >= sparsity
    if values != torch.int8:
        return weight, formats.get("sbt").pack(weight, mask)
    integers, scale, _ = quantize.quantize(weight, mask)
    return weight, formats.get("sbt").pack(integers, mask, scale)


def seconds_of(call: Callable[..., Tensor], *arguments: Tensor) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def copy_count(nbytes: int, total: int) -> int:
    """Copies of a weight that fill `total` bytes; two at least, MOST_COPIES at most."""
    return min(max(2, -(-total // nbytes)), MOST_COPIES)


def copies(packed: formats.Packed, total: int) -> Iterator[formats.Packed]:
    """As many copies in distinct memory as fill `total` bytes."""
    for _ in range(copy_count(packed.nbytes, total)):
        yield packed.map(Tensor.clone)
