"""Block and what is known of its layers' inputs → the columns that activation-based allocators read."""

import math

import torch
from torch import Tensor

from alphaprune.calibrate import InputStat
from alphaprune.gram import Gram, full_float32
from alphaprune.model import Block

COLUMNS: tuple[str, ...] = ("outliers", "outliers_matrix", "score_mean", "score_mean_matrix", "removal_error")

OUTLIER = 5  # times the mean: M of OWL
GROUP = 128  # columns in which removal_error searches together, as LSA's published runs do
SAMPLED_ROWS = 128  # that removal_error looks at


def columns(block: Block, inputs: dict[str, InputStat]) -> dict[str, dict[str, float]]:
    """Columns by layer name, all of them finite; dead inputs and zero weights score 0. A = |W_ij|·‖X_j‖₂.

    inputs: of every layer, with its Gram matrix.
    outliers: percentage of the block's A above M·mean(A) of the block (Yin et al. 2024, "Outlier Weighed Layerwise
    Sparsity", section 3.2), the same for all its layers.   outliers_matrix: that of the layer by itself.
    score_mean: mean A over the block (Chen et al. 2025, "DLP", as its code has it; the paper says median).
    score_mean_matrix: over the layer.   removal_error: see there.
    """
    means = {name: _score_mean(layer.weight.detach(), inputs[name].norms) for name, layer in block.linears.items()}
    sizes = {name: layer.weight.numel() for name, layer in block.linears.items()}
    mean = math.fsum(means[name] * sizes[name] for name in sizes) / sum(sizes.values())
    found, outliers = {}, 0
    for name, layer in block.linears.items():
        weight, stat = layer.weight.detach(), inputs[name]
        outliers += _count_above(weight, stat.norms, OUTLIER * mean)
        found[name] = {
            "outliers_matrix": 100 * _count_above(weight, stat.norms, OUTLIER * means[name]) / sizes[name],
            "score_mean": mean,
            "score_mean_matrix": means[name],
            "removal_error": removal_error(weight, stat.gram),
        }
    return {name: {"outliers": 100 * outliers / sum(sizes.values()), **own} for name, own in found.items()}


def removal_error(weight: Tensor, gram: Gram) -> float:
    """‖(W − M∘W)X‖² per sample for a mask M without half of every row, chosen to make little of it.

    weight: [N, K].   gram: G = XXᵀ [K, K]. Whatever is removed together, a row loses e = Σ w_i·w_j·G_ij over its pairs.
    Within every group of columns the weight that adds the least goes next, and changes what each other one would add:
    e_k ← e_k + 2·w_k·w_i·G_ik (Yang et al. 2026, "LSA: Layer-wise Sparsity Allocation", algorithm 1). Of a large layer
    some rows stand for all, in proportion to the squares of their weights.
    """
    rows = torch.tensor(_rows(weight.shape[0]), device=weight.device)
    w = weight[rows].to(gram.matrix.device, torch.float32)  # [rows, K]
    diagonal = gram.matrix.diagonal()  # [K]
    largest, loudest = float(w.abs().max()), float(diagonal.max())
    if largest == 0 or loudest == 0:
        return 0.0
    w = w / largest  # so that no square of these leaves float32
    added = w.square() * (diagonal / loudest)  # [rows, K], what the next weight to go would add
    lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()  # [N]
    total = torch.zeros((), dtype=torch.float64, device=w.device)
    with full_float32():
        for first in range(0, w.shape[1], GROUP):
            last = min(first + GROUP, w.shape[1])
            g = gram.matrix[first:last] / loudest  # [width, K]
            inside = slice(first, last)
            removed = _remove_half(w[:, inside], added[:, inside], g[:, inside], total)
            added[:, last:] += 2 * w[:, last:] * (removed @ g[:, last:])
    return max(0.0, float(total)) * largest**2 * loudest * float(lengths.sum() / lengths[rows].sum())


def _remove_half(w: Tensor, added: Tensor, g: Tensor, total: Tensor) -> Tensor:
    """Half of each row of a group, [rows, width], the others 0; `total` grows by what their removal adds.

    w, added: [rows, width], the latter is used up.   g: [width, width].   total: scalar float64.
    """
    removed = torch.zeros_like(w)
    for _ in range(w.shape[1] // 2):
        least, place = added.min(1, keepdim=True)  # [rows, 1]
        total += least.sum(dtype=torch.float64)
        gone = w.gather(1, place)
        added += 2 * w * gone * g[place.squeeze(1)]
        added.scatter_(1, place, math.inf)
        removed.scatter_(1, place, gone)
    return removed


def _score_mean(weight: Tensor, norms: Tensor) -> float:
    """Mean of |W_ij|·‖X_j‖₂, from float64 sums of columns."""
    by_column = weight.abs().sum(0, dtype=torch.float64)  # [K]
    return float(by_column @ norms.to(weight.device, torch.float64)) / weight.numel()


def _count_above(weight: Tensor, norms: Tensor, threshold: float) -> int:
    """How many |W_ij|·‖X_j‖₂ exceed a threshold; weights are compared, since products may leave float32."""
    limits = threshold / norms.to(weight.device, torch.float64)  # [K], inf or NaN where nothing comes in
    return int((weight.abs() > limits.float()).sum())


def _rows(count: int) -> list[int]:
    """SAMPLED_ROWS of `count` rows, spread by the golden section so that no period of heads or tiles meets them."""
    if count <= SAMPLED_ROWS:
        return list(range(count))
    stride = next(s for s in range(round(count * 0.618034), 0, -1) if math.gcd(s, count) == 1)
    return sorted(i * stride % count for i in range(SAMPLED_ROWS))
