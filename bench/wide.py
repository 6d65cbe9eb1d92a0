"""How sbt_wgmma shares its work on a GPU: every way to do it, the one that it chooses, sbt_mma and torch, by turns.

python bench/wide.py --seconds 20                          on a GPU, the most important cases first
python bench/wide.py --shape 28672x4096 --tokens 32,64     of one layer

Rows, one JSON object each; a time is the median of graph replays over so many copies that the weights come from memory:

machine's facts            as in bench/gpu.py
shape, sparsity, tokens    of the layer [N, K] and its call, in bfloat16
seconds                    by name: dense, sbt_mma, pair_mma, chosen, and "groups, slices, splits" of every way
best, over_dense           the fastest way; dense over what is chosen

A way whose product is not that of torch ends the script: what it took is then worth nothing.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu_cases
import torch
from gpu_cases import Kept, Shape
from gpu_contenders import Weights
from gpu_rig import Call, Cuda, Replay
from rows import append
from torch.nn import functional

from alphaprune.formats import Packed
from alphaprune.kernels import cuda, spmm

LARGE, GATE_UP, QKV, OUT, DOWN = (28672, 4096), (22016, 4096), (12288, 4096), (4096, 4096), (4096, 11008)
Plan = Sequence[tuple[Shape, Kept, Sequence[int]]]
PLAN: Plan = (
    *((shape, Kept(0.5), (32, 64)) for shape in (LARGE, GATE_UP, OUT, DOWN, QKV)),
    *((shape, Kept(0.7), (32, 64)) for shape in (LARGE, GATE_UP)),
    *((shape, Kept(0.5), (128, 256, 16)) for shape in (LARGE, OUT, GATE_UP, QKV, DOWN)),
    *((shape, Kept(0.8), (32,)) for shape in (LARGE, OUT)),
)
GROUPS = {32: 4, 64: 4, 128: 3, 256: 2}  # wide_groups of csrc/cuda/sbt_wgmma.cuh, by tokens
OTHERS = ("sbt_mma", "pair_mma")  # kernels for as few tokens
ALLOWED = 5e-3  # of the norm of y: rounding to bfloat16
REPEATS = 7


def ways(tokens: int) -> Iterator[tuple[int, int, int]]:
    """(groups, slices, splits) that use most of the warps that a block may have."""
    most = next(found for size, found in GROUPS.items() if tokens <= size)
    for groups, slices, splits in itertools.product(range(1, most + 1), range(1, most + 1), (1, 2, 4, 8)):
        if most - 1 <= groups * slices <= most:
            yield groups, slices, splits


def calls_of(name: str, copies: list[Packed], x: torch.Tensor) -> list[Call]:
    """A call for each copy of the weight, by a kernel of that name or by a way of sbt_wgmma."""
    if name in OTHERS:
        return [functools.partial(spmm.prepare(one, "bench", name), x) for one in copies]
    way = (0, 0, 0) if name == "chosen" else tuple(int(part) for part in name.split(", "))
    return [wide(one, x, way) for one in copies]


def wide(packed: Packed, x: torch.Tensor, way: tuple[int, int, int]) -> Call:
    made, alive = cuda.native_wide(packed)
    return native_call(made.by_ways(*way), packed, x, alive)


def native_call(made: Any, packed: Packed, x: torch.Tensor, alive: object) -> Call:
    """Of a native weight, which reads `alive`."""
    bound = cuda.joined(made, [packed.shape[0]], packed.shape[1], x.device, 1, alive)
    return lambda: bound.run(x, None)[0]


def measure(
    rig: Cuda,
    weights: Weights,
    kept: Kept,
    tokens: int,
    names: Sequence[str],
    check: bool = True,
    calls_of: Callable[[str, list[Packed], torch.Tensor], list[Call]] = calls_of,
) -> dict[str, float]:
    """Seconds of torch's product and of each of these names; those that do not fit the device are left out.

    calls_of: what a name stands for. ValueError if one gives another product than torch, unless nobody is to check it.
    """
    packed, x = weights.packed(kept), weights.x(tokens)
    pruned = weights.pruned(kept)
    truth = functional.linear(x.float(), pruned.float())
    copies = [packed.map(torch.Tensor.clone) for _ in range(max(1, -(-rig.rotate // packed.nbytes)))]
    dense = [pruned.clone() for _ in range(max(1, -(-rig.rotate // pruned.nbytes)))]
    replays: dict[str, tuple[Replay, int]] = {}
    replays["dense"] = rig.record([functools.partial(functional.linear, x, weight) for weight in dense]), len(dense)
    for name in names:
        calls = calls_of(name, copies, x)
        try:
            y = calls[0]().float()
        except RuntimeError as error:
            if "invalid" in str(error):
                continue
            raise
        wrong = ((y - truth).norm() / truth.norm()).item()
        if check and not wrong < ALLOWED:
            raise ValueError(f"{weights.shape}, {tokens} tokens, {name}: the product is off by {wrong:.3g}")
        replays[name] = rig.record(calls), len(copies)
    rig.time([replay for replay, _ in replays.values()], 2)  # wakes the clocks
    times = rig.time([replay for replay, _ in replays.values()], REPEATS)
    return {name: statistics.median(t) / n for (name, (_, n)), t in zip(replays.items(), times, strict=True)}


def row(rig: Cuda, weights: Weights, kept: Kept, tokens: int) -> dict[str, object]:
    """Of every way."""
    names = ["chosen", *(", ".join(map(str, way)) for way in ways(tokens))]
    found = measure(rig, weights, kept, tokens, [*(OTHERS if tokens <= 64 else ()), *names])
    best = min((name for name in names if name in found), key=lambda name: found[name])
    return {
        **rig.facts(),
        **{"shape": list(weights.shape), "sparsity": kept.sparsity, "tokens": tokens},
        **{"seconds": found, "best": best, "over_dense": found["dense"] / found["chosen"]},
    }


def rows(
    rig: Cuda, plan: Plan, row: Callable[[Cuda, Weights, Kept, int], dict[str, object]], until: float
) -> Iterator[dict[str, object]]:
    """That of each layer and number of tokens; until: the clock's time after which no layer is begun."""
    made: dict[Shape, Weights] = {}
    for shape, kept, every in plan:
        if time.monotonic() > until:
            break
        if shape not in made:
            made[shape] = Weights(shape, torch.bfloat16, rig.device)
        for tokens in every:
            yield row(rig, made[shape], kept, tokens)
            rig.release()


def line(row: dict) -> str:
    micro = {name: f"{1e6 * seconds:.1f}" for name, seconds in row["seconds"].items()}
    shape = "x".join(map(str, row["shape"]))
    known = "  ".join(f"{name} {micro[name]}" for name in ("dense", *OTHERS, "chosen") if name in micro)
    return f"{shape:>12} {row['sparsity']:.0%} {row['tokens']:>4}  {known}  best ({row['best']}) {micro[row['best']]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=gpu_cases.shapes_from, help="of these layers only")
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default=(32, 64))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=20, help="after which no case is begun")
    parser.add_argument("--out", type=Path, help="rows are appended to this file too")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if reason := cuda.missing_wide():
        print(f"wide.py: no sbt_wgmma: {reason}", file=sys.stderr)
        return 2
    plan = [(shape, Kept(options.sparsity), options.tokens) for shape in options.shape or ()] or PLAN
    for found in rows(Cuda(), plan, row, begin + options.seconds):
        print(line(found), flush=True)
        if options.out:
            append(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
