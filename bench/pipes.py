"""One launch of a kernel at a time for Nsight Compute, which says what fills the device: pipes, banks, memory, stalls.

ncu -o p --profile-from-start off --clock-control none --set full \\
    python bench/pipes.py --shape 28672x4096 --case sbt_mma:1:0.5,sbt_mma:1:0.8,delta_spmv:1:0.8,nm_mma_sp:1:2:4

A case is kernel:tokens:sparsity. Each launch follows two that nobody watches, which bind and compile what it needs.
bench/counters.py makes rows of what was counted.
"""

import argparse
import sys

import gpu_cases
import torch
from gpu_contenders import Weights

from alphaprune.kernels import spmm


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=gpu_cases.shapes_from, default=((28672, 4096),))
    parser.add_argument("--case", default="sbt_mma:1:0.5,sbt_mma:1:0.8", help="kernel:tokens:sparsity, with commas")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("pipes.py: torch sees no CUDA device to profile", file=sys.stderr)
        return 2
    for shape in options.shape:
        weights = Weights(shape, torch.bfloat16, torch.device("cuda"))
        for case in options.case.split(","):
            kernel, tokens, sparsity = case.split(":", 2)
            (kept,) = gpu_cases.kept_from(sparsity)
            prepared, x = spmm.prepare(weights.packed(kept), "layer", kernel), weights.x(int(tokens))
            for _ in range(2):
                prepared(x)
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            prepared(x)
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
            print(f"{shape[0]}x{shape[1]} {case}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
