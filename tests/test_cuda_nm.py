"""nm_mma_sp and its layout: the kernel's own source, run thread by thread on the CPU against float64."""

import itertools
import shutil

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
A100 = (80, 108, 166912)  # capability, multiprocessors, bytes of shared memory of a block
TINY = (90, 2, 56 << 10)  # short rings that go round, blocks with several units
MANY = (90, 132, 110 << 10)  # the same, one unit each


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return cuda_face.build("nm", tmp_path_factory.mktemp("nm")).nm_mma_sp_emulated


# An NmShare of csrc/cuda/launch.h: panels of a unit, blocks that split columns.
SHARES = [(1, 1), (3, 1), (7, 1), (1, 2), (5, 4)]


def kept(n: int, k: int, keep: int, of: int) -> Tensor:
    """A random mask with `keep` of every `of` columns."""
    order = torch.rand(n, -(-k // of), of).argsort(-1).argsort(-1)
    return (order < keep).flatten(1)[:, :k]


def multiply(kernel, panels: nm_layout.NmPanels, x: Tensor, device=A100, share=(0, 0), **options) -> tuple[str, Tensor]:
    """device: capability, multiprocessors, bytes of shared memory; share: panels of a unit, blocks of a cluster."""
    return multiply_all(kernel, [panels], x, device, share, **options)


def multiply_all(
    kernel, members: list[nm_layout.NmPanels], x: Tensor, device=A100, share=(0, 0), **options
) -> tuple[str, Tensor]:
    """As `multiply`, of weights that share x; y has [tokens, N_i] of each one after the other."""
    rows = [panels.shape[0] for panels in members]
    counts = [len(rows), *(*rows, 0, 0)[:3], members[0].shape[1], *device, *share]
    return cuda_face.run(kernel, [panels.panels for panels in members], counts, x, sum(rows), **options)


def check(kernel, n: int, k: int, pattern: tuple[int, int], tokens: int, dtype: torch.dtype, **options) -> None:
    mask = kept(n, k, *pattern)
    weight = (torch.randn(n, k) * mask).to(dtype)
    x = torch.randn(tokens, k).to(dtype)
    problem, y = multiply(kernel, nm_layout.build(sbt.pack(weight, mask)), x, **options)
    assert not problem, problem
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


@pytest.mark.parametrize("device", [A100, TINY], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("order", cuda_face.ORDERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_product_is_within_the_bound(kernel, dtype: torch.dtype, order: int, device: tuple[int, ...]) -> None:
    for (n, k, pattern), tokens in itertools.product(SHAPES, BUCKETS):
        bias = (None, torch.randn(n).to(dtype), torch.randn(n), torch.randn(n).half())[(tokens + n) % 4]
        residual = torch.randn(tokens, n).to(dtype) if tokens in (4, 16) else None
        check(kernel, n, k, pattern, tokens, dtype, bias=bias, residual=residual, order=order, device=device)


@pytest.mark.parametrize("order", cuda_face.ORDERS)
@pytest.mark.parametrize("tokens", (1, 12, 50))
def test_every_way_to_share_the_work(kernel, tokens: int, order: int) -> None:
    for share in SHARES:
        n = 2 * share[0] * nm_layout.ROWS - 27  # two units, the second without some of its rows
        bias, dtype = torch.randn(n), HALVES[(tokens + order) % 2]
        check(kernel, n, 904, (2, 4), tokens, dtype, bias=bias, order=order, device=MANY, share=share)


@pytest.mark.parametrize(("tokens", "group"), [(3, 3), (20, 1), (40, 2)])
def test_units_follow_each_other(kernel, tokens: int, group: int) -> None:
    """A block has several units, and its ring goes on from one to the next."""
    for order, n in itertools.product(cuda_face.ORDERS[::2], (7 * 32 * group - 20,)):
        check(kernel, n, 648, (2, 4), tokens, torch.bfloat16, order=order, device=TINY, share=(group, 1))


def test_the_share_is_chosen_by_the_device(kernel) -> None:
    """Few multiprocessors or many, the result is the same but for its rounding; of all there is a way for 64 tokens."""
    mask = kept(130, 1032, 2, 4)
    weight, x = (torch.randn(130, 1032) * mask).bfloat16(), torch.randn(64, 1032).bfloat16()
    panels = nm_layout.build(sbt.pack(weight, mask))
    for processors, shared in ((1, 48 << 10), (3, 60 << 10), (6, 110 << 10)):
        problem, y = multiply(kernel, panels, x, (90, processors, shared))
        assert not problem, problem
        assert_product(y, x, weight)


def test_the_sum_is_the_same_every_time(kernel) -> None:
    weight, x = (torch.randn(100, 704) * kept(100, 704, 2, 4)).half(), torch.randn(12, 704).half()
    panels = nm_layout.build(sbt.pack(weight, weight != 0))
    for share in ((1, 1), (2, 4)):
        first, *others = [multiply(kernel, panels, x, MANY, share, order=order)[1] for order in cuda_face.ORDERS]
        assert all(torch.equal(first, other) for other in others)


def check_all(kernel, rows: tuple[int, ...], k: int, tokens: int, dtype: torch.dtype, biased=False, **options) -> None:
    """Weights with so many rows in one launch; the last one meets what is not finite."""
    masks = [kept(n, k, 2, 4) for n in rows]
    dense = [(torch.randn(n, k) * mask).to(dtype) for n, mask in zip(rows, masks, strict=True)]
    members = [nm_layout.build(sbt.pack(*pair)) for pair in zip(dense, masks, strict=True)]
    x, bias = torch.randn(tokens, k).to(dtype), torch.randn(sum(rows)) if biased else None
    x[-1, torch.randint(k, ())] = float("inf")
    problem, y = multiply_all(kernel, members, x, bias=bias, **options)
    assert not problem, problem
    parts = y.flatten().split([tokens * n for n in rows])
    biases = [None] * len(rows) if bias is None else bias.split(rows)
    for part, weight, own in zip(parts, dense, biases, strict=True):
        assert_product(part.view(tokens, -1), x, weight, own)


@pytest.mark.parametrize("device", [A100, (90, 2, 110 << 10)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("order", cuda_face.ORDERS)
def test_several_weights_in_one_launch(kernel, order: int, device: tuple[int, ...]) -> None:
    for (rows, k), tokens in itertools.product([((37, 1, 64), 264), ((100, 15), 648), ((32, 33, 4), 136)], (1, 12, 40)):
        for share in [(0, 0)] if device == A100 else [(1, 1), (3, 1), (2, 2)]:
            dtype = HALVES[(tokens + rows[0]) % 2]
            check_all(kernel, rows, k, tokens, dtype, tokens != 12, order=order, device=device, share=share)


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
    device=st.sampled_from([A100, TINY, TINY]),
)
def test_any_shape(kernel, n, k, tokens, pattern, dtype, order, device) -> None:
    check(kernel, n, k + -k % 8 if device == TINY else k, pattern, tokens, dtype, order=order, device=device)


def test_x_may_lie_anywhere(kernel) -> None:
    for shift, k, device in itertools.product((0, 2, 8), (128, 136, 65), (A100, TINY)):
        check(kernel, 9, k, (2, 4), 2, torch.float16, shift=shift, device=device)


def not_finite(kernel, device=A100, share=(0, 0)) -> None:
    """Products with NaN and infinities in x and in the weight, as a dense layer has them."""
    shapes = [(37, 130 if device == A100 else 136), (9, 256), (20, 1304), *([(200, 392)] if device != A100 else [])]
    for (n, k), tokens, dtype in itertools.product(shapes, (1, 3, 10, 40), HALVES):
        mask = kept(n, k, 2, 4)
        weight = (torch.randn(n, k) * mask).to(dtype)
        if k == 256:
            weight[0, mask[0].nonzero()[5]] = float("inf")
        x = torch.randn(tokens, k).to(dtype)
        for token, value in zip(range(0, tokens, 3), itertools.cycle((float("inf"), float("nan"), -float("inf")))):
            x[token, torch.randint(k, ())] = value
        problem, y = multiply(kernel, nm_layout.build(sbt.pack(weight, mask)), x, device, share)
        assert not problem, problem
        assert_product(y, x, weight)


@pytest.mark.parametrize(("device", "share"), [(A100, (0, 0)), (TINY, (0, 0)), (TINY, (1, 2)), (TINY, (2, 1))])
def test_not_finite_activations_are_as_in_a_dense_layer(kernel, device, share) -> None:
    not_finite(kernel, device, share)


@pytest.mark.parametrize("device", [A100, TINY], ids=["sm_80", "sm_90"])
def test_one_infinity_in_any_column(kernel, device) -> None:
    """Every position of a group and every lane's share of x is looked at."""
    one_infinity(kernel, device)


def one_infinity(kernel, device=A100) -> None:
    mask = kept(32, 128, 2, 4)
    weight = (torch.randn(32, 128) * mask).bfloat16()
    panels = nm_layout.build(sbt.pack(weight, mask))
    for column in range(0, 128, 3):
        x = torch.ones(2, 128, dtype=torch.bfloat16)
        x[1, column] = float("inf")
        problem, y = multiply(kernel, panels, x, device)
        assert not problem, problem
        assert y[0].isfinite().all()
        assert torch.equal(y[1].isnan(), weight[:, column] == 0) and torch.equal(y[1].isinf(), weight[:, column] != 0)


def test_large_activations_are_not_taken_for_infinite_ones(kernel) -> None:
    mask = kept(20, 256, 2, 4)
    weight = (torch.randn(20, 256) * 1e-3 * mask).bfloat16()
    x = torch.full((2, 256), 1e30, dtype=torch.bfloat16)
    problem, y = multiply(kernel, nm_layout.build(sbt.pack(weight, mask)), x)
    assert not problem, problem
    assert_product(y, x, weight)


@pytest.mark.parametrize("bit", range(0, 16, 5))
def test_a_wrong_bit_of_metadata_is_caught(kernel, bit: int) -> None:
    mask = kept(32, 128, 2, 4)
    weight = ((1 + torch.rand(32, 128)) * mask).half()
    panels = nm_layout.build(sbt.pack(weight, mask))
    panels.panels.view(torch.int16)[..., nm_layout.VALUES + 77] ^= 1 << bit if bit < 15 else -(1 << 15)
    x = torch.randn(8, 128).half()
    problem, y = multiply(kernel, panels, x)
    assert not problem, problem
    with pytest.raises(AssertionError):
        assert_product(y, x, weight)
