"""Quantiles that stand for a layer's magnitudes: shares below any threshold, and the one threshold of a budget."""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphaprune import sketches
from alphaprune.analysis import Analysis, LayerStat

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def draw(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    """float64 weights of very different distributions."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    other = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {
        "normal": normal,
        "uniform": uniform,
        "heavy": normal / other.abs().clamp(min=1e-3),  # a Cauchy distribution
        "two scales": torch.where(uniform < 0.3, 50 * normal, normal),
        "narrow": 1 + 1e-2 * normal,
    }[kind]


KINDS = ("normal", "uniform", "heavy", "two scales", "narrow")


def lamp_root(values: Tensor, value: float) -> float:
    """Of one weight among `values`, straight from the definition: Lee et al. 2021, eq. 5."""
    squares = values.double().square()
    return math.sqrt(value**2 / float(squares[squares >= value**2].sum()))


def test_probabilities_rise_from_0_to_1_and_are_denser_on_top() -> None:
    steps = [b - a for a, b in pairwise(sketches.PROBABILITIES)]
    assert sketches.PROBABILITIES[0] == 0 and sketches.PROBABILITIES[-1] == 1
    assert min(steps) > 0 and max(steps) <= 0.005 + 1e-12 and steps[-1] < 0.001


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_shares_of_magnitudes_are_right_to_a_thousandth(kind: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weight = draw(kind, (401, 499), seed=len(kind)).float()
    quantiles = sketches.series(weight.to(device))["magnitude_quantiles"]
    values = weight.abs().flatten().sort().values
    for share in torch.linspace(0, 0.999, 401).tolist():
        threshold = float(values[int(share * values.numel())])
        exact = float((values < threshold).double().mean())
        assert abs(sketches.share_below(quantiles, threshold) - exact) < (1e-3 if share <= 0.99 else 2e-3)
    assert sketches.share_below(quantiles, 0.0) == 0
    assert sketches.share_below(quantiles, 2 * float(values[-1])) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_lamp_scores_are_right_to_a_thousandth(kind: str) -> None:
    weight = draw(kind, (401, 499), seed=3).float()
    quantiles = sketches.series(weight)["lamp_quantiles"]
    values = weight.abs().flatten().sort().values
    assert quantiles[-1] == 1  # the largest weight is all that is not smaller than itself
    for share in torch.linspace(0.0, 0.99, 250).tolist():
        value = float(values[int(share * values.numel())])
        exact = float((values < value).double().mean())  # scores rise with magnitudes
        assert abs(sketches.share_below(quantiles, lamp_root(values, value)) - exact) < 1e-3


def test_equal_weights_share_one_lamp_score() -> None:
    found = sketches.series(torch.full((7, 9), -0.25))
    assert set(found["magnitude_quantiles"]) == {0.25}
    assert found["lamp_quantiles"] == pytest.approx([1 / math.sqrt(63)] * len(sketches.PROBABILITIES), rel=1e-4)
    assert sketches.share_below(found["magnitude_quantiles"], 0.25) == 0
    assert sketches.share_below(found["magnitude_quantiles"], 0.2500001) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_pruned_and_tiny_matrices_stay_finite(dtype: torch.dtype) -> None:
    pruned = draw("normal", (40, 50), 0).to(dtype)
    pruned.view(-1)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:1400]] = 0
    for weight in (torch.zeros(5, 6, dtype=dtype), pruned, torch.ones(1, 1, dtype=dtype), pruned[:1, :3]):
        found = sketches.series(weight)
        assert set(found) == set(sketches.SERIES)
        for values in found.values():
            assert all(math.isfinite(v) for v in values) and values == sorted(values)
            assert len(values) == len(sketches.PROBABILITIES)
    for series in sketches.SERIES:
        assert sketches.share_below(sketches.series(pruned)[series], 1e-30) == pytest.approx(0.7, abs=5e-3)


def test_extreme_scales_change_no_lamp_score() -> None:
    weight = draw("normal", (30, 31), 5)
    plain, small, large = (sketches.series((s * weight).float())["lamp_quantiles"] for s in (1.0, 1e-30, 1e30))
    assert small == pytest.approx(plain, rel=1e-4) and large == pytest.approx(plain, rel=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    layers=st.lists(
        st.tuples(st.sampled_from(KINDS), st.floats(1e-6, 1e6), st.floats(0, 1), st.integers(1, 20)),
        min_size=1,
        max_size=6,
    ),
    sparsity=st.floats(0, 1, exclude_max=True),
    series=st.sampled_from(sketches.SERIES),
)
def test_one_threshold_meets_the_budget(layers, sparsity: float, series: str) -> None:
    quantiles, sizes = {}, {}
    for i, (kind, scale, zeros, rows) in enumerate(layers):
        weight = (scale * draw(kind, (rows, 31), i)).float()
        weight.view(-1)[: int(zeros * weight.numel())] = 0
        quantiles[str(i)], sizes[str(i)] = sketches.series(weight)[series], weight.numel()
    found = sketches.shares(quantiles, sizes, sparsity)
    assert all(0 <= s <= 1 for s in found.values())
    total = math.fsum(sizes[n] * s for n, s in found.items())
    assert total == pytest.approx(sparsity * sum(sizes.values()), rel=1e-9, abs=1e-9)
    backwards = sketches.shares(dict(reversed(quantiles.items())), sizes, sparsity)
    assert backwards == found
    more = sketches.shares(quantiles, sizes, sparsity + (1 - sparsity) / 2)
    assert all(more[n] >= found[n] - 1e-12 for n in found)


def test_layers_that_share_one_value_give_the_same_part_of_it() -> None:
    same = {n: sketches.series(torch.ones(4, 5))["magnitude_quantiles"] for n in "abc"}
    assert sketches.shares(same, {"a": 20, "b": 20, "c": 20}, 0.3) == pytest.approx(dict.fromkeys("abc", 0.3))
    zeros = {**same, "z": sketches.series(torch.zeros(4, 5))["magnitude_quantiles"]}
    found = sketches.shares(zeros, dict.fromkeys("abcz", 20), 0.1)
    assert found == pytest.approx({"a": 0, "b": 0, "c": 0, "z": 0.4})


def test_an_analysis_of_224_layers_stays_small() -> None:
    stat = LayerStat(0, (40, 50), {"alpha": 2.123456789}, sketches.series(draw("normal", (40, 50), 1) * 0.0123))
    analysis = Analysis("m", "", "float32", "robust", None, {f"model.layers.{i}.mlp.up_proj": stat for i in range(224)})
    text = analysis.to_json()
    assert len(text) < 3_000_000
    assert json.loads(text)["layers"]["model.layers.0.mlp.up_proj"]["series"] == stat.series
