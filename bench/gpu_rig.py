"""A device to measure on: calls recorded once and replayed, timed by turns, with the clocks they ran at."""

import contextlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from alphaprune import timing

Call = Callable[[], Tensor]
Replay = Callable[[], object]
L2_TIMES = 4  # copies of a weight that the calls go round fill the second-level cache so many times
CYCLES = 100_000  # that the device sleeps for each replay of a round: longer than it takes to launch one
BUSY = 0.2  # seconds of replays during which the clocks are read


class Cuda:
    """The current CUDA device: CUDA graphs, events, nvidia-smi."""

    device = torch.device("cuda")
    libraries = ("cublas", "cublaslt")

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("bench/gpu.py measures on a CUDA device, and torch sees none; --dry-run runs on the CPU")
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.rotate = L2_TIMES * self._properties.L2_cache_size

    def facts(self) -> dict[str, object]:
        """What every row says of the machine."""
        driver, power = self._ask("driver_version", "power.limit")
        return {
            "gpu": self._properties.name,
            "capability": f"{self._properties.major}.{self._properties.minor}",
            "l2_bytes": self._properties.L2_cache_size,
            "driver": driver,
            "power_limit_watts": power,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }

    def record(self, calls: list[Call]) -> Replay:
        """One CUDA graph of all calls in order. What they bind, compile or tune happens before, on a side stream.

        The replay keeps the calls: a graph knows the addresses of the weights that they read, and does not hold them.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
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
        graph.replay()
        torch.cuda.synchronize()
        return lambda kept=tuple(calls): graph.replay()

    def time(self, replays: list[Replay], repeats: int) -> list[list[float]]:
        """Seconds of each replay, `repeats` times, by turns."""
        found: list[list[float]] = [[] for _ in replays]
        for _ in range(repeats):
            # While the device sleeps the round is queued behind it, so that no launch is waited for.
            torch.cuda._sleep(CYCLES * (len(replays) + 10))
            marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in replays]
            for replay, (begin, end) in zip(replays, marks, strict=True):
                begin.record()
                replay()
                end.record()
            torch.cuda.synchronize()
            for times, (begin, end) in zip(found, marks, strict=True):
                times.append(begin.elapsed_time(end) / 1e3)
        return found

    def bandwidth(self) -> float:
        """Bytes read and written per second by the fastest way to copy 2 GiB."""
        ways = timing.copy_ways(self.device)
        found = self.time([*ways.values(), *(self.record([way]) for way in ways.values())], 20)
        return 2 * timing.COPY_BYTES / min(map(statistics.median, found))

    def clocks(self, replays: list[Replay], round_seconds: float) -> dict[str, float | None]:
        """MHz of multiprocessors and memory, watts and degrees Celsius while the replays run."""
        for _ in range(max(1, int(BUSY / max(round_seconds, 1e-6)))):
            for replay in replays:
                replay()
        found = self._ask("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
        torch.cuda.synchronize()
        return dict(zip(("sm_mhz", "memory_mhz", "watts", "celsius"), map(_number, found), strict=True))

    def release(self) -> None:
        """Gives back the memory of graphs that are gone, which no other one may use."""
        torch.cuda.empty_cache()

    def alive(self) -> bool:
        """Whether the device still answers: after an illegal access nothing of this process does."""
        try:
            torch.cuda.synchronize()
            torch.ones(1, device=self.device).item()
        except RuntimeError:
            return False
        return True

    @contextlib.contextmanager
    def library(self, name: str | None) -> Iterator[None]:
        """torch's dense products by this library."""
        if name is None:
            yield
            return
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(name)
        try:
            yield
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    def _ask(self, *names: str) -> list[str | None]:
        """nvidia-smi's answers for this device; None where there is none."""
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        if uuid := getattr(self._properties, "uuid", None):
            command.append(f"--id=GPU-{uuid}")
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return [None] * len(names)
        found = [part.strip() for part in answer.strip().splitlines()[0].split(",")] if answer.strip() else []
        return list(found) if len(found) == len(names) else [None] * len(names)


class Host:
    """The CPU in the place of a GPU, for a dry run: no graphs, no clocks, no figures worth keeping."""

    device = torch.device("cpu")
    libraries = ()
    rotate = 1 << 14

    def facts(self) -> dict[str, object]:
        return {"gpu": None, "cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}

    def record(self, calls: list[Call]) -> Replay:
        kept = tuple(calls)
        for call in kept:
            call()
        return lambda: [call() for call in kept]

    def time(self, replays: list[Replay], repeats: int) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in replays]
        for _ in range(repeats):
            for replay, times in zip(replays, found, strict=True):
                begin = time.perf_counter()
                replay()
                times.append(time.perf_counter() - begin)
        return found

    def bandwidth(self) -> float:
        source = torch.zeros(1 << 20, dtype=torch.uint8)
        (times,) = self.time([source.clone], 5)
        return 2 * source.nbytes / statistics.median(times)

    def clocks(self, replays: list[Replay], round_seconds: float) -> dict[str, float | None]:
        return dict.fromkeys(("sm_mhz", "memory_mhz", "watts", "celsius"))

    def release(self) -> None:
        pass

    def alive(self) -> bool:
        return True

    def library(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


Rig = Cuda | Host


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # [N/A]
        return None
