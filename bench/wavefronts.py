"""Shared-memory wavefronts of a kernel per 1024 weights, bank conflicts included, from the addresses that it touches.

python bench/wavefronts.py              sbt_mma and sbt_mma_int8 at 50 and 30 % density, run in the emulator
python bench/wavefronts.py --trace FILE [--weights N]   lines that something else recorded: kind,bytes,address per lane

A wavefront is one pass through the 32 banks of 4 bytes: as many per access as the busiest bank has distinct words.
Lanes that read one word share it. Accesses of 8 bytes go by half-warps, those of 16 by quarters, each for itself; an
asynchronous copy is counted as its stores. Lanes that are switched off, "-", touch nothing.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {"sbt_mma": "bfloat16", "sbt_mma_int8": "int8"}  # files of csrc/cuda, and the values that they multiply
BANKS, WORD, WARP = 32, 4, 32
UNIT = 1024
DENSITIES = (0.5, 0.3)


@dataclass(frozen=True)
class Access:
    """One instruction of a warp: bytes per lane, and each lane's address or None."""

    kind: str
    nbytes: int
    addresses: tuple[int | None, ...]

    @property
    def wavefronts(self) -> int:
        return self._by(WARP * WORD // max(self.nbytes, WORD))

    @property
    def paired(self) -> int:
        """Wavefronts where a wide load takes half as many if its lanes agree in pairs, i and i ^ 1 or i and i ^ 2.

        So NVIDIA says of compute capability 7 (forums.developer.nvidia.com/t/77228); of later ones nothing is written.
        """
        lanes = WARP * WORD // max(self.nbytes, WORD)
        agree = any(
            all(None in (a, b) or a == b for a, b in ((self.addresses[i], self.addresses[i ^ x]) for i in range(WARP)))
            for x in (1, 2)
        )
        return self._by(2 * lanes if self.kind == "load" and lanes < WARP and agree else lanes)

    def _by(self, lanes: int) -> int:
        return sum(_passes(self.addresses[i : i + lanes], self.nbytes) for i in range(0, WARP, lanes))


def _passes(addresses: Iterable[int | None], nbytes: int) -> int:
    words = {word for a in addresses if a is not None for word in range(a // WORD, (a + nbytes - 1) // WORD + 1)}
    return max(Counter(word % BANKS for word in words).values(), default=0)


def read(lines: Iterable[str]) -> Iterator[Access]:
    """Accesses from lines kind,bytes,a0,…,a31 with - for a lane that is switched off."""
    for text in lines:
        kind, nbytes, *addresses = text.strip().split(",")
        if len(addresses) != WARP:
            raise ValueError(f"an access wants {WARP} addresses, got {len(addresses)}: {text.strip()[:80]}")
        yield Access(kind, int(nbytes), tuple(None if a == "-" else int(a) for a in addresses))


def total(accesses: Iterable[Access]) -> Counter[str]:
    """Wavefronts by kind of access, of all, and of all with paired lanes."""
    found: Counter[str] = Counter()
    for access in accesses:
        found[access.kind] += access.wavefronts
        found["all"] += access.wavefronts
        found["paired"] += access.paired
    return found


class Emulated:
    """KERNELS of csrc/cuda, compiled for the emulator into a folder when one is asked for the first time."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "wavefronts"

    def _build(self) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            raise ValueError("wavefronts need the emulator, which needs a C++ compiler: install g++")
        kernels = [str(ROOT / "csrc" / "cuda" / f"{name}.cu") for name in KERNELS]
        sources = [str(Path(__file__).with_suffix(".cpp")), "-x", "c++", *kernels]
        command = [compiler, "-O1", "-std=c++17", f"-I{ROOT / 'csrc'}", *sources, "-o", str(self.program)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"the emulated kernels do not compile:\n{done.stderr.strip()}")

    def trace(
        self, cols: int, density: float, tokens: int, seed: int = 0, kernel: str = "sbt_mma", row_tiles: int = 0
    ) -> tuple[int, list[Access]]:
        """Rows of the only block, and what its warps touch. row_tiles: of a warp of sbt_mma, see csrc/cuda/launch.h."""
        if not self.program.exists():
            self._build()
        command = [str(self.program), str(cols), str(density), str(tokens), str(seed), KERNELS[kernel], str(row_tiles)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"the emulated launch failed: {done.stderr.strip() or done.returncode}")
        head, *lines = done.stdout.splitlines()
        return int(head.removeprefix("rows ")), list(read(lines))

    def per_unit(
        self, density: float, tokens: int = 8, cols: int = 4096, kernel: str = "sbt_mma", row_tiles: int = 0
    ) -> dict[str, float]:
        """Wavefronts of the main loop per UNIT weights by kind: what a launch twice as long touches more."""
        (rows, short), (again, long) = (
            self.trace(k, density, tokens, kernel=kernel, row_tiles=row_tiles) for k in (cols, 2 * cols)
        )
        assert rows == again
        more = total(long)
        more.subtract(total(short))
        return {kind: round(count * UNIT / (rows * cols), 2) for kind, count in sorted(more.items())}


def rows(tokens: Iterable[int]) -> Iterator[dict[str, object]]:
    """One row per density and number of tokens."""
    with tempfile.TemporaryDirectory(prefix="alphaprune-wavefronts-") as folder:
        emulated = Emulated(Path(folder))
        for kernel, m, density in itertools.product(KERNELS, tokens, DENSITIES):
            row = {"kernel": kernel, "m": m, "dtype": "bfloat16", "density": density}
            yield row | emulated.per_unit(density, m, kernel=kernel)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8", help="of the emulated launch, comma-separated")
    parser.add_argument("--trace", type=Path, help="count these lines instead")
    parser.add_argument("--weights", type=int, default=UNIT, help="that the trace stands for")
    args = parser.parse_args(arguments)
    try:
        if args.trace:
            with args.trace.open() as file:
                found = total(read(file))
            print(json.dumps({kind: count * UNIT / args.weights for kind, count in sorted(found.items())}))
            return 0
        for row in rows(int(m) for m in args.tokens.split(",")):
            print(json.dumps(row), flush=True)
    except ValueError as error:
        print(f"wavefronts: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
