"""2:4 layers with many tokens on a GPU, as prompts have them: torch, the expansion and nm_wgmma in every way, by turns.

python bench/prompts.py --seconds 20                            the most important cases first
python bench/prompts.py --shape 28672x4096 --tokens 512,2048    of one layer

Rows, one JSON object each, with the same as those of bench/wide.py but for what `seconds` has: dense, sbt_expand,
nm_mma_sp (the way that it chooses), and "tokens, groups" of every way (NmWays in csrc/cuda/launch.h). A product that is
not torch's ends the script.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import gpu_cases
import torch
import wide
from gpu_cases import Kept
from gpu_contenders import Weights
from gpu_rig import Call, Cuda
from rows import append

from alphaprune.formats import Packed
from alphaprune.kernels import cuda, cuda_layouts, spmm

TWO_OF_FOUR = Kept(0.5, "2:4")
PLAN: wide.Plan = (
    *((shape, TWO_OF_FOUR, (2048,)) for shape in (wide.GATE_UP, wide.DOWN, wide.QKV, wide.OUT, wide.LARGE)),
    *((shape, TWO_OF_FOUR, (512, 256, 128)) for shape in (wide.GATE_UP, wide.OUT)),
    *((shape, TWO_OF_FOUR, (8192,)) for shape in (wide.LARGE, wide.OUT)),
)
WAYS = [(256, 2), (128, 4), (128, 2)]
NAMES = [", ".join(map(str, way)) for way in WAYS]
OTHERS = ("sbt_expand", "nm_mma_sp")


def calls_of(name: str, copies: list[Packed], x: torch.Tensor) -> list[Call]:
    """A call for each copy of the weight, by a kernel of that name or in a way."""
    if name in OTHERS:
        return [functools.partial(spmm.prepare(one, "bench", name), x) for one in copies]
    return [_in_a_way(one, x, *map(int, name.split(", "))) for one in copies]


def _in_a_way(packed: Packed, x: torch.Tensor, *way: int) -> Call:
    made, panels = cuda_layouts.native_nm(packed)
    return wide.native_call(made.by_ways(*way), packed, x, panels)


def row(rig: Cuda, weights: Weights, kept: Kept, tokens: int) -> dict[str, object]:
    """Of every contender."""
    found = wide.measure(rig, weights, kept, tokens, [*OTHERS, *NAMES], calls_of=calls_of)
    return {
        **rig.facts(),
        **{"shape": list(weights.shape), "pattern": str(kept), "tokens": tokens, "seconds": found},
        **{
            "best": min((name for name in NAMES if name in found), key=lambda name: found[name]),
            "over_dense": found["dense"] / found["nm_mma_sp"],
        },
    }


def line(row: dict) -> str:
    shape, seconds = "x".join(map(str, row["shape"])), row["seconds"]
    known = "  ".join(f"{name} {1e6 * taken:.1f}" for name, taken in seconds.items() if name not in NAMES)
    ways = "  ".join(f"({name}) {1e6 * seconds[name]:.1f}" for name in NAMES if name in seconds)
    flops = 2 * row["shape"][0] * row["shape"][1] * row["tokens"] / seconds["nm_mma_sp"]
    return (
        f"{shape:>12} {row['tokens']:>5}  {known}  {row['over_dense']:.2f}x  {flops / 1e12:.0f} dense TFLOP/s  {ways}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=gpu_cases.shapes_from, help="of these layers only")
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default=(2048,))
    parser.add_argument("--seconds", type=float, default=20, help="after which no case is begun")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of a line")
    parser.add_argument("--out", type=Path, help="rows are appended to this file too")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if reason := cuda.missing_wide():
        print(f"prompts.py: no nm_wgmma: {reason}", file=sys.stderr)
        return 2
    plan = [(shape, TWO_OF_FOUR, options.tokens) for shape in options.shape or ()] or PLAN
    for found in wide.rows(Cuda(), plan, row, begin + options.seconds):
        print(json.dumps(found) if options.json else line(found), flush=True)
        if options.out:
            append(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
