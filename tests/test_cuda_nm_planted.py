"""Mistakes planted into nm_mma_sp's sources are seen, each by a sentence or a wrong result."""

import re
import shutil
from pathlib import Path

import cuda_face
import pytest
import torch
from test_cuda_nm import TINY, check, check_all, kernel, not_finite, one_infinity

__all__ = ["kernel"]  # the fixture
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

PLANTED = {
    "no wait for x": ("      copy_wait<0>();\n      sync_warp();", "      sync_warp();"),
    "x read before all lanes have it": ("      copy_wait<0>();\n      sync_warp();", "      copy_wait<0>();"),
    "x copied over x that is read": (
        "const uint32_t other = ring + (ring + kStage - stage);",
        "const uint32_t other = stage;",
    ),
    "no barrier before the sums": ("  copy_wait<0>();\n  sync_block();", "  copy_wait<0>();"),
    "no barrier before the sums are read": ("  sync_block();\n  float any = 0;", "  float any = 0;"),
    "the metadata of the other step": ("if (odd)", "if (!odd)"),
    "the metadata of the other row tile": (
        "word_of(words, 2 * r + step / 2)",
        "word_of(words, 2 * (1 - r) + step / 2)",
    ),
    "a wrong swizzle": ("((i * kAtOnce & 7) << 4)", "((i * kAtOnce & 3) << 4)"),
    "a column panel too many": (
        "int left = (p.col_panels - warp + kWarps - 1) / kWarps;",
        "int left = (p.col_panels - warp + kWarps) / kWarps;",
    ),
    "a warp's sums forgotten": (
        "for (int w = 0; w < kWarps; ++w)\n      total",
        "for (int w = 1; w < kWarps; ++w)\n      total",
    ),
    "tokens that are not there not zeroed": (">= p.tokens) store_shared_u128", "> p.tokens) store_shared_u128"),
    "columns past the last not zeroed": (
        "half[k] = col + k < p.cols ? load_cached(x + k) : 0;",
        "half[k] = load_cached(x + k);",
    ),
    "rows past the last": ("if (!p.out.has(row)) continue;", ""),
    "x not probed": ("mma_sparse<0, Value>(probe, b[t], b[t], words.x);", ""),
    "a pruned infinity forgotten": ("if (is_nan(any) &&", "if (!is_nan(any) &&"),
    "a panel counted to the weight before": ("row >= of[1].first", "row > of[1].first"),
    "the panel of another weight": ("row_panel - p.out.of[member].first / kNmRows", "row_panel"),
    "another weight's panels": ("return p.panels[member] +", "return p.panels[0] +"),
    "the bias of another weight": (
        "const OutputRows& to = out.holder(row);\n  row -= to.first;\n  if (to.bias) sum",
        "const OutputRows& to = out.of[0];\n  row -= to.first;\n  if (to.bias) sum",
    ),
    "rows of a weight that are not there": ("return row - to.first < to.rows;", "return row - to.first <= to.rows;"),
    "no bias": ("if (to.bias) sum += bias_of(to, row);", ""),
}


def battery(kernel) -> None:
    """What finds every planted error; quick, so that many copies can be tried."""
    for order in cuda_face.ORDERS:
        check(kernel, 37, 2200, (2, 4), 5, torch.bfloat16, bias=torch.randn(37), order=order)
        check(kernel, 20, 1280, (2, 4), 40, torch.bfloat16, order=order)
    check_all(kernel, (37, 32, 5), 264, 5, torch.bfloat16, biased=True)
    not_finite(kernel)
    one_infinity(kernel)


def test_battery_passes(kernel) -> None:
    assert not cuda_face.fails(lambda: battery(kernel))


WAIT = "mbarrier_wait(shared.full(index), parity);"
# The same for sm_90a: (text, replacement, what is seen).
WRONG = "error is|NaN in other places|assert"  # a wrong number, or none
PLANTED_SM90 = {
    "no wait for a stage": (WAIT, "", "a wait is missing|nobody wrote"),
    "a wait for the other phase": (WAIT, WAIT.replace("parity", "parity ^ 1"), "wait is missing|deadlock|nobody wrote"),
    "a stage brought over what is read": (
        "if (before >= p.stages) mbarrier_wait",
        "if (false) mbarrier_wait",
        "missing|arriv|under way",
    ),
    "a stage given back before it is read": (
        WAIT,
        f"{WAIT} if (lane == 0) mbarrier_arrive(shared.empty(index));",
        "races|deadlock|missing",
    ),
    "a stage never given back": (
        "if (lane == 0) mbarrier_arrive(shared.empty(index));",
        "if (lane == 99) mbarrier_arrive(shared.empty(index));",
        "deadlock",
    ),
    "the second half of x is the first": ("x, first + kStreamBox, 0", "x, first, 0", WRONG),
    "fewer bytes expected": ("there ? kPanelBytes : 0", "there ? kPanelBytes - 16 : 0", "bytes more"),
    "the weight brought twice": ("if (before >= ahead) bring_weight", "bring_weight", "under way|deadlock|missing"),
    "the ring becomes sums while it is read": (
        "if (last) sync_block();",
        "if (last && warp > 99) sync_block();",
        "wait is missing|races|deadlock",
    ),
    "sums read before they are there": (
        "} else {\n        sync_warps(1, threads);\n      }",
        "}",
        "barrier is missing|nobody wrote",
    ),
    "sums written over others that are read": (
        "if (!last) sync_warps(1, threads);  // nobody writes over sums that are read",
        "",
        "races",
    ),
    "sums of other blocks read before they are there": (
        "if (p.splits > 1) {\n        sync_cluster();",
        "if (p.splits > 1) {\n        sync_block();",
        "barrier of the cluster is missing|deadlock|wrong",
    ),
    "a block leaves while others read its sums": (
        "if (p.splits > 1) sync_cluster();  // nobody leaves",
        "if (false) sync_cluster();  // nobody leaves",
        "ended",
    ),
    "the other phase after a round": (
        "index -= p.stages;\n        parity ^= 1;",
        "index -= p.stages;",
        "wait is missing|deadlock",
    ),
    "another panel": ("(panel < panels ? panel :", "(panel < panels ? panels - 1 - panel :", WRONG),
    "a slice forgotten": (
        "for (int slice = 0; slice < p.slices; ++slice) {",
        "for (int slice = 1; slice < p.slices; ++slice) {",
        WRONG,
    ),
    "a block's columns forgotten": (
        "for (int from = 0; from < p.splits; ++from)\n      for",
        "for (int from = 1; from < p.splits; ++from)\n      for",
        WRONG,
    ),
    "x not probed": ("mma_sparse<0, Value>(probe, b[t], b[t], word_of(words, 0));", ";", WRONG),
    "three steps probed": ("step < kNmSteps; ++step) probes", "step < kNmSteps - 1; ++step) probes", WRONG),
    "flags of other blocks forgotten": ("load(shared.flags + at, from)", "load(shared.flags + at, rank)", WRONG),
    "a pruned infinity forgotten": (
        "if (is_nan(any)) {\n      ALPHAPRUNE_UNROLL",
        "if (false) {\n      ALPHAPRUNE_UNROLL",
        WRONG,
    ),
    "the token of another tile": ("in_unit % kNmRows + i, first + token)", "in_unit % kNmRows + i, token)", WRONG),
    "rows past the last": ("if (p.nm.out.has(row + i)) store", "store", "bytes around y|signal"),
    "another weight's panels": ("return p.panels[member] +", "return p.panels[0] +", WRONG + "|under way|signal"),
    "a panel of rows too early": ("there ? lane : 0)) + col", "there ? lane - 1 : 0)) + col", WRONG + "|signal"),
    "panels past the last": ("if (!p.nm.out.has(row)) continue;", "", "bytes around y|signal"),
}


def battery_sm90(kernel) -> None:
    """What finds every error planted into nm_mma_sp_sm90.cuh."""
    for order in cuda_face.ORDERS:
        check(kernel, 37, 2200, (2, 4), 5, torch.bfloat16, bias=torch.randn(37), order=order, device=TINY)
        check(kernel, 122, 648, (2, 4), 20, torch.bfloat16, order=order, device=TINY, share=(1, 1))
        check(kernel, 60, 1160, (2, 4), 40, torch.bfloat16, order=order, device=TINY, share=(2, 1))
        check(kernel, 61, 1160, (2, 4), 3, torch.bfloat16, order=order, device=TINY, share=(3, 4))
        check_all(kernel, (37, 32, 65), 264, 5, torch.bfloat16, biased=True, order=order, device=TINY, share=(2, 1))
    not_finite(kernel, TINY)
    not_finite(kernel, TINY, (1, 2))
    one_infinity(kernel, TINY)


def test_battery_of_sm90_passes(kernel) -> None:
    assert cuda_face.complaint(lambda: battery_sm90(kernel)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name: str, tmp_path: Path) -> None:
    library = cuda_face.build("nm", tmp_path, dict([PLANTED[name]]), "-O0")
    assert cuda_face.fails(lambda: battery(library.nm_mma_sp_emulated))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED_SM90)
def test_errors_planted_for_sm90_are_caught(name: str, tmp_path: Path) -> None:
    old, new, seen = PLANTED_SM90[name]
    library = cuda_face.build("nm", tmp_path, {old: new}, "-O0")
    said = cuda_face.complaint(lambda: battery_sm90(library.nm_mma_sp_emulated))
    assert said and re.search(seen, said), said
