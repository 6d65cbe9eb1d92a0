"""One threshold for the LAMP scores of the whole model (Lee et al. 2021)."""

import math
from collections.abc import Mapping

from alphaprune import sketches
from alphaprune.allocators import Allocator, Granularity, shares_as_ratios
from alphaprune.analysis import LayerStat


def ratios(
    stats: Mapping[str, LayerStat], sparsity: float, epsilon: float, granularity: Granularity
) -> dict[str, float]:
    """Of every matrix the share of its weights whose score is below the one threshold that meets the budget.

    A score is the part that a weight has in the squares of all weights of its matrix that are not smaller, so no matrix
    is ever emptied. A matrix has a sparsity of its own whatever the granularity, and ε has no meaning.
    """
    quantiles = {name: stat.series["lamp_quantiles"] for name, stat in stats.items()}
    sizes = {name: math.prod(stat.shape) for name, stat in stats.items()}
    return shares_as_ratios(sketches.shares(quantiles, sizes, sparsity), sparsity)


ALLOCATOR = Allocator("lamp", (), ratios, series=("lamp_quantiles",), auto_epsilon=lambda sparsity, high: 0.0)
