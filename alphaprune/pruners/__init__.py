"""What to prune: one layer's weight, statistic and number of zeros → its new weight and mask."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from alphaprune import registry

MEMBERS = ("wanda", "magnitude")

Selection = Literal["row", "matrix"]


@dataclass(frozen=True)
class Pruner:
    """A way to choose zeros.

    scores: (weight [N, K], norms [K] or None) → scores [N, K] float32, larger = keep.
    needs_calibration: whether `norms`, the norms of the layer's inputs, must be measured.
    selection: whether an unstructured mask removes the same share of every row, or the lowest of the whole matrix.
    """

    name: str
    needs_calibration: bool
    selection: Selection
    scores: Callable[[Tensor, Tensor | None], Tensor]


def get(name: str) -> Pruner:
    return registry.member(__name__, MEMBERS, name, "PRUNER")
