"""The same sparsity everywhere."""

from alphaprune.allocators import Allocator

ALLOCATOR = Allocator(
    "uniform",
    (),
    lambda stats, sparsity, epsilon, granularity: dict.fromkeys(stats, 1.0),
    auto_epsilon=lambda sparsity, high: 0.0,
)
