"""Fits the constants by which sbt_wgmma shares its work (csrc/cuda/launch_wide.cuh) to rows of bench/wide.py.

python bench/wide_fit.py                                     what the constants as they are take, over the fastest ways
python bench/wide_fit.py --fit bench/results/wide.jsonl      new ones, to be written into the source by hand

The model is that of clocks_of: a block takes as long as the slowest of what it does at once, and its beginning and end.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS, SOURCE = ROOT / "bench" / "results" / "wide.jsonl", ROOT / "csrc" / "cuda" / "launch_wide.cuh"
NAMES = ("kBlock", "kRound", "kRoundTokens", "kCluster", "kClusterTokens", "kAlone", "kBusy", "kBusyTokens", "kOrder",
         "kOrderTiles", "kActivationBytes")  # fmt: skip
WEIGHT_BYTES, CLOCK = 18, 1.755e9  # kWeightBytes; Hz of an H200
PROCESSORS, SHARED, MOST_STAGES = 132, 232448, 16
BOXES = (32, 64, 128, 256)
NEAR = 1.3  # ways up to so much slower than the fastest one count for more


@dataclass(frozen=True)
class Way:
    """A way to share the work of a layer, and what it comes to: see WideProblem in csrc/cuda/sbt_wgmma.cuh."""

    box: int
    slices: int
    splits: int
    tiles: int  # of the block that has the most
    rounds: int
    chunks: int
    tile_bytes: int
    waves: int

    def clocks(self, constants: "list[float] | tuple[float, ...]") -> float:
        block, rounds, round_tokens, cluster, cluster_tokens, alone, busy, busy_tokens, order, order_tiles, x = (
            constants
        )
        eights = self.box / 8
        most = max(
            self.rounds * -(-self.chunks // self.slices) * alone,
            self.tiles * self.chunks * (busy + eights * busy_tokens),
            self.chunks * (self.rounds * order + -(-self.tiles // 4) * order_tiles),
            self.tiles * self.chunks * self.tile_bytes / WEIGHT_BYTES,
            self.rounds * self.chunks * 2 * self.box * 128 / x,
        )
        shared = cluster + eights * cluster_tokens if self.splits > 1 else 0
        return self.waves * (most + block + self.rounds * (rounds + eights * round_tokens) + shared)


def value_bytes(density: float) -> int:
    """About those of the largest chunk of a random weight."""
    values = 2048 * density + 4.5 * math.sqrt(2048 * density * (1 - density))
    return (int(2 * values) // 16 + 2) * 16


def way(shape: tuple[int, int], density: float, tokens: int, groups: int, slices: int, splits: int) -> Way | None:
    """None where it does not fit the device."""
    box = next(box for box in BOXES if tokens <= box)
    row_tiles, col_tiles = -(-shape[0] // 16), -(-shape[1] // 64)
    tiles, room, tile_bytes = 4 * groups, 8 if box <= 64 else box // 8, 256 + value_bytes(density)
    processors = PROCESSORS if splits <= 2 else PROCESSORS * 13 // 16
    clusters = min(max(processors // splits, 1), row_tiles)
    if splits > 1 and -(-row_tiles // clusters) > tiles:
        clusters = -(-row_tiles // tiles)
    share = -(-row_tiles // clusters)

    def shared(stages: int) -> int:
        sums = slices * (64 * groups + 4) * 4
        ring = max(stages * (2 * box * 128 + tiles * tile_bytes) + tiles * slices * 512, box * sums)
        return 1024 + ring + (room * sums if share > tiles else 0) + stages * 16

    most = MOST_STAGES // slices * slices
    if not any(shared(stages) <= SHARED for stages in range(most, 2 * slices - 1, -slices)):
        return None
    chunks = math.ceil(math.ceil(col_tiles / 2) / splits)
    return Way(box, slices, splits, share, -(-share // tiles), chunks, tile_bytes, -(-clusters * splits // processors))


@dataclass(frozen=True)
class Case:
    """A row: the ways by (groups, slices, splits), and the seconds that each was measured to take."""

    row: dict
    ways: dict[tuple[int, int, int], tuple[Way, float]]

    def over(self, chosen: tuple[int, int, int]) -> float:
        """What a way takes over the fastest one."""
        return self.ways[chosen][1] / min(seconds for _, seconds in self.ways.values())


def cases(file: Path) -> list[Case]:
    found = []
    for row in map(json.loads, file.read_text().splitlines()):
        ways = {}
        for name, seconds in row["seconds"].items():
            if "," not in name:
                continue
            numbers = tuple(map(int, name.split(", ")))
            if made := way(tuple(row["shape"]), 1 - row["sparsity"], row["tokens"], *numbers):
                ways[numbers] = made, seconds
        found.append(Case(row, ways))
    return found


def constants() -> list[float]:
    """Those of the source."""
    text = SOURCE.read_text()
    return [float(re.search(rf"\b{name} = (\d+)", text)[1]) for name in NAMES]


def chosen(case: Case, by: list[float]) -> tuple[int, int, int]:
    return min(case.ways, key=lambda numbers: case.ways[numbers][0].clocks(by))


def over(known: list[Case], by: list[float]) -> float:
    """What the chosen ways take over the fastest ones, geometric mean."""
    return math.exp(sum(math.log(case.over(chosen(case, by))) for case in known) / len(known))


def fit(known: list[Case]) -> list[float]:
    """Constants with small errors of all logarithms, above all of the fast ways; of three beginnings the best."""
    import numpy as np
    from scipy.optimize import minimize

    every = [(made, seconds * CLOCK) for case in known for made, seconds in case.ways.values()]
    near = [
        (made, seconds * CLOCK)
        for case in known
        for made, seconds in case.ways.values()
        if seconds < NEAR * min(other for _, other in case.ways.values())
    ]

    def loss(logs) -> float:
        by = np.exp(logs)
        return sum(
            weight * math.log(made.clocks(by) / clocks) ** 2
            for weight, pairs in ((1, every), (3, near))
            for made, clocks in pairs
        ) / len(every)

    begin, generator, found = np.log(constants()), np.random.default_rng(0), []
    for spread in (0.0, 0.3, 0.6):
        first = begin + generator.normal(0, spread, len(NAMES))
        options = {"maxiter": 1500, "maxfev": 1500, "adaptive": True}
        made = [float(f"{v:.4g}") for v in np.exp(minimize(loss, first, method="Nelder-Mead", options=options).x)]
        found.append((over(known, made), made))
    return min(found)[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", type=Path, metavar="ROWS", help="find new constants for these rows")
    options = parser.parse_args(arguments)
    known = cases(options.fit or ROWS)
    by = constants()
    print(f"{len(known)} cases; the ways that are chosen take {over(known, by):.4f} times the fastest ones")
    if options.fit:
        by = fit(known)
        print(f"with those below {over(known, by):.4f}")
        for name, value in zip(NAMES, by, strict=True):
            print(f"{name} = {max(1, round(value))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
