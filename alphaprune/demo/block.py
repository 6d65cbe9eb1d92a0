"""One LLaMA-2-7B-shaped block of linears, pruned like a plan and timed from memory beside its dense twin."""

from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import formats, timing
from alphaprune.kernels import spmm

SHAPES = (*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008))  # q k v o gate up down, [N, K]
ROTATED = 1 << 30  # bytes of distinct weights between two uses of the same, so that no cache holds them
ROUNDS = 5


class BlockTimer:
    """Holds the dense block; the dense time is measured anew beside every pruned one, since machines drift."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        largest = max(n * k for n, k in SHAPES)
        # Uniform, not normal: for speed only the pattern of zeros matters, and 200 million normal deviates would take
        # longer than all the timing.
        pool = torch.rand(largest, generator=generator).sub_(0.5).to(torch.bfloat16)
        self.weights = [pool[: n * k].reshape(n, k).clone() for n, k in SHAPES]
        self.x = {k: torch.randn(1, k, generator=generator).to(torch.bfloat16) for _, k in SHAPES}
        self.dense_bytes = sum(w.nbytes for w in self.weights)
        copies = -(-ROTATED // self.dense_bytes)
        self.dense = [self.weights] + [[w.clone() for w in self.weights] for _ in range(copies - 1)]
        self.dense_seconds = median(self._dense_pass() for _ in range(ROUNDS + 1))

    def time(self, sparsities: list[float]) -> dict[str, Any]:
        """Seconds of the pruned block and its speed-up over dense, medians of interleaved passes.

        sparsities: one per block of a plan; the rows of every matrix are cut into as many parts.
        """
        packed = [formats.get("sbt").pack(w, cut_mask(w, sparsities)) for w in self.weights]
        size = sum(p.nbytes for p in packed)
        rotation = zip(*(timing.copies(p, ROTATED * p.nbytes // size) for p in packed), strict=False)
        sets = [[spmm.prepare(p) for p in one] for one in rotation]
        dense, sparse = [], []
        for _ in range(ROUNDS):
            dense.append(self._dense_pass())
            sparse.append(self._sparse_pass(sets))
        return {
            "block_seconds": median(sparse),
            "block_speedup": median(d / s for d, s in zip(dense, sparse, strict=True)),
            "block_bytes": size,
        }

    def _dense_pass(self) -> float:
        with torch.inference_mode():
            started = perf_counter()
            for weights in self.dense:
                for w in weights:
                    nn.functional.linear(self.x[w.shape[1]], w)
            return (perf_counter() - started) / len(self.dense)

    def _sparse_pass(self, sets: list) -> float:
        with torch.inference_mode():
            started = perf_counter()
            for prepared in sets:
                for one in prepared:
                    one(self.x[one.cols])
            return (perf_counter() - started) / len(sets)


def cut_mask(weight: Tensor, sparsities: list[float]) -> Tensor:
    """Keeps the largest |W|, with one sparsity per horizontal part of the matrix; weights uniform in ±0.5."""
    bounds = torch.linspace(0, weight.shape[0], len(sparsities) + 1).long().tolist()
    mask = torch.empty(weight.shape, dtype=torch.bool)
    for sparsity, first, last in zip(sparsities, bounds, bounds[1:], strict=False):
        torch.gt(weight[first:last].abs(), 0.5 * sparsity, out=mask[first:last])
    return mask
