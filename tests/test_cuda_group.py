"""Weights that share x in one launch of sbt_mma, sbt_wgmma or nm_mma_sp: the kernels' own source, run on the CPU."""

import gc
import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from emulated import guarded, use
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Kind, problem
from test_cuda import HALVES, INTEGERS, of_four
from tolerance import assert_product
from torch import Tensor

from alphaprune.formats import Packed, sbt
from alphaprune.kernels import base, cuda, cuda_layouts, group, nm_layout, spmm

TRIPLES = [(1, 15, 16), (17, 1, 100), (40, 33)]  # rows of each weight: parts of row tiles and whole ones
DENSITIES = (0.2, 0.9, 0.0)


def weights(rows: Sequence[int], k: int, densities: Sequence[float], kind: Kind) -> tuple[list[Tensor], list[Packed]]:
    """(dense, packed) of each weight."""
    made = [problem(n, k, 1, d, kind, HALVES[1], i) for i, (n, d) in enumerate(zip(rows, densities, strict=False))]
    return [dense for dense, _, _ in made], [packed.map(guarded) for _, packed, _ in made]


def biases_of(rows: Sequence[int], dtype: torch.dtype) -> list[Tensor | None]:
    """Of some weights only, in different dtypes."""
    return [(torch.randn(n), None, torch.randn(n).to(dtype))[i] for i, n in enumerate(rows)]


def check_group(
    rows: Sequence[int],
    k: int,
    tokens: int,
    dtype: torch.dtype,
    kind: Kind | None = None,
    densities: Sequence[float] = DENSITIES,
    biased: bool = True,
) -> list[Tensor]:
    dense, packed = weights(rows, k, densities, kind or dtype)
    x, biases = guarded(torch.randn(tokens, k).to(dtype)), biases_of(rows, dtype) if biased else None
    found = cuda.bind_mma_group(packed, False).run(x, biases, None)
    for y, weight, bias in zip(found, dense, biases or [None] * len(rows), strict=True):
        assert y.is_contiguous()
        assert_product(y, x, weight, bias)
    return found


@pytest.mark.parametrize("kind", [None, *INTEGERS])
@pytest.mark.parametrize("order", range(3))
def test_every_number_of_tokens(emulator: ModuleType, poisoned: None, order: int, kind: str | None) -> None:
    emulator.emulate_in_order(order)
    for place, (rows, tokens) in enumerate(itertools.product(TRIPLES, (1, 8, 16, 25, 40, 70))):
        check_group(rows, (128, 65, 300)[place % 3], tokens, HALVES[(place + order) % 2], kind, biased=tokens != 8)


@pytest.mark.parametrize(("capability", "multiprocessors", "shared"), [(80, 1, 40000), (90, 1, 232448), (90, 3, 40000)])
def test_any_device_shares_out_the_work(
    emulator: ModuleType, poisoned: None, capability: int, multiprocessors: int, shared: int
) -> None:
    """Blocks that have row tiles of several weights, in one round and in many, one and two row tiles at a time."""
    emulator.emulate_device(capability, multiprocessors, shared)
    for (rows, k), tokens in itertools.product((((40, 17, 33), 1024), ((100, 16), 650)), (3, 40)):
        for kind in (None, *INTEGERS):
            check_group(rows, k, tokens, HALVES[1], kind)
    check_group((150, 100, 300), 128, 3, HALVES[0])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    densities=st.tuples(*[st.floats(0, 1)] * 3),
    k=st.integers(1, 500),
    tokens=st.integers(0, 80),
    dtype=st.sampled_from(HALVES),
    kind=st.sampled_from((None, *INTEGERS)),
    device=st.sampled_from(((80, 108, 166912), (90, 132, 232448), (90, 2, 60000))),
)
def test_any_weights(module: ModuleType, rows, densities, k, tokens, dtype, kind, device) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(module, monkeypatch)
        module.emulate_device(*device)
        check_group(rows, k, tokens, dtype, kind, densities)
        module.emulate_device(90, 132, 232448)
    cuda.opened.cache_clear()


def test_bits_do_not_depend_on_the_order_of_threads(emulator: ModuleType, poisoned: None) -> None:
    for kind, tokens in itertools.product((HALVES[1], *INTEGERS), (3, 40)):
        _, packed = weights((33, 20, 16), 512, DENSITIES, kind)
        x, found = torch.randn(tokens, 512).to(HALVES[1]), []
        for order in range(3):
            emulator.emulate_in_order(order)
            found.append(cuda.bind_mma_group(packed, False).run(x, None, None))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_two_row_tiles_of_a_warp(emulator: ModuleType, poisoned: None) -> None:
    """As they are asked for in measurements, of one weight and of several."""
    for (n, k), tokens, order in itertools.product(((17, 300), (100, 640)), (9, 16, 30), range(3)):
        emulator.emulate_in_order(order)
        emulator.emulate_device(*((90, 132, 232448), (80, 1, 166912), (90, 1, 60000))[order])
        dense, packed = weights((n, 16, 33), k, DENSITIES, HALVES[1])
        made = [cuda.handles(one)[0][HALVES[1]] for one in packed]
        x = guarded(torch.randn(tokens, k).bfloat16())
        for members in (made[:1], made):
            rows = [one.shape[0] for one in packed[: len(members)]]
            native = emulator.Weight.joined(members).by_row_tiles(2)
            found = cuda.joined(native, rows, k, x.device, len(rows)).run(x, None, None)
            for y, weight in zip(found, dense, strict=False):
                assert_product(y, x, weight)
    _, (integers,) = weights((16,), 64, DENSITIES, "int8")
    for native, number in ((made[0], 3), (made[0], -1), (cuda.handles(integers)[0][HALVES[1]], 1)):
        with pytest.raises(ValueError, match="multiplied by 1 or 2 row tiles"):
            native.by_row_tiles(number)


def test_what_is_not_finite_stays_with_its_weight(emulator: ModuleType, poisoned: None) -> None:
    dense, packed = weights((20, 16, 7), 200, (0.5, 0.5, 0.5), HALVES[1])
    x = torch.randn(4, 200).bfloat16()
    x[1, 70], x[2, 5], x[3, 199] = float("inf"), float("nan"), float("-inf")
    for y, weight in zip(cuda.bind_mma_group(packed, False).run(x, None, None), dense, strict=True):
        assert_product(y, x, weight)


def test_weights_that_cannot_share_a_launch(emulator: ModuleType) -> None:
    _, halves = weights((16, 16, 16), 256, DENSITIES, HALVES[1])
    others = [weights((16,), 256, DENSITIES, kind)[1][0] for kind in (HALVES[0], *INTEGERS)]
    others.append(weights((16,), 128, DENSITIES, HALVES[1])[1][0])
    for bind in (cuda.bind_mma_group, cuda_layouts.bind_nm_group):
        assert bind([*halves, halves[0]], False) is None and bind(halves[:2], True) is None
        assert all(bind([halves[0], other], False) is None for other in others)
    made = [cuda.handles(packed)[0][HALVES[1]] for packed in (*halves, others[1], others[3])]
    for members in ([made[0], made[3]], [made[0], made[4]], [emulator.Weight.joined(made[:2]), made[2]]):
        with pytest.raises(ValueError, match="the same columns, dtypes, scales and device"):
            emulator.Weight.joined(members)
    for members in ([], [*made[:3], made[0]]):
        with pytest.raises(ValueError, match="from 1 to 3 weights share a product"):
            emulator.Weight.joined(members)
    with pytest.raises(ValueError, match="a single weight is expanded"):
        emulator.Weight.joined(made[:2]).expand(0, 16, 0, 0)


def two_of_four(rows: Sequence[int], k: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Packed]]:
    made = [torch.randn(n, k).to(dtype) for n in rows]
    dense = [weight * of_four(weight, 2) for weight in made]
    return dense, [sbt.pack(weight) for weight in dense]


@pytest.mark.parametrize("device", [(80, 108, 166912), (90, 132, 232448), (90, 1, 60000)])
def test_panels_of_several_weights(emulator: ModuleType, poisoned: None, device: tuple[int, int, int]) -> None:
    emulator.emulate_device(*device)
    for (rows, k), tokens in itertools.product((((37, 1, 64), 264), ((100, 15), 300)), (1, 12, 40, 70)):
        dtype = HALVES[tokens % 2]
        dense, packed = two_of_four(rows, k, dtype)
        x, biases = guarded(torch.randn(tokens, k).to(dtype)), biases_of(rows, dtype)
        x[-1, k // 2] = float("inf")
        found = cuda_layouts.bind_nm_group(packed, False).run(x, biases, None)
        for y, weight, bias in zip(found, dense, biases, strict=True):
            assert_product(y, x, weight, bias)


@pytest.mark.parametrize("multiprocessors", [132, 1])
def test_many_tokens_of_several_weights(emulator: ModuleType, poisoned: None, multiprocessors: int) -> None:
    """By sbt_wgmma: parts of row tiles, columns that are padded, more tokens than a call takes."""
    emulator.emulate_device(90, multiprocessors, 232448)
    for (rows, k), tokens in itertools.product((((40, 17, 64), 265), ((100, 3), 136)), (1, 33, 260)):
        dtype = HALVES[tokens % 2]
        dense, packed = weights(rows, k, DENSITIES, dtype)
        x, biases = guarded(torch.randn(tokens, k).to(dtype)), biases_of(rows, dtype)
        found = cuda.bind_wide_group(packed, False).run(x, biases, None)
        for y, weight, bias in zip(found, dense, biases, strict=True):
            assert_product(y, x, weight, bias)
    assert cuda.bind_wide_group(packed[:2], True) is None
    native = cuda.native_wide(packed[0])[0]
    with pytest.raises(RuntimeError, match="sbt_wgmma"):
        cuda.joined(native.by_ways(9, 9, 1), [100], k, x.device, 1).run(x[:, :136].contiguous(), None)


@pytest.fixture
def launches(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Members of each launch, while these kernels take tensors of the host."""
    known, made = base.kernels(), []
    here = {name: replace(known[name], device="cpu", available=lambda: None) for name in ("nm_mma_sp", "sbt_mma")}
    monkeypatch.setattr(base, "kernels", lambda: here | {"reference": known["reference"]})
    original = cuda.joined

    def counting(native, members: Sequence[int], *rest, **keywords) -> base.Together:
        found = original(native, members, *rest, **keywords)
        return replace(found, run=lambda *given: made.append(len(members)) or found.run(*given))

    monkeypatch.setattr(cuda, "joined", counting)
    return made


@pytest.mark.parametrize("kernel", ["sbt_mma", "nm_mma_sp"])
def test_projections_take_one_launch(launches: list[int], poisoned: None, kernel: str) -> None:
    rows, k = (40, 17, 16), 136
    dense, packed = weights(rows, k, (0.7, 0.9, 0.8), HALVES[1])  # too crowded for the other kernel
    if kernel == "nm_mma_sp":
        dense, packed = two_of_four(rows, k, HALVES[1])
    prepared = [spmm.prepare(one, f"layer {i}") for i, one in enumerate(packed)]
    for tokens in (1, 5, 60):
        x, biases = torch.randn(tokens, k).bfloat16(), biases_of(rows, HALVES[1])
        for each in (None, biases):
            found = group.spmm_group(x.view(1, tokens, k), prepared, each)
            for y, weight, bias in zip(found, dense, each or [None] * 3, strict=True):
                assert_product(y.view(tokens, -1), x, weight, bias)
    assert launches == [3] * 6
    many = torch.randn(70, k).bfloat16()
    group.spmm_group(many, prepared)
    assert launches == [3] * 6, "past the most tokens of the kernel"


def test_int8_weights_share_a_launch_with_either_dtype(launches: list[int]) -> None:
    dense, packed = weights((40, 17), 130, DENSITIES, "int8/128")
    prepared = [spmm.prepare(one) for one in packed]
    for dtype in (*HALVES, HALVES[0]):
        x = torch.randn(3, 130).to(dtype)
        for y, weight in zip(group.spmm_group(x, prepared), dense, strict=True):
            assert_product(y, x, weight)
    assert launches == [2] * 3


def test_panels_are_made_once(launches: list[int]) -> None:
    """Whoever is called first, and they go with those that use them."""
    for alone_first in (True, False):
        _, packed = two_of_four((40, 17), 136, HALVES[1])
        prepared, x = [spmm.prepare(one) for one in packed], torch.randn(2, 136).bfloat16()
        if alone_first:
            prepared[0](x)
        group.ready(prepared, 2, HALVES[1], swiglu=True)
        group.spmm_group(x, prepared)
        for one in prepared:
            one(x)
        known = cuda_layouts._layouts[nm_layout.build]
        panels = [known[one.packed]() for one in prepared]
        assert [one.copied() for one in prepared] == [each.nbytes for each in panels]
        assert [cuda_layouts.native_nm(one.packed)[1] for one in prepared] == panels
        alive = [known[one.packed] for one in prepared]
        del panels
        prepared[1].leave_out("nm_mma_sp", "no room")
        group.spmm_group(x, prepared)
        prepared[0].leave_out("nm_mma_sp", "no room")
        gc.collect()
        assert [one() for one in alive] == [None, None] and all(one.copied() == 0 for one in prepared)
