"""delta_spmv and its layout: the kernel's own source, run thread by thread on the CPU against float64."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import cuda_face
import delta_face
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_product

from alphaprune.formats import sbt
from alphaprune.kernels import delta_deal, delta_layout

HALVES = (torch.float16, torch.bfloat16)
# rows, columns, density: single weights, empty and full rows, rows of 4 to 32 lanes, wide gaps
SHAPES = [
    (1, 1, 1),
    (1, 1, 0),
    (3, 7, 0.5),
    (37, 130, 0.3),
    (70, 264, 0.1),
    (20, 500, 1),
    (33, 1000, 0.02),
    (5, 4096, 0.4),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return delta_face.build(tmp_path_factory.mktemp("delta"))


def many(kernel) -> None:
    """Runs of 68 packs, in which rows begin: three words of bits."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(delta_layout, "MULTIPROCESSORS", 1)
        check(kernel, 700, 600, 1, 1, torch.bfloat16)


def check(kernel, n: int, k: int, density: float, tokens: int, dtype: torch.dtype, **options) -> None:
    weight, mask = delta_face.unequal(n, k, density, dtype)
    x = torch.randn(tokens, k).to(dtype)
    problem, y = delta_face.multiply(kernel, delta_layout.build(sbt.pack(weight, mask)), x, **options)
    assert not problem
    bias, residual = options.get("bias"), options.get("residual")
    extra = [part.float() for part in (bias, residual) if part is not None]
    if residual is None:
        assert_product(y, x, weight, bias)
    else:
        for token in range(tokens):  # per token, bias and residual are one vector that is added
            assert_product(y[token], x[token], weight, sum(part if part.dim() == 1 else part[token] for part in extra))


@pytest.fixture(autouse=True)
def _two_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_layout, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(delta_deal, "LEAST", 1 / delta_deal.THREADS)


@pytest.mark.parametrize("dtype", (*HALVES, torch.bfloat16))
@pytest.mark.parametrize(("n", "k", "density"), [*SHAPES, (4, 21000, 0.05), (300, 40, 0.3)])
def test_layout_round_trip(n: int, k: int, density: float, dtype: torch.dtype) -> None:
    weight, mask = delta_face.unequal(n, k, density, dtype)
    weight[mask & (torch.rand(n, k) < 0.1)] = float("nan")
    weight[mask & (torch.rand(n, k) < 0.1)] = -0.0
    rows = delta_layout.build(sbt.pack(weight, mask))
    kept = torch.where(mask, weight, 0)
    assert torch.equal(delta_layout.unpack(rows).view(torch.int16), kept.view(torch.int16))


def test_long_runs(kernel) -> None:
    many(kernel)


def test_layout_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = sbt.pack(*delta_face.unequal(100, 300, 0.2, torch.float16))
    whole = delta_layout.build(packed)
    monkeypatch.setattr(delta_layout, "CHUNK", 1)
    for a, b in zip(whole.tensors, delta_layout.build(packed).tensors, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_bytes_per_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """2.5 bytes per kept value, or 2.625 with fifth bits, what gaps cost, and a few % for threads and row ends."""
    monkeypatch.setattr(delta_layout, "MULTIPROCESSORS", 8)
    for density, most in ((0.5, 1.25), (0.3, 0.753), (0.2, 0.515), (0.1, 0.272)):
        mask = torch.rand(1738, 4096) < density
        packed = sbt.pack(torch.ones(1738, 4096, dtype=torch.bfloat16), mask)
        rows = delta_layout.build(packed)
        assert rows.nbytes / mask.numel() < most * (1.02 + 0.004 / density)
        assert rows.nbytes == pytest.approx(delta_layout.nbytes(packed), rel=0.02)
        assert bool(rows.fifths.numel()) == (density == 0.1), "deltas of five bits where many gaps are wide"


def test_layout_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"layer: nibble-delta rows hold float16 or bfloat16, got torch.float32"):
        delta_layout.build(sbt.pack(torch.ones(2, 2)), name="layer")


def test_shares_and_runs_are_equal() -> None:
    mask = torch.rand(640, 200) < torch.linspace(0.2, 1, 640)[:, None]
    rows = delta_layout.build(sbt.pack(torch.ones(640, 200, dtype=torch.float16), mask))
    counts, longest = rows.counts, -(-200 // delta_layout.PACK)
    assert (counts.max() - counts.min()) * 32 <= longest + 31, "shares differ by a row and by the end of a line"
    assert (~rows.values[0, : int(counts[0])].any(-1)).sum() < 32, "a share has fewer empty packs than a line"


def test_many_rows_are_dealt_in_turns(kernel) -> None:
    """A share has a row per thread at most; the shares of all multiprocessors then are of one size."""
    n = 3 * delta_deal.THREADS + 1
    weight = (torch.randn(n, 24) * (torch.rand(n, 24) < 0.3)).half()
    rows = delta_layout.build(sbt.pack(weight))
    shares, most = rows.rows.shape
    assert shares in (4, 6) and most <= delta_deal.THREADS
    x = torch.randn(2, 24).half()
    problem, y = delta_face.multiply(kernel, rows, x)
    assert not problem
    assert_product(y, x, weight)


@pytest.mark.parametrize("order", cuda_face.ORDERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_product_is_within_the_bound(kernel, dtype: torch.dtype, order: int) -> None:
    for (n, k, density), tokens in itertools.product(SHAPES, (1, 2, 3, 4)):
        bias = (None, torch.randn(n).to(dtype), torch.randn(n), torch.randn(n).half())[(tokens + n) % 4]
        residual = torch.randn(tokens, n).to(dtype) if (tokens + k) % 3 == 0 else None
        check(kernel, n, k, density, tokens, dtype, bias=bias, residual=residual, order=order)


@pytest.mark.parametrize("tokens", (1, 2, 4))
def test_columns_in_blocks(kernel, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(delta_layout, "MOST_COLS", 104)
    for k in (104, 105, 300, 313):
        check(kernel, 40, k, 0.2, tokens, torch.bfloat16)
    check(kernel, 3, 209, 1, tokens, torch.float16)


@pytest.mark.slow
def test_more_columns_than_shared_memory_holds(kernel) -> None:
    for k, tokens in ((20480, 4), (20481, 2), (70000, 1)):
        check(kernel, 6, k, 0.03, tokens, torch.bfloat16)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 80),
    k=st.integers(1, 600),
    tokens=st.integers(1, 4),
    density=st.floats(0, 1),
    dtype=st.sampled_from(HALVES),
    order=st.sampled_from(cuda_face.ORDERS),
)
def test_any_shape(kernel, n, k, tokens, density, dtype, order) -> None:
    check(kernel, n, k, density, tokens, dtype, order=order)


def test_x_may_lie_anywhere(kernel) -> None:
    for shift, k in itertools.product((0, 2, 8), (64, 65)):
        check(kernel, 9, k, 0.4, 2, torch.float16, shift=shift)


def not_finite(kernel) -> None:
    """Products with NaN and infinities in x and in the weight, as a dense layer has them."""
    for (n, k, density), tokens, dtype in itertools.product(
        [(37, 130, 0.3), (9, 40, 0.9), (20, 311, 0.05)], (1, 2, 4), HALVES
    ):
        weight, mask = delta_face.unequal(n, k, density, dtype)
        x = torch.randn(tokens, k).to(dtype)
        for token, value in zip(range(tokens), (float("inf"), float("nan"), -float("inf"), float("inf")), strict=False):
            column = int(torch.randint(k, ()))
            x[token, column] = value
            mask[:, column] |= torch.rand(n) < 0.5
        if tokens > 1:
            x[-1] = torch.randn(k)
        mask[0, -1] = True
        weight = torch.where(mask, torch.randn(n, k), 0).to(dtype)
        if k == 40:
            weight[0, -1] = float("inf")
        problem, y = delta_face.multiply(kernel, delta_layout.build(sbt.pack(weight, mask)), x)
        assert not problem
        assert_product(y, x, weight)


def test_not_finite_activations_are_as_in_a_dense_layer(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    not_finite(kernel)
    monkeypatch.setattr(delta_layout, "MOST_COLS", 48)
    not_finite(kernel)


def test_the_last_kept_column_holds_infinity(kernel) -> None:
    """Zeros that fill up a pack stand in columns of their own: kept infinities stay infinite."""
    for k in (1, 3, 7, 8, 9, 20, 300):
        weight = torch.ones(3, k, dtype=torch.bfloat16)
        x = torch.ones(2, k, dtype=torch.bfloat16)
        x[0, -1] = float("inf")
        problem, y = delta_face.multiply(kernel, delta_layout.build(sbt.pack(weight)), x)
        assert not problem and y[0].isinf().all() and (y[1] == k).all()


def test_an_infinite_weight_meets_no_zeros_of_others(kernel) -> None:
    weight = torch.zeros(40, 200, dtype=torch.float16)
    weight[7, 100] = float("inf")
    x = torch.ones(1, 200, dtype=torch.float16)
    problem, y = delta_face.multiply(kernel, delta_layout.build(sbt.pack(weight)), x)
    assert not problem and y[0, 7].isinf() and y.isfinite().sum() == 39


PLANTED = {
    "no barrier before x is read": (
        "if (sync_block_any(!finite)) {",
        "if (!finite) {",
    ),
    "no barrier before sums are added": (
        "    leave_sum(place, sum);\n    sync_block();\n    add_sums(p, range, total);",
        "    leave_sum(place, sum);\n    add_sums(p, range, total);",
    ),
    "no barrier before counts take the place of sums": (
        "  add_sums(p, range, total);\n  sync_block();",
        "  add_sums(p, range, total);",
    ),
    "a column too far": (
        "dot_bytes(through_odd, kBytes << 8 * i, from) + (2 * i + 1)",
        "dot_bytes(through_odd, kBytes << 8 * i, from) + (2 * i + 2)",
    ),
    "a fifth bit in the wrong place": ("odd |= (fifth >> 4 & 15u)", "odd |= (fifth >> 3 & 15u)"),
    "the fifth bits of another group": ("now = fifth[i / kDeltaGroup];", "now = fifth[0] >> 8;"),
    "a pack forgotten": ("if (i < left) walk(i);", "if (i + 1 < left) walk(i);"),
    "a pack walked twice": (
        "if (i + kDeltaAhead < left) packs.load(i);",
        "if (i + kDeltaAhead + 1 < left) packs.load(i);",
    ),
    "the end of a row forgotten": ("if (begins >> i & 1) leave_sum", "if (begins >> i & 2) leave_sum"),
    "the end of a row forgotten later": ("begins = later;", "begins = 0;"),
    "a row begins where the last one ended": ("place.column = place.first_column;", ""),
    "the wrong half of a value": ("low = float_of(pair << 16);", "low = float_of(pair & 0xffff0000u);"),
    "lanes of a row not summed": ("for (int step = lanes / 2; step;", "for (int step = lanes / 4; step;"),
    "a sum too few": ("i < range >> 16; i += lanes", "i + 1 < range >> 16; i += lanes"),
    "no bias": ("if (to.bias) sum += bias_of(to, row);", ""),
    "no residual": ("if (out.residual) sum += Value::widen(out.residual[at]);", ""),
    "no zeros past the columns": ("const int limit = p.block_cols + kDeltaSlack;", "const int limit = p.block_cols;"),
    "only the threads that saw it know of an infinity": (
        "sync_block_any(!finite)",
        "sync_block_any(!finite) && !finite",
    ),
    "x not checked": ("poison += poison_of(low[t]) + poison_of(high[t]);", ""),
    "a pruned infinity forgotten": ("if (kept[t] < sum_lanes(present[t]))", "if (kept[t] > sum_lanes(present[t]))"),
    "y written by rows that are not there": ("if (row == ~0u || lane_index() %", "if (lane_index() %"),
    "y in order of the length": ("static_cast<int>(row), total[t]);", "at, total[t]);"),
    "a token too many": ("t < p.tokens ? eight_of", "t <= p.tokens ? eight_of"),
}


def battery(kernel) -> None:
    """What finds every planted error; quick, so that many copies can be tried."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(delta_layout, "MULTIPROCESSORS", 2)
        monkeypatch.setattr(delta_deal, "LEAST", 1 / delta_deal.THREADS)
        for order in cuda_face.ORDERS:
            check(kernel, 37, 130, 0.3, 1, torch.bfloat16, bias=torch.randn(37), order=order)
            check(kernel, 20, 500, 1, 3, torch.bfloat16, residual=torch.randn(3, 20).bfloat16(), order=order)
        check(kernel, 41, 900, 0.04, 2, torch.bfloat16)
        many(kernel)
        monkeypatch.setattr(delta_layout, "MOST_COLS", 48)
        for order in cuda_face.ORDERS:
            check(kernel, 9, 300, 0.5, 2, torch.bfloat16, order=order)
        not_finite(kernel)


def test_battery_passes(kernel) -> None:
    assert not cuda_face.fails(lambda: battery(kernel))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name: str, tmp_path: Path) -> None:
    planted = delta_face.build(tmp_path, dict([PLANTED[name]]), "-O0")
    assert cuda_face.fails(lambda: battery(planted))


def test_a_wrong_start_is_caught(kernel) -> None:
    weight, mask = delta_face.unequal(37, 130, 0.3, torch.float16)
    rows = delta_layout.build(sbt.pack(weight, mask))
    x = torch.randn(1, 130).half()
    problem, y = delta_face.multiply(kernel, replace(rows, starts=rows.starts + 1), x)
    with pytest.raises(AssertionError):
        assert not problem
        assert_product(y, x, weight)
