"""Blocks with a small mean Wanda score are pruned less (DLP, Chen et al. 2025)."""

from collections.abc import Mapping

from alphaprune.allocators import Allocator, Granularity, block_means, published_epsilon, shifted
from alphaprune.analysis import LayerStat

SHIFTS = ((0.5, 0.04), (0.6, 0.10), (0.7, 0.15))  # α of the paper


def ratios(
    stats: Mapping[str, LayerStat], sparsity: float, epsilon: float, granularity: Granularity
) -> dict[str, float]:
    """s_k = S − 2α·(t_k − mean t), t = 1 − q_k/Σq from 0 to 1, q the mean score of block or matrix; α = ε·S.

    A block is kept where its score is *small*. That sounds upside down and is as published: activations grow with
    depth and the scores with them, so the first blocks, whose errors all later ones inherit, are protected, almost
    linearly in depth. As I = 1 − q/Σq is only ever used from least to greatest, −q does as well.
    """
    if granularity == "block":
        return shifted({name: -mean for name, mean in block_means(stats, "score_mean").items()}, epsilon)
    return shifted({name: -stat.columns["score_mean_matrix"] for name, stat in stats.items()}, epsilon)


ALLOCATOR = Allocator(
    "dlp",
    ("score_mean", "score_mean_matrix"),
    ratios,
    auto_epsilon=lambda sparsity, high: published_epsilon(SHIFTS, sparsity, high),
)
