"""The picture of a comparison: what every candidate loses, one panel for each sparsity."""

from pathlib import Path
from typing import Any

from alphaprune.candidates import BASELINES
from alphaprune.compare import paired

MARKERS = "osD^vP*X"
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7c3aed", "#0e7490", "#a16207", "#be185d", "#374151")
LINES = {"uniform": "--", "ramp": ":"}  # of the baselines, which also have hollow markers: no colour is needed
NARROWEST, LEGEND_COLUMN = 7.2, 1.6  # inches: what the words below the panels and those of one mark take
APART = 0.5  # the room that methods share around the row of a plan


def draw(results: dict[str, Any], file: Path) -> str | None:
    """Writes the PNG and returns its path; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    part = results["validation"]
    rows = [{**row, "id": name, "label": _label(name, row)} for name, row in part["rows"].items()]
    rows = [{**row, **paired(row, part["dense"])} for row in rows if None not in row["window_losses"]]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    recommended = results["recommended"]
    size = (max(NARROWEST, 1.7 + 3.1 * len(recommended)), 1.7 + 0.2 * len(labels) * max(1.6, 0.8 * len(methods)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(recommended), sharey=True, squeeze=False)[0]
    for axes, chosen in zip(panels, recommended, strict=True):
        found = [row for row in rows if row["sparsity"] == chosen["sparsity"]]
        _panel(axes, found, labels, methods, chosen["id"])
        axes.set_title(f"sparsity {chosen['sparsity']:g}")
    _name_rows(panels[0], labels, rows)
    figure.supxlabel("loss over the dense model's, nats per token; bars: standard error over windows", fontsize=10)
    marks, names = _legend(methods)
    ncols = min(len(names), int(size[0] / LEGEND_COLUMN))
    figure.legend(marks, names, loc="outside upper center", ncols=ncols, frameon=False, fontsize=9)
    beside = file.with_suffix(".part.png")
    figure.savefig(beside, dpi=150)
    beside.replace(file)
    return str(file)


def _panel(axes: Any, rows: list[dict[str, Any]], labels: list[str], methods: list[str], chosen: str) -> None:
    """One dot for every candidate: its loss to the right, its plan's row downwards."""
    log = all(row["difference"] > 0 for row in rows)
    for row in rows:
        place = methods.index(row["method"])
        x, y = row["difference"], labels.index(row["label"]) + APART * ((place + 0.5) / len(methods) - 0.5)
        error = row["stderr"] or 0.0
        colour = COLOURS[place % len(COLOURS)]
        hollow = row["allocator"] in BASELINES
        left = min(error, 0.9 * x) if log else error  # a bar that reaches 0 has no end on a logarithmic axis
        axes.errorbar(
            x, y, xerr=[[left], [error]], fmt=MARKERS[place % len(MARKERS)], color=colour, markersize=5.5,
            markerfacecolor="white" if hollow else colour, capsize=2, elinewidth=1, zorder=3,
        )  # fmt: skip
        if row["id"] == chosen:
            axes.plot(x, y, "o", markersize=13, markerfacecolor="none", color="black", markeredgewidth=1.4, zorder=4)
    for name, style in LINES.items():
        best = [row["difference"] for row in rows if row["allocator"] == name]
        if best:
            axes.axvline(min(best), linestyle=style, color="#555555", linewidth=1, zorder=1)
    if log:
        axes.set_xscale("log")
        _plain_ticks(axes)
    else:
        axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="y", color="#eeeeee", zorder=0)
    axes.margins(x=0.1)


def _plain_ticks(axes: Any) -> None:
    """0.2 and 0.5 in place of 2·10⁻¹, and no more of them than there is room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name_rows(axes: Any, labels: list[str], rows: list[dict[str, Any]]) -> None:
    baselines = {row["label"] for row in rows if row["allocator"] in BASELINES}
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    for tick in axes.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in baselines else "normal")


def _legend(methods: list[str]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], linestyle="none")
        for i in range(len(methods))
    ]
    lines = [Line2D([], [], color="#555555", linestyle=style) for style in LINES.values()]
    ring = Line2D([], [], marker="o", markersize=11, markerfacecolor="none", color="black", linestyle="none")
    return [*marks, ring, *lines], [*methods, "recommended", *(f"the best {name}" for name in LINES)]


def _label(name: str, row: dict[str, Any]) -> str:
    """The plan's name without its sparsity and method: uniform, or alpha-0.1 where several epsilons are tried."""
    return name.partition("-")[2].removesuffix(f"-{row['method']}")
