"""Budgets: the one factor, integer counts, and steps of N:M, on plain numbers."""

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alphaprune.counts import share_counts, share_steps, water_fill

SIZES = st.integers(1, 10**9)
RATIOS = st.floats(0.01, 10)
LAYERS = st.lists(st.tuples(SIZES, RATIOS), min_size=1, max_size=30)


@st.composite
def budgets(draw):
    """sizes, ratios, and low ≤ sparsity ≤ high."""
    layers = draw(LAYERS)
    low, sparsity, high = sorted(draw(st.floats(0, 0.999)) for _ in range(3))
    if draw(st.booleans()):
        low = 0.0
    return [n for n, _ in layers], [r for _, r in layers], sparsity, low, high


@settings(max_examples=300, deadline=None)
@given(budgets())
def test_water_filling_meets_budget_and_bounds_with_one_factor(case) -> None:
    sizes, ratios, sparsity, low, high = case
    found = water_fill(sizes, ratios, sparsity, low, high)
    assert all(low <= s <= high for s in found)
    filled = math.fsum(n * s for n, s in zip(sizes, found, strict=True))
    assert filled == pytest.approx(sparsity * sum(sizes), rel=1e-9, abs=1e-9)
    factors = [s / r for s, r in zip(found, ratios, strict=True) if low < s < high]
    assert all(f == pytest.approx(factors[0], rel=1e-12) for f in factors)
    for eta in factors[:1]:  # what is clipped is so because the factor says so
        for s, r in zip(found, ratios, strict=True):
            assert s == pytest.approx(min(max(eta * r, low), high), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(budgets(), st.randoms(use_true_random=False))
def test_water_filling_is_monotone_and_blind_to_order(case, random) -> None:
    sizes, ratios, sparsity, low, high = case
    found = water_fill(sizes, ratios, sparsity, low, high)
    ordered = [s for _, s in sorted(zip(ratios, found, strict=True))]
    assert ordered == sorted(ordered)
    order = list(range(len(sizes)))
    random.shuffle(order)
    shuffled = water_fill([sizes[i] for i in order], [ratios[i] for i in order], sparsity, low, high)
    assert all(shuffled[place] == pytest.approx(found[i], rel=1e-9, abs=1e-12) for place, i in enumerate(order))


def test_water_filling_without_bounds_is_the_published_scaling() -> None:
    found = water_fill([10, 30], [0.5, 1.5], 0.9)
    assert found == pytest.approx([0.9 * 40 / 50 * 0.5, 0.9 * 40 / 50 * 1.5])  # 1.08: above 1, as published
    assert water_fill([10, 30], [0.5, 1.5], 0.9, 0, 0.95) == pytest.approx([0.75, 0.95])


@pytest.mark.parametrize("sparsity, low, high", [(0.5, 0.6, 0.9), (0.95, 0.0, 0.9)])
def test_water_filling_refuses_what_bounds_exclude(sparsity, low, high) -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        water_fill([3, 4], [1.0, 1.0], sparsity, low, high)
    with pytest.raises(ValueError, match="ratios"):
        water_fill([3, 4], [1.0, 0.0], 0.5)


@settings(max_examples=300, deadline=None)
@given(budgets())
def test_counts_sum_to_the_budget_inside_the_bounds(case) -> None:
    sizes, ratios, sparsity, low, high = case
    budget = round(sparsity * sum(sizes))
    real = water_fill(sizes, ratios, sparsity, low, high)
    try:
        found = share_counts(sizes, real, budget, low, high)
    except ValueError as error:
        assert "cannot be had" in str(error)  # the integers between the bounds do not hold it
        most, least = [math.floor(high * n + 1e-6) for n in sizes], [math.ceil(low * n - 1e-6) for n in sizes]
        assert any(a > b for a, b in zip(least, most, strict=True)) or not sum(least) <= budget <= sum(most)
        return
    assert sum(found) == budget and all(isinstance(z, int) for z in found)
    assert all(low * n - 1e-5 <= z <= high * n + 1e-5 for n, z in zip(sizes, found, strict=True))
    same = {}
    for n, s, z in zip(sizes, real, found, strict=True):
        same.setdefault(n, []).append((s, z))
    for pairs in same.values():  # among layers of one size, more wanted is no fewer zeros
        for (s, z), (other, w) in itertools.permutations(pairs, 2):
            assert s <= other or z >= w


def test_a_layer_too_small_for_its_bounds() -> None:
    with pytest.raises(ValueError, match="cannot be had"):
        share_counts([1, 5], [0.75, 0.75], 4, 0.5, 0.875)  # no integer lies between 0.5 and 0.875


def test_largest_remainders_by_order() -> None:
    assert share_counts([10, 10, 10], [0.55, 0.55, 0.55], 17, 0, 1) == [6, 6, 5]
    assert share_counts([10, 10, 10], [0.54, 0.58, 0.58], 17, 0, 1) == [5, 6, 6]
    assert share_counts([100, 100], [0.55, 0.55], 110, 0.55, 0.55) == [55, 55]  # 0.55·100 is 55.000…01 in binary


@st.composite
def step_cases(draw):
    units = draw(st.lists(st.sampled_from([1, 3, 4, 14, 30]), min_size=1, max_size=5))
    of = draw(st.sampled_from([2, 4, 8]))
    wanted = [draw(st.floats(0, of - 1)) for _ in units]
    return units, of, wanted


@settings(max_examples=300, deadline=None)
@given(step_cases(), st.integers(0, 2), st.data())
def test_steps_come_within_one_smallest_step_wherever_that_is_possible(case, low, data) -> None:
    units, of, wanted = case
    assume(low < of)
    budget = data.draw(st.integers(0, sum(units) * (of - 1)))

    def miss(steps) -> int:
        return abs(sum(u * j for u, j in zip(units, steps, strict=True)) - budget)

    try:
        found = share_steps(units, wanted, budget, low, of - 1)
    except ValueError as error:
        assert "within one step" in str(error)
        grid = itertools.product(range(low, of), repeat=len(units))
        assert len(units) > 3 or min(map(miss, grid)) > min(units)
        return
    assert miss(found) <= min(units) and all(low <= j <= of - 1 for j in found)


def test_steps_that_need_an_overshoot() -> None:
    """14·1 is seven too many and the small layer has nothing to give, so the large one goes below."""
    assert share_steps([4, 14], [0.0, 1.0], 7, 0, 1) == [1, 0]


def test_steps_stay_near_what_was_wanted() -> None:
    """Small layers absorb the rounding of large ones together, not the first of them alone."""
    units = [14] * 3 + [1] * 64
    wanted = [4.4] * 3 + [4.0] * 64
    budget = round(sum(u * w for u, w in zip(units, wanted, strict=True)))
    found = share_steps(units, wanted, budget, 0, 7)
    assert abs(sum(u * j for u, j in zip(units, found, strict=True)) - budget) <= 1
    assert all(abs(j - w) <= 1 for j, w in zip(found, wanted, strict=True))
