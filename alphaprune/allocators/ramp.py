"""Later blocks are pruned more, linearly in depth: a baseline without any measurement, and a strong one."""

from collections.abc import Mapping

from alphaprune.allocators import Allocator, Granularity, spread
from alphaprune.analysis import LayerStat


def ratios(
    stats: Mapping[str, LayerStat], sparsity: float, epsilon: float, granularity: Granularity
) -> dict[str, float]:
    """Linear in the number of the block, whatever the granularity: all layers of a block are equally deep."""
    return spread({name: float(stat.block) for name, stat in stats.items()}, epsilon)


ALLOCATOR = Allocator("ramp", (), ratios)
