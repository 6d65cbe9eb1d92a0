"""Seconds that a method needs for one layer, beside its floor: the factorisations, solves and products in it.

    python bench/prune_layer.py [--shape 4096x11008] [--methods sparsegpt,alps] [--iterations 30] [--json]

The inputs are random and correlated, by default fewer tokens than columns. The floor of sparsegpt is torch's Cholesky
of the Gram matrix and one product of N·K² operations; that of alps is as many Choleskys as it tried values of ρ, a
product of 2·N·K² operations for each of its iterations (it solves two triangular systems, no fewer operations), and
those of its refit. A round times each part, the method, and each part again; during alps, which takes minutes, also
at every new ρ, and that time is taken off. Target: at most 1.3 times the floor.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from alphaprune import pruners
from alphaprune.calibrate import InputStat
from alphaprune.gram import Factor, Gram, full_float32
from alphaprune.pattern import Unstructured
from alphaprune.pruners import Cut, alps

TARGET = 1.3


def make_gram(columns: int, tokens: int, device: torch.device) -> Gram:
    """Of inputs with an eighth as many common factors as columns, and columns of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    loadings = torch.randn(columns // 8, columns, generator=generator)
    scale = torch.randn(columns, generator=generator).exp()
    matrix = torch.zeros(columns, columns, device=device)
    for start in range(0, tokens, 2048):
        count = min(2048, tokens - start)
        factors = torch.randn(count, columns // 8, generator=generator)
        x = (factors @ loadings / 4 + torch.randn(count, columns, generator=generator)) * scale
        x = x.to(device)
        matrix.addmm_(x.T, x)
    return Gram(matrix, tokens)


class Layer:
    """One layer to be pruned, and the parts that floors are made of."""

    def __init__(self, shape: tuple[int, int], tokens: int, sparsity: float, device: torch.device) -> None:
        n, k = shape
        self.shape, self.device = shape, device
        self.weight = (0.02 * torch.randn(n, k, generator=torch.Generator().manual_seed(1))).to(device)
        self.gram = make_gram(k, tokens, device)
        self.cut = Cut(round(sparsity * n * k), Unstructured(), "matrix")
        damped = self.gram.matrix.clone()
        damped.diagonal().add_(self.gram.damping())
        half = damped[:, : k // 2].contiguous()
        self.parts: dict[str, Callable[[], object]] = {  # each a pure function of large matrices
            "cholesky": lambda: torch.linalg.cholesky_ex(damped),
            "half_product": lambda: self.weight @ half,  # N·K² operations
            "product": lambda: self.weight @ damped,  # 2·N·K²
        }

    def seconds(self, run: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin

    def prune(self, method: str) -> Tensor:
        gram = Gram(self.gram.matrix, self.gram.tokens)  # nothing cached
        norms = gram.matrix.diagonal().sqrt()
        return pruners.get(method).prune(self.weight, InputStat(norms, gram, gram.tokens), self.cut)[0]


class Counter:
    """Counts, while `alps` runs, how often it needs each part, and times the parts between its own."""

    def __init__(self, layer: Layer, took: dict[str, list[float]]) -> None:
        self.layer, self.took = layer, took
        self.before = alps.factorize, Factor.solve_, torch.mm

    def __enter__(self) -> None:
        factorize, solve, product = self.before
        self.factorisations, self.products, self.outside = 0, 0.0, 0.0

        def counted_factorize(*arguments: object) -> Factor:
            self.factorisations += 1
            for name in ("cholesky", "product"):
                seconds = self.layer.seconds(self.layer.parts[name])
                self.took[name].append(seconds)
                self.outside += seconds
            return factorize(*arguments)

        def counted_solve(factor: Factor, right: Tensor) -> Tensor:
            self.products += 1
            return solve(factor, right)

        def counted_product(left: Tensor, right: Tensor, **out: Tensor) -> Tensor:  # of a refit: some rows of all
            self.products += left.shape[0] / self.layer.shape[0]
            return product(left, right, **out)

        alps.factorize, Factor.solve_, torch.mm = counted_factorize, counted_solve, counted_product

    def __exit__(self, *error: object) -> None:
        alps.factorize, Factor.solve_, torch.mm = self.before

    def counts(self) -> dict[str, float]:
        return {"cholesky": self.factorisations, "product": self.products}


def measure(method: str, layer: Layer, rounds: int) -> dict:
    """The row of a method: medians over rounds."""
    names = ("cholesky", "product" if method == "alps" else "half_product")
    took: dict[str, list[float]] = {name: [] for name in (*names, method)}
    counter = Counter(layer, took) if method == "alps" else None
    results: list[Tensor] = []
    for _ in range(rounds):
        for name in (*names, method, *names):
            if name != method:
                took[name].append(layer.seconds(layer.parts[name]))
                continue
            with counter or nullcontext():
                seconds = layer.seconds(lambda: results.append(layer.prune(method)))
            took[name].append(seconds - (counter.outside if counter else 0))
    medians = {name: statistics.median(times) for name, times in took.items()}
    counts = counter.counts() if counter else dict.fromkeys(names, 1.0)
    floor = sum(count * medians[name] for name, count in counts.items())
    return {
        "method": method,
        "shape": list(layer.shape),
        "tokens": layer.gram.tokens,
        "sparsity": layer.cut.zeros / layer.weight.numel(),
        "error": layer.gram.relative_error(results[-1], layer.weight),
        "seconds": medians[method],
        "floor": floor,
        "ratio": medians[method] / floor,
        "target": TARGET,
        "parts": {name: {"count": round(counts[name], 2), "seconds": medians[name]} for name in names},
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if layer.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x11008", help="NxK")
    parser.add_argument("--tokens", type=int, help="by default three quarters of K")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--methods", default="sparsegpt,alps")
    parser.add_argument("--iterations", type=int, help="at most so many of alps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one row per line")
    options = parser.parse_args()
    n, k = map(int, options.shape.split("x"))
    if options.iterations:
        alps.ITERATIONS = options.iterations
    with full_float32(), torch.no_grad():
        layer = Layer((n, k), options.tokens or 3 * k // 4, options.sparsity, torch.device(options.device))
        for method in options.methods.split(","):
            row = measure(method, layer, options.rounds)
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            parts = ", ".join(f"{p['count']:g} × {name} {p['seconds']:.3f} s" for name, p in row["parts"].items())
            figures = f"{row['seconds']:9.3f} s, floor {row['floor']:9.3f} s, {row['ratio']:5.2f}× (target ≤ {TARGET})"
            print(f"{options.shape:12} {method:10} {figures}; {parts}; error {row['error']:.4f}", flush=True)


if __name__ == "__main__":
    main()
