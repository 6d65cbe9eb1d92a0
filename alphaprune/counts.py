"""Real shares → integers: the arithmetic of budgets, on plain numbers."""

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

SLACK = 1e-6  # counts this close above or below a bound are at it: 0.55 · 100 is not 55 in binary
SEARCHED = 10_000  # combinations of totals tried before a budget counts as out of reach


def water_fill(
    sizes: Sequence[int], ratios: Sequence[float], sparsity: float, low: float = 0.0, high: float = math.inf
) -> list[float]:
    """s_k = clip(η·r_k, low, high) with the one η ≥ 0 for which Σ N_k·s_k = sparsity·ΣN_k.

    The sum is piecewise linear and rising in η, so η is found by walking its sorted breakpoints low/r_k and high/r_k,
    then solved for exactly from the layers that are not clipped. Independent of the order of the layers.
    Raises ValueError for ratios that are not positive, or a sparsity outside [low, high].
    """
    if not all(math.isfinite(r) and r > 0 for r in ratios):
        raise ValueError("ratios: wanted finite numbers above 0")
    if not low <= sparsity <= high:
        raise ValueError(f"sparsity {sparsity} cannot be reached with layers between {low} and {high}")
    target = sparsity * sum(sizes)
    events = [(low / r, n * r) for n, r in zip(sizes, ratios, strict=True)]
    if math.isfinite(high):
        events += [(high / r, -n * r) for n, r in zip(sizes, ratios, strict=True)]
    events.sort()
    eta, slope, filled = 0.0, 0.0, low * sum(sizes)
    for place, change in events:
        if slope > 0 and filled + slope * (place - eta) >= target:
            break
        filled, eta, slope = filled + slope * (place - eta), place, slope + change
    if slope > 0 and filled < target:
        eta += (target - filled) / slope
    free = [(n, r) for n, r in zip(sizes, ratios, strict=True) if low < eta * r < high]
    if free:
        clipped = [
            n * (low if eta * r <= low else high)
            for n, r in zip(sizes, ratios, strict=True)
            if not low < eta * r < high
        ]
        eta = (target - math.fsum(clipped)) / math.fsum(n * r for n, r in free)
    return [min(max(eta * r, low), high) for r in ratios]


def share_counts(sizes: Sequence[int], sparsities: Sequence[float], budget: int, low: float, high: float) -> list[int]:
    """Integers near N_k·s_k that sum to `budget`, each within [low, high]·N_k: the method of largest remainders.

    Raises ValueError if the bounds, as integers, do not hold the budget.
    """
    wanted = [n * s for n, s in zip(sizes, sparsities, strict=True)]
    least = [math.ceil(low * n - SLACK) for n in sizes]
    most = [math.floor(high * n + SLACK) for n in sizes]
    narrow = any(lo > hi for lo, hi in zip(least, most, strict=True))  # no integer between the bounds of a tiny layer
    if narrow or not sum(least) <= budget <= sum(most):
        raise ValueError(f"{budget} zeros cannot be had with layers between {low} and {high} of their weights")
    return _largest_remainders(wanted, budget, least, most)


def share_steps(units: Sequence[int], wanted: Sequence[float], budget: int, low: float, high: float) -> list[int]:
    """Integers j_k near `wanted` in [low, high] with |Σ units_k·j_k − budget| ≤ min(units).

    All layers of one unit share a total, in which rounding spreads evenly over them. Totals are chosen from the largest
    unit to the smallest, each next to what its layers want and what the larger ones left over.
    Raises ValueError if the bounds leave the budget out of reach.
    """
    least, most = math.ceil(low - SLACK), math.floor(high + SLACK)
    members: dict[int, list[int]] = {}
    for k, unit in sorted(enumerate(units), key=lambda pair: -pair[1]):
        members.setdefault(unit, []).append(k)
    groups = [_Group(u, sum(wanted[k] for k in m), least * len(m), most * len(m)) for u, m in members.items()]
    totals = _totals(groups, budget, set()) if least <= most else None
    if totals is None:
        raise ValueError(f"with N between its bounds in every layer, {budget} zeros cannot be met within one step")
    steps = [0] * len(units)
    for total, group in zip(totals, members.values(), strict=True):
        for k, step in zip(group, _shifted([wanted[k] for k in group], total, least, most), strict=True):
            steps[k] = step
    return steps


def share_choices(costs: Sequence[Sequence[int]], wanted: Sequence[float], budget: int) -> list[int]:
    """One choice per item near what it wants to cost, all of them together no more than `budget`.

    costs: of each item's choices, rising.   Every item starts with its dearest choice that is not above `wanted`, then
    the next choices are bought by the largest remainders, ties by order, for as long as one fits. So what is left of
    the budget is less than the cheapest next step, or every item has its dearest choice.
    Raises ValueError if the cheapest choices cost more than the budget.
    """
    found = [max(bisect_right(c, w + SLACK * max(1.0, abs(w))) - 1, 0) for c, w in zip(costs, wanted, strict=True)]
    left = budget - sum(c[i] for c, i in zip(costs, found, strict=True))
    while left < 0:  # the least choices of some are above what they want
        spare = [(c[i] - w, -k) for k, (c, i, w) in enumerate(zip(costs, found, wanted, strict=True)) if i]
        if not spare:
            raise ValueError(f"the least that there is costs {budget - left}, more than {budget}")
        k = -max(spare)[1]
        left += costs[k][found[k]] - costs[k][found[k] - 1]
        found[k] -= 1

    def entry(k: int) -> tuple[float, int]:
        here, there = costs[k][found[k]], costs[k][found[k] + 1]
        return (here - wanted[k]) / (there - here), k

    queue = [entry(k) for k in range(len(costs)) if found[k] + 1 < len(costs[k])]
    heapq.heapify(queue)
    while queue:
        k = heapq.heappop(queue)[1]
        step = costs[k][found[k] + 1] - costs[k][found[k]]
        if step > left:
            continue
        left -= step
        found[k] += 1
        if found[k] + 1 < len(costs[k]):
            heapq.heappush(queue, entry(k))
    return found


class _Group(NamedTuple):
    """Layers of one unit together: what they want in sum, and what they can have."""

    unit: int
    wanted: float
    least: int
    most: int


def _totals(groups: list[_Group], rest: int, failed: set[tuple[int, int]]) -> list[int] | None:
    """Steps per group, largest unit first, that make `rest` within one smallest unit; None if there are none.

    The first choice of every group nearly always leads to the end; the others are tried by distance from it, each
    remainder once (`failed` remembers those in vain).
    """
    group, later = groups[0], groups[1:]
    first = round((rest - sum(g.unit * g.wanted for g in later)) / group.unit)
    first = min(max(first, group.least), group.most)
    if not later:
        return [first] if abs(rest - group.unit * first) <= group.unit else None
    smallest = later[-1].unit
    below = sum(g.unit * g.least for g in later) - smallest
    above = sum(g.unit * g.most for g in later) + smallest
    for total in sorted(range(group.least, group.most + 1), key=lambda total: abs(total - first)):
        left = rest - group.unit * total
        if below <= left <= above and (len(later), left) not in failed and len(failed) < SEARCHED:
            found = _totals(later, left, failed)
            if found is not None:
                return [total, *found]
            failed.add((len(later), left))
    return None


def _shifted(wanted: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """Integers in [least, most] that sum to `total`, next to wanted + one common shift."""
    low, high = least - max(wanted), most - min(wanted)  # the shift that puts all at the least, and all at the most
    for _ in range(80):
        shift = (low + high) / 2
        under = math.fsum(min(max(w + shift, least), most) for w in wanted) < total
        low, high = (shift, high) if under else (low, shift)
    moved = [min(max(w + high, least), most) for w in wanted]
    return _largest_remainders(moved, total, [least] * len(moved), [most] * len(moved))


def _largest_remainders(wanted: Sequence[float], total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Every value rounded down, and one more for the largest remainders, ties by order, until the sum is `total`.

    `least` and `most` bound each integer and must allow the total.
    """
    found = [min(max(math.floor(w), lo), hi) for w, lo, hi in zip(wanted, least, most, strict=True)]
    missing = total - sum(found)
    while missing:
        one = 1 if missing > 0 else -1
        order = sorted(range(len(found)), key=lambda k: one * (found[k] - wanted[k]))
        for k in order:
            if missing and least[k] <= found[k] + one <= most[k]:
                found[k] += one
                missing -= one
    return found
