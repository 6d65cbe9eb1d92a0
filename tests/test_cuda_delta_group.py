"""delta_spmv of several weights at once, with RMSNorm before it and SwiGLU behind it, in the emulator."""

import itertools
import shutil
from pathlib import Path

import cuda_face
import delta_face
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_product, bound, exact, ulp
from torch import Tensor

from alphaprune.formats import Packed, sbt
from alphaprune.kernels import delta_deal, delta_layout

HALVES = (torch.float16, torch.bfloat16)
EPSILON = 1e-5  # of tests/native/delta_face.cpp


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return delta_face.build(tmp_path_factory.mktemp("delta"))


@pytest.fixture(autouse=True)
def _two_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_layout, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(delta_deal, "LEAST", 1 / delta_deal.THREADS)


def weights(members: tuple[int, ...], k: int, density: float, dtype: torch.dtype) -> tuple[list[Tensor], list[Packed]]:
    made = [delta_face.unequal(n, k, density, dtype) for n in members]
    return [weight for weight, _ in made], [sbt.pack(*pair) for pair in made]


def parts(y: Tensor, members: tuple[int, ...]) -> list[Tensor]:
    """The y [tokens, N_i] of each weight."""
    tokens = len(y)
    return [part.view(tokens, -1) for part in y.flatten().split([tokens * n for n in members])]


def check(kernel, members: tuple[int, ...], k: int, density: float, tokens: int, dtype, order=0, bias=None) -> None:
    dense, packed = weights(members, k, density, dtype)
    x = torch.randn(tokens, k).to(dtype)
    problem, y = delta_face.multiply(kernel, delta_layout.build(*packed), x, order=order, bias=bias)
    assert not problem
    biases = [None] * len(members) if bias is None else bias.split(members)
    for part, weight, own in zip(parts(y, members), dense, biases, strict=True):
        assert_product(part, x, weight, own)


@pytest.mark.parametrize("members", [(1, 1), (3, 1, 7), (37, 20, 20), (30, 70)])
@pytest.mark.parametrize("pairs", [False, True])
def test_layout_round_trip(members: tuple[int, ...], pairs: bool) -> None:
    members = members[:1] * 2 if pairs else members
    dense, packed = weights(members, 300, 0.2, torch.bfloat16)
    rows = delta_layout.build(*packed, pairs=pairs)
    assert torch.equal(delta_layout.unpack(rows), torch.cat(dense)) and rows.members == members
    places = rows.rows.flatten()
    assert sorted(places[places >= 0].tolist()) == list(range(sum(members)))
    if pairs:
        first, second = rows.rows.view(-1, 2).unbind(1)
        assert torch.equal(second, torch.where(first < 0, first, first + members[0]))


def test_weights_that_differ_are_refused() -> None:
    one = sbt.pack(torch.ones(4, 8).half())
    for other in (torch.ones(4, 9).half(), torch.ones(4, 8).bfloat16()):
        with pytest.raises(ValueError, match="q: weights that share x have the same columns, dtype and device"):
            delta_layout.build(one, sbt.pack(other), name="q")


@pytest.mark.parametrize("order", cuda_face.ORDERS)
def test_several_weights(kernel, order: int) -> None:
    for (members, k, density), tokens in itertools.product(
        [((37, 11, 12), 130, 0.3), ((1, 80), 264, 0.1), ((5, 0 + 1, 3), 40, 1), ((400, 16), 50, 0.4)], (1, 2, 3, 4)
    ):
        bias = torch.randn(sum(members)).half() if tokens % 2 else None
        check(kernel, members, k, density, tokens, HALVES[tokens % 2], order, bias)


@settings(max_examples=20, deadline=None)
@given(
    members=st.lists(st.integers(1, 60), min_size=2, max_size=3),
    k=st.integers(1, 300),
    tokens=st.integers(1, 4),
    density=st.floats(0, 1),
    dtype=st.sampled_from(HALVES),
)
def test_any_members(kernel, members, k, tokens, density, dtype) -> None:
    check(kernel, tuple(members), k, density, tokens, dtype)


def swiglu(kernel, n: int, k: int, tokens: int, dtype, order=0, bias=None, density=0.4) -> None:
    """Sums of small integers are exact in any order: gate and up are known to the bit, and what is made of them to one
    ulp of the activation, whose exponential is approximate, and one of the product."""
    packed, wanted = [], []
    x = torch.randint(-2, 3, (tokens, k)).to(dtype)
    for i in range(2):
        mask = torch.rand(n, k) < density
        weight = (torch.randint(-3, 4, (n, k)) / 8 * mask).to(dtype)
        packed.append(sbt.pack(weight, mask))
        own = 0 if bias is None else bias[i * n : i * n + n].double()
        wanted.append((exact(x, weight) + own).to(dtype).double())
    gate, up = wanted
    active = (gate * torch.sigmoid(gate)).to(dtype).double()
    problem, y = delta_face.multiply(kernel, delta_layout.build(*packed, pairs=True), x, order=order, bias=bias)
    assert not problem
    first, rest = parts(y, (n, n))
    assert rest.isnan().all(), "the second weight has no y"
    truth = active * up
    allowed = 2 * ulp(active, dtype) * up.abs() + ulp(truth, dtype)
    assert ((first.double() - truth).abs() <= allowed).all()
    assert (first.double() == truth.to(dtype).double()).float().mean() > 0.95, "most have the very bits"


def gated(kernel) -> None:
    for (n, k), tokens in itertools.product([(37, 130), (1, 9), (300, 40)], (1, 2, 3, 4)):
        bias = (torch.randint(-9, 10, (2 * n,)) / 8).float() if tokens % 2 else None
        swiglu(kernel, n, k, tokens, HALVES[tokens // 2 % 2], order=tokens % 3, bias=bias)


def test_swiglu(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    gated(kernel)
    monkeypatch.setattr(delta_layout, "MOST_COLS", 48)
    swiglu(kernel, 21, 200, 2, torch.bfloat16)


def test_swiglu_of_large_and_not_finite_sums(kernel) -> None:
    """As silu(gate) · up has them: −0 or 0 far below zero, infinities and NaN where they belong."""
    gates = torch.tensor([-1000.0, 1000.0, float("inf"), -float("inf"), float("nan"), 0.0, 3.0, 2.0])
    ups = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, float("inf"), float("nan"), -float("inf")])
    packed = [
        sbt.pack(torch.ones(8, 1).bfloat16() * values[:, None].bfloat16(), torch.ones(8, 1).bool())
        for values in (gates, ups)
    ]
    problem, y = delta_face.multiply(kernel, delta_layout.build(*packed, pairs=True), torch.ones(1, 1).bfloat16())
    wanted = torch.nn.functional.silu(gates.bfloat16()) * ups.bfloat16()
    assert not problem and torch.equal(y[0, :8].nan_to_num(7), wanted.nan_to_num(7))


def normalized(h: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm(h) · weight in float64, rounded to the dtype where the kernel rounds."""
    scale = (h.double().square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return (h.double() * scale).to(h.dtype).double() * weight.double()


def normed(kernel) -> None:
    """By the identity matrix: each column of x by itself, at most one ulp of both roundings away."""
    for k, tokens, dtype in itertools.product((1, 7, 130, 136), (1, 2, 3, 4), HALVES):
        h = (torch.randn(tokens, k) * torch.tensor([0.01, 1, 30, 5])[:tokens, None]).to(dtype)
        weight = (torch.rand(k) + 0.5).to(dtype)
        packed = sbt.pack(torch.eye(k).to(dtype))
        order = tokens % 3
        problem, y = delta_face.multiply(kernel, delta_layout.build(packed), h, norm=weight, order=order)
        truth = normalized(h, weight)
        assert (
            not problem
            and (
                (y.double() - truth).abs() <= ulp(truth / weight.double(), dtype) * weight.double() + ulp(truth, dtype)
            ).all()
        )
        assert (y.double() == truth.to(dtype).double()).float().mean() > 0.9, "most have the very bits"


def test_norm(kernel) -> None:
    normed(kernel)


@pytest.mark.parametrize("tokens", (1, 2, 4))
def test_norm_of_many_columns(kernel, tokens: int) -> None:
    """More than the threads load at first, and a product with it."""
    k, n = 6500, 5
    dense, packed = weights((n, n), k, 0.05, torch.bfloat16)
    h, weight = torch.randn(tokens, k).bfloat16(), (torch.rand(k) + 0.5).bfloat16()
    problem, y = delta_face.multiply(kernel, delta_layout.build(*packed), h, norm=weight)
    assert not problem
    x = normalized(h, weight).bfloat16()
    for part, own in zip(parts(y, (n, n)), dense, strict=True):
        # A scale that is off by its last bits rounds some columns of x the other way.
        allowed = bound(x, own) + exact(2 * ulp(x.double(), torch.bfloat16), own.abs())
        assert ((part.double() - exact(x, own)).abs() <= allowed).all()


def test_norm_of_what_is_not_finite(kernel) -> None:
    for value in (float("inf"), float("nan")):
        h = torch.ones(2, 40).half()
        h[0, 3] = value
        problem, y = delta_face.multiply(
            kernel, delta_layout.build(sbt.pack(torch.eye(40).half())), h, norm=torch.ones(40).half()
        )
        assert not problem and y[0].isnan().all() and y[1].isfinite().all()


PLANTED = {
    "a member's border": ("(row >= of[1].first)", "(row > of[1].first)"),
    "the third member is the second": ("+ (row >= of[2].first)", ""),
    "rows of a member not counted from its first": ("row -= to.first;\n  if (to.bias) sum +=", "if (to.bias) sum +="),
    "the other row is the next lane's": ("lane_index() ^ (1 << p.lanes_log)", "lane_index() ^ 1"),
    "the second member's rows are stored": ("(p.pairs ? 2 : 1) << p.lanes_log", "1 << p.lanes_log"),
    "gate and up swapped": ("total[t], other[t])", "other[t], total[t])"),
    "the up's bias forgotten": ("if (other.bias) up += bias_of(other, row);", ""),
    "silu without its sigmoid": ("gate / (1 + exponential(-gate))", "gate"),
    "the squares of one warp forgotten": (
        "float all = 0;\n      for (int w = 0;",
        "float all = 0;\n      for (int w = 1;",
    ),
    "no barrier before the squares are added": (
        "    sync_block();\n    ALPHAPRUNE_UNROLL\n    for (int t = 0; t < kTokens; ++t) {\n      float all",
        "    for (int t = 0; t < kTokens; ++t) {\n      float all",
    ),
    "another token's scale": ("(low * scale[t], high * scale[t])", "(low * scale[0], high * scale[0])"),
    "the norm's weight forgotten": ("(low * by_low, high * by_high)", "(low, high)"),
    "the mean of too few": ("all / p.cols + p.epsilon", "all / (p.cols - 1) + p.epsilon"),
    "no epsilon": ("all / p.cols + p.epsilon", "all / p.cols"),
}


def battery(kernel) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(delta_layout, "MULTIPROCESSORS", 2)
        monkeypatch.setattr(delta_deal, "LEAST", 1 / delta_deal.THREADS)
        for tokens in (1, 3):
            check(kernel, (37, 11, 12), 130, 0.3, tokens, torch.bfloat16, bias=torch.randn(60))
        gated(kernel)
        normed(kernel)


def test_battery_passes(kernel) -> None:
    assert cuda_face.complaint(lambda: battery(kernel)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    planted = delta_face.build(tmp_path, dict([PLANTED[name]]), "-O0")
    assert cuda_face.fails(lambda: battery(planted))
