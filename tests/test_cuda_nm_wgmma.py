"""nm_wgmma, 2:4 products of many tokens on sm_90a: the kernel's own source, run thread by thread on the CPU."""

import itertools
import re
import shutil
from pathlib import Path

import cuda_face
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_nm import HALVES, check, check_all, kept, multiply, one_infinity
from test_cuda_nm_planted import WRONG
from tolerance import assert_product

from alphaprune.formats import sbt
from alphaprune.kernels import nm_layout

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

TILES = [(128, 2), (256, 2), (128, 4)]  # tokens of a unit, warpgroups of 64 rows of each of two blocks
H200 = (90, 132, 232448)  # capability, multiprocessors, bytes of shared memory of a block
SHORT = (90, 2, 130 << 10)  # one pair of blocks, rings that go round soon


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    return cuda_face.build("nm", tmp_path_factory.mktemp("nm_wgmma")).nm_wgmma_emulated


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("order", cuda_face.ORDERS)
def test_product_is_within_the_bound(kernel, order: int, tile: int) -> None:
    """Rows that end in a panel, a row tile and a group of four; columns that end in either half of a panel."""
    for i, (n, k, tokens) in enumerate([(1, 8, 1), (37, 136, 70), (100, 264, 130), (260, 72, 20)]):
        dtype = HALVES[(i + order) % 2]
        bias = (None, torch.randn(n).to(dtype), torch.randn(n), torch.randn(n).half())[i]
        residual = torch.randn(tokens, n).to(dtype) if i % 2 else None
        options = {"bias": bias, "residual": residual, "order": order, "device": H200, "share": tile}
        check(kernel, n, k, (2, 4), tokens, dtype, **options)


@pytest.mark.parametrize("tile", TILES)
def test_units_follow_each_other(kernel, tile: int) -> None:
    """One pair of blocks does all rows and tokens, and its ring goes on from one unit to the next."""
    tokens, rows = tile[0], 128 * tile[1]
    cases = [(rows + 40, tokens + 9), (30, 2 * tokens + 1), (2 * rows + 8, 7)]
    for order, (n, count) in zip(cuda_face.ORDERS, cases, strict=True):
        check(kernel, n, 200, (2, 4), count, torch.bfloat16, order=order, device=SHORT, share=tile)


def test_many_units_of_tokens(kernel) -> None:
    """More than a band of them, whose last one is not full."""
    check(kernel, 300, 64, (2, 4), 128 * 9 + 1, torch.bfloat16, device=(90, 6, 100 << 10), share=(128, 2))


@pytest.mark.parametrize("order", cuda_face.ORDERS)
def test_several_weights_in_one_launch(kernel, order: int) -> None:
    for (rows, k), tokens in [(((37, 1, 64), 136), 12), (((260, 15), 72), 150), (((32, 33, 4), 136), 40)]:
        dtype = HALVES[(tokens + rows[0]) % 2]
        check_all(kernel, rows, k, tokens, dtype, tokens != 12, order=order, device=SHORT, share=TILES[order % 2])


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 40),
    tokens=st.integers(1, 300),
    pattern=st.sampled_from([(2, 4), (1, 4), (2, 8), (1, 2), (0, 4)]),
    dtype=st.sampled_from(HALVES),
    order=st.sampled_from(cuda_face.ORDERS),
    device=st.sampled_from([H200, SHORT]),
    share=st.sampled_from([(0, 0), (0, 4), *TILES]),
)
def test_any_shape(kernel, n, k, tokens, pattern, dtype, order, device, share) -> None:
    check(kernel, n, 8 * k, pattern, tokens, dtype, order=order, device=device, share=share)


def test_the_sum_is_the_same_however_the_work_is_shared(kernel) -> None:
    mask = kept(100, 328, 2, 4)
    weight, x = (torch.randn(100, 328) * mask).half(), torch.randn(140, 328).half()
    panels = nm_layout.build(sbt.pack(weight, mask))
    ways = [(H200, (128, 2), 0), (SHORT, (256, 2), 1), (SHORT, (128, 4), 2), (H200, (0, 0), 0)]
    first, *others = [multiply(kernel, panels, x, device, tile, order=order) for device, tile, order in ways]
    assert not first[0] and all(said == first[0] and torch.equal(y, first[1]) for said, y in others)


def not_finite(kernel) -> None:
    """Products with NaN and infinities in x and in the weight, as a dense layer has them."""
    for (n, k), tokens, dtype in itertools.product([(37, 136), (70, 264)], (3, 130), HALVES):
        mask = kept(n, k, 2, 4)
        weight = (torch.randn(n, k) * mask).to(dtype)
        if k == 264:
            weight[0, mask[0].nonzero()[5]] = float("inf")
        x = torch.randn(tokens, k).to(dtype)
        for token, value in zip(range(0, tokens, 29), itertools.cycle((float("inf"), float("nan"), -float("inf")))):
            x[token, torch.randint(k, ())] = value
        problem, y = multiply(kernel, nm_layout.build(sbt.pack(weight, mask)), x, SHORT)
        assert not problem, problem
        assert_product(y, x, weight)


def test_not_finite_activations_are_as_in_a_dense_layer(kernel) -> None:
    not_finite(kernel)
    one_infinity(kernel, SHORT)


def test_large_activations_are_not_taken_for_infinite_ones(kernel) -> None:
    for dtype in HALVES:
        mask = kept(20, 136, 2, 4)
        weight = (torch.randn(20, 136) * 1e-3 * mask).to(dtype)
        x = torch.full((2, 136), torch.finfo(dtype).max, dtype=dtype) * 0.25
        problem, y = multiply(kernel, nm_layout.build(sbt.pack(weight, mask)), x, SHORT)
        assert not problem and y.isfinite().all(), problem
        assert_product(y, x, weight)


def test_a_device_with_too_little_shared_memory(kernel) -> None:
    mask = kept(8, 8, 2, 4)
    panels = nm_layout.build(sbt.pack(mask.half(), mask))
    problem, _ = multiply(kernel, panels, torch.zeros(3, 8).half(), (90, 2, 30000))
    assert problem == "no way to share the work"


WAIT = "mbarrier_wait(shared.full(stage.index), stage.parity);"
RELEASE = "if (lane < kNmPair) mbarrier_arrive_in(lane, shared.empty(index));"
PLANTED = {
    "no wait for x and the weight": (WAIT, "", "missing|under way|nobody wrote"),
    "no wait before x is brought again": (
        "mbarrier_wait(shared.empty(stage.index), stage.parity);",
        "",
        "bytes more|arrival or a wait is missing|under way",
    ),
    "a stage given back to this block only": (
        RELEASE,
        "if (lane < kNmPair) mbarrier_arrive_in(cluster_rank(), shared.empty(index));",
        "races with a read|under way|deadlock",
    ),
    "a stage given back before its products are complete": (
        "wgmma_wait<1>();  // those",
        "//",
        "written while it is under way",
    ),
    "a stage never given back": (RELEASE, "", "deadlock"),
    "no fence before products": ("wgmma_fence();\n        wgmma_sparse", "wgmma_sparse", "a fence is missing"),
    "the bytes of one half expected": (
        "mbarrier_arrive_expect(full, nm_wide_x_bytes(kTokens));",
        "mbarrier_arrive_expect(full, nm_wide_x_bytes(kHalf));",
        "bytes more|nobody wrote|missing|under way",
    ),
    "x brought for this block only": (
        "copy_box_to((1u << kNmPair) - 1,",
        "copy_box_to(1u << cluster_rank(),",
        "deadlock",
    ),
    "the other half of the tokens": ("* kTokens + rank * kHalf,", "* kTokens + (1 - rank) * kHalf,", WRONG),
    "both halves in one place": (
        "shared.x(stage.index) + rank * nm_wide_x_bytes(kHalf),",
        "shared.x(stage.index),",
        "under way",
    ),
    "blocks that begin before the other has barriers": (
        "mbarrier_fence_init();\n  }\n  sync_cluster();\n\n  // Who brings gives",
        "mbarrier_fence_init();\n  }\n  sync_block();\n\n  // Who brings gives",
        "barrier of the cluster is missing|no barrier at",
    ),
    "a block that leaves before the other": (
        "sync_cluster();  // nobody leaves while the other",
        "// nobody leaves while the other",
        "ended|no barrier at|outside of shared memory",
    ),
    "the metadata of the other step": (
        "wgmma_sparse<0, Value, kTokens>(sum, a[half * kNmHalfSteps],",
        "wgmma_sparse<1, Value, kTokens>(sum, a[half * kNmHalfSteps],",
        WRONG,
    ),
    "the metadata of the other half": ("load_shared_u32(words + 4 * half);", "load_shared_u32(words);", WRONG),
    "the metadata of the other row tile": ("lane * 16 + warp % 2 * 8;", "lane * 16 + (1 - warp % 2) * 8;", WRONG),
    "metadata that come with either half": (
        "half ? kNmHalfBytes : kNmStagePanel",
        "kNmStagePanel",
        "missing|deadlock|under way|nobody wrote",
    ),
    "the other row tile": ("((2 * i + warp % 2) * kWarp", "((2 * i + 1 - warp % 2) * kWarp", WRONG),
    "the other half of a panel": ("from + half * (kNmHalfBytes / 16)", "from", WRONG),
    "the panel of another warp": (
        "shared.weight(stage.index, warp / 2);",
        "shared.weight(stage.index, warp % 4);",
        WRONG,
    ),
    "metadata written while they are in use": (
        "meta[half] = load_shared_u32(words + 4 * half);",
        "meta[half] = meta[1] = load_shared_u32(words + 4 * half);",
        "while it is under way",
    ),
    "the columns of the step before": ("operand_further(b, 64)", "operand_further(b, 32)", WRONG),
    "the rows of the other block": ("(rows * kNmPair + rank) * panels", "rows * kNmPair * panels", WRONG),
    "panels past the last": ("panel < p.row_panels ? panel : p.row_panels - 1", "panel", "signal"),
    "the tokens of another unit": (
        "rows = in_band / width;\n    tokens = band * kNmBand + in_band - rows * width;",
        "rows = in_band / width;\n    tokens = band * kNmBand;",
        WRONG,
    ),
    "a band that is not full": ("left < kNmBand ? left : kNmBand", "kNmBand", WRONG),
    "tokens past the last": ("if (token < p.nm.tokens) rows.store", "rows.store", "bytes around y|signal"),
    "rows past the last": ("if (i < count) y[at + i]", "y[at + i]", "bytes around y|signal"),
    "lanes that exchange with the wrong ones": ("lane ^ 4 * step", "lane ^ 2 * step", WRONG),
    "the token of another lane": ("group % 4 / 2) + 2 * (lane % 4) + group % 2", "group % 2) + 2 * (lane % 4)", WRONG),
    "a bias forgotten": ("sum[i] += bias[i];", "sum[i] += 0;", WRONG),
    "the residual of another token": ("Value::widen(residual[at + i])", "Value::widen(residual[i])", WRONG),
    "what is not finite not looked for": ("if (!sync_block_any(any)) return;", "return;", WRONG),
    "half of the activations looked at": ("found(eight.z) | found(eight.w);", "0u;", WRONG),
    "the other phase after a round": (
        "index -= stages;\n      parity ^= 1;",
        "index -= stages;",
        "missing|deadlock|bytes more",
    ),
}


def battery(kernel) -> None:
    """What finds every planted error; quick, so that many copies can be tried."""
    residual = torch.randn(140, 37).bfloat16()
    for order in cuda_face.ORDERS:
        options = {"order": order, "device": SHORT, "share": (128, 2)}
        check(kernel, 37, 456, (2, 4), 140, torch.bfloat16, bias=torch.randn(37), residual=residual, **options)
    check(kernel, 290, 136, (2, 4), 20, torch.bfloat16, device=SHORT, share=(128, 2))
    check(kernel, 290, 64, (2, 4), 128 * 9 + 1, torch.bfloat16, device=(90, 4, 60 << 10), share=(128, 2))
    one_infinity(kernel, SHORT)


def test_battery_passes(kernel) -> None:
    assert cuda_face.complaint(lambda: battery(kernel)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name: str, tmp_path: Path) -> None:
    old, new, seen = PLANTED[name]
    library = cuda_face.build("nm", tmp_path, {old: new}, "-O0")
    said = cuda_face.complaint(lambda: battery(library.nm_wgmma_emulated))
    assert said and re.search(seen, said), said
