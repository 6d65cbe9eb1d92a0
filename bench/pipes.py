"""One launch of a kernel at a time for Nsight Compute, which says what fills the device: pipes, banks, memory, stalls.

ncu -o p --profile-from-start off --clock-control none --set full \\
    python bench/pipes.py --shape 28672x4096 --case sbt_mma:1:0.5,sbt_mma:1:0.8,delta_spmv:1:0.8,nm_mma_sp:1:2:4

A case is kernel:tokens:sparsity. Each launch follows two that nobody watches, which bind and compile what it needs.
bench/counters.py makes rows of what was counted.
"""

import argparse
import itertools
import sys

import gpu_cases
import torch
from gpu_contenders import Weights

from alphaprune import devices
from alphaprune.kernels import spmm


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=gpu_cases.shapes_from, default=((28672, 4096),))
    cases = {"type": gpu_cases.launches_from, "default": "sbt_mma:1:0.5,sbt_mma:1:0.8"}
    parser.add_argument("--case", **cases, help="kernel:tokens:sparsity, with commas")
    options = parser.parse_args(arguments)
    try:
        device = devices.named("cuda")
        for shape, (kernel, tokens, sparsity) in itertools.product(options.shape, options.case):
            launch(Weights(shape, torch.bfloat16, device), kernel, tokens, *gpu_cases.kept_from(sparsity))
            print(f"{shape[0]}x{shape[1]} {kernel}:{tokens}:{sparsity}", flush=True)
    except ValueError as fault:
        print(f"pipes.py: {fault}", file=sys.stderr)
        return 2
    return 0


def launch(weights: Weights, kernel: str, tokens: int, kept: gpu_cases.Kept) -> None:
    """One launch under the profiler, after two without it."""
    prepared, x = spmm.prepare(weights.packed(kept), "layer", kernel), weights.x(tokens)
    for _ in range(2):
        prepared(x)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    prepared(x)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    sys.exit(main())
