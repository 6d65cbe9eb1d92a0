"""Eigenvalues → the spectral metrics beside alpha."""

from torch import Tensor

from alphaprune.alpha import PowerLaw

COLUMNS: tuple[str, ...] = ()


def columns(eigenvalues: Tensor, law: PowerLaw, shape: tuple[int, int], noise: float) -> dict[str, float]:
    """Metrics of a spectrum [min(N, K)], ascending float64."""
    return {}
