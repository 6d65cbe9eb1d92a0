"""Blocks with many outliers among their Wanda scores are pruned less (OWL, Yin et al. 2024)."""

from collections.abc import Mapping

from alphaprune.allocators import Allocator, Granularity, block_means, published_epsilon, shifted
from alphaprune.analysis import LayerStat

SHIFTS = ((0.7, 0.08),)  # λ of every LLaMA run of the paper


def ratios(
    stats: Mapping[str, LayerStat], sparsity: float, epsilon: float, granularity: Granularity
) -> dict[str, float]:
    """s_k = S − 2λ·(t_k − mean t), t the percentage of outliers of the block, or of the matrix, from 0 to 1; λ = ε·S.

    Source: section 3.3 of the paper and its code, which scales the *kept* part by the outliers. By matrix it was
    published as much worse than by block.
    """
    if granularity == "block":
        return shifted(block_means(stats, "outliers"), epsilon)
    return shifted({name: stat.columns["outliers_matrix"] for name, stat in stats.items()}, epsilon)


ALLOCATOR = Allocator(
    "owl",
    ("outliers", "outliers_matrix"),
    ratios,
    auto_epsilon=lambda sparsity, high: published_epsilon(SHIFTS, sparsity, high),
)
