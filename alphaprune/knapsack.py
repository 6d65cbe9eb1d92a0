"""One choice per item, the least total value for every total cost: dynamic programming on whole numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SLACK = 1e-9  # costs this close above a multiple of the resolution are at it: 3 · 0.1 is not 0.3 in binary


@dataclass(frozen=True, eq=False)
class Table:
    """values[c]: the least total value of one choice per item whose costs sum to c exactly, inf where none do."""

    values: np.ndarray  # [most + 1] float64
    _costs: tuple[np.ndarray, ...]
    _picked: np.ndarray  # [items, most + 1] int32: the item's choice where the items up to it cost so much

    def within(self, cost: int) -> int:
        """The total up to `cost` with the least value, of equally good ones the least; ValueError if there is none."""
        best = int(np.argmin(self.values[: cost + 1])) if cost >= 0 else 0
        if cost < 0 or not np.isfinite(self.values[best]):
            raise ValueError(f"no choices cost {cost} or less")
        return best

    def picks(self, cost: int) -> list[int]:
        """The choice of every item behind values[cost]; ValueError if that is inf."""
        if not 0 <= cost < len(self.values) or not np.isfinite(self.values[cost]):
            raise ValueError(f"no choices cost {cost} together")
        found = []
        for costs, picked in zip(reversed(self._costs), self._picked[::-1], strict=True):
            found.append(int(picked[cost]))
            cost -= int(costs[found[-1]])
        return found[::-1]


def fill(costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]], most: int) -> Table:
    """The multiple-choice knapsack for every total cost from 0 to `most`, exactly; values need not be convex in costs.

    costs[i][c] ≥ 0, values[i][c]: of choice c of item i. Of equally good choices the first is taken.
    Time: most · number of choices. Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), chapter 11.
    """
    best = np.full(most + 1, math.inf)
    best[0] = 0.0
    whole = tuple(np.asarray(c, dtype=np.int64) for c in costs)
    picked = np.zeros((len(whole), most + 1), dtype=np.int32)
    for item, (prices, worths) in enumerate(zip(whole, values, strict=True)):
        if len(prices) != len(worths) or not len(prices) or prices.min() < 0:
            raise ValueError(f"item {item}: wanted a cost of 0 or more and a value for each choice")
        found = np.full(most + 1, math.inf)
        for choice, (price, worth) in enumerate(zip(prices.tolist(), worths, strict=True)):
            if price > most:
                continue
            total = best[: most + 1 - price] + worth  # [most + 1 − price]
            better = total < found[price:]
            found[price:][better] = total[better]
            picked[item, price:][better] = choice
        best = found
    return Table(best, whole, picked)


def units(costs: Sequence[Sequence[float]], resolution: float) -> list[list[int]]:
    """Real costs in whole numbers of `resolution`, rounded up, so that what is within a budget of them is so indeed."""
    return [[math.ceil(cost / resolution - SLACK) for cost in item] for item in costs]
