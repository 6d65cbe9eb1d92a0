"""Shared-memory wavefronts are counted as the banks serve them, from addresses that the emulator records."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import wavefronts  # noqa: E402
from wavefronts import Access  # noqa: E402

emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="not installed: g++")
LANES = range(32)


@pytest.mark.parametrize(
    ("nbytes", "addresses", "expected"),
    [
        (4, [4 * lane for lane in LANES], 1),
        (4, [64] * 32, 1),  # one word for all
        (4, [8 * lane for lane in LANES], 2),
        (4, [128 * lane for lane in LANES], 32),
        (4, [None] * 32, 0),
        (4, [128 * lane if lane < 3 else None for lane in LANES], 3),
        (2, [2 * lane for lane in LANES], 1),  # two lanes in a word
        (2, [4 * 33 * lane for lane in LANES], 1),
        (8, [8 * lane for lane in LANES], 2),
        (8, [256 * (lane % 16) for lane in LANES], 32),
        (16, [16 * lane for lane in LANES], 4),
        (16, [16 * (lane // 8) for lane in LANES], 4),  # each quarter for itself
    ],
)
def test_wavefronts_of_an_access(nbytes: int, addresses: list[int | None], expected: int) -> None:
    assert Access("load", nbytes, tuple(addresses)).wavefronts == expected
    text = f"load,{nbytes}," + ",".join("-" if a is None else str(a) for a in addresses)
    assert wavefronts.total(wavefronts.read([text]))["load"] == expected


@pytest.mark.parametrize(
    ("kind", "nbytes", "addresses", "expected"),
    [
        ("load", 16, [16 * (lane // 8) for lane in LANES], 2),
        ("load", 8, [8 * (lane // 2) for lane in LANES], 1),
        ("load", 8, [8 * (lane % 2) for lane in LANES], 1),
        ("load", 8, [8 * lane for lane in LANES], 2),
        ("load", 16, [128 * (lane // 2) for lane in LANES], 16),
        ("store", 8, [8 * (lane // 2) for lane in LANES], 2),
        ("load", 4, [4 * (lane // 2) for lane in LANES], 1),
    ],
)
def test_wavefronts_of_paired_lanes(kind: str, nbytes: int, addresses: list[int], expected: int) -> None:
    assert Access(kind, nbytes, tuple(addresses)).paired == expected


def test_wavefronts_of_gathered_values() -> None:
    """Four values per lane, kept by chance and packed: 1.2 wavefronts per load at 50 %, 1 at 10 %."""
    generator = random.Random(0)
    for density, expected in ((0.5, 1.21), (0.1, 1.0)):
        total = loads = 0
        for _ in range(300):
            at, lanes = 2 * generator.randrange(64), []
            for _ in LANES:
                kept = [generator.random() < density for _ in range(4)]
                lanes.append([at + 2 * sum(kept[:i]) if kept[i] else None for i in range(4)])
                at += 2 * sum(kept)
            for i in range(4):
                total += Access("load", 2, tuple(lane[i] for lane in lanes)).wavefronts
                loads += 1
        assert total / loads == pytest.approx(expected, abs=0.04), density


def test_a_trace_with_lanes_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="32 addresses, got 2"):
        list(wavefronts.read(["load,4,0,4"]))


PROGRAM = """
#include "cuda/device.cuh"
#include <cstdio>
using namespace alphaprune;
int main() {
  const auto body = [] {
    const int lane = cuda::lane_index();
    for (int i = 0; i < 4; ++i) emulator::store_shared(static_cast<uint32_t>(16 * lane + 4 * i), lane);
    cuda::sync_warp();
    emulator::load_shared<uint16_t>(8u * lane, lane < 16);
  };
  if (!emulator::launch({1, 1, 1}, 32, 512, body, emulator::Order::forwards, true).empty()) return 1;
  for (const auto& access : emulator::machine().blocks[0].warps[0].accesses) {
    std::printf("%s,%u", access.kind, access.bytes);
    for (const int64_t at : access.address) at < 0 ? std::printf(",-") : std::printf(",%d", static_cast<int>(at));
    std::printf("\\n");
  }
}
"""


@emulated
def test_the_emulator_records_addresses(tmp_path: Path) -> None:
    if not (ROOT / "csrc" / "cuda" / "device.cuh").is_file():
        pytest.skip("csrc/cuda/device.cuh is missing")
    program = tmp_path / "trace"
    command = ["g++", "-x", "c++", "-std=c++17", f"-I{ROOT / 'csrc'}", "-", "-o", str(program)]
    subprocess.run(command, input=PROGRAM, text=True, check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    found = wavefronts.total(wavefronts.read(lines))
    assert found == {
        "store": 4 * 4,
        "load": 1,
        "all": 17,
        "paired": 17,
    }  # every fourth bank four times; sixteen lanes in sixteen banks
