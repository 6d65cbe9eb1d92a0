"""bench/gpu_rig.py on a stand-in for torch.cuda: the order of warm-up, capture, replays and clocks; never a time."""

import contextlib
import functools
import gc
import os
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alphaprune import timing

ROOT = Path(__file__).parent.parent


@pytest.fixture
def Cuda(monkeypatch: pytest.MonkeyPatch):
    """The class of that name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.delitem(sys.modules, "gpu_rig", raising=False)
    import gpu_rig

    yield gpu_rig.Cuda
    sys.modules.pop("gpu_rig", None)


class FakeCuda:
    """What gpu_rig.Cuda uses of torch.cuda, and a log of the order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock = 0.0
        self.inside = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(name="Fake", major=9, minor=0, L2_cache_size=1 << 20, uuid="ab-cd")
        stream = SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))
        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda index: properties,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda s: contextlib.nullcontext(),
            "synchronize": lambda: self.log.append("synchronize"),
            "CUDAGraph": lambda: SimpleNamespace(
                replay=lambda: self.log.append("replay"),
                capture_begin=self.begin,
                capture_end=self.end,
            ),
            "Event": lambda enable_timing: FakeEvent(self),
            "_sleep": lambda cycles: self.log.append("sleep"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def begin(self) -> None:
        self.log.append("capture")
        self.inside = True

    def end(self) -> None:
        self.log.append("captured")
        self.inside = False


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.at = self.cuda.clock
        self.cuda.log.append("event")

    def elapsed_time(self, other: "FakeEvent") -> float:
        return other.at - self.at  # ms


def test_graphs_are_captured_after_a_warm_up_and_timed_by_turns(Cuda, monkeypatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)
    rig = Cuda()
    assert rig.rotate == 4 << 20
    fake.log.clear()
    replay = rig.record(
        [lambda i=i: fake.log.append(f"call {i} {'inside' if fake.inside else 'before'}") for i in (0, 1)]
    )
    assert fake.log == [
        *("wait", "call 0 before", "call 1 before", "wait", "synchronize"),
        *("capture", "call 0 inside", "call 1 inside", "captured", "replay", "synchronize"),
    ]
    fake.log.clear()
    replay()
    assert fake.log == ["replay"]

    def takes(milliseconds: float):
        def run() -> None:
            fake.log.append(f"run {milliseconds}")
            fake.clock += milliseconds

        return run

    fake.log.clear()
    found = rig.time([takes(2), takes(5)], 3)
    assert found == [[0.002] * 3, [0.005] * 3]
    turn = ["sleep", "event", "run 2", "event", "event", "run 5", "event", "synchronize"]
    assert fake.log == turn * 3


@pytest.mark.parametrize("place", ["Cuda", "Host"])
def test_a_replay_keeps_what_it_calls(Cuda, monkeypatch, place: str) -> None:
    """A graph knows the addresses of the weights that it reads; who replays it must hold them."""
    import gpu_rig

    FakeCuda().install(monkeypatch)
    weight = torch.ones(3)
    held, calls = weakref.ref(weight), [functools.partial(torch.neg, weight)]
    replay = getattr(gpu_rig, place)().record(calls)
    calls.clear()
    del weight, calls
    gc.collect()
    assert held() is not None, "the weight of a recorded call is gone"
    replay()
    del replay
    gc.collect()
    assert held() is None, "and is given back with the replay"


def test_the_bandwidth_is_that_of_the_fastest_copy(Cuda, monkeypatch) -> None:
    """A memcpy in a graph runs elsewhere than a kernel, and slower."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    rig, milliseconds = Cuda(), {"copy": 4.0, "kernel": 2.0}

    def way(name: str) -> None:
        fake.clock += milliseconds[name]

    monkeypatch.setattr(timing, "copy_ways", lambda device: {name: lambda n=name: way(n) for name in milliseconds})
    monkeypatch.setattr(rig, "record", lambda calls: lambda: setattr(fake, "clock", fake.clock + 8.0))
    assert rig.bandwidth() == 2 * timing.COPY_BYTES / 0.002
    milliseconds["kernel"] = 16.0
    assert rig.bandwidth() == 2 * timing.COPY_BYTES / 0.004


def test_a_capture_that_fails_is_ended(Cuda, monkeypatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)

    def call() -> None:
        if fake.inside:
            raise RuntimeError("not while capturing")

    with pytest.raises(RuntimeError, match="not while capturing"):
        Cuda().record([call])
    assert fake.log[-2:] == ["capture", "captured"]


def test_clocks_are_read_while_it_runs(Cuda, monkeypatch, tmp_path: Path) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)
    smi = tmp_path / "nvidia-smi"
    answer = f'echo "$@" > {tmp_path}/asked; echo "1980, 2619, 312.5, [N/A]"'
    smi.write_text(f"#!/bin/sh\n{answer}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    rig, runs = Cuda(), []
    found = rig.clocks([lambda: runs.append(1)], 0.05)
    assert found == {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "watts": 312.5, "celsius": None}
    assert len(runs) == 4, "0.2 s of replays of 0.05 s"
    assert "--id=GPU-ab-cd" in (tmp_path / "asked").read_text()
    assert fake.log[-1] == "synchronize", "the clocks are read before the device is waited for"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert set(rig.clocks([lambda: None], 1).values()) == {None}
    assert rig.facts()["driver"] is None


def test_libraries_are_put_back(Cuda, monkeypatch) -> None:
    fake, state = FakeCuda(), ["default"]
    fake.install(monkeypatch)

    def preferred(name: str | None = None) -> str:
        if name is not None:
            state.append(name)
        return state[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    rig = Cuda()
    with pytest.raises(KeyError), rig.library("cublaslt"):
        assert state[-1] == "cublaslt"
        raise KeyError
    assert state[-1] == "default"
    with rig.library(None):
        assert state[-1] == "default"
