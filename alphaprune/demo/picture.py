"""The demo's picture: alpha per block, the plan it leads to, and quality against speed."""

from pathlib import Path
from typing import Any

COLOURS = {"uniform": "#7a7a7a", "alpha": "#c2410c"}
MARKERS = {"uniform": "o", "alpha": "s"}


def draw(result: dict[str, Any], file: Path) -> str | None:
    """Writes the PNG and returns its path; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _alphas(left, result["alpha"])
    _plan(middle, result["plan"], result["plan_sparsity"])
    _curve(right, result["rows"])
    figure.suptitle("From heavy tails to a faster model: alpha → plan → quality and speed", fontsize=13)
    beside = file.with_suffix(".part.png")
    figure.savefig(beside, dpi=150)
    beside.replace(file)
    return str(file)


def _alphas(axes: Any, alphas: list[dict[str, float]]) -> None:
    mean = [a["mean"] for a in alphas]
    spread = [[a["mean"] - a["lowest"] for a in alphas], [a["highest"] - a["mean"] for a in alphas]]
    axes.errorbar(range(len(mean)), mean, yerr=spread, fmt="s-", color=COLOURS["alpha"], capsize=4, ecolor="#888888")
    axes.margins(x=0.08, y=0.12)
    axes.set(
        title="1. Alpha of every block\n(mean of its layers; whiskers: lowest, highest)", xlabel="block", ylabel="alpha"
    )
    axes.set_xticks(range(len(mean)))


def _plan(axes: Any, plans: dict[str, list[float]], sparsity: float) -> None:
    for name, values in plans.items():
        axes.plot(
            values, marker=MARKERS[name], color=COLOURS[name], label=name, linestyle="-" if name == "alpha" else "--"
        )
    axes.set(
        title=f"2. The plan for {sparsity:.0%}\n(heavier tail, smaller alpha: pruned less)",
        xlabel="block",
        ylabel="sparsity",
    )
    axes.set_xticks(range(len(next(iter(plans.values())))))
    axes.legend(frameon=False)


def _curve(axes: Any, rows: list[dict[str, Any]]) -> None:
    dense = next(r for r in rows if r["allocator"] == "dense")
    for name in COLOURS:
        found = [dense] + [r for r in rows if r["allocator"] == name]
        x, y = [r["block_speedup"] for r in found], [r["bits_per_byte"] for r in found]
        axes.plot(
            x, y, marker=MARKERS[name], color=COLOURS[name], label=name, linestyle="-" if name == "alpha" else "--"
        )
        if name == "alpha":
            for row, a, b in zip(found[1:], x[1:], y[1:], strict=True):
                axes.annotate(f"{row['sparsity']:.0%}", (a, b), textcoords="offset points", xytext=(-4, 8), ha="right")
    axes.margins(x=0.12, y=0.12)
    axes.axhline(dense["bits_per_byte"], color="#bbbbbb", linewidth=1, zorder=0)
    axes.annotate(
        "dense", (dense["block_speedup"], dense["bits_per_byte"]), textcoords="offset points", xytext=(4, -14)
    )
    axes.set(
        title="3. What it costs and what it brings",
        xlabel="speed-up of a LLaMA-2-7B-shaped block over dense",
        ylabel="held-out bits per byte (lower is better)",
    )
    axes.legend(frameon=False)
