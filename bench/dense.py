"""Dense layers of a few tokens in bfloat16, ours beside torch's, from memory, by turns.

python bench/dense.py --out bench/results/dense.jsonl

Rows, one JSON object each, seconds and bytes: machine, threads, torch; shape, tokens; seconds, torch_seconds, medians
of calls on copies of the weight in distinct memory on huge pages, as `serve` has them; ratio; bandwidth of the moment.
"""

import argparse
import functools
import json
import sys

import by_turns
import torch
from rows import replace
from torch.nn import functional

from alphaprune import timing
from alphaprune.kernels import dense


def measure(shape: tuple[int, int], tokens: int, total: int, rounds: int) -> dict[str, float]:
    """Medians of both."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    copies = timing.dense_copies(weight, total)
    calls = {
        "seconds": [functools.partial(dense.linear(copy, None), x) for copy in copies],
        "torch_seconds": [functools.partial(functional.linear, x, copy) for copy in copies[1:] + copies[:1]],
    }
    return by_turns.medians(calls, rounds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="11008x4096,4096x11008,32000x4096", help="NxK[,NxK...]")
    parser.add_argument("--tokens", default="1,2,4,8,16")
    by_turns.options(parser, "weights", 1)
    options = parser.parse_args(arguments)
    common, made = by_turns.here(), []
    dense.MOST_TOKENS = 1 << 20  # where it ends is what is asked
    for shape in options.shape.split(","):
        n, k = map(int, shape.split("x"))
        for tokens in map(int, options.tokens.split(",")):
            row = measure((n, k), tokens, int(options.gigabytes * (1 << 30)), options.rounds)
            row["ratio"] = row["torch_seconds"] / row["seconds"]
            made.append({**common, "shape": [n, k], "tokens": tokens, **row})
            print(json.dumps(made[-1]), flush=True)
    if options.out:
        replace(options.out, made, "machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
