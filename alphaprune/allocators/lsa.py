"""Blocks whose outputs change little when half of their weights go are pruned less (LSA, Yang et al. 2026)."""

import math
from collections.abc import Mapping

from alphaprune.allocators import Allocator, Granularity, block_means, published_epsilon, shifted
from alphaprune.analysis import LayerStat

SHIFTS = ((0.5, 0.04), (0.6, 0.10), (0.7, 0.15), (0.8, 0.12))  # β of the published code


def ratios(
    stats: Mapping[str, LayerStat], sparsity: float, epsilon: float, granularity: Granularity
) -> dict[str, float]:
    """s_k = S − 2β·(t_k − mean t), t = 1 − E_k/ΣE from 0 to 1, E the error of removing half; β = ε·S.

    A small error counts as importance, not as room to prune: by the paper's reading the error of such a layer lies in a
    few weights that matter, and that of a layer with a large error is spread evenly. Errors are absolute, not relative
    to the outputs, so they grow with depth as the activations do, and the first blocks are protected.
    By matrix the shift is times mean N / N_k, which keeps the published budget; the published runs use β = 0.07
    there at 70 %, which is --epsilon 0.1.
    """
    if granularity == "block":
        return shifted({name: -error for name, error in block_means(stats, "removal_error").items()}, epsilon)
    shifts = shifted({name: -stat.columns["removal_error"] for name, stat in stats.items()}, epsilon)
    sizes = {name: math.prod(stat.shape) for name, stat in stats.items()}
    mean = sum(sizes.values()) / len(sizes)
    return {name: max(1e-3, 1 + (shifts[name] - 1) * mean / sizes[name]) for name in stats}


ALLOCATOR = Allocator(
    "lsa",
    ("removal_error",),
    ratios,
    auto_epsilon=lambda sparsity, high: published_epsilon(SHIFTS, sparsity, high),
)
