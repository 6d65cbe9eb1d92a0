"""Time of FARMS on one random weight [side, side] against float32 singular values window by window, as published.

    python bench/farms.py [--side 4096] [--window 2000] [--count 15] [--sample 12] [--rounds 3] [--device cpu] [--json]

All 225 windows take minutes. With --sample, ours are the first so many (as near to a square of positions as can be) and
svdvals has a sixth of them; both take turns, once per round, and medians are multiplied up to all windows. The fit is
part of ours, and always of as many values as all windows have. Target: 3 times faster.
"""

import argparse
import json
import math
import statistics
import time

import torch
from torch import Tensor

from alphaprune import alpha, farms, spectrum, timing

TARGET = 3.0


def first_windows(weight: Tensor, windows: farms.Windows, sample: int) -> tuple[Tensor, list[Tensor]]:
    """What the first positions along both sides of a weight [side, side] cover, and the windows there: `sample` of them
    at most, or all without one."""
    size = min(windows.size, len(weight))
    starts = windows.along(len(weight), size)
    starts = starts[: max(1, math.isqrt(sample))] if sample else starts
    end = starts[-1] + size
    cut = [weight[top : top + size, left : left + size] for top in starts for left in starts]
    return weight[:end, :end].contiguous(), cut


class Clock:
    """Seconds by name, of a round after another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rounds: list[dict[str, float]] = []

    def time(self, name: str, run):
        begin = time.perf_counter()
        result = run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.rounds[-1][name] = time.perf_counter() - begin
        return result

    def median(self, name: str) -> float:
        return statistics.median(turn[name] for turn in self.rounds[1:])  # the first round warms up


def measure(side: int, windows: farms.Windows, sample: int, rounds: int, device: torch.device) -> dict:
    """The row of one weight."""
    weight = 0.02 * torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device)
    size = min(windows.size, side)
    total = len(windows.along(side, size)) ** 2
    part, cut = first_windows(weight, windows, sample)
    theirs = cut[: max(1, len(cut) // 6)] if sample else cut
    clock, fewer = Clock(device), farms.Windows(size, math.isqrt(len(cut)))
    for _ in range(rounds + 1):
        clock.rounds.append({})
        values, noise = clock.time("windows", lambda: farms.pooled(part, fewer, str(device)))
        all_values = values.repeat(-(-total // len(cut)))[: total * size].sort().values
        clock.time("fit", lambda v=all_values, n=noise: alpha.fit(v, "robust", n))
        clock.time("svdvals", lambda: [torch.linalg.svdvals(window) for window in theirs])
    ours = clock.median("windows") * total / len(cut) + clock.median("fit")
    svdvals = clock.median("svdvals") * total / len(theirs)
    return {
        "side": side,
        "window": size,
        "windows": total,
        "timed_windows": {"ours": len(cut), "svdvals": len(theirs)},
        "extrapolated": len(cut) < total,
        "seconds": {"ours": ours, "fit": clock.median("fit"), "svdvals": svdvals},
        "ratio": svdvals / ours,
        "target": TARGET,
        "rounds": rounds,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "machine": timing.machine(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--window", type=int, default=2000)
    parser.add_argument("--count", type=int, default=15)
    parser.add_argument("--sample", type=int, help="time only so many windows of ours, and a sixth of it of svdvals")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one row per line")
    options = parser.parse_args()
    device = spectrum.check("auto", options.device)
    windows = farms.Windows(options.window, options.count)
    row = measure(options.side, windows, options.sample or 0, options.rounds, device)
    if options.json:
        print(json.dumps(row))
        return
    times = row["seconds"]
    print(
        f"{row['windows']} windows of {row['window']}², side {row['side']}, {row['threads']} threads, {row['machine']}"
    )
    print(f"ours {times['ours']:.1f} s (fit {times['fit']:.2f} s), svdvals {times['svdvals']:.1f} s", end="")
    print(f", {row['ratio']:.2f}× faster, target ≥ {TARGET}", end="")
    print(f"; from {row['timed_windows']} windows" if row["extrapolated"] else "")


if __name__ == "__main__":
    main()
