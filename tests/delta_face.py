"""delta_spmv under the emulator, and weights for it."""

from pathlib import Path

import cuda_face
import torch
from torch import Tensor

from alphaprune.kernels.delta_layout import DeltaRows


def build(folder: Path, changes: dict[str, str] | None = None, optimize: str = "-O1"):
    """The function of tests/native/delta_face.cpp; changes: see cuda_face.build."""
    return cuda_face.build("delta", folder, changes, optimize).delta_spmv_emulated


def unequal(n: int, k: int, density: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weight, mask): rows of very different lengths, one of them full and one empty where there are several."""
    mask = torch.rand(n, k) < density * torch.rand(n, 1) * 2
    if n > 2 and 0 < density < 1:
        mask[n // 2], mask[n // 3] = True, False
    return (torch.randn(n, k) * mask).to(dtype), mask


def multiply(kernel, rows: DeltaRows, x: Tensor, **options) -> tuple[str, Tensor]:
    """As cuda_face.run; y of several weights has [tokens, N_i] of each one after the other. options: norm, [K], too."""
    counts = [-2 if rows.pairs else len(rows.members), *(*rows.members, 0, 0)[:3], *rows.sizes]
    weight = [*rows.tensors, options.pop("norm", torch.empty(0))]
    return cuda_face.run(kernel, weight, counts, x, sum(rows.members), **options)
