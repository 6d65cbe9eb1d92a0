"""Light tails (large alpha) are pruned more than heavy ones (AlphaPruning, Lu et al. 2024)."""

from collections.abc import Mapping

from alphaprune.allocators import Allocator, Granularity, block_means, spread
from alphaprune.analysis import LayerStat


def ratios(
    stats: Mapping[str, LayerStat], sparsity: float, epsilon: float, granularity: Granularity
) -> dict[str, float]:
    """Linear in alpha: in the mean alpha of the block, or of the matrix itself (which is noisier)."""
    if granularity == "block":
        return spread(block_means(stats, "alpha"), epsilon)
    return spread({name: stat.columns["alpha"] for name, stat in stats.items()}, epsilon)


ALLOCATOR = Allocator("alpha", ("alpha",), ratios)
