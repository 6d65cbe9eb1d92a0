"""The least predicted loss: measured error curves of every block, and an exact search for the best division.

A model's loss is taken for the sum of what its blocks lose when pruned alone. Between two measured points it grows
exponentially with the sparsity, as measured curves do from some 0.4 on, but no later than (part of the way)³: that is
the law near 0, where the s·N smallest weights have squares that sum up to s³. Both are convex, where straight lines
between few points would reward extremes.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from alphaprune import knapsack
from alphaprune.allocators import Allocator, Granularity
from alphaprune.analysis import LayerStat
from alphaprune.curves import SERIES

STEPS = 128  # of sparsity that a block of average size can have, at least
LEAST_UNITS = 4096  # that the cost of all blocks is divided into
TIME_UNITS = 16384
BEYOND = 0.05  # of sparsity past the last measurement cost ten times the largest loss that was measured of any block
UNTOUCHED = 1e-9  # the ratio of a block without zeros: ratios are above 0

Loss = Callable[[Sequence[float]], np.ndarray]


def losses(stats: Mapping[str, LayerStat]) -> dict[int, Loss]:
    """By block, its loss as a function of its sparsity: never falling, and pessimistic past the last measurement.

    There the blocks' common largest loss times 10^(excess / BEYOND) − 1 comes on top, so that a block goes there only
    when the budget leaves nothing else. Points that fall are replaced by the nearest that do not (isotonic regression).
    """
    points = {stat.block: tuple(stat.series[name] for name in SERIES) for stat in stats.values()}
    rising = {block: _rising(measured) for block, (_, measured) in points.items()}
    top = max(values[-1] for values in rising.values()) or 1.0
    return {block: _between(sparsities, rising[block], top) for block, (sparsities, _) in points.items()}


def _rising(values: Sequence[float]) -> list[float]:
    """The numbers that never fall, from 0 on, with the least squared distance: means of neighbours that do fall."""
    pools: list[tuple[float, int]] = []
    for value in values[1:]:
        total, count = value, 1
        while pools and pools[-1][0] * count > total * pools[-1][1]:
            total, count = total + pools[-1][0], count + pools.pop()[1]
        pools.append((total, count))
    return [0.0, *(max(0.0, total / count) for total, count in pools for _ in range(count))]


def _between(sparsities: Sequence[float], values: Sequence[float], top: float) -> Loss:
    places, known = np.array(sparsities), np.array(values)

    def loss(asked: Sequence[float]) -> np.ndarray:
        at = np.asarray(asked, dtype=float)
        right = np.clip(np.searchsorted(places, at), 1, len(places) - 1)
        low, high = known[right - 1], known[right]
        part = np.clip((at - places[right - 1]) / (places[right] - places[right - 1]), 0.0, 1.0)
        excess = np.maximum(at - places[-1], 0.0)
        return np.maximum(low ** (1 - part) * high**part, high * part**3) + top * (10 ** (excess / BEYOND) - 1)

    return loss


def ratios(
    stats: Mapping[str, LayerStat],
    sparsity: float,
    epsilon: float,
    granularity: Granularity,
    bounds: tuple[float, float] = (0.0, 0.95),
) -> dict[str, float]:
    """The sparsities of the blocks with the least Σ loss for the budget, in steps of 1/4096 of all weights or finer.

    They meet the budget to within such a step; planning does the rest. All layers of a block get the same.
    """
    sizes, known, bounds = _sizes(stats), losses(stats), (bounds[0], min(bounds[1], 1.0))
    count = max(LEAST_UNITS, STEPS * len(sizes))
    unit = sum(sizes.values()) / count  # weights
    steps = {block: _steps(*bounds, size / unit) for block, size in sizes.items()}
    shares = {block: np.clip(np.array(steps[block]) * unit / size, *bounds) for block, size in sizes.items()}
    least, most = (sum(pick(s) for s in steps.values()) for pick in (min, max))
    budget = min(max(round(sparsity * count), least), most)
    values = [known[block](shares[block]).tolist() for block in sizes]
    picks = knapsack.fill([steps[block] for block in sizes], values, budget).picks(budget)
    found = {block: float(shares[block][pick]) for block, pick in zip(sizes, picks, strict=True)}
    return {name: max(found[stat.block], UNTOUCHED) for name, stat in stats.items()}


def _steps(low: float, high: float, units: float) -> list[int]:
    """Whole numbers of zeros inside the bounds of a block of so many units; the next below if there is none."""
    first, last = math.ceil(low * units - knapsack.SLACK), math.floor(high * units + knapsack.SLACK)
    return list(range(first, last + 1)) or [last]


def _sizes(stats: Mapping[str, LayerStat]) -> dict[int, int]:
    """Weights of every block, in the order of the layers."""
    found: dict[int, int] = {}
    for stat in stats.values():
        found[stat.block] = found.get(stat.block, 0) + stat.shape[0] * stat.shape[1]
    return found


def order(stats: Mapping[str, LayerStat], sparsity: float) -> dict[str, float]:
    """Ratios that fall with the loss per weight of pruning a block to this sparsity.

    With the choice of that or nothing for every block, and a part of the last one, taking the blocks in this order is
    the best (Dantzig 1957).
    """
    sizes, known = _sizes(stats), losses(stats)
    cost = {block: float(known[block]([sparsity])[0]) / size for block, size in sizes.items()}
    ranks = {block: rank for rank, block in enumerate(sorted(sizes, key=lambda block: -cost[block]))}
    return {name: float(1 + ranks[stat.block]) for name, stat in stats.items()}


def timed(
    stats: Mapping[str, LayerStat],
    seconds: Mapping[str, Sequence[float]],
    sparsities: Sequence[float],
    latency: float | None,
    most_loss: float | None,
) -> dict[str, float]:
    """The sparsity of every layer, the same within a block: the best model within `latency`, or else the fastest that
    loses `most_loss` at most, by the sums over blocks.

    sparsities: what a block may have, rising. seconds: of each layer at each of them.
    Times count in steps of 1/16384 of the budget (of the dense model, for a loss), rounded up. ValueError if there is
    no such model; it says what the least is.
    """
    known = losses(stats)
    times: dict[int, np.ndarray] = {}
    for name, stat in stats.items():
        times[stat.block] = times.get(stat.block, 0.0) + np.asarray(seconds[name], dtype=float)
    costs = [taken.tolist() for taken in times.values()]
    worths = [known[block](sparsities).tolist() for block in times]
    least = math.fsum(min(c) for c in costs)
    if latency is not None and least > latency:
        raise ValueError(
            f"a latency of {latency:g} s cannot be reached: the least within the bounds is {least:.4g} s; allow more "
            f"sparsity, or choose a smaller model"
        )
    if most_loss is not None and math.fsum(min(w) for w in worths) > most_loss:
        raise ValueError(
            f"a loss of {most_loss:g} cannot be reached: the least within the bounds is "
            f"{math.fsum(min(w) for w in worths):.4g}"
        )
    picks = _best(costs, worths, latency, most_loss)
    found = {block: float(sparsities[pick]) for block, pick in zip(times, picks, strict=True)}
    return {name: found[stat.block] for name, stat in stats.items()}


def _best(
    costs: Sequence[Sequence[float]], worths: Sequence[Sequence[float]], latency: float | None, most_loss: float | None
) -> list[int]:
    """The choice of every block."""
    if latency is not None and math.fsum(c[0] for c in costs) <= latency:
        return [0] * len(costs)  # which loses least; the rounding up may not see that it is in time
    budget = math.fsum(max(c) for c in costs) if latency is None else latency
    spare = len(costs) if latency is None else 0  # for the rounding up of what is dense
    table = knapsack.fill(knapsack.units(costs, budget / TIME_UNITS), worths, TIME_UNITS + spare)
    if latency is not None:
        if np.isfinite(table.values).any():
            return table.picks(table.within(TIME_UNITS))
        return [int(np.argmin(c)) for c in costs]  # the fastest of all, which only the rounding put out of reach
    return table.picks(int(np.argmax(table.values <= most_loss)))


def predicted(stats: Mapping[str, LayerStat], zeros: Mapping[str, int]) -> float:
    """The loss of a model with so many zeros in each layer: Σ over blocks, each at the mean sparsity of those of its
    layers that have zeros."""
    pruned: dict[int, list[int]] = {}
    for name, stat in stats.items():
        if zeros[name]:
            total = pruned.setdefault(stat.block, [0, 0])
            total[0] += zeros[name]
            total[1] += stat.shape[0] * stat.shape[1]
    known = losses(stats)
    return math.fsum(float(known[block]([z / n])[0]) for block, (z, n) in pruned.items())


ALLOCATOR = Allocator("measured", (), ratios, series=SERIES, auto_epsilon=lambda sparsity, high: 0.0, bounded=True)
