"""Weight → alpha of the pooled spectra of windows of one aspect ratio (FARMS, arXiv 2506.06280)."""

from dataclasses import dataclass

from torch import Tensor

COLUMNS = ("alpha_farms",)


@dataclass(frozen=True)
class Windows:
    """Square windows: `size` rows and columns, `count` positions along either side."""

    size: int = 2000
    count: int = 15


def columns(weight: Tensor, windows: Windows, device: str = "auto") -> dict[str, float]:
    """The column of a weight [N, K]."""
    return {}
