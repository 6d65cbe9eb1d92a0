"""What a kernel takes by itself: packed layers whose weights lie in a cache, on one thread, without what a call costs.

python bench/in_cache.py --out bench/results/in_cache.jsonl      rows, in the place of this machine's

nanoseconds are those of 1024 weights, zeros included: the difference between a layer of `--shape` and one of a single
macro tile, each the lower quartile of many calls in a row. With the counts of bench/cpu_loops.py they say what bounds a
loop; from memory (bench/linear.py) a layer takes as long or longer.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import held
import torch
from rows import replace

from alphaprune import timing
from alphaprune.kernels import spmm

CALLS = 4  # in a row, timed together
KINDS = {"bfloat16": (None, None), "int8": (torch.int8, None), "int8, x in int8": (torch.int8, torch.int8)}


def seconds(shape: tuple[int, int], sparsity: float, tokens: int, kind: str, rounds: int) -> tuple[float, str]:
    """Seconds of a call, the lower quartile, and the kernel."""
    values, activations = KINDS[kind]
    _, packed = timing.random_packed(shape, sparsity, torch.bfloat16, values or torch.bfloat16)
    prepared = spmm.prepare(dataclasses.replace(packed, activations=activations), "in_cache")
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    with torch.inference_mode():
        for _ in range(rounds):
            begin = time.perf_counter()
            for _ in range(CALLS):
                prepared(x)
            found.append((time.perf_counter() - begin) / CALLS)
    return sorted(found)[rounds // 4], prepared.choice(tokens, torch.bfloat16)[0].name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="256x4096", help="NxK, which should fit into the second-level cache")
    parser.add_argument("--sparsity", default="0.5,0.7,0.8,0.9")
    parser.add_argument("--tokens", default="1,2,3,4,5,6,8,12,16")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--held", choices=held.ISAS, help=held.HELP)
    parser.add_argument("--out", type=Path, help="put the rows into this file, in the place of this machine's")
    args = parser.parse_args(arguments)
    held.hold(args.held)
    torch.set_num_threads(1)
    n, k = map(int, args.shape.split("x"))
    machine, rows = held.named(timing.machine(), args.held), list[dict[str, Any]]()
    for kind, sparsity in itertools.product(KINDS, map(float, args.sparsity.split(","))):
        cells = []
        for tokens in map(int, args.tokens.split(",")):
            whole, kernel = seconds((n, k), sparsity, tokens, kind, args.rounds)
            call, _ = seconds((16, 64), sparsity, tokens, kind, args.rounds)
            row = {"machine": machine, "shape": [n, k], "values": kind, "sparsity": sparsity, "tokens": tokens}
            rows.append(row | {"kernel": kernel, "nanoseconds": (whole - call) * 1e9 / (n * k) * 1024})
            cells.append(f"{tokens}: {rows[-1]['nanoseconds']:.1f}")
        print(f"{kind}, {sparsity:.0%}, {kernel}, ns per 1024 weights by tokens   " + "  ".join(cells), flush=True)
    if args.out:
        replace(args.out, rows, "machine")


if __name__ == "__main__":
    sys.exit(main())
