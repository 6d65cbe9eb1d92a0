"""Weight → short series that stand for the distribution of its magnitudes, for allocators with one global threshold."""

from torch import Tensor

SERIES: tuple[str, ...] = ()


def series(weight: Tensor) -> dict[str, list[float]]:
    """Series by name of a weight [N, K]."""
    return {}
