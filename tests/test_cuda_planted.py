"""Mistakes planted into sbt_mma's source are seen, each by the sentence or the wrong result that it must lead to."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from test_cuda import H100, INTEGERS, SMALL, check, guarded
from torch import Tensor

from alphaprune.kernels import cuda

WRONG = "error is|nobody wrote|NaN"  # a wrong number, or bytes that were never written
# What a mistake in the source does: (file, text, replacement, what is seen).
PLANTED = {
    "no barrier before the words are read": ("sbt_mma.cuh", "sync_warp();", ";", "barrier is missing|nobody wrote"),
    "no wait for the copies": ("sbt_mma.cuh", "copy_wait<kStages - 2>();", "", "a wait is missing"),
    "a wait for too few copies": (
        "sbt_mma.cuh",
        "copy_wait<kStages - 2>",
        "copy_wait<kStages - 1>",
        "a wait is missing",
    ),
    "no barrier before the rings become sums": (
        "sbt_mma.cuh",
        "copy_wait<0>();\n  sync_block();",
        "copy_wait<0>();",
        "races",
    ),
    "no barrier before the sums are added": (
        "sbt_mma.cuh",
        "  sync_block();\n  for (int index",
        "  for (int index",
        "races|nobody wrote",
    ),
    "a copy that nobody waits for": ("sbt_mma.cuh", "copy_wait<0>();\n", "", "a wait is missing|under way"),
    "words stored outside": (
        "chunk.cuh",
        "to = lane / 4 * kStepMeta",
        "to = lane * 4 * kStepMeta",
        "outside|races|nobody",
    ),
    "a tile too far": ("chunk.cuh", "offsets = all_offsets + first;", "offsets = all_offsets + first + 1;", WRONG),
    "the second tile's start forgotten": (
        "chunk.cuh",
        "kWarp / 2 ? first_tile_bytes : 0",
        "kWarp ? first_tile_bytes : 0",
        WRONG,
    ),
    "a bit too far": ("chunk.cuh", "1u << (lane % 8 * 4 + i)", "2u << (lane % 8 * 4 + i)", WRONG),
    "too few copies": ("chunk.cuh", "kAll - kStraight>(to", "kAll - kStraight - 1>(to", "nobody wrote|error is"),
    "halves of a tile swapped": (
        "chunk.cuh",
        "uint32_t mask[2] = {words.x, words.z}",
        "uint32_t mask[2] = {words.z, words.x}",
        WRONG,
    ),
    "another row tile's values": (
        "sbt_mma.cuh",
        "one.offsets += (r < there ? r : 0) * stride;",
        "one.offsets += (r < there ? 0 : 0) * stride;",
        WRONG,
    ),
    "rows that are not there": ("sbt_mma.cuh", "if (r >= there) one.mask_left = 0;", "", WRONG + "|outside|signal"),
    "a token too many": ("sbt_mma.cuh", "8 * t + group < p.tokens", "8 * t + group <= p.tokens", "signal 11"),
    "no barrier before a partner's operands are read": (
        "sbt_mma.cuh",
        "sync_warps(1 + team, kSharers * kWarp);",
        "",
        "races|nobody wrote",
    ),
    "one barrier for all teams": (
        "sbt_mma.cuh",
        "sync_warps(1 + team,",
        "sync_warps(1,",
        "races|nobody wrote|deadlock",
    ),
    "operands given where the partner still reads": (
        "sbt_mma.cuh",
        "given = step % 2 == 0 ? given + kMine * kOperandBytes : given - kMine * kOperandBytes;",
        "",
        "races",
    ),
    "its own operands taken": ("sbt_mma.cuh", "given + taken + r", "given + r", WRONG),
    "the partner's row tiles in the wrong place": ("sbt_mma.cuh", "/ 16 ^ of * kMine", "/ 16", "error is"),
    "both of a team with the same tokens": ("sbt_mma.cuh", "first_token = member *", "first_token = 0 *", "error is"),
    "a team of which one has no row tile": (
        "sbt_mma.cuh",
        "const int first = kSure || there > 0 ? first_tile : p.row_tiles - 1;",
        "const int first = first_tile;",
        "signal 11|outside|nobody wrote|not aligned",
    ),
    "the residual's or bias's row": (
        "output.cuh",
        "static_cast<const float*>(out.bias)[row]",
        "static_cast<const float*>(out.bias)[0]",
        "error is",
    ),
}


# The same of int8 values.
PLANTED_INT8 = {
    "a byte whose sign is not turned over": ("chunk.cuh", "kSigns = 0x80808080u", "kSigns = 0x80800080u", "error is"),
    "the set of kept ones backwards": ("chunk.cuh", "set >> place & 1 ?", "set >> (3 - place) & 1 ?", WRONG),
    "bytes counted that are not kept": ("chunk.cuh", "popcount(set & ((1u << place) - 1)) : 4u", "place : 4", WRONG),
    "another lane's set": ("chunk.cuh", "(lane % 8 * 4 + 29) % 32", "(lane % 8 * 4 + 28) % 32", WRONG + "|not aligned"),
    "another number taken away": ("chunk.cuh", "kBfloat ? 0xc000c000u", "kBfloat ? 0xc0004000u", "error is"),
    "a table that nobody fills": (
        "sbt_mma.cuh",
        "if constexpr (Lane::kTableBytes > 0) Lane::fill(table, lane);",
        "",
        "nobody wrote",
    ),
    "one table for all warps": ("sbt_mma.cuh", "shared_start() + warp * Lane::kTableBytes", "shared_start()", "races"),
    "rings where the tables are": (
        "sbt_mma.cuh",
        "rings = shared_start() + p.warps * Lane::kTableBytes",
        "rings = shared_start()",
        WRONG + "|races|under way",
    ),
    "offsets of 16 bytes": ("chunk.cuh", "kUnitOffsets = kUnitBytes / kOffsetBytes", "kUnitOffsets = 1", "not aligned"),
    "a scale too early": ("sbt_mma.cuh", "    ++next;\n", "    next += warp_index() * 0;\n", "error is"),
    "the upper rows' scales": ("sbt_mma.cuh", "[i / 2] * part", "[0] * part", "error is"),
    "scales past the last row": ("sbt_mma.cuh", "(8 * i < last ? 8 * i : last)", "8 * i", "signal 11"),
    "the partner's scales for its own": (
        "sbt_mma.cuh",
        "(block_tile + (member ^ i) * kMine)",
        "first_tile",
        "error is",
    ),
    "a scale forgotten": ("sbt_mma.cuh", "total *= p.scale[at_row];", "total *= p.scale[block_tile];", "error is"),
    "a factor forgotten": ("sbt_mma.cuh", "if constexpr (kBytes == 1) total *= Lane::kFactor;", "", "error is"),
}


def run_all(library: str, kinds: tuple[str | None, ...]) -> None:
    """Some products with the module in this file: what a process of its own does, because a mistake may end it."""
    module = emulated.open_module(Path(library))
    cuda._find = lambda: (module, "")
    original = Tensor.new_empty
    Tensor.new_empty = lambda self, *sizes, **keywords: guarded(original(self, *sizes, **keywords).fill_(float("nan")))
    for order, (n, k, density) in itertools.product(range(3), [(40, 1000, 0.5), (16, 128, 1), (37, 640, 0.8)]):
        module.emulate_in_order(order)
        for tokens, device in ((1, H100), (8, H100), (40, H100), (40, SMALL), (70, H100), (70, SMALL)):
            module.emulate_device(*device)
            cuda._device.cache_clear()
            for values in kinds:
                check(n, k, tokens, density, torch.bfloat16, torch.randn(n), values=values)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The compiled files of csrc/cuda."""
    return emulated.build(tmp_path_factory.mktemp("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["none", *PLANTED, *PLANTED_INT8])
def test_a_planted_mistake_is_seen(mistake: str, objects: dict[str, Path], tmp_path: Path) -> None:
    made, stem, kinds = objects, "sbt_mma", (None,)
    if mistake in PLANTED_INT8:
        stem, kinds = "sbt_mma_int8", INTEGERS
    if mistake == "none":
        kinds = (None, *INTEGERS)
    else:
        file, text, replacement, seen = {**PLANTED, **PLANTED_INT8}[mistake]
        csrc = shutil.copytree(emulated.ROOT / "csrc", tmp_path / "csrc")
        source = (csrc / "cuda" / file).read_text()
        assert source.count(text) == 1, f"{file} has changed: {text}"
        (csrc / "cuda" / file).write_text(source.replace(text, replacement))
        kept = {name: path for name, path in objects.items() if name != stem}
        made = emulated.build(tmp_path / "objects", csrc, kept)
    library = emulated.link_library(made, tmp_path)
    command = [sys.executable, "-c", f"import test_cuda_planted; test_cuda_planted.run_all({str(library)!r}, {kinds})"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    said = done.stderr + (f"signal {-done.returncode}" if done.returncode < 0 else "")
    assert (done.returncode == 0) == (mistake == "none"), said
    assert mistake == "none" or re.search(seen, said), said
