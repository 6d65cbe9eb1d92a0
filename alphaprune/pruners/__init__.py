"""What to prune: one layer's weight, what is known of its inputs and what the plan asks → new weight and mask."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from alphaprune import registry
from alphaprune.calibrate import InputStat, Need
from alphaprune.mask import keep_mask
from alphaprune.pattern import Pattern

MEMBERS = ("wanda", "magnitude", "sparsegpt", "alps", "ria")

Selection = Literal["row", "matrix"]
Scores = Callable[[Tensor, InputStat | None], Tensor]


@dataclass(frozen=True)
class Cut:
    """What is asked of one layer: so many zeros, where the pattern allows them.

    selection: whether an unstructured mask removes the same share of every row, or the least of the whole matrix.
    """

    zeros: int
    pattern: Pattern
    selection: Selection


@dataclass(frozen=True)
class Pruner:
    """A way to choose zeros, and perhaps to change what is kept.

    need: what it must know of the layer's inputs; more than "nothing" takes calibration text.
    selection: the one that it was published with.
    prune: (weight [N, K], its inputs or None, cut) → the new weight [N, K], zero where not kept, and the mask [N, K]
    bool, True = keep, with exactly `cut.zeros` entries False. The weight may come back in float32: the caller rounds.
    """

    name: str
    need: Need
    selection: Selection
    prune: Callable[[Tensor, InputStat | None, Cut], tuple[Tensor, Tensor]]

    @property
    def needs_calibration(self) -> bool:
        return self.need != "nothing"


def by_scores(scores: Scores) -> Callable[[Tensor, InputStat | None, Cut], tuple[Tensor, Tensor]]:
    """The `prune` of a method that only ranks: the lowest scores go, what is kept stays as it is."""

    def prune(weight: Tensor, inputs: InputStat | None, cut: Cut) -> tuple[Tensor, Tensor]:
        mask = keep_mask(scores(weight, inputs), cut.zeros, cut.pattern, cut.selection)
        return weight.masked_fill(~mask, 0), mask

    return prune


def get(name: str) -> Pruner:
    return registry.member(__name__, MEMBERS, name, "PRUNER")
