"""The rule of `alpha`, with the alpha of windows of one aspect ratio (FARMS, arXiv 2506.06280)."""

from alphaprune.allocators.metric import by_metric

ALLOCATOR = by_metric("alpha_farms", "farms")
