"""What sharing a launch gains on a GPU, and what two row tiles of a warp do: ways to compute the same, timed by turns.

python bench/launches.py                    on a GPU, at most 60 seconds
python bench/launches.py --dry-run          tiny shapes on the CPU, no figures worth keeping

Rows, one JSON object each; seconds are medians of graph replays over so many copies that the weights come from memory:

machine's facts            as in bench/gpu.py
part                       group: q, k and v, or gate and up, by separate launches or by one. rows: one weight, with as
                           many row tiles of a warp as sbt_mma takes by itself or with two
kernel, values, sparsity   of the packed weights
shapes, tokens, way        ([N, K] of each weight); separate, together; chosen, two
seconds, over_first        of all products; the first way's seconds over these
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_cases import Kept, Shape
from gpu_contenders import Weights
from gpu_rig import Call, Cuda, Host, Rig

from alphaprune.formats import Packed
from alphaprune.kernels import cuda, group, spmm

QKV, GQA, GATE_UP = ((4096, 4096),) * 3, ((4096, 4096), (1024, 4096), (1024, 4096)), ((11008, 4096),) * 2
TINY = ((48, 128), (17, 128))
TWO_OF_FOUR = Kept(0.5, "2:4")
REPEATS = 15

Ways = dict[str, Callable[[list[Packed], torch.Tensor], Call]]


@dataclass(frozen=True)
class Case:
    """Weights that share x, and who multiplies."""

    part: str
    kernel: str | None
    shapes: tuple[Shape, ...]
    tokens: int
    kept: Kept
    values: str = "float"


def cases(dry: bool) -> Iterator[Case]:
    """The most important first."""
    if dry:
        yield Case("group", None, TINY, 2, Kept(0.5))
        return
    for shapes in (QKV, GATE_UP):
        for tokens in (8, 16, 1, 32):
            yield Case("group", "sbt_mma", shapes, tokens, Kept(0.5))
            yield Case("group", "nm_mma_sp", shapes, tokens, TWO_OF_FOUR)
    for tokens, sparsity in ((32, 0.5), (32, 0.7), (16, 0.5), (24, 0.5), (16, 0.7)):
        for shapes in (((28672, 4096),), ((4096, 14336),), GATE_UP):
            yield Case("rows", "sbt_mma", shapes, tokens, Kept(sparsity))
    for shapes in (QKV, GATE_UP, GQA):
        yield Case("group", "sbt_mma", shapes, 8, Kept(0.7))
        yield Case("group", "sbt_mma", shapes, 8, Kept(0.5), "int8")


def separate(kernel: str | None, packed: list[Packed], x: torch.Tensor) -> Call:
    """One launch each."""
    prepared = [spmm.prepare(one, "bench", kernel) for one in packed]
    return lambda: [one(x) for one in prepared]


def together(kernel: str | None, packed: list[Packed], x: torch.Tensor) -> Call:
    """One launch, as a model has it."""
    prepared = [spmm.prepare(one, "bench", kernel) for one in packed]
    return lambda: group.spmm_group(x, prepared)


def by_row_tiles(row_tiles: int, packed: list[Packed], x: torch.Tensor) -> Call:
    """One launch of sbt_mma with so many row tiles of a warp; 0 as it is chosen."""
    made = [cuda.handles(one)[0][x.dtype] for one in packed]
    rows, cols = [one.shape[0] for one in packed], x.shape[1]
    native = cuda.load().Weight.joined(made).by_row_tiles(row_tiles)
    bound = cuda.joined(native, rows, cols, x.device, len(rows), packed)
    return lambda: bound.run(x, None, None)


def ways(case: Case) -> Ways:
    if case.part == "rows":
        return {name: functools.partial(by_row_tiles, count) for name, count in (("chosen", 0), ("two", 2))}
    return {one.__name__: functools.partial(one, case.kernel) for one in (separate, together)}


def measure(case: Case, rig: Rig, repeats: int) -> Iterator[dict[str, object]]:
    """A row for each way."""
    made = [Weights(shape, torch.bfloat16, rig.device) for shape in case.shapes]
    packed, x = [one.packed(case.kept, case.values) for one in made], made[0].x(case.tokens)
    copies = max(1, -(-rig.rotate // sum(one.nbytes for one in packed)))
    replays = {}
    for name, way in ways(case).items():
        calls = [way([one.map(torch.Tensor.clone) for one in packed], x) for _ in range(copies)]
        replays[name] = rig.record(calls)
    rig.time(list(replays.values()), 3)  # wakes the clocks
    times = rig.time(list(replays.values()), repeats)
    seconds = {name: statistics.median(found) / copies for name, found in zip(replays, times, strict=True)}
    first = next(iter(seconds.values()))
    for name, found in seconds.items():
        yield {
            "part": case.part,
            "kernel": case.kernel,
            "values": case.values,
            "sparsity": str(case.kept),
            "shapes": [list(shape) for shape in case.shapes],
            "tokens": case.tokens,
            "way": name,
            "copies": copies,
            "seconds": found,
            "over_first": first / found,
        }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--seconds", type=float, default=55, help="after which no case is begun")
    parser.add_argument("--out", type=Path, help="rows are appended to this file too")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        rig = Host() if options.dry_run else Cuda()
    except ValueError as error:
        print(f"launches.py: {error}", file=sys.stderr)
        return 2
    for case in cases(options.dry_run):
        if time.monotonic() - begin > options.seconds:
            print("launches.py: out of time; --seconds for more", file=sys.stderr)
            break
        for row in measure(case, rig, REPEATS):
            text = json.dumps(rig.facts() | row)
            print(text, flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(text + "\n")
        rig.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
