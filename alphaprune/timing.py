"""Seconds of one linear layer, packed and dense side by side, on a CPU or a GPU, from memory rather than a cache."""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune import devices, formats, pages
from alphaprune.bandwidth import Call, Reader, read_bandwidth, seconds_of
from alphaprune.formats import quantize
from alphaprune.kernels import spmm, table
from alphaprune.mask import keep_mask
from alphaprune.pattern import NM, Pattern, Unstructured

COPY_BYTES = 1 << 31
MOST_COPIES = 1024  # smaller weights than a MB are not worth the minutes: their row says how much they went round
LEAST_CALLS = 20
L2_TIMES = 4  # on a GPU the copies of a weight that calls go round fill the second-level cache so many times
SLEEP = 100_000  # cycles that a GPU sleeps for each replay of a round: longer than it takes to launch one
WAKING = 3  # rounds on a GPU that do not count, while its clocks rise
UNSTRUCTURED = Unstructured()
READ = "read"  # what is called by turns to know the bandwidth


@dataclass(frozen=True)
class Row:
    """What one packed linear layer takes beside torch's dense one: medians of calls made by turns.

    seconds, dense_seconds: of one call. nbytes, dense_nbytes: of the weight. dense_dtype: what torch is fastest in,
    that of x or float32, which a CPU without bfloat16 arithmetic prefers. rotated: bytes of copies of the packed weight
    that the calls went round, so that none is found in a cache. bandwidth: measured read bytes/s of the machine, of a
    GPU those that copies read and write; its `threads` are 0. activations: int8 where kernels may round x so; `kernel`
    tells whether it does, see cpu.BYTES.
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
    activations: str | None = None

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


class CpuClock:
    """Times calls on the CPU.

    rotated: bytes of copies of a weight that calls go round by default. whole: whether a round calls every copy.
    """

    device, rotated, whole = torch.device("cpu"), 1 << 30, False

    def __init__(self) -> None:
        self._places = itertools.count()  # goes on from one measurement to the next: caches hold what was called last

    @property
    def machine(self) -> table.Machine:
        return table.Machine.here()

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def rounds(self, calls: dict[str, list[Call]]) -> Iterator[dict[str, float]]:
        """Endless rounds by turns: seconds of one call of each kind, on the next of its copies."""
        for place in self._places:
            yield {name: seconds_of(copied[place % len(copied)]) for name, copied in calls.items()}

    def bandwidth(self) -> float:
        """See read_bandwidth."""
        return read_bandwidth()


class CudaClock:
    """Times calls on a GPU: of each kind a CUDA graph of a call on every copy, replayed by turns between two events."""

    whole, threads = True, 0

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.rotated = L2_TIMES * torch.cuda.get_device_properties(index).L2_cache_size

    @property
    def machine(self) -> table.Gpu:
        return table.Gpu.at(self.device.index)

    def rounds(self, calls: dict[str, list[Call]]) -> Iterator[dict[str, float]]:
        """Endless rounds by turns: seconds of one call of each kind, the mean over its copies."""
        replays = {name: self._record(copied) for name, copied in calls.items()}
        for done in itertools.count():
            seconds = self._round(replays)
            if done >= WAKING:
                yield {name: seconds[name] / len(copied) for name, copied in calls.items()}

    def bandwidth(self) -> float:
        """Bytes read and written per second by the fastest way to copy 2 GiB: the median of twenty copies."""
        ways = copy_ways(self.device)
        ways |= {f"{name} in a graph": self._record([way]) for name, way in ways.items()}
        found = [self._round(ways) for _ in range(WAKING + LEAST_CALLS)][WAKING:]
        return 2 * COPY_BYTES / min(statistics.median(one[name] for one in found) for name in ways)

    def _record(self, calls: list[Call]) -> Callable[[], None]:
        """One graph of all calls in order. What they bind, compile or tune happens before, on a side stream.

        The replay keeps the calls: a graph knows the addresses of the weights that they read, and does not hold them.
        """
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for call in calls:
                    call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # torch.cuda.graph would collect garbage and empty the allocator's cache every time.
            with torch.cuda.stream(side):
                graph.capture_begin()
                try:
                    for call in calls:
                        call()
                finally:
                    graph.capture_end()
        return lambda kept=tuple(calls): graph.replay()

    def _round(self, replays: dict[str, Callable[[], None]]) -> dict[str, float]:
        """Seconds of each replay. While the device sleeps all are queued behind it, so that no launch is waited for."""
        with torch.cuda.device(self.device):
            torch.cuda._sleep(SLEEP * (len(replays) + 10))
            marks = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in replays}
            for name, replay in replays.items():
                marks[name][0].record()
                replay()
                marks[name][1].record()
            torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) / 1e3 for name, (begin, end) in marks.items()}


def copy_ways(device: torch.device) -> dict[str, Call]:
    """Ways to read COPY_BYTES on a device and write as many: the driver's, which runs elsewhere in a graph than alone,
    and a kernel's."""
    source = torch.zeros(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return {"copy": lambda: target.copy_(source), "kernel": lambda: torch.neg(source, out=target)}


Clock = CpuClock | CudaClock


def clock(device: str) -> Clock:
    """What times calls on "cpu", "cuda" or "cuda:N"; ValueError in one sentence if there is no such device here."""
    where = devices.named(device)
    if where.type == "cpu":
        return CpuClock()
    return CudaClock(torch.cuda.current_device() if where.index is None else where.index)


def time_linear(
    shape: tuple[int, int],
    sparsity: float,
    tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    kernel: str | None = None,
    total_bytes: int | None = None,
    repeats: int = 3,
    bandwidth: float | None = None,
    pattern: Pattern = UNSTRUCTURED,
    values: torch.dtype | None = None,
    device: str = "cpu",
    activations: torch.dtype | None = None,
    reader: Reader | None = None,
) -> Row:
    """The median seconds of y = x Wᵀ with a packed random W [N, K] and with dense ones, called by turns.

    All go round copies of their weight in distinct memory, `total_bytes` each but MOST_COPIES at most, `repeats` times
    the packed ones. total_bytes: by default 1 GiB, on a GPU several times its second-level cache.
    bandwidth: of the clock, measured if not given; with a reader that of the moment, as it reads as many bytes as the
    weight has by turns with the calls. pattern: N:M instead of zeros anywhere. values: int8 to store the kept weights
    so; activations: int8 beside them as `Packed` has it. The dense layer beside them is in `dtype`, as x, or, on a CPU,
    in float32 if that is faster.
    ValueError if the kernel cannot run, K does not fit the pattern, the device is not here, or activations are to be
    int8 beside floats.
    """
    check_activations(values, activations)
    timer = clock(device)
    total = total_bytes or timer.rotated
    weight, packed = random_packed(shape, sparsity, dtype, values or dtype, pattern, timer.device)
    packed = replace(packed, activations=activations)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(timer.device, dtype)
    name = spmm.prepare(packed, "bench", kernel).choice(tokens, dtype)[0].name
    sparse: list[Call] = [functools.partial(spmm.prepare(copy, "bench", kernel), x) for copy in copies(packed, total)]
    kinds = dict.fromkeys((dtype, torch.float32) if timer.device.type == "cpu" else (dtype,))
    dense = {str(kind).removeprefix("torch."): _dense(weight.to(kind), x.to(kind), total) for kind in kinds}
    rounds = max(repeats if timer.whole else repeats * len(sparse), LEAST_CALLS)
    reads = {} if reader is None else {READ: reader.calls(packed.nbytes)}
    found = medians(timer, {"": sparse, **dense, **reads}, rounds)
    best = min(dense, key=found.__getitem__)
    bandwidth = packed.nbytes / found[READ] if reads else bandwidth
    return Row(
        machine=str(timer.machine),
        threads=timer.threads,
        shape=shape,
        sparsity=sparsity,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        values=str(packed.dtype).removeprefix("torch."),
        kernel=name,
        calls=rounds * (len(sparse) if timer.whole else 1),
        rotated=len(sparse) * packed.nbytes,
        seconds=found[""],
        dense_seconds=found[best],
        dense_dtype=best,
        nbytes=packed.nbytes,
        dense_nbytes=weight.numel() * getattr(torch, best).itemsize,
        bandwidth=bandwidth or timer.bandwidth(),
        activations=activations and str(activations).removeprefix("torch."),
    )


def medians(timer: Clock, calls: dict[str, list[Call]], rounds: int) -> dict[str, float]:
    """Seconds of each kind of calls, made by turns."""
    with torch.inference_mode():
        found = list(itertools.islice(timer.rounds(calls), rounds))
    return {kind: statistics.median(one[kind] for one in found) for kind in calls}


def check_activations(values: torch.dtype | None, activations: torch.dtype | None) -> None:
    """ValueError if activations are to be rounded beside values that are floats."""
    if activations is not None and values != torch.int8:
        raise ValueError("--activations int8: they are rounded beside int8 values only; give --values int8, too")


def _dense(weight: Tensor, x: Tensor, total_bytes: int) -> list[Call]:
    return [functools.partial(functional.linear, x, copy) for copy in dense_copies(weight, total_bytes)]


def random_packed(
    shape: tuple[int, int],
    sparsity: float,
    dtype: torch.dtype,
    values: torch.dtype,
    pattern: Pattern = UNSTRUCTURED,
    device: torch.device = CpuClock.device,
) -> tuple[Tensor, formats.Packed]:
    """A dense random weight [N, K] in `dtype`, and the same pruned and packed as `values`, int8 or `dtype` itself."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device).to(dtype)
    scores = torch.rand(shape, generator=generator, device=device)
    if isinstance(pattern, NM):
        mask = keep_mask(scores, round(pattern.sparsity * scores.numel()), pattern)
    else:
        mask = scores >= sparsity
    if values != torch.int8:
        return weight, formats.get("sbt").pack(weight, mask)
    integers, scale, _ = quantize.quantize(weight, mask)
    return weight, formats.get("sbt").pack(integers, mask, scale)


def copy_count(nbytes: int, total: int) -> int:
    """Copies of a weight that fill `total` bytes; two at least, MOST_COPIES at most."""
    return min(max(2, -(-total // nbytes)), MOST_COPIES)


def dense_copies(weight: Tensor, total: int) -> list[Tensor]:
    """As many copies of a dense weight in distinct memory as fill `total` bytes, on huge pages, as `serve` has them."""
    return pages.placed([weight] * copy_count(weight.nbytes, total))


def copies(packed: formats.Packed, total: int) -> Iterator[formats.Packed]:
    """As many copies of a packed weight; see dense_copies."""
    count, together = copy_count(packed.nbytes, total), max(1, pages.TOGETHER // packed.nbytes)
    own = list(packed.tensors.values())
    for done in range(0, count, together):
        made = pages.placed(own * min(together, count - done))
        yield from (packed.of(made[first : first + len(own)]) for first in range(0, len(made), len(own)))
