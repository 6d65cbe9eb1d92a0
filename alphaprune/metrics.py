"""Eigenvalues → the spectral metrics beside alpha.

λ are the eigenvalues of WᵀW of min(N, K) dimensions, so Σλ = ‖W‖_F² and λ_max = ‖W‖₂². Most definitions are those of
WeightWatcher (Martin, Peng and Mahoney 2021; `apply_norm_metrics`), whose values the published code allocates by; its
`norm` and `spectral_norm` are squares, ours are the norms of W themselves.
"""

import functools
import math

import torch
from torch import Tensor

from alphaprune.alpha import PowerLaw, round_off

COLUMNS = (
    "alpha_mid",
    "alpha_hat",
    "stable_rank",
    "entropy",
    "spectral_norm",
    "frobenius_norm",
    "log_norm",
    "log_spectral_norm",
    "log_alpha_norm",
    "mp_soft_rank",
)
NOTHING = 1e-307  # what stands for λ_max of a weight of zeros where a logarithm is taken
LEAST_EXCESS = 0.05  # mean ln(λ/x) of a tail, at least, as for the robust fit: equal eigenvalues have an alpha of 21


def columns(eigenvalues: Tensor, law: PowerLaw, shape: tuple[int, int], noise: float) -> dict[str, float]:
    """Metrics of a spectrum, all of them and all finite, whatever its rank.

    eigenvalues: [min(N, K)] ascending, finite, ≥ 0.   law: what `alpha.fit` made of them.   shape: (N, K).
    noise: λ/λ_max below which they are round-off (see `alpha.round_off`); alpha_mid, entropy, log_alpha_norm and
    mp_soft_rank take such ones for zero.

    alpha_mid: Hill's estimate from the median of the eigenvalues above round-off on (the published `xmin_mid`), with a
    mean ln(λ/x) of LEAST_EXCESS at least.   alpha_hat: α·log₁₀ λ_max (WeightWatcher's `alpha_weighted`).
    stable_rank: ‖W‖_F² / ‖W‖₂².   entropy: −Σ p ln p / ln rank of p = λ/Σλ, 0…1; 0 for rank one.
    spectral_norm: ‖W‖₂.   frobenius_norm: ‖W‖_F.   log_norm: log₁₀ Σλ.   log_spectral_norm: log₁₀ λ_max.
    log_alpha_norm: log₁₀ Σ λ^α.   mp_soft_rank: λ₊/λ_max, see `bulk_edge`: near 1 where W looks random, small where
    its spectrum reaches far beyond that; 0 if most of the spectrum is round-off.

    A weight of zeros has ranks, norms and entropy 0, and NOTHING for the λ that logarithms are taken of.
    """
    values = eigenvalues.detach().to("cpu", torch.float64)
    solid = values[values > round_off(values, noise)]
    whole, largest = float(values.sum()), float(values[-1])
    logs = solid.log() if len(solid) else values.new_full((1,), math.log(NOTHING))
    share = solid / solid.sum()
    entropy = -float((share * share.log()).sum()) / math.log(len(solid)) if len(solid) > 1 else 0.0
    edge = bulk_edge(torch.cat([values.new_zeros(len(values) - len(solid)), solid]), shape)
    return {
        "alpha_mid": _hill_from_median(logs),
        "alpha_hat": law.alpha * math.log10(max(largest, NOTHING)),
        "stable_rank": whole / largest if largest else 0.0,
        "entropy": entropy,
        "spectral_norm": math.sqrt(largest),
        "frobenius_norm": math.sqrt(whole),
        "log_norm": math.log10(max(whole, NOTHING)),
        "log_spectral_norm": math.log10(max(largest, NOTHING)),
        "log_alpha_norm": float((law.alpha * logs).logsumexp(0)) / math.log(10),
        "mp_soft_rank": edge / largest if largest else 0.0,
    }


def _hill_from_median(logs: Tensor) -> float:
    """α = 1 + 1 / mean ln(λ/x) of the upper half of ascending `logs`, x being the least of it."""
    tail = logs[len(logs) // 2 :]
    return 1 + 1 / max(float((tail - tail[0]).mean()), LEAST_EXCESS)


def bulk_edge(eigenvalues: Tensor, shape: tuple[int, int]) -> float:
    """λ₊, where the spectrum of a random W [N, K] would end that has the same median eigenvalue.

    Entries of variance σ² give λ up to σ²·n·(1 + √β)², with n the larger side and β the ratio of the sides
    (Marchenko-Pastur). σ² = median λ / (n·μ_β) with μ_β the median of that law (Gavish and Donoho 2014), so that no
    eigenvalue of the tail has a say in it.
    """
    beta = min(shape) / max(shape)
    return float(eigenvalues.quantile(0.5)) / marchenko_pastur_median(beta) * (1 + math.sqrt(beta)) ** 2


@functools.cache
def marchenko_pastur_median(beta: float) -> float:
    """μ_β, the median of the Marchenko-Pastur law of variance 1 and aspect ratio 0 < β ≤ 1.

    With x = 1 + β + 2√β cos θ its density √((x₊ − x)(x − x₋)) / 2πβx becomes (2/π) sin²θ / (1 + β + 2√β cos θ) in θ
    from 0 to π, which has an integral in closed form.
    """
    root = math.sqrt(beta)
    slope = (1 - root) / (1 + root)

    def above(theta: float) -> float:  # P(x ≥ x(θ))
        bend = 2 * (1 - beta) * math.atan(slope * math.tan(theta / 2))
        return ((1 + beta) * theta - 2 * root * math.sin(theta) - bend) / (2 * math.pi * beta)

    low, high = 0.0, math.pi
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) < 0.5 else (low, middle)
    return 1 + beta + 2 * root * math.cos(low)
