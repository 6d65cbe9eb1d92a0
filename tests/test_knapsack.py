"""The multiple-choice knapsack against every combination of choices."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaprune.knapsack import fill, units

VALUES = st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 1.0, 1e-9, 1e9]))


@st.composite
def items(draw) -> tuple[list[list[int]], list[list[float]]]:
    """Costs and values of the choices of one to four items, neither sorted nor convex."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    costs = [[draw(st.integers(0, 9)) for _ in range(count)] for count in counts]
    return costs, [[draw(VALUES) for _ in range(count)] for count in counts]


def cheapest(costs, values, fits) -> float:
    """The least total value of all combinations whose total cost fits."""
    best = math.inf
    for picks in itertools.product(*(range(len(c)) for c in costs)):
        if fits(sum(c[p] for c, p in zip(costs, picks, strict=True))):
            best = min(best, sum(v[p] for v, p in zip(values, picks, strict=True)))
    return best


@settings(max_examples=200, deadline=None)
@given(items(), st.integers(0, 40))
def test_every_total_has_the_least_value_and_the_picks_that_make_it(case, most: int) -> None:
    costs, values = case
    table = fill(costs, values, most)
    for total, found in enumerate(table.values.tolist()):
        wanted = cheapest(costs, values, lambda cost, total=total: cost == total)
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-9)
        if math.isinf(wanted):
            with pytest.raises(ValueError, match=f"no choices cost {total} together"):
                table.picks(total)
            continue
        picks = table.picks(total)
        assert sum(c[p] for c, p in zip(costs, picks, strict=True)) == total
        assert sum(v[p] for v, p in zip(values, picks, strict=True)) == pytest.approx(wanted, rel=1e-12, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(items(), st.integers(-1, 40))
def test_the_best_within_a_budget(case, budget: int) -> None:
    costs, values = case
    wanted = cheapest(costs, values, lambda cost: cost <= budget)
    table = fill(costs, values, 36)
    if math.isinf(wanted):
        with pytest.raises(ValueError, match="or less"):
            table.within(budget)
        return
    assert table.within(budget) <= budget
    assert table.values[table.within(budget)] == pytest.approx(wanted, rel=1e-12, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1e3), min_size=1, max_size=4), min_size=1, max_size=4), st.floats(1e-3, 10))
def test_real_costs_are_never_less_in_units(costs, resolution: float) -> None:
    for item, found in zip(costs, units(costs, resolution), strict=True):
        for cost, whole in zip(item, found, strict=True):
            assert cost / resolution - 1e-8 <= whole < cost / resolution + 1


def test_multiples_of_the_resolution_stay_what_they_are() -> None:
    assert units([[0.0, 0.1, 3 * 0.1, 0.3 + 1e-6]], 0.1) == [[0, 1, 3, 4]]


def test_the_first_of_equal_choices() -> None:
    table = fill([[1, 1], [2, 2]], [[5.0, 5.0], [0.0, 0.0]], 3)
    assert table.picks(3) == [0, 0]


def test_no_choice_or_a_cost_below_zero_is_refused() -> None:
    for costs, values in (([[]], [[]]), ([[1, 2]], [[0.0]]), ([[-1]], [[0.0]])):
        with pytest.raises(ValueError, match="item 0: wanted a cost of 0 or more and a value for each choice"):
            fill(costs, values, 4)


def test_eighty_items_with_many_choices_that_are_not_convex() -> None:
    """Against the relaxation, which no choice beats: any price per unit gives a lower bound (Lagrange)."""
    random = np.random.default_rng(0)
    costs = [list(range(52)) for _ in range(80)]
    values = [random.exponential(size=52).cumsum()[::-1].tolist() for _ in range(80)]
    table = fill(costs, values, 4096)
    picks = table.picks(2000)
    assert sum(picks) == 2000
    reached = sum(v[p] for v, p in zip(values, picks, strict=True))
    bounds = [
        sum(min(v[c] + price * c for c in range(52)) for v in values) - price * 2000 for price in np.linspace(0, 3, 301)
    ]
    assert max(bounds) <= reached + 1e-9 and reached - max(bounds) < 0.02 * reached
