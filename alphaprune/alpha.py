"""Eigenvalues → PowerLaw: how heavy the upper tail of a spectrum is.

All fits are Hill's maximum-likelihood estimate α = 1 + n / Σ_{λ_i ≥ x} ln(λ_i / x) for some start x of the tail, with n
eigenvalues in it. They differ in how they find x.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["robust", "reference", "mid"]

METHODS = ("robust", "reference", "mid")
NEED = {"robust": "tail", "mid": "tail", "reference": "all"}  # what a fit must have exact; see spectrum.Need
LEAST = 8  # eigenvalues for a fit to mean anything
BINS = 100  # of the published histogram
WIDTH = 0.25  # bandwidth of the density of ln λ: a quarter of a factor e
STARTS = 128  # candidates for the start of the tail
SHARPNESS = 8  # power of the density whose centre of mass is the peak: 1 is the mean, ∞ the mode
INTERVAL = (0.95, 1.5)  # of the peak: where the tail may start (Lu et al. 2024)
STEEPEST = 1e6  # alpha above which the eigenvalues of a tail are equal but for round-off
CHUNK = 1 << 22  # elements of a table of distances held at once
ENOUGH = 1 << 14  # eigenvalues that show the shape of a spectrum; of twice as many (pooled ones), every second is seen


@dataclass(frozen=True)
class PowerLaw:
    """p(λ) ∝ λ^−alpha for λ ≥ xmin.

    tail: eigenvalues from xmin on. ks: Kolmogorov-Smirnov distance of the tail from the law. stderr: (α − 1)/√tail,
    the sampling error if the law held. spread: how far alpha moves when the free choices of the method are varied a
    little. unstable: whether that is more than sampling explains. dropped: eigenvalues left out as round-off.
    """

    alpha: float
    xmin: float
    tail: int
    ks: float
    stderr: float
    spread: float
    unstable: bool
    dropped: int

    def columns(self) -> dict[str, float]:
        """The fields as numbers, for an analysis."""
        return {name: float(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class _Start:
    """One way to cut off a tail: log x, and the law that follows."""

    alpha: float
    log_xmin: float
    tail: int
    ks: float


def fit(eigenvalues: Tensor, method: Method = "robust", noise: float = 2e-6) -> PowerLaw:
    """The power law of the upper tail of a spectrum.

    eigenvalues: [n] ascending, finite, ≥ 0.   noise: λ/λ_max below which a solver's eigenvalues are round-off.

    robust: the tail starts around the peak of the density of log λ, found and averaged smoothly, see `_robust`.
    reference: AlphaPruning's published estimator (`fix_fingers="xmin_peak"`), see `_reference`.
    mid: the tail starts at the median.

    Raises ValueError for a spectrum with too few eigenvalues, or with zeros where a method cannot have them.
    """
    if method not in METHODS:
        raise ValueError(f"fit {method!r}: wanted one of {', '.join(METHODS)}")
    values = eigenvalues.detach().to("cpu", torch.float64)
    if values.ndim != 1 or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("eigenvalues: wanted [n], finite and not negative")
    if bool((values.diff() < 0).any()):
        raise ValueError("eigenvalues: wanted in ascending order")
    solid = values[values > round_off(values, noise)]
    if len(solid) < LEAST:
        raise ValueError(
            f"a power law needs {LEAST} eigenvalues above round-off at least, this spectrum has {len(solid)} of "
            f"{len(values)}; the allocators uniform and ramp need no spectra"
        )
    dropped = len(values) - len(solid)
    if method == "robust":
        return _robust(solid.log(), dropped)
    return _mid(values, dropped) if method == "mid" else _reference(values, noise)


def round_off(values: Tensor, noise: float) -> float:
    """Up to where ascending `values` are zero but for round-off: of the solver, or of weights of rank below n that were
    stored as bfloat16, which adds a relative variance of 2⁻¹⁶/12 or so to every weight and hence some 1e-6 of the mean
    to every eigenvalue."""
    return max(noise * float(values[-1]), 2e-5 * float(values.mean())) if len(values) else 0.0


def _robust(logs: Tensor, dropped: int) -> PowerLaw:
    """A peak that no single eigenvalue can move, and an average over the starts of the tail around it.

    The peak is the centre of mass of the SHARPNESS-th power of a kernel density of ln λ: scale-free, smooth in every
    eigenvalue, blind to the smallest and to how many are round-off. Starts x in INTERVAL·peak are weighted by
    exp(−2 √n (D − D_min)) with D their two-sided Kolmogorov-Smirnov distance: the best fit, without its jumps. The
    spread is that of alpha over bandwidths ÷ and × 1.25 and over windows moved by ± 10 %.
    """
    peak, size = _peak(logs, WIDTH), len(logs) + dropped
    main = _averaged(logs, peak, size)
    varied = [_averaged(logs, _peak(logs, WIDTH * factor), size) for factor in (0.8, 1.25)]
    varied += [_averaged(logs, peak + math.log(factor), size) for factor in (0.9, 1.1)]
    return _law(main, [v.alpha for v in varied], dropped)


def _peak(logs: Tensor, width: float) -> float:
    """Where the density of ln λ is highest, softly."""
    step = width / 5  # fine enough that the sum over the grid is the integral
    reach = math.ceil(float(logs[-1] - logs[0]) / step) + 15
    grid = logs[-1] + step * torch.arange(-reach, 16, dtype=torch.float64)  # the smallest eigenvalue shifts no point
    stride = _stride(logs)
    seen = logs[stride // 2 :: stride]
    density = torch.exp(-0.5 * ((grid[:, None] - seen) / width).square()).sum(1)
    weight = (density / density.max()) ** SHARPNESS
    return float((weight * grid).sum() / weight.sum())


def _stride(logs: Tensor) -> int:
    """Every so many eigenvalues are enough for a density or a distance: all of a weight's own, whatever its size."""
    return max(1, len(logs) // ENOUGH)


def _averaged(logs: Tensor, peak: float, size: int) -> _Start:
    """Alpha averaged over the starts in INTERVAL around exp(peak), the better fits weighing more; size: min(N, K)."""
    least = min(max(LEAST / 2, 0.02 * size), len(logs))
    # The tail keeps so many eigenvalues and spans 5 % at least: alpha is then finite even where all are equal.
    top = float(logs[-math.ceil(least)]) - 0.05
    low, high = (min(peak + math.log(factor), top) for factor in INTERVAL)
    starts = torch.linspace(low, high, STARTS, dtype=torch.float64)
    first = torch.searchsorted(logs, starts)  # [STARTS]
    count = (len(logs) - first).double()
    alphas = _hill(logs, first, starts)
    distances = _distances(logs, first, starts, alphas, two_sided=True, stride=_stride(logs))
    room = ((count - least + 1) / least).clamp(max=1)  # starts that leave few eigenvalues fade out
    weight = room * torch.exp(-2 * count.sqrt() * (distances - distances.min()))
    weight = weight / weight.sum()
    alpha, log_xmin = float((weight * alphas).sum()), float((weight * starts).sum())
    return _Start(alpha, log_xmin, round(float((weight * count).sum())), float((weight * distances).sum()))


def _mid(values: Tensor, dropped: int) -> PowerLaw:
    """Hill's estimate from the eigenvalue n // 2 on; varied by ± 5 % of n."""
    middle, step = len(values) // 2, max(1, len(values) // 20)
    if middle - step < dropped:
        raise ValueError(
            f"fit mid needs a median above round-off, but {dropped} of {len(values)} eigenvalues are not; use robust"
        )
    logs = values[dropped:].log()
    middle -= dropped
    main = _at(logs, middle)
    if not main.alpha < STEEPEST:
        raise ValueError("fit mid: all eigenvalues from the median on are equal, so there is no tail; use robust")
    return _law(main, [_at(logs, middle + move).alpha for move in (-step, step)], dropped)


def _at(logs: Tensor, place: int) -> _Start:
    first = torch.tensor([place])
    alphas = _hill(logs, first, logs[first])
    distance = _distances(logs, first, logs[first], alphas, two_sided=False)
    return _Start(float(alphas[0]), float(logs[place]), len(logs) - place, float(distance[0]))


def _reference(values: Tensor, noise: float) -> PowerLaw:
    """The published estimator (AlphaPruning, lib/esd_utils.py, fix_fingers="xmin_peak"), its oddities included.

    The fullest of 100 equal bins of log₁₀ λ gives x₂, its left edge. Every eigenvalue from log₁₀(0.95·x₂) to 1.5·x₂ but
    the last is tried as start; the one with the smallest distance wins. As published, and on purpose:
    - the lower end is a logarithm that is compared with λ itself, so for x₂ < 1.05 there is no lower end, and alpha
      depends on the scale of W;
    - the bins reach from λ_min to λ_max, so the noisiest eigenvalue moves them all;
    - the smallest distance is usually found close to the upper end, so alpha is a step function of the peak's bin;
    - the distance is one-sided (i/n only), and the n of Hill's formula counts the start itself.
    Sums are float64 here, where the original adds float32 in a loop. The spread is that over 99 to 101 bins.
    """
    if float(values[0]) <= 0 or float(values[1]) <= noise * float(values[-1]):
        raise ValueError("fit reference takes the logarithm of every eigenvalue, and some are zero; use robust")
    main, *others = (_published(values, bins) for bins in (BINS, BINS - 1, BINS + 1))
    if main is None:
        raise ValueError("fit reference finds no start of a tail, as if all eigenvalues were equal; use robust")
    return _law(main, [other.alpha if other else math.inf for other in others], 0)


def _published(values: Tensor, bins: int) -> _Start | None:
    """The published choice with so many bins; None if no start has an alpha."""
    tens, logs = values.log10(), values.log()
    low, high = float(tens[0]), float(tens[-1])
    histogram = torch.histc(tens, bins, low, high)
    edge = float(torch.linspace(low, high, bins + 1, dtype=torch.float64)[histogram.argmax()])
    least, most = math.log10(0.95 * 10**edge), 1.5 * 10**edge
    candidates = values[:-1]
    first = torch.nonzero((candidates >= least) & (candidates <= most))[:, 0]
    alphas = _hill(logs, first, logs[first])
    usable = (alphas > 1) & (alphas < STEEPEST)
    first, alphas = first[usable], alphas[usable]
    if not len(first):
        return None
    # Distances over every 16th eigenvalue bound the full ones from below: only candidates that they leave in the race
    # are computed in full, and the winner is the same.
    bound = _distances(logs, first, logs[first], alphas, two_sided=False, stride=16)
    leader = bound.argmin().reshape(1)
    limit = _distances(logs, first[leader], logs[first[leader]], alphas[leader], two_sided=False)
    racing = bound <= limit
    first, alphas = first[racing], alphas[racing]
    distances = _distances(logs, first, logs[first], alphas, two_sided=False)
    best = int(distances.argmin())
    place = int(first[best])
    return _Start(float(alphas[best]), float(logs[place]), len(logs) - place, float(distances[best]))


def _hill(logs: Tensor, first: Tensor, starts: Tensor) -> Tensor:
    """α [C] of the tails logs[first:], first [C], above log x = starts [C], from suffix sums: O(n + C)."""
    suffix = logs.flip(0).cumsum(0).flip(0)  # [n]
    count = len(logs) - first
    return 1 + count / (suffix[first] - count * starts)


def _distances(logs: Tensor, first: Tensor, starts: Tensor, alphas: Tensor, two_sided: bool, stride: int = 1) -> Tensor:
    """Kolmogorov-Smirnov distances [C] of the tails logs[first:] from F(λ) = 1 − (λ/x)^(1−α).

    The j-th of n eigenvalues (from 0) is compared with j/n, and if two-sided with (j + 1)/n as well.
    stride: only every so many eigenvalues, from the largest down, are looked at.
    """
    parts, rows = [], max(1, CHUNK * stride // len(logs))
    for c in range(0, len(first), rows):
        begin, log_x, exponent = first[c : c + rows, None], starts[c : c + rows, None], 1 - alphas[c : c + rows, None]
        offset = int(begin.min())
        looked_at = torch.arange(len(logs) - 1, offset - 1, -stride)
        place = looked_at - begin  # [rows, (n − offset)/stride]: j
        count = (len(logs) - begin).double()
        law = -torch.expm1(exponent * (logs[looked_at] - log_x))  # F
        gap = law - place / count
        gap = torch.maximum(gap.abs(), (1 / count - gap).abs()) if two_sided else gap.abs()
        parts.append(gap.masked_fill_(place < 0, 0).amax(1))
    return torch.cat(parts)


def _law(main: _Start, varied: list[float], dropped: int) -> PowerLaw:
    finite = [main.alpha, *(a for a in varied if a < STEEPEST)]  # a tail of equal eigenvalues has none
    spread = max(finite) - min(finite)
    stderr = (main.alpha - 1) / math.sqrt(main.tail)
    unstable = spread > 3 * stderr + 0.1 * (main.alpha - 1) or len(finite) <= len(varied)
    return PowerLaw(main.alpha, math.exp(main.log_xmin), main.tail, main.ks, stderr, spread, unstable, dropped)
