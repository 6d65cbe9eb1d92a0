"""Light tails (large alpha) are pruned more than heavy ones (AlphaPruning, Lu et al. 2024)."""

from alphaprune.allocators.metric import by_metric

ALLOCATOR = by_metric("alpha")
