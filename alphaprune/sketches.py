"""Short series that stand for a distribution: of a weight's magnitudes, for allocators with one global threshold, and
of its eigenvalues, for pictures."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

SERIES: tuple[str, ...] = ("magnitude_quantiles", "lamp_quantiles")

# Every half per cent, and finer at both ends where tails bend: straight lines between them are right to 1e-3 of the
# weights wherever no single value has more of them than that.
PROBABILITIES = (
    *(0.0, 0.0002, 0.0005, 0.001, 0.002, 0.003),
    *(step / 200 for step in range(1, 180)),
    *(step / 400 for step in range(360, 396)),
    *(step / 1000 for step in range(990, 1000)),
    *(0.9995, 0.9999, 1.0),
)
SPECTRUM = "eigenvalues"  # the series that every analysis with a fit has
TOP = 16  # largest eigenvalues that are kept one by one
STEP = 1.15  # from one rank to the next in the tail below them
PARTS = 48  # of the rest
DIGITS = 6  # significant: 2 series of 234 numbers are 10 kB per layer in an analysis file


def series(weight: Tensor) -> dict[str, list[float]]:
    """Quantiles at PROBABILITIES of a weight [N, K]: of |w|, and of the root of its LAMP scores.

    LAMP(u) = w_u² / Σ w_v² over all v with w_v² ≥ w_u², and 0 for w_u = 0 (Lee et al. 2021, "Layer-adaptive Sparsity
    for the Magnitude-based Pruning", eq. 5). It rises with |w|, so both have their quantiles at the same weights.
    """
    ordered = _sorted(weight.detach().flatten().float().abs())  # [N·K]
    last = ordered.numel() - 1
    values = ordered[torch.tensor([round(p * last) for p in PROBABILITIES], device=ordered.device)]
    first = torch.searchsorted(ordered, values)  # of the weights as large as each value
    parts = ordered.tensor_split(first.tolist())
    squares = torch.stack([part.double().square().sum() for part in parts[1:]])  # between one first and the next
    sums = squares.flip(0).cumsum(0).flip(0)  # of the weights from each first on
    roots = torch.where(sums > 0, values.double() / sums.sqrt(), 0.0)
    return {"magnitude_quantiles": _rounded(values.tolist()), "lamp_quantiles": _rounded(roots.tolist())}


def share_below(quantiles: Sequence[float], threshold: float) -> float:
    """Share of the weights below a threshold, by straight lines between the quantiles."""
    after = bisect_left(quantiles, threshold)
    if after == 0:
        return 0.0
    if after == len(quantiles):
        return 1.0
    low, high = quantiles[after - 1], quantiles[after]
    start, end = PROBABILITIES[after - 1], PROBABILITIES[after]
    return start + (end - start) * (threshold - low) / (high - low)


def shares(quantiles: Mapping[str, Sequence[float]], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Share of every layer's weights below the one threshold for which Σ N_k·share_k = sparsity · ΣN_k.

    Found by halving the logarithm of the threshold. Where a value that many weights share is too little below the
    threshold and too much above it, every layer gives the same part of those that it has.
    """
    target = sparsity * sum(sizes.values())
    low, high = _bracket(list(quantiles.values()))

    def below(threshold: float) -> dict[str, float]:
        return {name: share_below(found, threshold) for name, found in quantiles.items()}

    def count(found: dict[str, float]) -> float:
        return math.fsum(sizes[name] * share for name, share in found.items())

    least, most = below(0.0), below(low)
    if count(most) < target:
        least, most = most, below(high)
        for _ in range(64):  # any two float32 numbers are next to each other after that
            middle = math.sqrt(low) * math.sqrt(high)
            between = below(middle)
            if count(between) < target:
                low, least = middle, between
            else:
                high, most = middle, between
    gap = count(most) - count(least)
    part = (target - count(least)) / gap if gap > 0 else 0.0
    return {name: least[name] + part * (most[name] - least[name]) for name in quantiles}


def ranks(count: int) -> list[int]:
    """Which of `count` eigenvalues in descending order a spectrum is drawn from: the largest, ever fewer of the tail,
    and the rest at equal distances to the smallest. Some 90 of thousands, all of 90."""
    places = list(range(min(TOP, count)))
    while places and (after := math.ceil((places[-1] + 1) * STEP)) < count / 8:
        places.append(after)
    left = count - 1 - places[-1] if places else 0
    first = places[-1] if places else 0
    return sorted({*places, *(first + round(left * part / PARTS) for part in range(1, PARTS + 1))})


def eigenvalues(spectrum: Tensor) -> list[float]:
    """Of ascending eigenvalues [n] those at `ranks(n)`, descending."""
    return _rounded(spectrum.flip(0)[ranks(len(spectrum))].tolist())


def _bracket(quantiles: list[Sequence[float]]) -> tuple[float, float]:
    """A threshold that only zeros are below, and one that all weights are below; both above 0."""
    above_zero = [q for found in quantiles for q in found if q > 0]
    if not above_zero:
        return 1.0, 2.0
    return min(above_zero), math.nextafter(max(above_zero), math.inf)


def _sorted(values: Tensor) -> Tensor:
    """In rising order; on a CPU by NumPy, which is several times faster at it than torch."""
    return torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort().values


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
