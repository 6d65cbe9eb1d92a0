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

    columns, series: what it reads of `LayerStat.columns` and `.series`; allocators never measure.
    auto_epsilon: (sparsity, most sparsity of a layer) → the spread it was published with, for epsilon "auto"; None
    leaves that to planning.
    ratios: (stats, sparsity, epsilon, granularity) → r_k by layer name, all > 0; planning scales them by one factor
    to meet the budget inside the bounds.
    """

    name: str
    columns: tuple[str, ...]
    ratios: Callable[[Mapping[str, LayerStat], float, float, Granularity], dict[str, float]]
    series: tuple[str, ...] = ()
    auto_epsilon: Callable[[float, float], float] | None = None


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


def shifted(values: Mapping[str, float], epsilon: float) -> dict[str, float]:
    """Ratios that sink linearly by 2ε from the least of `values` to the greatest, around 1 at their mean.

    r_k = 1 − 2ε·(t_k − mean t),  t_k = (v_k − min v) / (max v − min v). With ε = λ/S this is the published rule of OWL
    and DLP, s_k = S − 2λ·(t_k − mean t): they keep more where a value is large. At least a thousandth, to stay a ratio.
    """
    low, high = min(values.values()), max(values.values())
    if high == low:
        return dict.fromkeys(values, 1.0)
    places = {name: (value - low) / (high - low) for name, value in values.items()}
    mean = math.fsum(places.values()) / len(places)
    return {name: max(1e-3, 1 - 2 * epsilon * (place - mean)) for name, place in places.items()}


def block_means(stats: Mapping[str, LayerStat], column: str) -> dict[str, float]:
    """For every layer the mean of `column` over the layers of its block."""
    members: dict[int, list[float]] = {}
    for stat in stats.values():
        members.setdefault(stat.block, []).append(stat.columns[column])
    means = {block: math.fsum(values) / len(values) for block, values in members.items()}
    return {name: means[stat.block] for name, stat in stats.items()}
