"""Dense layers in 16 bits, ours beside torch's, from memory, by turns.

python bench/dense.py --out bench/results/dense.jsonl
python bench/dense.py --held avx2 --out bench/results/dense.jsonl   # as a CPU without AVX-512 has them

Rows, one JSON object each, seconds and bytes: machine, threads, torch; dtype, shape, tokens; seconds, torch_seconds,
medians of calls on copies of the weight in distinct memory on huge pages, as `serve` has them; ratio; bandwidth of the
moment. Rows without a dtype are of bfloat16.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import by_turns
import held
import torch
from torch.nn import functional

from alphaprune import timing
from alphaprune.kernels import cpu, dense


def measure(shape: tuple[int, int], dtype: torch.dtype, tokens: int, total: int, rounds: int) -> dict[str, float]:
    """Medians of both."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    copies = timing.dense_copies(weight, total)
    calls = {
        "seconds": [functools.partial(dense.ours(copy, None, cpu.best(), dense.MOST_TOKENS), x) for copy in copies],
        "torch_seconds": [functools.partial(functional.linear, x, copy) for copy in copies[1:] + copies[:1]],
    }
    return by_turns.medians(calls, rounds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="11008x4096,4096x11008,32000x4096", help="NxK[,NxK...]")
    parser.add_argument("--tokens", default="1,2,4,8,16")
    parser.add_argument("--dtype", default="bfloat16,float16")
    parser.add_argument("--held", choices=held.ISAS, help=held.HELP)
    by_turns.options(parser, "weights", 1)
    options = parser.parse_args(arguments)
    held.hold(options.held)
    common = by_turns.here()
    common["machine"] = held.named(common["machine"], options.held)
    by_turns.tell((common | row for row in products(options)), options.out)
    return 0


def products(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of every dtype, shape and number of tokens."""
    wanted = (given.split(",") for given in (options.dtype, options.shape, options.tokens))
    for dtype, shape, tokens in itertools.product(*wanted):
        n, k = map(int, shape.split("x"))
        total = int(options.gigabytes * (1 << 30))
        row = measure((n, k), getattr(torch, dtype), int(tokens), total, options.rounds)
        row["ratio"] = row["torch_seconds"] / row["seconds"]
        yield {"dtype": dtype, "shape": [n, k], "tokens": int(tokens), **row}


if __name__ == "__main__":
    sys.exit(main())
