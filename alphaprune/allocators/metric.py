"""A spectral metric, linearly: layers where it is larger are pruned more (AlphaPruning, Lu et al. 2024)."""

from collections.abc import Mapping
from functools import partial

from alphaprune.allocators import Allocator, Granularity, apart, block_means, spread
from alphaprune.analysis import LayerStat


def by_metric(column: str, name: str | None = None) -> Allocator:
    """The allocator of a column of the analysis, called like it unless `name` says otherwise.

    The published code (`ww_sparsity`) has this one rule and direction for all metrics. It has a reason for the shapes
    of spectra: a light tail (large alpha, ranks, entropy, soft rank) is that of a layer that has learnt little. It is
    doubtful for sizes (alpha_hat and all norms), which a factor on W changes and layers of other shapes have others of:
    they are there for comparison, as in the paper, which finds alpha best of all.

    The rule stretches any difference to the full ε, be it no more than noise. An automatic ε therefore spreads the
    sparsities no further than the metric itself is spread (`apart`).
    """
    return Allocator(name or column, (column,), partial(_ratios, column), auto_cap=partial(_apart, column))


def _ratios(
    column: str, stats: Mapping[str, LayerStat], sparsity: float, epsilon: float, granularity: Granularity
) -> dict[str, float]:
    return spread(_values(column, stats, granularity), epsilon)


def _apart(column: str, stats: Mapping[str, LayerStat], granularity: Granularity) -> float:
    return apart(_values(column, stats, granularity))


def _values(column: str, stats: Mapping[str, LayerStat], granularity: Granularity) -> dict[str, float]:
    """The mean of the column over the block, or that of the matrix itself, which is noisier."""
    if granularity == "block":
        return block_means(stats, column)
    return {name: stat.columns[column] for name, stat in stats.items()}
