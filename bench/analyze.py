"""Time of an analysis (spectrum and fit) against float32 singular values alone, on random matrices of LLaMA's sizes.

    python bench/analyze.py [--shape 4096x4096,11008x4096] [--rounds 3] [--device cpu] [--json]

All contenders take turns, once per round; the ratio is that of the medians. Targets: robust ≤ 1.0, reference ≤ 1.15.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from alphaprune import alpha, spectrum

TARGETS = {"robust": 1.0, "reference": 1.15}


def contenders(weight: Tensor, device: torch.device) -> dict[str, Callable[[], object]]:
    """Name → what is timed, on a weight [N, K] float32 that is on the device already."""

    def analysis(method: alpha.Method) -> Callable[[], object]:
        def run() -> alpha.PowerLaw:
            ((values, used),) = spectrum.solve([weight], alpha.NEED[method], str(device))
            return alpha.fit(values, method, noise=used.noise)

        return run

    def singular_values() -> Tensor:
        found = torch.linalg.svdvals(weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return found

    return {"svdvals": singular_values, **{method: analysis(method) for method in alpha.METHODS}}


def measure(shape: tuple[int, int], rounds: int, device: torch.device) -> list[dict]:
    """A row per contender: median seconds, ratio to svdvals, target."""
    weight = 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    runs = contenders(weight.to(device), device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "shape": list(shape),
            "contender": name,
            "seconds": median,
            "ratio": median / medians["svdvals"],
            "target": TARGETS.get(name),
            "solver": _solver(name, shape, device),
            "rounds": rounds,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        for name, median in medians.items()
    ]


def _solver(name: str, shape: tuple[int, int], device: torch.device) -> str:
    return "svd float32" if name == "svdvals" else str(spectrum.choose(alpha.NEED[name], shape, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x4096,11008x4096")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one row per line")
    options = parser.parse_args()
    device = spectrum.check("auto", options.device)
    for text in options.shape.split(","):
        n, k = map(int, text.split("x"))
        for row in measure((n, k), options.rounds, device):
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            target = f"target ≤ {row['target']}" if row["target"] else ""
            figures = f"{row['seconds']:9.3f} s  {row['ratio']:5.2f}×"
            print(f"{text:12} {row['contender']:10} {figures}  {row['solver']:12}  {target}", flush=True)


if __name__ == "__main__":
    main()
