"""Steps of a ragged batch without the host: one CUDA graph for each number of sequences, rounded up to a bucket.

A step of a 7B model is some 400 launches; a host that launches them one by one takes longer than the GPU does. A graph
launches all of them at once, on the addresses that it was recorded with.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from alphaprune import memory
from alphaprune.kernels import cuda
from alphaprune.ragged import Choose, Ragged
from alphaprune.sampling import GREEDY, Kind, Sampler

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # sequences
SHORTEST = 256  # positions of the smallest reach; the others are twice the one before
HOW = ("auto", "graphs", "compile", "eager")
WARM_UPS = 2  # runs before recording: kernels are bound, compiled and tuned, libraries take their workspaces

Call = Callable[[], Any]


class Recorder(Protocol):
    """Takes a call that works on tensors that stay, and gives one that repeats its work on them."""

    def record(self, call: Call) -> Call: ...


class Graphs:
    """Records CUDA graphs, all of them in one pool of memory. ahead: as `kernels.cuda.looking_ahead` takes it."""

    def __init__(self, device: torch.device, ahead: int = 0) -> None:
        self.device, self.ahead = device, ahead
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, call: Call) -> Call:
        """Replays what `call` does; its result, the same tensors every time, is what it returned when recorded.

        The replay keeps `call`: a graph knows the addresses of the tensors that it works on, and does not hold them.
        """
        with torch.cuda.device(self.device), cuda.looking_ahead(self.ahead):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    call()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = call()

        def replay(kept: Call = call) -> Any:
            with torch.cuda.device(self.device):
                graph.replay()
            return result

        return replay


class Eager:
    """Calls as they are: for CPUs, where a launch costs nothing, and to compare with."""

    def record(self, call: Call) -> Call:
        return call


class Steps:
    """Decodes the sequences of a ragged batch, one token each per call.

    how: "graphs", "compile" (torch.compile, then a graph around it on a GPU), "eager", or "auto": graphs on a GPU.
    buckets: numbers of sequences that a step is recorded for; others round up. recorder: in the place of CUDA's.
    Recorded steps keep the kernels that were chosen when they were recorded: make Steps anew after `bench --tune`.
    ahead: bytes of the next product's weight that each has fetched into the second-level cache; not measured yet.
    """

    def __init__(
        self,
        ragged: Ragged,
        how: str = "auto",
        buckets: Sequence[int] = BUCKETS,
        recorder: Recorder | None = None,
        backend: str = "inductor",
        ahead: int = 0,
    ) -> None:
        if how not in HOW:
            raise ValueError(f"steps {how!r}: wanted one of {', '.join(HOW)}")
        device = ragged.decoder.device
        if how == "graphs" and recorder is None and device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need a model on a CUDA device, and this one is on {device}; leave out graphs"
            )
        self.ragged, self.buckets = ragged, sorted(buckets)
        self.sampler = Sampler(ragged.slots + 1, ragged.decoder.config.vocab_size, device)
        self._run = ragged.step
        if how == "compile":
            self._run = torch.compile(ragged.step, dynamic=False, backend=backend)
        graphs = device.type == "cuda" and how != "eager"
        self.recorder = recorder or (Graphs(device, ahead) if graphs else Eager())
        # Where calls run as they are, nothing has to be rounded up.
        self.exact = isinstance(self.recorder, Eager) and how != "compile" and device.type == "cpu"
        self._rows = {bucket: torch.full((bucket,), ragged.nobody, device=device) for bucket in self.buckets}
        self._in_rows: dict[int, list[int]] = {}  # by bucket: the slots that its rows hold
        self.recorded: dict[tuple[int, int, Kind], Call] = {}

    @torch.inference_mode()
    def __call__(self, slots: Sequence[int], kind: Kind = GREEDY) -> tuple[Tensor, Tensor]:
        """New tokens int64 [sequences] of the sequences in `slots`, and the logits they were chosen by.

        Both lie in memory that the next step writes to, and stay on the device. kind: of the samplings of these slots.
        ValueError past the largest bucket, or if a sequence has no room for one token more.
        """
        bucket, longest = self.bucket(len(slots)), self._reserve(slots)
        if self.exact:
            lengths = [self.ragged.held[slot] + 1 for slot in slots]
            new, logits = self._run(torch.tensor(slots), longest, self._chooser(kind), lengths)
            self._count(slots)
            return new, logits
        reach = self.reach(longest)
        run = self.recorded.get((bucket, reach, kind)) or self._record(bucket, reach, kind)
        rows = [*slots, *[self.ragged.nobody] * (bucket - len(slots))]
        if self._in_rows.get(bucket) != rows:
            self._rows[bucket].copy_(memory.upload(torch.tensor(rows), self.ragged.decoder.device))
            self._in_rows[bucket] = rows
        new, logits = run()
        self._count(slots)
        return new[: len(slots)], logits[: len(slots)]

    def _count(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.ragged.held[slot] += 1

    def _chooser(self, kind: Kind) -> Choose | None:
        if kind == GREEDY:
            return None
        choose = self.sampler.choose
        return lambda *given: choose(*given, kind)

    def bucket(self, sequences: int) -> int:
        """The smallest bucket that takes so many sequences."""
        found = next((bucket for bucket in self.buckets if bucket >= sequences > 0), None)
        if found is None:
            raise ValueError(
                f"a step takes from 1 to {self.buckets[-1]} sequences, the largest batch it is recorded for, and got "
                f"{sequences}; split the batch, or make Steps with larger buckets"
            )
        return found

    def reach(self, positions: int) -> int:
        """Positions, rounded up, that a step for sequences of up to so many is recorded for."""
        found = SHORTEST
        while found < positions:
            found *= 2
        return min(found, self.ragged.capacity)

    def prepare(self, kinds: Sequence[Kind] = (GREEDY,)) -> None:
        """Records every bucket and reach, so that no request waits for it; the largest first, whose memory the others
        share."""
        reaches, positions = [], self.ragged.capacity
        while self.reach(positions) not in reaches:
            reaches.append(self.reach(positions))
            positions = max(SHORTEST, 1 << (reaches[-1] - 1).bit_length() - 1)
        with torch.inference_mode():
            for bucket, reach, kind in itertools.product(self.buckets[::-1], reaches, kinds):
                self._record(bucket, reach, kind)

    def _reserve(self, slots: Sequence[int]) -> int:
        ragged = self.ragged
        for slot in slots:
            if not ragged.reserve(slot, ragged.held[slot] + 1):
                raise ValueError(
                    f"all {ragged.pages} pages of the batch are taken, and a sequence of {ragged.held[slot]} positions "
                    f"needs one more; close a sequence, or make the batch with more pages"
                )
        return 1 + max(ragged.held[slot] for slot in slots)

    def _record(self, bucket: int, reach: int, kind: Kind) -> Call:
        """Recorded on rows that belong to nobody: what runs before recording changes no sequence."""
        rows, self._in_rows[bucket] = self._rows[bucket].fill_(self.ragged.nobody), []

        run, choose = self._run, self._chooser(kind)  # and not self: what is recorded would hold itself

        def step() -> tuple[Tensor, Tensor]:
            return run(rows, reach, choose)

        needs = {
            f"logits and hidden states of {bucket} sequences": 8 * bucket * self.sampler.vocabulary,
            "the keys and values there are": self.ragged.cache.nbytes,
        }
        with memory.explained(needs, self.ragged.decoder.device, "take fewer sequences or a shorter context"):
            self.recorded[bucket, reach, kind] = self.recorder.record(step)
        return self.recorded[bucket, reach, kind]


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the host behind what the device has to do; the result waits for it, and gives it."""
    if tensor.device.type != "cuda":
        copy = tensor.clone()
        return lambda: copy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait
