"""The clock around one linear: consistent rows, and the script in front of it. No test asserts a time."""

import contextlib
import itertools
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alphaprune import bandwidth, timing
from alphaprune.formats import native

ROOT = Path(__file__).parent.parent


def test_a_row_says_what_was_timed() -> None:
    row = timing.time_linear((100, 130), 0.75, 3, torch.float32, "reference", 1 << 18, 2, bandwidth=2.0)
    assert (row.shape, row.sparsity, row.tokens, row.dtype, row.kernel) == ((100, 130), 0.75, 3, "float32", "reference")
    assert row.rotated >= 1 << 18 and row.rotated % row.nbytes == 0
    assert row.calls >= 2 * row.rotated // row.nbytes
    assert row.dense_nbytes == 100 * 130 * 4 and row.nbytes < row.dense_nbytes
    assert row.seconds > 0 and row.ratio == row.dense_seconds / row.seconds
    assert row.weights_per_second == 100 * 130 / row.seconds
    assert row.of_bandwidth == row.nbytes / row.seconds / 2


def test_int8_values_beside_the_fastest_dense_layer() -> None:
    options = {"total_bytes": 1 << 14, "repeats": 1, "bandwidth": 1.0}
    row = timing.time_linear((48, 130), 0.5, 2, torch.bfloat16, "reference", values=torch.int8, **options)
    plain = timing.time_linear((48, 130), 0.5, 2, torch.bfloat16, "reference", **options)
    assert (row.dtype, row.values, plain.values) == ("bfloat16", "int8", "bfloat16")
    for one in (row, plain):
        assert one.dense_dtype in ("bfloat16", "float32")
        assert one.dense_nbytes == 48 * 130 * getattr(torch, one.dense_dtype).itemsize
    assert row.nbytes < plain.nbytes
    weight, packed = timing.random_packed((48, 130), 0.5, torch.bfloat16, torch.int8)
    assert packed.dtype == torch.int8 and packed.scale.shape == (48,)
    from alphaprune.formats import sbt

    dense, kept = sbt.dense(packed)
    assert 0.4 < kept.float().mean() < 0.6
    step = packed.scale[:, None] / 2 * (1 + 1e-5)
    assert ((dense - weight.float()).abs() <= step).masked_select(kept).all()


def test_copies_lie_in_distinct_memory() -> None:
    from alphaprune.formats import sbt

    copies = list(timing.copies(sbt.pack(torch.randn(64, 64)), 1 << 17))
    assert len({copy.weight.data_ptr() for copy in copies}) == len({copy.mask.data_ptr() for copy in copies}) > 2


def test_a_kernel_that_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel is called 'magic'"):
        timing.time_linear((16, 64), 0.5, kernel="magic", total_bytes=1, bandwidth=1.0)


@pytest.mark.parametrize("lines", [0, 1, 2, 3, 5, 7, 64, 65_536 + 3, 2 * 65_536 + 9])  # parts have 65536 lines
def test_read_loops_read_every_byte_once(native_only, lines: int) -> None:
    """They return the sum of what they read."""
    module, generator = native.load(), torch.Generator().manual_seed(lines)
    words = torch.randint(-(2**62), 2**62, (8 * lines + 24,), dtype=torch.int64, generator=generator)
    first = -words.data_ptr() % 64 // 8
    block = words[first : first + 8 * lines]
    loops = module.read_loops()
    assert len(loops) == len(set(loops)) and len(loops) >= 3
    for loop, streams in itertools.product(loops, (1, 2, 3, 4)):
        total = module.read_loop(loop, block.data_ptr(), block.nbytes, streams)
        assert total == int(block.sum()) % 2**64, (loop, streams)


def test_read_loops_refuse_what_they_cannot_read(native_only) -> None:
    module = native.load()
    for arguments, message in (
        (("magic", 0, 64, 1), "no read loop is called magic"),
        ((module.read_loops()[0], 8, 64, 1), "whole lines"),
        ((module.read_loops()[0], 0, 65, 1), "whole lines"),
        ((module.read_loops()[0], 0, -64, 1), "whole lines"),
        ((module.read_loops()[0], 0, 64, 5), "1 to 4 streams"),
    ):
        with pytest.raises(ValueError, match=message):
            module.read_loop(*arguments)


def test_bandwidth_is_the_best_of_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bandwidth.read_bandwidth(1 << 20, 1) > 0
    monkeypatch.setattr(native, "_find", lambda: (None, "no C++ compiler was found"))
    reader = bandwidth.Reader(1 << 20, 1)
    assert reader.bandwidth > 0 and all(call() is not None for call in reader.calls(1 << 18))
    with pytest.raises(ValueError, match="native code: not built: no C"):
        next(bandwidth.read_loops(1 << 20))


def test_a_reader_goes_through_its_block(native_only) -> None:
    """Every part sums ones: so many 64-bit words of them."""
    word = 0x0101010101010101
    calls = bandwidth.Reader(1 << 20, 1).calls((1 << 18) - 5)
    assert [call() for call in calls] == [(1 << 18) // 8 * word % 2**64] * 4
    (whole,) = bandwidth.Reader(1 << 12, 1).calls(1 << 30)
    assert whole() == (1 << 12) // 8 * word % 2**64


def test_the_bandwidth_of_the_moment_is_measured_by_turns() -> None:
    class Slow:
        def calls(self, nbytes: int) -> list:
            asked.append(nbytes)
            return [lambda: time.sleep(0.002)]

    asked: list[int] = []
    row = timing.time_linear((48, 130), 0.5, 1, torch.float32, "reference", 1 << 14, 1, reader=Slow())
    assert asked == [row.nbytes] and row.nbytes / 0.2 < row.bandwidth <= row.nbytes / 0.002


def test_the_bandwidth_script_writes_a_row_per_way_to_read(native_only, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "bench" / "bandwidth.py"), "--gigabytes=0.001", "--repeats=1", "--json"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=True, cwd=ROOT)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    ways = {(row["loop"], row["pages"], row["streams"]) for row in rows}
    assert ways == set(itertools.product(native.load().read_loops(), ("normal", "huge"), (1, 2, 3, 4)))
    assert all(row["bytes_per_second"] > 0 and row["nbytes"] <= 0.001 * 2**30 for row in rows)
    assert all(row["huge_bytes"] == 0 for row in rows if row["pages"] == "normal")


def test_the_script_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--shape=48x64", "--sparsity=0.5,0.9", "--tokens=1,2", "--gigabytes=0.0001", "--repeats=1", "--json"]
    command = [sys.executable, str(ROOT / "bench" / "linear.py"), *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert printed == [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["tokens"], row["sparsity"]) for row in printed] == [(1, 0.5), (1, 0.9), (2, 0.5), (2, 0.9)]
    assert all(row["machine"] and row["ratio"] > 0 for row in printed)


class FakeCuda:
    """torch.cuda with a clock of its own: calls take the seconds that they say, the first replays ten times those."""

    def __init__(self) -> None:
        self.now, self.graph, self.side, self.slept, self.made = 0.0, None, False, 0, []

    def work(self, seconds: float) -> None:
        if self.graph is None:
            self.now += seconds
        else:
            self.graph.nodes.append(seconds)

    def device(self, index) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def stream(self, stream):
        self.side = True
        yield
        self.side = False

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self) -> None:
        return None

    def synchronize(self) -> None:
        assert self.graph is None, "nothing waits during a capture"

    def _sleep(self, cycles: int) -> None:
        self.slept += cycles

    def get_device_properties(self, index: int):
        return SimpleNamespace(L2_cache_size=1 << 10)

    def Event(self, enable_timing: bool):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def CUDAGraph(self):
        graph = SimpleNamespace(nodes=[], replays=0)

        def begin() -> None:
            assert self.side, "the capture is on a side stream"
            self.graph = graph

        def replay() -> None:
            graph.replays += 1
            self.now += (10 if graph.replays <= timing.WAKING else 1) * (sum(graph.nodes) or 0.5)

        graph.capture_begin, graph.replay = begin, replay
        graph.capture_end = lambda: setattr(self, "graph", None)
        self.made.append(graph)
        return graph


COPIES = (("copy", 0.5, 0.75), ("kernel", 0.375, 0.25))  # seconds alone, and in a graph


def test_ways_to_copy_write_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 10)
    for way in timing.copy_ways(torch.device("cpu")).values():
        assert way().nbytes == 1 << 10 and not bool(way().any())  # of what the tests fill with NaN


def test_the_clock_of_a_gpu_replays_graphs_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    clock, called = timing.CudaClock(0), []
    assert clock.rotated == 4 << 10

    def call(name: str, seconds: float) -> None:
        called.append((name, fake.graph is not None))
        fake.work(seconds)

    calls = {
        "a": [lambda s=s: call("a", s) for s in (1.0, 2.0, 3.0)],
        "b": [lambda: call("b", 5.0)] * 2,
    }
    found = list(itertools.islice(clock.rounds(calls), 4))
    assert found == [{"a": pytest.approx(2.0), "b": pytest.approx(5.0)}] * 4
    # Every call once beforehand, where kernels bind, then once into the graph; afterwards only replays.
    assert called == [("a", False)] * 3 + [("a", True)] * 3 + [("b", False)] * 2 + [("b", True)] * 2
    assert [graph.replays for graph in fake.made] == [4 + timing.WAKING] * 2 and fake.slept > 0
    kept = calls.pop("b")[0]
    held, replay = weakref.ref(kept), clock._record([kept])
    del kept
    assert held() is not None, "a replay keeps what it calls"
    del replay
    assert held() is None
    copies = {name: lambda a=eager, b=inside: fake.work(b if fake.graph else a) for name, eager, inside in COPIES}
    monkeypatch.setattr(timing, "copy_ways", lambda device: dict(copies))
    assert clock.bandwidth() == 2 * timing.COPY_BYTES / 0.25

    def fail() -> None:
        if fake.graph:
            raise RuntimeError("not permitted while a stream is captured")

    with pytest.raises(RuntimeError, match="not permitted"):
        next(clock.rounds({"a": [fail]}))
    assert fake.graph is None  # the capture was ended all the same
