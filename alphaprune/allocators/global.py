"""One threshold for the magnitudes of the whole model."""

import math
from collections.abc import Mapping

from alphaprune import sketches
from alphaprune.allocators import Allocator, Granularity, shares_as_ratios
from alphaprune.analysis import LayerStat


def ratios(
    stats: Mapping[str, LayerStat], sparsity: float, epsilon: float, granularity: Granularity
) -> dict[str, float]:
    """Of every matrix the share of its weights whose |w| is below the one threshold that meets the budget.

    Matrices of small weights lose most of them: a baseline. A matrix has a sparsity of its own whatever the
    granularity, and ε has no meaning.
    """
    quantiles = {name: stat.series["magnitude_quantiles"] for name, stat in stats.items()}
    sizes = {name: math.prod(stat.shape) for name, stat in stats.items()}
    return shares_as_ratios(sketches.shares(quantiles, sizes, sparsity), sparsity)


ALLOCATOR = Allocator("global", (), ratios, series=("magnitude_quantiles",), auto_epsilon=lambda sparsity, high: 0.0)
