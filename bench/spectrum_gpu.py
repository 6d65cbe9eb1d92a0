"""Ways to the eigenvalues of many Gram matrices on a GPU, by size; and a whole model's spectra.

python bench/spectrum_gpu.py --out bench/results/spectrum_gpu.jsonl      every size; then the table for cusolver.py
python bench/spectrum_gpu.py --sizes 4096 --batch 1,7 --rounds 1 --minutes 0.6      the size of a 7B model, quickly
python bench/spectrum_gpu.py --model --minutes 1                          the 224 matrices of LLaMA 7B: target < 15 s
python bench/spectrum_gpu.py --launches --sizes 4096 --batch 7            what the launches of `tridiagonal` take

batched and looped are cuSOLVER's (see alphaprune/cusolver.py), streams are as many of its handles, streams and threads
as there are matrices. tridiagonal is alphaprune/tridiagonal.py, recorded the same as a graph. torch is
torch.linalg.eigvalsh on the same batch, svdvals are the float32 singular values of the weights themselves. A figure is
a median of rounds by turns. A way that takes longer than 5 s is not repeated, and not tried on larger batches. A way
that fails gets a row with its error. Errors are relative to the largest eigenvalue, against float64: on the CPU, of
large matrices by cuSOLVER.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, zip_longest

import torch
from rows import append, command
from torch import Tensor

from alphaprune import cusolver, memory, spectrum, tridiagonal
from alphaprune.weight_stats import WeightStats

BATCHES = {128: 64, 256: 64, 512: 32, 1024: 16, 2048: 8, 4096: 7}  # a block of LLaMA has seven matrices
COMPARED_UP_TO = 1024  # larger ones take the CPU too long
DTYPES = {"float32": torch.float32, "float64": torch.float64}
WAYS = ("tridiagonal", "recorded", "batched", "streams", "looped", "torch", "svdvals")
BLOCK = ((4, (4096, 4096)), (2, (11008, 4096)), (1, (4096, 11008)))  # of LLaMA 7B, which has 32
BLOCKS, TARGET = 32, 15.0
SLOW = 5.0  # seconds: a way that takes longer is measured once
LAUNCHES = 20
TILES = ((128, 32, 4), (128, 32, 8), (64, 64, 4), (64, 64, 8), (128, 128, 8), (256, 32, 8))  # rows, chunk, warps


def weights_of(batch: int, shape: tuple[int, int], device: torch.device, seed: int = 0) -> Tensor:
    """Random weights [batch, N, K] in float32."""
    generator = torch.Generator(device).manual_seed(seed)
    return 0.02 * torch.randn(batch, *shape, generator=generator, device=device)


def ways(weights: Tensor, gram: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name → the eigenvalues [batch, n], ascending."""
    found = {route: lambda route=route: cusolver.eigvalsh(gram, route) for route in WAYS if route != "svdvals"}
    found["streams"], recorder = lambda: side_by_side(gram), tridiagonal.Recorder(since=0)

    def recorded() -> Tensor:
        with tridiagonal.recording(recorder):
            return cusolver.eigvalsh(gram, "tridiagonal")

    found["recorded"] = recorded
    if gram.dtype == torch.float32:
        found["svdvals"] = lambda: torch.stack([torch.linalg.svdvals(w).square().flip(0) for w in weights])
    return found


def side_by_side(gram: Tensor) -> Tensor:
    """The eigenvalues of gram [b, n, n], each matrix by a cuSOLVER handle, a stream and a thread of its own."""
    if gram.device.type != "cuda" or (reason := cusolver.status()):
        raise cusolver.Unusable(reason if gram.device.type == "cuda" else "streams are of CUDA devices")
    main, device = torch.cuda.current_stream(gram.device), gram.device

    def one(matrix: Tensor) -> Tensor:
        side = torch.cuda.Stream(device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            solver = cusolver.Solver(
                cusolver._library(), lambda: memory.free(device) // len(gram), lambda: side.cuda_stream
            )
            return solver.eigenvalues(matrix[None], "looped")[0]

    with ThreadPoolExecutor(len(gram)) as pool:
        return torch.cat(list(pool.map(one, gram)))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


class Measured:
    """Rows of ways on batches of matrices. left: seconds until no way is begun. names: the ways."""

    def __init__(self, device: torch.device, rounds: int, left: Callable[[], float], names: Iterable[str]) -> None:
        self.device, self.rounds, self.left, self.names = device, rounds, left, list(names)
        self.slow: dict[tuple[int, torch.dtype, str], float] = {}

    def rows(self, n: int, dtype: torch.dtype, batch: int) -> Iterator[dict]:
        """A row per way, for `batch` matrices [n, n]."""
        weights = weights_of(batch, (n, n), self.device)
        exact = weights.double() @ weights.double().mT
        wanted, gram = truth(exact[:1], weights[0]), exact.to(dtype)
        del exact
        common = {"n": n, "dtype": str(dtype).removeprefix("torch."), "batch": batch}
        times: dict[str, list[float]] = {}
        every, worst = ways(weights, gram), {}
        for name in (name for name in self.names if name in every):
            key = n, dtype, name
            if self.left() <= 0 or key in self.slow:
                why = f"{self.slow[key]:.1f} s with fewer matrices" if key in self.slow else "no time is left"
                yield common | {"way": name, "error": f"not measured: {why}"}
                continue
            try:
                found: list[Tensor] = []
                first = seconds_of(lambda run=every[name], found=found: found.append(run()), self.device)
            except Exception as fault:
                yield common | {"way": name, "error": f"{type(fault).__name__}: {fault}"}
                continue
            worst[name] = float((found[0][0].double().cpu() - wanted).abs().max() / wanted[-1])
            times[name] = []
            if first > SLOW:
                self.slow[key] = first
                times[name] = [first]
            for _ in range(self.rounds if first <= SLOW else 0):
                times[name].append(seconds_of(every[name], self.device))
            median = statistics.median(times[name])
            each = {"seconds": median, "first_seconds": first, "seconds_per_matrix": median / batch}
            yield common | {"way": name, "rounds": len(times[name]), **each, "max_error": worst[name]}


def truth(gram: Tensor, weight: Tensor) -> Tensor:
    """Eigenvalues [n] of the Gram matrix [1, n, n] of weight [n, n], float64 on the CPU."""
    if gram.shape[-1] <= COMPARED_UP_TO or gram.device.type == "cpu":
        return torch.linalg.svdvals(weight.double().cpu()).square().flip(0)
    try:
        return cusolver.eigvalsh(gram, "looped")[0].cpu()
    except cusolver.Unusable:
        return cusolver.eigvalsh(gram, "torch")[0].cpu()


def table(rows: list[dict]) -> dict[str, list[tuple[int, int, str]]]:
    """FASTEST of alphaprune/cusolver.py as these rows have it: dtype → (largest n, fewest matrices, way); neighbours
    that have the same ways as one."""
    timed = [row for row in rows if "seconds" in row and row["way"] not in ("svdvals", "streams", "recorded")]
    found: dict[str, list[tuple[int, int, str]]] = {}
    for dtype in DTYPES:
        best: dict[int, list[tuple[int, str]]] = {}
        of_dtype = sorted((row for row in timed if row["dtype"] == dtype), key=lambda row: (row["n"], -row["batch"]))
        for (n, batch), group in groupby(of_dtype, key=lambda row: (row["n"], row["batch"])):
            way = min(group, key=lambda row: row["seconds_per_matrix"])["way"]
            ways = best.setdefault(n, [])
            ways[-1:] = [(batch, way)] if ways and ways[-1][1] == way else [*ways[-1:], (batch, way)]
        for ways in best.values():
            ways[-1] = 1, ways[-1][1]
        ends = [n for n, after in zip_longest(best, list(best)[1:]) if best[n] != best.get(after)]
        found[dtype] = [(n if n != ends[-1] else _largest(way), few, way) for n in ends for few, way in best[n]]
    return found


def _largest(way: str) -> int:
    return tridiagonal.LARGEST if way == "tridiagonal" else cusolver.LARGEST


def model(
    device: torch.device, solver: str, left: Callable[[], float], blocks: int = BLOCKS, block: tuple = BLOCK
) -> Iterator[dict]:
    """Rows: seconds of the spectra and the robust fits of all blocks so far, as `analyze` makes them of weights on the
    device. They end when no time is left."""

    def units() -> Iterator[dict[str, dict[str, Tensor]]]:
        for number in range(blocks):
            if left() <= 0:
                return
            yield {
                str(shape): {
                    f"{number} {shape} {i}": weight.bfloat16()
                    for i, weight in enumerate(weights_of(count, shape, device, number))
                }
                for count, shape in block
            }

    work, begin, used = WeightStats("robust", str(device), solver, False, None), time.perf_counter(), set()
    for done, entries in enumerate(work.of_blocks(units(), [shape for _, shape in block]), 1):
        used |= {name for entry in entries.values() for name in entry["solvers"]}
        common = {"way": "model", "blocks": done, "matrices": done * sum(count for count, _ in block)}
        yield common | {
            "of": blocks,
            "solvers": sorted(used),
            "seconds": time.perf_counter() - begin,
            "target": TARGET if (blocks, block) == (BLOCKS, BLOCK) else None,
        }


def launches(n: int, dtype: torch.dtype, batch: int, device: torch.device) -> Iterator[dict]:
    """Rows: seconds of launches of `tridiagonal` on the whole matrices, a median: products by several tiles, and
    the bytes_per_second of the lower halves that they read; and of all bisections."""
    from alphaprune import tridiagonal_triton

    gram = weights_of(batch, (n, n), device).to(dtype)
    gram += gram.mT.clone()
    common = {"n": n, "dtype": str(dtype).removeprefix("torch."), "batch": batch}

    def row(name: str, run: Callable[[], object], count: int = LAUNCHES) -> dict:
        times = [seconds_of(lambda: [run() for _ in range(count)], device) / count for _ in range(4)]
        return common | {"way": f"launch {name}", "seconds": statistics.median(times[1:]), "first_seconds": times[0]}

    kept = tridiagonal_triton.CHUNK, tridiagonal_triton.WARPS
    for tile, chunk, warps in TILES:
        tridiagonal_triton.CHUNK, tridiagonal_triton.WARPS = chunk, warps
        v, w, *others, main, beside = tridiagonal.spaces(gram, tridiagonal.PANEL, tile)
        launch = tridiagonal_triton.Panel(gram, v, w, *others, main, beside, tile)
        made = row("multiply", lambda launch=launch: launch.multiply(0, tridiagonal.PANEL // 2))
        speed = batch * n * (n + tile) // 2 * dtype.itemsize / made["seconds"]
        yield made | {"tile": tile, "chunk": chunk, "warps": warps, "bytes_per_second": speed}
    tridiagonal_triton.CHUNK, tridiagonal_triton.WARPS = kept
    yield row("step", lambda: launch.step(0, tridiagonal.PANEL // 2, True))
    both = torch.cat((v, w), 1)
    yield row("update", lambda: gram.baddbmm_(both.mT, both, alpha=-1))
    yield row("bisect", lambda: tridiagonal_triton.bisect(gram[:, 0], gram[:, 1], tridiagonal.STEPS[dtype]), 1)


def facts(device: torch.device, arguments: list[str]) -> dict[str, object]:
    """What every row says of the machine."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusolver": cusolver.status() or "usable",
        "command": command("bench/spectrum_gpu.py", arguments),
    }


def line(row: dict) -> str:
    """A row of the table."""
    if row["way"] == "model":
        goal = "" if row["target"] is None else f", target < {row['target']:.0f} s for all"
        return f"{row['matrices']} matrices of {row['blocks']} of {row['of']} blocks in {row['seconds']:.1f} s{goal}"
    name = f"{row['n']:6}  {row['dtype']:8} {row['batch']:4}  {row['way']:16}"
    if "error" in row:
        return name + row["error"].splitlines()[0]
    if "seconds_per_matrix" not in row:
        kind = f", tile {row['tile']}, chunk {row['chunk']}, {row['warps']} warps" if "tile" in row else ""
        speed = f", {row['bytes_per_second'] / 1e9:.0f} GB/s" if "tile" in row else ""
        return f"{name}{1e6 * row['seconds']:12.1f} us a launch{speed}{kind}"
    figures = f"{1e3 * row['seconds_per_matrix']:10.3f} ms each, first {row['first_seconds']:.2f} s"
    return f"{name}{figures}, error {row['max_error']:.0e}"


def parse(arguments: list[str]) -> tuple[argparse.Namespace, torch.device]:
    numbers = {"type": lambda text: tuple(map(int, text.split(",")))}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=tuple(BATCHES), **numbers)
    parser.add_argument("--dtypes", default=tuple(DTYPES), type=lambda text: tuple(text.split(",")))
    parser.add_argument("--batch", help="matrices at once; by default fewer of the larger ones", **numbers)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default=WAYS, type=lambda text: tuple(text.split(",")), help="of: " + ", ".join(WAYS))
    parser.add_argument("--minutes", type=float, default=10, help="no way and no block is begun after so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", action="store_true", help="the matrices of LLaMA 7B, by --ways, if given")
    parser.add_argument("--solver", default="auto", choices=spectrum.SOLVERS, help="of --model")
    parser.add_argument("--launches", action="store_true", help="single launches of the way tridiagonal")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", help="append the rows to this file, one JSON object each")
    options = parser.parse_args(arguments)
    for name, known in (("dtypes", DTYPES), ("ways", WAYS)):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    for name in ("sizes", "batch", "rounds"):
        found = getattr(options, name)
        if any(one < 1 for one in (found if isinstance(found, tuple) else [1 if found is None else found])):
            parser.error(f"--{name} {found}: wanted whole numbers from 1")
    try:
        return options, spectrum.check("auto", options.device)
    except ValueError as fault:
        parser.error(str(fault))


def every(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """All rows that are asked for, each as soon as it is made."""
    end = time.monotonic() + 60 * options.minutes

    def left() -> float:
        return end - time.monotonic()

    if options.model:
        if options.ways != WAYS:
            cusolver.FASTEST = {dtype: ((cusolver.LARGEST, 1, options.ways[0]),) for dtype in cusolver.FASTEST}
        yield from model(device, options.solver, left)
        return
    measured = Measured(device, options.rounds, left, options.ways)
    for n in options.sizes:
        for dtype in options.dtypes:
            for batch in options.batch or (BATCHES.get(n, 1),):
                if options.launches:
                    yield from launches(n, DTYPES[dtype], batch, device)
                else:
                    yield from measured.rows(n, DTYPES[dtype], batch)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options, device = parse(arguments)
    common, rows = facts(device, arguments), []
    for row in every(options, device):
        rows.append(row)
        text = json.dumps(common | row, allow_nan=False)
        print(text if options.json else line(row), flush=True)
        if options.out:
            append(options.out, common | row)
    if not (options.model or options.launches or options.json):
        print("FASTEST", table(rows))


if __name__ == "__main__":
    main()
