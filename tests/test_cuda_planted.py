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
from emulated import guarded
from test_cuda import H100, INTEGERS, KINDS, PAIRS, SMALL, check
from test_cuda_group import check_group
from torch import Tensor

from alphaprune.kernels import cuda

WRONG = "error is|nobody wrote|NaN"  # a wrong number, or bytes that were never written
# What a mistake in the source does: (file, text, replacement, what is seen).
PLANTED = {
    "no barrier before the words are read": (
        "sbt_mma.cuh",
        "sync_warp();  // every lane's",
        "// every lane's",
        "barrier is missing|nobody wrote|races",
    ),
    "words that the next chunk overwrites": (
        "sbt_mma.cuh",
        "sync_warp();  // nobody reads",
        "// nobody reads",
        "races",
    ),
    "no wait for the copies": (
        "sbt_mma.cuh",
        "      copy_wait<kStages - 2>();\n    }\n    sync_warp",
        "    }\n    sync_warp",
        "a wait is missing",
    ),
    "a wait for too few copies": (
        "sbt_mma.cuh",
        "      copy_wait<kStages - 2>();\n    }\n    sync_warp",
        "      copy_wait<kStages - 1>();\n    }\n    sync_warp",
        "a wait is missing",
    ),
    "no wait for a stage": (
        "sbt_mma.cuh",
        "if constexpr (kBulk) mbarrier_wait(at.landed + stage * kMbarrierBytes, phase);",
        "",
        "under way|nobody wrote|wait",
    ),
    "no wait for a slab of x": (
        "sbt_mma.cuh",
        "mbarrier_wait(at.slab_landed(number), number / 2 % 2);",
        "",
        "under way|nobody wrote|wait",
    ),
    "a slab of x over one that is read": (
        "sbt_mma.cuh",
        "if (slab) mbarrier_wait(at.slab_left(number - 1), (number - 1) / 2 % 2);",
        "",
        "races|wait is missing",
    ),
    "a slab of x that nobody leaves": (
        "sbt_mma.cuh",
        "if (kBulk && lane == 0) mbarrier_arrive(at.slab_left(number));",
        "",
        "deadlock",
    ),
    "lanes that a barrier leaves behind": (
        "sbt_mma.cuh",
        "if constexpr (kBulk) sync_warp();  // no lane",
        "// no lane",
        "deadlock",
    ),
    "fewer bytes expected": ("sbt_mma.cuh", "all += bytes[r] + At::kMasks", "all += bytes[r]", "bytes more"),
    "tokens that are not there": (
        "sbt_mma.cuh",
        "if constexpr (kTiles > 1) clear_activations<kTiles>(p, x, x_stride);",
        "",
        "nobody wrote",
    ),
    "no barrier before the rings become sums": (
        "sbt_mma.cuh",
        "    sync_block();\n    constexpr uint32_t kSums",
        "    constexpr uint32_t kSums",
        "races",
    ),
    "no barrier before the sums are added": (
        "sbt_mma.cuh",
        "    sync_block();\n    const int all",
        "    const int all",
        "races|nobody wrote",
    ),
    "no barrier before the rings are filled again": (
        "sbt_mma.cuh",
        "sync_block();  // the sums are read",
        "// the sums are read",
        "races",
    ),
    "a copy that nobody waits for": (
        "sbt_mma.cuh",
        "      copy_wait<0>();\n    }\n",
        "    }\n",
        "a wait is missing|under way",
    ),
    "words stored outside": (
        "chunk.cuh",
        "to = lane / 4 * kStepMeta",
        "to = lane * 4 * kStepMeta",
        "outside|races|nobody",
    ),
    "a tile too far": ("chunk.cuh", "offsets = all_offsets + first;", "offsets = all_offsets + first + 1;", WRONG),
    "the second tile's start forgotten": (
        "chunk.cuh",
        "kWarp / kChunk ? first_tile_bytes : 0",
        "kWarp ? first_tile_bytes : 0",
        WRONG,
    ),
    "a bit too far": ("chunk.cuh", "1u << (lane % 8 * 4 + i)", "2u << (lane % 8 * 4 + i)", WRONG),
    "too few copies": ("chunk.cuh", "kAll - kStraight>(to", "kAll - kStraight - 1>(to", "nobody wrote|error is"),
    "halves of a tile swapped": (
        "chunk.cuh",
        "mask[0] = words.x, mask[1] = words.z;",
        "mask[0] = words.z, mask[1] = words.x;",
        WRONG,
    ),
    "another row tile's values": ("sbt_mma.cuh", "offsets_of(to[r], r * apart", "offsets_of(to[r], 0 * apart", WRONG),
    "another row tile's words": ("sbt_mma.cuh", "row.mask_of(r * apart", "row.mask_of(0 * apart", WRONG),
    "a row tile past a weight's last": (
        "sbt_mma.cuh",
        "member_end < end ? member_end : end",
        "member_end < 0 ? 0 : end",
        WRONG + "|signal",
    ),
    "row tiles of two weights at a time": ("launch_mma.cuh", "call.members > 1 ? kRows : 1", "1", WRONG + "|signal"),
    "a row tile counted to the weight before": (
        "output.cuh",
        "(row >= of[1].first)",
        "(row > of[1].first)",
        WRONG + "|signal",
    ),
    "a row that a weight does not have": (
        "output.cuh",
        "row - to.first < to.rows",
        "row - to.first <= to.rows",
        WRONG + "|signal",
    ),
    "the row tile of another weight": (
        "sbt_mma.cuh",
        "tile -= p.out.of[member].first / kTileRows;",
        "",
        WRONG + "|signal|outside",
    ),
    "another weight's words": ("sbt_mma.cuh", "row.start(of.mask", "row.start(p.of[0].mask", WRONG + "|signal|outside"),
    "another weight's offsets": ("sbt_mma.cuh", "of.offsets, static", "p.of[0].offsets, static", WRONG + "|signal"),
    "another weight's values": (
        "sbt_mma.cuh",
        "lane == 0 ? of.values : nullptr",
        "lane == 0 ? p.of[0].values : nullptr",
        WRONG + "|signal",
    ),
    "another warp's chunk": ("sbt_mma.cuh", "part * Lane::kMacroTiles", "0 * Lane::kMacroTiles", WRONG),
    "a block's first row tile twice": (
        "sbt_mma.cuh",
        "round_tile + team * kRows",
        "round_tile + 0 * team",
        "error is|NaN",
    ),
    "the residual's or bias's row": (
        "output.cuh",
        "static_cast<const float*>(to.bias)[row]",
        "static_cast<const float*>(to.bias)[0]",
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
        "if constexpr (Lane::kTableBytes > 0) Lane::fill(at.table, lane);",
        "",
        "nobody wrote",
    ),
    "one table for all warps": ("sbt_mma.cuh", "shared_start() + warp * Lane::kTableBytes", "shared_start()", "races"),
    "rings where the tables are": (
        "sbt_mma.cuh",
        "barriers = shared_start() + warps * Lane::kTableBytes",
        "barriers = shared_start()",
        WRONG + "|races|under way",
    ),
    "offsets of 16 bytes": ("chunk.cuh", "1 : kUnitBytes / kOffsetBytes", "1 : 1", "not aligned"),
    "a scale too early": ("sbt_mma.cuh", "    next += further;\n", "    next += 0 * further;\n", "error is"),
    "the upper rows' scales": ("sbt_mma.cuh", "[i / 2] * part", "[0] * part", "error is"),
    "scales past the last row": ("sbt_mma.cuh", "(8 * i < last ? 8 * i : last)", "8 * i", "signal 11"),
    "a scale forgotten": (
        "sbt_mma.cuh",
        "scale[row - p.out.of[member].first];",
        "scale[round_tile - p.out.of[member].first];",
        "error is|signal",
    ),
    "another weight's scale": ("sbt_mma.cuh", "total *= p.of[member]", "total *= p.of[0]", "error is|signal"),
    "another weight's scales": ("sbt_mma.cuh", "next = p.of[member]", "next = p.of[0]", "error is|signal"),
    "a factor forgotten": ("sbt_mma.cuh", "if constexpr (Lane::kBytes == 1) total *= Lane::kFactor;", "", "error is"),
}
PLANTED_PAIRS = {
    "a word where another is": (
        "chunk.cuh",
        "pair % 4 * 16 + pair / 4 * 8",
        "pair % 4 * 16 + pair / 4 * 0",
        f"{WRONG}|races",
    ),
    "words of half a size": ("device.cuh", "number.two * number.two : 0", "number.two : 0", "not aligned|error is"),
    "pairs of the other product": ("device.cuh", "a[j / 2][i + j % 2 * 2]", "a[j % 2][i + j / 2 * 2]", "error is"),
    "activations of other pairs": ("sbt_mma.cuh", "(from + 32 * i + 16)", "(from + 32 * i + 8)", "error is"),
    "a lane's activations": ("sbt_mma.cuh", "pair * 8 / Lane::kProducts", "pair * 8", "error is|outside|nobody"),
    "the same words again": ("sbt_wgmma.cuh", "words(meta, first / kProducts + 1)", "words(meta, 0)", "error is"),
    "units of half a size": ("chunk.cuh", "? kOffsetBytes / kUnitBytes : 1", "? 1 : 1", "nobody wrote|error is"),
}


def run_all(library: str, kinds: tuple[str | None, ...]) -> None:
    """Some products with the module in this file: what a process of its own does, because a mistake may end it."""
    module = emulated.open_module(Path(library))
    cuda._find = lambda: (module, "")
    original = Tensor.new_empty
    Tensor.new_empty = lambda self, *sizes, **keywords: guarded(original(self, *sizes, **keywords).fill_(float("nan")))
    few, narrow = (90, 1, 40000), (80, 1, 40000)  # so little shared memory that x comes in slabs and warps take turns
    for order, (n, k, density) in itertools.product(range(3), [(40, 1000, 0.5), (16, 128, 1), (37, 640, 0.8)]):
        module.emulate_in_order(order)
        cases = [(1, H100), (8, H100), (40, H100), (40, SMALL), (70, H100), (9, few), (9, narrow), (30, few)]
        for tokens, device in cases:
            module.emulate_device(*device)
            cuda.opened.cache_clear()
            for values in kinds:
                if values == PAIRS and (tokens, device) == (30, few):
                    continue  # no Hopper has so little for pair_wgmma
                check(n, k, tokens, density, torch.bfloat16, torch.randn(n), values=values)
    module.emulate_device(90, 1, 40000)  # more row tiles than warps
    for values in kinds:
        check(300, 640, 3, 0.5, torch.bfloat16, None, values=values)
    for (device, k), (tokens, rows) in itertools.product(
        [((90, 1, 60000), 640), ((80, 1, 166912), 200)], [(3, (40, 16, 5)), (40, (16, 40, 17))]
    ):
        module.emulate_device(*device)
        for values in kinds:
            if values == PAIRS:
                continue
            check_group(rows, k, tokens, torch.bfloat16, values)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["none", *PLANTED, *PLANTED_INT8, *PLANTED_PAIRS])
def test_a_planted_mistake_is_seen(mistake: str, objects: dict[str, Path], tmp_path: Path) -> None:
    made, stems, kinds = objects, {"sbt_mma"}, (None,)
    if mistake in PLANTED_INT8:
        stems, kinds = {"sbt_mma_int8"}, INTEGERS
    if mistake in PLANTED_PAIRS:
        stems, kinds = {"pair_mma", "pair_wgmma"}, (PAIRS,)
    if mistake == "none":
        kinds = KINDS
    else:
        file, text, replacement, seen = {**PLANTED, **PLANTED_INT8, **PLANTED_PAIRS}[mistake]
        csrc = shutil.copytree(emulated.ROOT / "csrc", tmp_path / "csrc")
        source = (csrc / "cuda" / file).read_text()
        assert source.count(text) == 1, f"{file} has changed: {text}"
        (csrc / "cuda" / file).write_text(source.replace(text, replacement))
        kept = {name: path for name, path in objects.items() if name not in stems}
        made = emulated.build(tmp_path / "objects", csrc, kept)
    library = emulated.link_library(made, tmp_path)
    command = [sys.executable, "-c", f"import test_cuda_planted; test_cuda_planted.run_all({str(library)!r}, {kinds})"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    said = done.stderr + (f"signal {-done.returncode}" if done.returncode < 0 else "")
    assert (done.returncode == 0) == (mistake == "none"), said
    assert mistake == "none" or re.search(seen, said), said
