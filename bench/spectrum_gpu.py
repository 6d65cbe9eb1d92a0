"""Ways to the eigenvalues of many Gram matrices on a GPU, by size; and a whole model's spectra.

python bench/spectrum_gpu.py --out bench/results/spectrum_gpu.jsonl      every size; then the table for cusolver.py
python bench/spectrum_gpu.py --model                                     the 224 matrices of LLaMA 7B: target < 15 s

batched and looped are cuSOLVER's (see alphaprune/cusolver.py), torch is torch.linalg.eigvalsh on the same batch, and
svdvals are the float32 singular values of the weights themselves. A figure is a median of rounds by turns. A way that
fails gets a row with its error. Errors are relative to the largest eigenvalue, against float64 on the CPU.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from rows import append
from torch import Tensor

from alphaprune import alpha, cusolver, spectrum

BATCHES = {128: 64, 256: 64, 512: 32, 1024: 16, 2048: 8, 4096: 7}  # a block of LLaMA has seven matrices
COMPARED_UP_TO = 1024  # larger ones take the CPU too long
DTYPES = {"float32": torch.float32, "float64": torch.float64}
BLOCK = ((4, (4096, 4096)), (2, (11008, 4096)), (1, (4096, 11008)))  # of LLaMA 7B, which has 32
BLOCKS, TARGET = 32, 15.0


def weights_of(batch: int, shape: tuple[int, int], device: torch.device, seed: int = 0) -> Tensor:
    """Random weights [batch, N, K] in float32."""
    generator = torch.Generator(device).manual_seed(seed)
    return 0.02 * torch.randn(batch, *shape, generator=generator, device=device)


def ways(weights: Tensor, gram: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name → the eigenvalues [batch, n], ascending."""
    found = {route: lambda route=route: cusolver.eigvalsh(gram, route) for route in ("batched", "looped", "torch")}
    if gram.dtype == torch.float32:
        found["svdvals"] = lambda: torch.stack([torch.linalg.svdvals(w).square().flip(0) for w in weights])
    return found


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measure(n: int, dtype: torch.dtype, batch: int, rounds: int, device: torch.device) -> Iterator[dict]:
    """A row per way, for `batch` matrices [n, n]."""
    weights = weights_of(batch, (n, n), device)
    gram = (weights.double() @ weights.double().mT).to(dtype)
    wanted = torch.linalg.svdvals(weights[0].double().cpu()).square().flip(0) if n <= COMPARED_UP_TO else None
    common = {"n": n, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "rounds": rounds}
    working, times = {}, {}
    for name, run in ways(weights, gram).items():
        try:
            values = run()[0].double().cpu()  # warms up, too
        except Exception as fault:
            yield common | {"way": name, "error": f"{type(fault).__name__}: {fault}"}
            continue
        worst = None if wanted is None else float((values - wanted).abs().max() / wanted[-1])
        working[name], times[name] = (run, worst), []
    for _ in range(rounds):
        for name, (run, _) in working.items():
            times[name].append(seconds_of(run, device))
    for name, (_, worst) in working.items():
        median = statistics.median(times[name])
        yield common | {"way": name, "seconds": median, "seconds_per_matrix": median / batch, "max_error": worst}


def table(rows: list[dict]) -> dict[str, list[tuple[int, str]]]:
    """FASTEST of alphaprune/cusolver.py as these rows have it: dtype → (largest n, way), equal neighbours as one."""
    timed = [row for row in rows if "seconds" in row and row["way"] != "svdvals"]
    found: dict[str, list[tuple[int, str]]] = {}
    for dtype in DTYPES:
        of_dtype = sorted((row for row in timed if row["dtype"] == dtype), key=lambda row: row["n"])
        sizes = groupby(of_dtype, key=lambda row: row["n"])
        best = [(n, min(group, key=lambda row: row["seconds_per_matrix"])["way"]) for n, group in sizes]
        ends = [(n, way) for i, (n, way) in enumerate(best) if i + 1 == len(best) or best[i + 1][1] != way]
        found[dtype] = [*ends[:-1], *((cusolver.LARGEST, way) for _, way in ends[-1:])]
    return found


def model(device: torch.device, blocks: int = BLOCKS, block: tuple = BLOCK) -> dict:
    """A row: seconds of the spectra and the robust fits of all blocks, weights already on the device."""
    total = 0.0
    for number in range(blocks):
        for count, shape in block:
            weights = list(weights_of(count, shape, device, number).bfloat16())

            def analyze(weights: list[Tensor] = weights) -> None:
                for values, used in spectrum.solve(weights, alpha.NEED["robust"], str(device)):
                    alpha.fit(values, "robust", noise=used.noise)

            total += seconds_of(analyze, device)
    matrices = blocks * sum(count for count, _ in block)
    return {"way": "model", "matrices": matrices, "seconds": total, "target": TARGET}


def facts(device: torch.device, arguments: list[str]) -> dict[str, object]:
    """What every row says of the machine."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusolver": cusolver.status() or "usable",
        "command": shlex.join(["python", "bench/spectrum_gpu.py", *arguments]),
    }


def line(row: dict) -> str:
    """A row of the table."""
    if row["way"] == "model":
        return f"{row['matrices']} matrices in {row['seconds']:.1f} s, target < {row['target']:.0f} s"
    name = f"{row['n']:6}  {row['dtype']:8} {row['batch']:4}  {row['way']:8}"
    return name + (row["error"] if "error" in row else f"{1e3 * row['seconds_per_matrix']:10.3f} ms each")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, BATCHES)))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--batch", type=int, help="matrices at once; by default fewer of the larger ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", action="store_true", help="the matrices of LLaMA 7B instead")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", help="append the rows to this file, one JSON object each")
    options = parser.parse_args(arguments)
    try:
        device = spectrum.check("auto", options.device)
    except ValueError as fault:
        parser.error(str(fault))
    common, rows = facts(device, arguments), []

    def every() -> Iterator[dict]:
        if options.model:
            yield model(device)
            return
        for n in map(int, options.sizes.split(",")):
            for dtype in options.dtypes.split(","):
                batch = options.batch or BATCHES.get(n, 1)
                yield from measure(n, DTYPES[dtype], batch, options.rounds, device)

    for row in every():
        rows.append(row)
        text = json.dumps(common | row, allow_nan=False)
        print(text if options.json else line(row), flush=True)
        if options.out:
            append(options.out, common | row)
    if not options.model and not options.json:
        print("FASTEST", table(rows))


if __name__ == "__main__":
    main()
