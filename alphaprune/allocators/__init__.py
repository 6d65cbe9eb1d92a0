"""How much to prune where: what analysis knows of each layer → the desired ratios of their sparsities."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from alphaprune import registry
from alphaprune.analysis import LayerStat

MEMBERS = ("uniform", "alpha", "ramp")

Granularity = Literal["block", "matrix"]


@dataclass(frozen=True)
class Allocator:
    """A way to spread a sparsity over layers.

    columns: what it reads of `LayerStat.columns`; allocators never measure.
    ratios: (stats, sparsity, epsilon, granularity) → r_k by layer name, all > 0; planning scales them by one factor
    to meet the budget inside the bounds.
    """

    name: str
    columns: tuple[str, ...]
    ratios: Callable[[Mapping[str, LayerStat], float, float, Granularity], dict[str, float]]


def get(name: str) -> Allocator:
    return registry.member(__name__, MEMBERS, name, "ALLOCATOR")


def spread(values: Mapping[str, float], epsilon: float) -> dict[str, float]:
    """Ratios from 1 − ε at the least of `values` to 1 + ε at the greatest, linear between; all 1 if they are equal.

    r_k = (v_k − min v) / (max v − min v) · 2ε + (1 − ε)   (AlphaPruning, Lu et al. 2024, section 3.2)
    """
    low, high = min(values.values()), max(values.values())
    if high == low:
        return dict.fromkeys(values, 1.0)
    return {name: (value - low) / (high - low) * 2 * epsilon + (1 - epsilon) for name, value in values.items()}


def block_means(stats: Mapping[str, LayerStat], column: str) -> dict[str, float]:
    """For every layer the mean of `column` over the layers of its block."""
    members: dict[int, list[float]] = {}
    for stat in stats.values():
        members.setdefault(stat.block, []).append(stat.columns[column])
    means = {block: math.fsum(values) / len(values) for block, values in members.items()}
    return {name: means[stat.block] for name, stat in stats.items()}
