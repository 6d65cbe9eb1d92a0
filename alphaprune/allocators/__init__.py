"""How much to prune where: what analysis knows of each layer → the desired ratios of their sparsities."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from alphaprune import metrics, registry
from alphaprune.analysis import LayerStat

MEMBERS = ("uniform", "alpha", "ramp", "farms", "owl", "dlp", "lsa", "erk", "lamp", "global", "measured")
METRICS = metrics.COLUMNS  # each an allocator by its name, all by the one rule of metric.py

Granularity = Literal["block", "matrix"]


@dataclass(frozen=True)
class Allocator:
    """A way to spread a sparsity over layers.

    columns, series: what it reads of `LayerStat.columns` and `.series`; allocators never measure.
    auto_epsilon: (sparsity, most sparsity of a layer) → the spread it was published with, for epsilon "auto"; None
    leaves that to planning.
    auto_cap: (stats, granularity) → the most that an automatic ε may be for this model; None: no such bound.
    ratios: (stats, sparsity, epsilon, granularity) → r_k by layer name, all > 0; planning scales them by one factor
    to meet the budget inside the bounds.
    bounded: whether `ratios` takes these bounds, (least, most), as its last argument.
    """

    name: str
    columns: tuple[str, ...]
    ratios: Callable[..., dict[str, float]]
    series: tuple[str, ...] = ()
    auto_epsilon: Callable[[float, float], float] | None = None
    auto_cap: Callable[[Mapping[str, LayerStat], Granularity], float] | None = None
    bounded: bool = False


def get(name: str) -> Allocator:
    """The member of that name, or the allocator by a spectral metric of that name; ValueError that lists both."""
    if name in METRICS and name not in MEMBERS:
        from alphaprune.allocators.metric import by_metric

        return by_metric(name)
    return registry.member(__name__, MEMBERS if name in MEMBERS else MEMBERS + METRICS, name, "ALLOCATOR")


def spread(values: Mapping[str, float], epsilon: float) -> dict[str, float]:
    """Ratios from 1 − ε at the least of `values` to 1 + ε at the greatest, linear between; all 1 if they are equal.

    r_k = (v_k − min v) / (max v − min v) · 2ε + (1 − ε)   (AlphaPruning, Lu et al. 2024, section 3.2)
    """
    low, high = min(values.values()), max(values.values())
    if high == low:
        return dict.fromkeys(values, 1.0)
    return {name: (value - low) / (high - low) * 2 * epsilon + (1 - epsilon) for name, value in values.items()}


def apart(values: Mapping[str, float]) -> float:
    """The ε for which `spread` puts the extreme ratios exactly as far apart as the values are, and infinity if they are
    not all positive: (1 + ε) / (1 − ε) = max v / min v.

    For the block means of the published alphas this is 0.24 (LLaMA-7B) and 0.34 (LLaMA-2-7B), where the paper found 0.2
    and 0.3 best by search.
    """
    low, high = min(values.values()), max(values.values())
    return (high - low) / (high + low) if low > 0 else math.inf


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


def published_epsilon(shifts: Sequence[tuple[float, float]], sparsity: float, high: float) -> float:
    """ε = λ/S that makes `shifted` the published rule, λ from `shifts`, pairs (sparsity, λ) in rising order.

    λ is linear between the pairs and constant outside. At most 0.5, where `shifted` could reach 0, and high/S − 1, the
    cap of every automatic ε.
    """
    if sparsity <= 0:
        return 0.0
    shift = shifts[0][1]
    for (here, low), (there, up) in pairwise(shifts):
        shift += (up - low) * min(max((sparsity - here) / (there - here), 0.0), 1.0)
    return max(0.0, min(shift / sparsity, 0.5, high / sparsity - 1))


def shares_as_ratios(shares: Mapping[str, float], sparsity: float) -> dict[str, float]:
    """Ratios s_k/S of an allocator that knows the sparsities s_k themselves; next to nothing for 0, to stay ratios."""
    if sparsity <= 0:
        return dict.fromkeys(shares, 1.0)
    return {name: max(1e-9, share / sparsity) for name, share in shares.items()}


def block_means(stats: Mapping[str, LayerStat], column: str) -> dict[str, float]:
    """For every layer the mean of `column` over the layers of its block."""
    members: dict[int, list[float]] = {}
    for stat in stats.values():
        members.setdefault(stat.block, []).append(stat.columns[column])
    means = {block: math.fsum(values) / len(values) for block, values in members.items()}
    return {name: means[stat.block] for name, stat in stats.items()}
