"""What reads memory the fastest here, and how fast: the ceiling for whatever has to read its weights."""

import contextlib
import functools
import itertools
import mmap
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from alphaprune import pages
from alphaprune.formats import native

PROBE_BYTES = 1 << 30
STREAMS = (1, 2, 3, 4)
FINALISTS = 8
LINE = 64

Call = Callable[..., object]
Way = tuple[str, str, int]  # a loop (see csrc/cpu/bandwidth.h), normal or huge pages, streams of a thread


class Reader:
    """A block of memory, and what reads it the fastest, with the threads of the kernels.

    bandwidth: bytes per second, the best of all that was tried: it is a ceiling. Each way reads a quarter of the block
    once, the fastest read the whole. Without the native module it is torch's dot.
    """

    def __init__(self, total_bytes: int = PROBE_BYTES, repeats: int = 3) -> None:
        self._way: Way | None = None
        if native.load() is None:
            halves = torch.ones(2, max(1, total_bytes // 8))
            best = min(seconds_of(torch.dot, *halves) for _ in range(3 * repeats))
            self._block, self.bandwidth = halves.view(torch.uint8).flatten(), total_bytes / best
            return
        blocks = _blocks(total_bytes)
        quarters = {kind: block[: block.nbytes // (4 * LINE) * LINE] for kind, block in blocks.items()}
        ranked = sorted(_ways(blocks), key=lambda way: _read_seconds(quarters, way))
        tried = [(_read_seconds(blocks, way), way) for _ in range(repeats) for way in ranked[:FINALISTS]]
        best, self._way = min(tried)
        self._block = blocks[self._way[1]]
        self.bandwidth = self._block.nbytes / best

    def calls(self, nbytes: int) -> list[Call]:
        """Calls that read so many bytes each, or as many as there are, one stretch of the block after the other."""
        size = min(-(-nbytes // LINE) * LINE, self._block.nbytes)
        parts = [self._block[first : first + size] for first in range(0, self._block.nbytes - size + 1, size)]
        return [functools.partial(_read, part, self._way) for part in parts]


def read_bandwidth(total_bytes: int = PROBE_BYTES, repeats: int = 3) -> float:
    """Bytes per second that the kernels' threads read from memory together, see Reader."""
    return Reader(total_bytes, repeats).bandwidth


def read_loops(total_bytes: int = PROBE_BYTES, repeats: int = 3) -> Iterator[dict[str, str | int | float]]:
    """What every way to read this machine's memory gives: the best of `repeats` rounds over all of them by turns.

    Rows of loop (load width and prefetch, see csrc/cpu/bandwidth.h), pages (normal or huge), streams (places that a
    thread reads from at the same time), huge_bytes (on huge pages indeed), nbytes, bytes_per_second.
    ValueError without the native module.
    """
    if native.load() is None:
        raise ValueError(f"the read loops are native code: {native.status()}")
    blocks = _blocks(total_bytes)
    tried = _ways(blocks)
    seconds = [[_read_seconds(blocks, way) for way in tried] for _ in range(repeats)]
    for (loop, kind, streams), taken in zip(tried, map(min, zip(*seconds, strict=True)), strict=True):
        yield {
            "loop": loop,
            "pages": kind,
            "streams": streams,
            "huge_bytes": pages.on_huge_pages(blocks[kind].data_ptr()),
            "nbytes": blocks[kind].nbytes,
            "bytes_per_second": blocks[kind].nbytes / taken,
        }


def seconds_of(call: Call, *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _ways(blocks: dict[str, Tensor]) -> list[Way]:
    return list(itertools.product(native.load().read_loops(), blocks, STREAMS))


def _read(block: Tensor, way: Way | None) -> object:
    if way is None:
        return torch.dot(*block.view(torch.float32).split(block.nbytes // 8)[:2])
    loop, _, streams = way
    return native.load().read_loop(loop, block.data_ptr(), block.nbytes, streams)


def _read_seconds(blocks: dict[str, Tensor], way: Way) -> float:
    return seconds_of(_read, blocks[way[1]], way)


def _blocks(nbytes: int) -> dict[str, Tensor]:
    """Anonymous memory as bytes on normal and, as far as the system gives them, huge pages; each page touched."""
    blocks, nbytes = {}, max(1, nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    for kind, advice in (("normal", "MADV_NOHUGEPAGE"), ("huge", "MADV_HUGEPAGE")):
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # a system without transparent huge pages
            block.madvise(getattr(mmap, advice))
        blocks[kind] = torch.frombuffer(block, dtype=torch.uint8).fill_(1)  # keeps the mapping alive
    return blocks
