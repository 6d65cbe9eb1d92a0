"""nm_mma_sp and its layout: the kernel's own source, run thread by thread on the CPU against float64."""

import itertools
import shutil
from pathlib import Path

import cuda_face
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_outputs, assert_product
from torch import Tensor

from alphaprune.formats import sbt
from alphaprune.kernels import nm_layout

HALVES = (torch.float16, torch.bfloat16)
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# rows, columns, (keep, of): parts of a panel, several panels and warps, K of 8, of 4 and of neither
SHAPES = [(1, 1, (2, 4)), (3, 7, (1, 4)), (37, 130, (2, 4)), (20, 264, (2, 8)), (33, 1153, (2, 4)), (65, 128, (2, 4))]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return cuda_face.build("nm", tmp_path_factory.mktemp("nm")).nm_mma_sp_emulated


def kept(n: int, k: int, keep: int, of: int) -> Tensor:
    """A random mask with `keep` of every `of` columns."""
    order = torch.rand(n, -(-k // of), of).argsort(-1).argsort(-1)
    return (order < keep).flatten(1)[:, :k]


def multiply(kernel, panels: nm_layout.NmPanels, x: Tensor, **options) -> tuple[str, Tensor]:
    return cuda_face.run(kernel, [panels.panels], list(panels.shape), x, panels.shape[0], **options)


def check(kernel, n: int, k: int, pattern: tuple[int, int], tokens: int, dtype: torch.dtype, **options) -> None:
    mask = kept(n, k, *pattern)
    weight = (torch.randn(n, k) * mask).to(dtype)
    x = torch.randn(tokens, k).to(dtype)
    problem, y = multiply(kernel, nm_layout.build(sbt.pack(weight, mask)), x, **options)
    assert not problem
    assert_outputs(y, x, weight, options.get("bias"), options.get("residual"))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "k", "pattern"), [*SHAPES, (5, 300, (0, 4)), (40, 520, (1, 16))])
def test_layout_round_trip(n: int, k: int, pattern: tuple[int, int], dtype: torch.dtype) -> None:
    mask = kept(n, k, *pattern)
    weight = (torch.randn(n, k) * mask).to(dtype)
    weight[mask & (torch.rand(n, k) < 0.1)] = float("nan")
    weight[mask & (torch.rand(n, k) < 0.1)] = -0.0
    panels = nm_layout.build(sbt.pack(weight, mask))
    assert torch.equal(nm_layout.unpack(panels).view(torch.int16), torch.where(mask, weight, 0).view(torch.int16))
    pairs = panels.panels.view(torch.int16)[..., nm_layout.VALUES :].to(torch.int64)[..., None] >> torch.arange(
        0, 16, 4
    )
    assert ((pairs & 3) < (pairs >> 2 & 3)).all(), "positions are distinct and in order"


def test_layout_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = kept(100, 300, 2, 4)
    packed = sbt.pack((torch.randn(100, 300) * mask).half(), mask)
    whole = nm_layout.build(packed)
    monkeypatch.setattr(nm_layout, "CHUNK", 1)
    assert torch.equal(whole.panels.view(torch.int16), nm_layout.build(packed).panels.view(torch.int16))


def test_bytes_per_weight() -> None:
    mask = kept(64, 256, 2, 4)
    assert nm_layout.build(sbt.pack(mask.half(), mask)).nbytes == mask.numel() * 9 / 8


def test_layout_refuses_what_is_not_2_4(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = kept(70, 300, 2, 4)
    mask[50, 8:11] = True
    mask[50, 11] = False
    monkeypatch.setattr(nm_layout, "CHUNK", 1)
    with pytest.raises(ValueError, match=r"layer: .* got 3 in row 50, columns 8 to 11; take another kernel"):
        nm_layout.build(sbt.pack(mask.half(), mask), "layer")
    with pytest.raises(ValueError, match=r"layer: 2:4 panels hold float16 or bfloat16, got torch.float32"):
        nm_layout.build(sbt.pack(torch.ones(2, 2)), "layer")


@pytest.mark.parametrize("order", cuda_face.ORDERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_product_is_within_the_bound(kernel, dtype: torch.dtype, order: int) -> None:
    for (n, k, pattern), tokens in itertools.product(SHAPES, BUCKETS):
        bias = (None, torch.randn(n).to(dtype), torch.randn(n), torch.randn(n).half())[(tokens + n) % 4]
        residual = torch.randn(tokens, n).to(dtype) if tokens in (4, 16) else None
        check(kernel, n, k, pattern, tokens, dtype, bias=bias, residual=residual, order=order)


@pytest.mark.parametrize("tokens", (3, 9, 33))
def test_all_warps_have_several_panels(kernel, tokens: int) -> None:
    for k in (2816, 3000):
        check(kernel, 17, k, (2, 4), tokens, torch.bfloat16)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 700),
    tokens=st.integers(1, 64),
    pattern=st.sampled_from([(2, 4), (1, 4), (2, 8), (1, 2), (0, 4)]),
    dtype=st.sampled_from(HALVES),
    order=st.sampled_from(cuda_face.ORDERS),
)
def test_any_shape(kernel, n, k, tokens, pattern, dtype, order) -> None:
    check(kernel, n, k, pattern, tokens, dtype, order=order)


def test_x_may_lie_anywhere(kernel) -> None:
    for shift, k in itertools.product((0, 2, 8), (128, 136, 65)):
        check(kernel, 9, k, (2, 4), 2, torch.float16, shift=shift)


def not_finite(kernel) -> None:
    """Products with NaN and infinities in x and in the weight, as a dense layer has them."""
    for (n, k), tokens, dtype in itertools.product([(37, 130), (9, 256), (20, 1300)], (1, 3, 10, 40), HALVES):
        mask = kept(n, k, 2, 4)
        weight = (torch.randn(n, k) * mask).to(dtype)
        if k == 256:
            weight[0, mask[0].nonzero()[5]] = float("inf")
        x = torch.randn(tokens, k).to(dtype)
        for token, value in zip(range(0, tokens, 3), itertools.cycle((float("inf"), float("nan"), -float("inf")))):
            x[token, torch.randint(k, ())] = value
        problem, y = multiply(kernel, nm_layout.build(sbt.pack(weight, mask)), x)
        assert not problem
        assert_product(y, x, weight)


def test_not_finite_activations_are_as_in_a_dense_layer(kernel) -> None:
    not_finite(kernel)


def test_one_infinity_in_any_column(kernel) -> None:
    """Every position of a group and every lane's share of x is looked at."""
    mask = kept(32, 128, 2, 4)
    weight = (torch.randn(32, 128) * mask).bfloat16()
    panels = nm_layout.build(sbt.pack(weight, mask))
    for column in range(0, 128, 3):
        x = torch.ones(2, 128, dtype=torch.bfloat16)
        x[1, column] = float("inf")
        problem, y = multiply(kernel, panels, x)
        assert not problem and y[0].isfinite().all()
        assert torch.equal(y[1].isnan(), weight[:, column] == 0) and torch.equal(y[1].isinf(), weight[:, column] != 0)


def test_large_activations_are_not_taken_for_infinite_ones(kernel) -> None:
    mask = kept(20, 256, 2, 4)
    weight = (torch.randn(20, 256) * 1e-3 * mask).bfloat16()
    x = torch.full((2, 256), 1e30, dtype=torch.bfloat16)
    problem, y = multiply(kernel, nm_layout.build(sbt.pack(weight, mask)), x)
    assert not problem
    assert_product(y, x, weight)


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
    "rows past the last": ("if (row >= p.out.rows) continue;", ""),
    "x not probed": ("mma_sparse<0, Value>(probe, b[t], b[t], words.x);", ""),
    "a pruned infinity forgotten": ("if (is_nan(any) &&", "if (!is_nan(any) &&"),
    "no bias": ("if (out.bias) sum += bias_of(out, row);", ""),
}


def battery(kernel) -> None:
    """What finds every planted error; quick, so that many copies can be tried."""
    for order in cuda_face.ORDERS:
        check(kernel, 37, 2200, (2, 4), 5, torch.bfloat16, bias=torch.randn(37), order=order)
        check(kernel, 20, 1280, (2, 4), 40, torch.bfloat16, order=order)
    not_finite(kernel)
    test_one_infinity_in_any_column(kernel)


def test_battery_passes(kernel) -> None:
    assert not cuda_face.fails(lambda: battery(kernel))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name: str, tmp_path: Path) -> None:
    library = cuda_face.build("nm", tmp_path, dict([PLANTED[name]]), "-O0")
    assert cuda_face.fails(lambda: battery(library.nm_mma_sp_emulated))


@pytest.mark.parametrize("bit", range(0, 16, 5))
def test_a_wrong_bit_of_metadata_is_caught(kernel, bit: int) -> None:
    mask = kept(32, 128, 2, 4)
    weight = (torch.randn(32, 128) * mask).half()
    panels = nm_layout.build(sbt.pack(weight, mask))
    panels.panels.view(torch.int16)[..., nm_layout.VALUES + 77] ^= 1 << bit if bit < 15 else -(1 << 15)
    x = torch.randn(8, 128).half()
    problem, y = multiply(kernel, panels, x)
    assert not problem
    with pytest.raises(AssertionError):
        assert_product(y, x, weight)
