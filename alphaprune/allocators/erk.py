"""Small and oblong matrices are pruned less, by their shapes alone (ERK, Evci et al. 2020)."""

from collections.abc import Mapping

from alphaprune.allocators import Allocator, Granularity, shares_as_ratios
from alphaprune.analysis import LayerStat


def ratios(
    stats: Mapping[str, LayerStat], sparsity: float, epsilon: float, granularity: Granularity
) -> dict[str, float]:
    """Density in proportion to (N + K)/(N·K) ("Rigging the Lottery", section 3, with 1 × 1 kernels).

    Matrices that would exceed a density of 1 stay dense, and the others share the rest. A matrix has a sparsity of its
    own whatever the granularity, and ε has no meaning.
    """
    kept = (1 - sparsity) * sum(n * k for n, k in (stat.shape for stat in stats.values()))
    wanted = {name: (n + k) / (n * k) for name, (n, k) in ((name, stat.shape) for name, stat in stats.items())}
    dense: set[str] = set()
    while True:
        others = [name for name in stats if name not in dense]
        left = kept - sum(stats[name].shape[0] * stats[name].shape[1] for name in dense)
        scale = left / sum(sum(stats[name].shape) for name in others) if others else 0.0
        above = {name for name in others if scale * wanted[name] > 1}
        if not above:
            break
        dense |= above
    return shares_as_ratios({n: 0.0 if n in dense else 1 - scale * wanted[n] for n in stats}, sparsity)


ALLOCATOR = Allocator("erk", (), ratios, auto_epsilon=lambda sparsity, high: 0.0)
