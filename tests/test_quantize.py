"""Rounding to int8: the nearest step, the error as it is, and nothing that depends on how the weight was cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import exact_weight
from torch import Tensor

from alphaprune.formats import quantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
problems = st.tuples(
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.sampled_from((0.0, 0.02, 0.5, 1.0)),
    st.sampled_from((None, 128)),
    st.integers(0, 2**31),
)


def weight_and_mask(n: int, k: int, dtype: torch.dtype, density: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of very different size, with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, k, generator=generator)
    weight = normal.sign() * normal.abs() ** 2 * torch.logspace(-2, 2, n)[:, None]
    return weight.to(dtype), torch.rand(n, k, generator=generator) < density


def groups(matrix: Tensor, group: int | None) -> list[Tensor]:
    return list(matrix.split(group or matrix.shape[1], dim=1))


@settings(max_examples=80, deadline=None)
@given(problem=problems)
def test_every_kept_weight_takes_the_nearest_step(problem: tuple) -> None:
    n, k, dtype, density, group, seed = problem
    weight, mask = weight_and_mask(n, k, dtype, density, seed)
    integers, scale, error = quantize.quantize(weight, mask, group)
    assert integers.dtype == torch.int8 and integers.shape == (n, k) and scale.dtype == torch.float32
    assert scale.shape == ((n,) if group is None else (n, -(-k // 128)))
    assert integers.min() >= -127 and not integers[~mask].any()
    kept = weight.double() * mask
    for part, whole, step in zip(
        groups(kept, group), groups(integers, group), scale.view(n, -1).double().unbind(1), strict=True
    ):
        largest = part.abs().amax(1)
        assert torch.equal(step, torch.where(largest > 0, (largest.float() / 127).double(), 1.0))
        assert (whole.abs().amax(1)[largest > 0] == 127).all()  # all of the range is used
        off = (whole.double() * step[:, None] - part).abs()
        assert (off <= step[:, None] * 0.50001).all()
    off = exact_weight(integers, scale) - kept
    norm = kept.norm().item()
    assert error.relative == pytest.approx(off.norm().item() / norm if norm else 0, rel=1e-4, abs=1e-6)
    top = kept.abs().max().item()
    assert error.largest == pytest.approx(off.abs().max().item() / top if top else 0, rel=1e-4, abs=1e-6)
    found = quantize.dequantize(integers, scale)
    assert torch.equal(found, exact_weight(integers, scale).float())
    assert torch.equal(quantize.dequantize(integers, scale, dtype), found.to(dtype))


def test_without_a_mask_all_is_kept_and_a_row_of_zeros_has_scale_1() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [-2.0, 1.0, 0.001]])
    for group in (None, 128):
        integers, scale, error = quantize.quantize(weight, None, group)
        assert integers.tolist() == [[0, 0, 0], [-127, 64, 0]]  # 63.5 is a tie, to even
        assert scale.flatten().tolist() == [1, torch.tensor(2 / 127).item()] and 0 < error.relative < 0.01


def test_nothing_is_lost_where_the_weights_are_steps() -> None:
    weight = torch.arange(-127, 128).float().view(5, 51)
    weight[:, 0] = 127
    assert quantize.quantize(weight).error == (0, 0)
    assert quantize.quantize(torch.zeros(3, 4)).error == (0, 0)


def test_large_weights_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask = weight_and_mask(37, 200, torch.bfloat16, 0.5, 1)
    for group in (None, 128):
        wanted = quantize.quantize(weight, mask, group)
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "CHUNK", 800)
            found = quantize.quantize(weight, mask, group)
        assert torch.equal(found.integers, wanted.integers) and torch.equal(found.scale, wanted.scale)
        assert found.error == pytest.approx(wanted.error, rel=1e-9)


def test_the_smallest_and_the_largest_floats_survive() -> None:
    for value in (1e-45, 1e-42, 1.2e-38, 3.4e38):
        weight = torch.tensor([[value, -value, 0.0]])
        integers, scale, _ = quantize.quantize(weight)
        assert scale.isfinite().all() and (scale > 0).all() and quantize.dequantize(integers, scale).isfinite().all()
        assert integers[0, 0] == -integers[0, 1] and (value < 1e-40 or integers[0, 0] == 127)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_where_it_is_kept(value: float) -> None:
    weight = torch.ones(3, 300)
    weight[2, 299] = value
    for group in (None, 128):
        with pytest.raises(ValueError, match="NaN and infinity have no place among int8 values"):
            quantize.quantize(weight, None, group)
        mask = torch.ones(3, 300, dtype=torch.bool)
        mask[2, 299] = False
        assert quantize.quantize(weight, mask, group).error == pytest.approx((0, 0), abs=1e-7)


def test_options_that_make_no_sense_are_named() -> None:
    for values, group, message in (
        ("int4", None, "values 'int4': wanted int8"),
        ("int8", 64, "group 64: int8 values have one scale per row, or with group 128 one per 128"),
        (None, 128, "group 128: int8 values"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize.check(values, group)
    quantize.check(None, None), quantize.check("int8", None), quantize.check("int8", 128)
