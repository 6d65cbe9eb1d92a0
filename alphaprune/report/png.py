"""Sections → PNG files, by matplotlib: the same charts as svg.py draws."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alphaprune.files import atomic_write
from alphaprune.report.chart import Chart, Section, Series, extent, ticks
from alphaprune.report.svg import DASHES

COLOURS = ("#b93c0b", "#1d4ed8", "#157a3a", "#7c3aed", "#0b7285", "#946200", "#4a4f5a", "#8b909b")
MARKS = "os^DvpX*"
COLUMNS = 8  # of small charts
MISSING = "--png needs matplotlib: pip install 'alphaprune[demo]'"


def check() -> None:
    """ValueError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(MISSING) from error


def pictures(sections: Sequence[Section]) -> list[tuple[str, tuple[Chart, ...]]]:
    """File name and charts of every picture: one for each chart, one for each group."""
    found, used = [], set()
    for section in sections:
        for name, charts in [(chart.title, (chart,)) for chart in section.charts] + list(section.groups):
            small = bool(charts[0].small)
            stem = re.sub(r"[^a-z0-9]+", "-", f"{'spectra ' * small}{name}".lower()).strip("-")[:80] or "picture"
            stem = next(s for n in range(1, 1000) if (s := stem if n == 1 else f"{stem}-{n}") not in used)
            used.add(stem)
            found.append((f"{stem}.png", charts))
    return found


def draw(charts: Sequence[Chart], file: Path) -> None:
    """Writes one picture; it appears whole or not at all."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    width, height = (2.3, 1.75) if charts[0].small else (5.6, 3.7)
    if charts[0].across:
        height = 1.3 + 0.27 * charts[0].rows
    figure = Figure(figsize=(max(width * columns, 3.2), height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, chart in zip(panels, charts, strict=False):
        _panel(axes, chart)
    for spare in figure.axes[len(charts) :]:
        spare.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=140, format="png")
    atomic_write(file, drawn.getvalue())


def _panel(axes: Any, chart: Chart) -> None:
    for axis, log in (("x", chart.x_log), ("y", chart.y_log)):
        low, high = extent(chart, axis)
        if log:
            getattr(axes, f"set_{axis}scale")("log")
        getattr(axes, f"set_{axis}lim")(*((10**low, 10**high) if log else (low, high)))
        marks = (chart.x_ticks if axis == "x" else chart.y_ticks) or ticks(low, high, log, 4 if chart.small else 6)
        found = getattr(axes, f"{axis}axis")
        found.set_ticks([10**v if log else v for v, _ in marks], [text for _, text in marks])
        found.set_ticks([], minor=True)
    if chart.across:
        axes.invert_yaxis()
    for series in chart.series:
        _series(axes, series, chart)
    for rule in chart.rules:
        line = axes.axvline if rule.axis == "x" else axes.axhline
        line(rule.value, color="#5b5f68", linewidth=1, linestyle=_dash(rule.dash), label=rule.name or None, zorder=1)
    axes.set_title(chart.title, fontsize=8 if chart.small else 11, loc="left")
    axes.tick_params(labelsize=7 if chart.small else 9, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.small:
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.text(0.98, 0.97, chart.note, transform=axes.transAxes, ha="right", va="top", fontsize=7)
        return
    axes.grid(axis="x" if chart.across else "y", color="#e8e8ea", zorder=0)
    axes.set_xlabel(chart.x_name)
    axes.set_ylabel(chart.y_name)
    named = [text for text in axes.get_legend_handles_labels()[1] if not text.startswith("_")]
    if named:
        axes.legend(frameon=False, fontsize=8, loc="best")


def _dash(place: int) -> Any:
    """The line style of svg.py."""
    dash = DASHES[place % len(DASHES)]
    return (0, tuple(map(float, dash.split()))) if dash else "-"


def _series(axes: Any, series: Series, chart: Chart) -> None:
    colour, name = COLOURS[series.place % len(COLOURS)], series.name or None
    if series.kind == "area":
        axes.fill_between(series.x, series.y, axes.get_ylim()[0], color=colour, alpha=0.75, linewidth=0)
        return
    if series.kind == "stem":
        for x, y in zip(series.x, series.y, strict=True):
            axes.plot([axes.get_xlim()[0], x], [y, y], color=colour, linewidth=1.5)
    if series.kind == "law":
        axes.plot(series.x, series.y, color=colour, linestyle=_dash(series.place), linewidth=1.3, label=name)
        return
    if series.error:
        bars = {"xerr" if chart.across else "yerr": [e if math.isfinite(e) else 0 for e in series.error]}
        axes.errorbar(series.x, series.y, **bars, fmt="none", ecolor=colour, elinewidth=0.9, capsize=2)
    line = _dash(series.place) if series.kind == "line" else "none"
    axes.plot(
        series.x, series.y, color=colour, linestyle=line, marker=MARKS[series.place % len(MARKS)], markersize=5,
        markerfacecolor="white" if series.hollow else colour, label=name, linewidth=1.4,
    )  # fmt: skip
    odd = [p for p, bad in zip(zip(series.x, series.y, strict=True), series.flagged, strict=False) if bad]
    if odd:
        axes.plot(*zip(*odd, strict=True), "x", color=colour, markersize=10)


def write(sections: Sequence[Section], folder: Path) -> Iterator[Path]:
    """Writes every picture into a folder, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, charts in pictures(sections):
        draw(charts, folder / name)
        yield folder / name
