"""An analysis → sections: its alphas by block and by kind of layer, and every spectrum with the fitted tail."""

import math
from itertools import pairwise

import numpy as np

from alphaprune.analysis import Analysis, LayerStat
from alphaprune.report.chart import Chart, Rule, Section, Series, Table, block_ticks
from alphaprune.report.inputs import Input, kind_of
from alphaprune.report.svg import steps
from alphaprune.sketches import SPECTRUM, ranks

BINS = (10, 36)  # of a histogram, at least and at most
SEEN = 0.985  # share of the eigenvalues, from the largest, that a picture shows: round-off lies below
DECADES = 7  # at most
SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the eigenvalues, from the largest, in the table
BULK, TAIL, LAW = 7, 0, 0  # places of colours


def alphas(one: Input) -> list[Section]:
    """Alpha by block and by kind of layer."""
    stats: Analysis = one.content
    if not _fitted(stats):
        return [Section("Alpha", f"{one.file} was made without a fit, so it has neither alphas nor spectra.")]
    unstable = sum(bool(stat.columns["unstable"]) for stat in stats.layers.values())
    words = (
        f"Alpha is the exponent of the power law p(λ) ∝ λ⁻ᵅ in the upper tail of a layer's spectrum: the smaller, the "
        f"heavier the tail, the more the layer has learned, and the less of it may go. Fit {stats.fit}, solver "
        f"{stats.solver}. Bars: sampling error (α − 1)/√tail. A crossed hollow mark: unstable, alpha moves by more "
        f"than that when the free choices of the fit are varied a little; {unstable} of {len(stats.layers)} layers are."
    )
    charts = (_by_block(stats), *(_by_depth(kind, layers) for kind, layers in by_kind(stats).items()))
    return [Section(f"Alpha by block and by kind of layer{_which(stats)}", words, charts, (_table(stats),))]


def _fitted(stats: Analysis) -> bool:
    return all("alpha" in stat.columns for stat in stats.layers.values())


def _which(stats: Analysis) -> str:
    """What is said of a fit that is not the usual one."""
    return "" if stats.fit == "robust" else f", fit {stats.fit}"


def by_kind(stats: Analysis) -> dict[str, dict[str, LayerStat]]:
    """Layers by what they are called in every block."""
    found: dict[str, dict[str, LayerStat]] = {}
    for name, stat in stats.layers.items():
        found.setdefault(kind_of(name), {})[name] = stat
    return found


def mean_alphas(stats: Analysis) -> dict[int, float]:
    """Of the layers of every block."""
    found: dict[int, list[float]] = {}
    for stat in stats.layers.values():
        found.setdefault(stat.block, []).append(stat.columns["alpha"])
    return {block: sum(alphas) / len(alphas) for block, alphas in sorted(found.items())}


def _by_block(stats: Analysis) -> Chart:
    found: dict[int, list[dict[str, float]]] = {}
    for stat in stats.layers.values():
        found.setdefault(stat.block, []).append(stat.columns)
    blocks, columns = zip(*sorted(found.items()), strict=True)
    means = [sum(c["alpha"] for c in block) / len(block) for block in columns]
    errors = [math.sqrt(sum(c["stderr"] ** 2 for c in block)) / len(block) for block in columns]
    flagged = tuple(any(c["unstable"] for c in block) for block in columns)
    at = tuple(float(block) for block in blocks)
    says = tuple(
        f"block {b}: mean alpha {m:.3f} ± {e:.3f}" + ", a layer is unstable" * bad
        for b, m, e, bad in zip(blocks, means, errors, flagged, strict=True)
    )
    lowest, highest = (tuple(pick(c["alpha"] for c in block) for block in columns) for pick in (min, max))
    series = (
        Series("mean of the block ± error", at, tuple(means), 0, "line", tuple(errors), flagged, says),
        Series("its smallest layer", at, lowest, 1, "law"),
        Series("its largest", at, highest, 2, "law"),
    )
    low, high = means.index(min(means)), means.index(max(means))
    said = (
        f"Mean alpha of {len(blocks)} blocks, from {means[low]:.2f} in block {blocks[low]} to {means[high]:.2f} in "
        f"block {blocks[high]}."
    )
    return Chart("Alpha by block", said, "block", "alpha", series, x_ticks=block_ticks(blocks))


def _by_depth(kind: str, layers: dict[str, LayerStat]) -> Chart:
    rows = sorted(layers.items(), key=lambda item: item[1].block)
    blocks = [stat.block for _, stat in rows]
    series = Series(
        "",
        tuple(float(block) for block in blocks),
        tuple(stat.columns["alpha"] for _, stat in rows),
        0,
        "line" if len(set(blocks)) == len(blocks) else "points",
        tuple(stat.columns["stderr"] for _, stat in rows),
        tuple(bool(stat.columns["unstable"]) for _, stat in rows),
        tuple(f"{name}: alpha {_value(stat.columns)}" for name, stat in rows),
    )
    alphas = series.y
    says = f"Alpha of {len(rows)} layers {kind}, from {min(alphas):.2f} to {max(alphas):.2f}."
    return Chart(kind, says, "block", "alpha", (series,), x_ticks=block_ticks(sorted(set(blocks))))


def _value(columns: dict[str, float]) -> str:
    return f"{columns['alpha']:.2f} ± {columns['stderr']:.2f}" + ", unstable" * bool(columns["unstable"])


def _table(stats: Analysis) -> Table:
    rows = []
    for name, stat in stats.layers.items():
        c = stat.columns
        rows.append(
            (
                *(
                    name,
                    f"{stat.shape[0]}×{stat.shape[1]}",
                    f"{c['alpha']:.3f}",
                    f"{c['stderr']:.3f}",
                    f"{c['spread']:.3f}",
                ),
                *("unstable" if c["unstable"] else "", f"{c['xmin']:.3g}", f"{c['tail']:.0f}", f"{c['ks']:.3f}"),
                *(f"{c[key]:.3g}" if key in c else "" for key in ("stable_rank", "spectral_norm")),
            )
        )
    columns = (
        "layer",
        "shape",
        "alpha",
        "± error",
        "spread",
        "",
        "tail from λ",
        "in tail",
        "KS",
        "stable rank",
        "‖W‖₂",
    )
    return Table(f"Alpha of all {len(rows)} layers", columns, tuple(rows))


def spectra(one: Input) -> list[Section]:
    """Every spectrum with its tail; none without a fit."""
    stats, title = one.content, "Spectra, and the tail that was fitted"
    if not _fitted(stats):
        return []
    title += _which(stats)
    if not all(SPECTRUM in stat.series for stat in stats.layers.values()):
        words = (
            f"{one.file} was written by a release that did not keep the spectra; `alphaprune analyze` again shows them."
        )
        return [Section(title, words)]
    words = (
        "How many eigenvalues λ of WᵀW lie where, both axes logarithmic. Dark: the tail, from which alpha is fitted; "
        "the dashed line is the power law. A tail that follows the line down to the right end is a good fit; one that "
        "bends away from it has a large KS distance. Layers of a kind share their axes."
    )
    groups = []
    for kind, layers in by_kind(stats).items():
        low = min(_visible(stat)[0] for stat in layers.values())
        high = max(_visible(stat)[1] for stat in layers.values())
        drawn = tuple(_spectrum(name, stat, (low, high)) for name, stat in layers.items())
        groups.append((kind, drawn))
    return [Section(title, words, tables=(_quantiles(stats),), groups=tuple(groups))]


def _quantiles(stats: Analysis) -> Table:
    """The numbers behind the histograms: of every layer the eigenvalues that so many shares of all lie above."""
    rows = []
    for name, stat in stats.layers.items():
        count, values = min(stat.shape), stat.series[SPECTRUM]
        at = np.interp([share * (count - 1) for share in SHARES], ranks(count)[: len(values)], values)
        rows.append((name, str(count), *(f"{value:.3g}" for value in at)))
    shares = ("largest λ", *(f"{share:.0%} above" for share in SHARES[1:-1]), "smallest")
    return Table(f"Spectra of all {len(rows)} layers", ("layer", "eigenvalues", *shares), tuple(rows))


def _visible(stat: LayerStat) -> tuple[float, float]:
    """The smallest and the largest eigenvalue that are shown."""
    values = [v for v in stat.series[SPECTRUM] if v > 0] or [1e-300]
    count = min(stat.shape)
    places = ranks(count)
    last = max(v_at for v_at, place in enumerate(places) if place <= SEEN * count and v_at < len(values))
    return max(values[last], values[0] * 10.0**-DECADES), values[0]


def _spectrum(name: str, stat: LayerStat, reach: tuple[float, float]) -> Chart:
    c, count = stat.columns, min(stat.shape)
    low, high = _visible(stat)
    start = min(max(c["xmin"], low), high)
    bins = min(max(round(2 * count ** (1 / 3)), BINS[0]), BINS[1])
    width = max(math.log(high / low), 1e-6) / bins
    floor = 0.5 / (count * width)
    series = [
        _histogram(stat, low, start, width, BULK) if start > low * 1.0001 else None,
        _histogram(stat, start, high, width, TAIL) if high > start * 1.0001 else None,
    ]
    density = [c["tail"] / count * (c["alpha"] - 1) * (x / start) ** (1 - c["alpha"]) for x in (start, high)]
    end = high
    if density[1] < floor < density[0]:  # where the line leaves the picture
        end, density[1] = start * (density[0] / floor) ** (1 / (c["alpha"] - 1)), floor
    line = Series("", (start, end), tuple(max(d, floor) for d in density), 1, "law")
    drawn = tuple(s for s in (*series, line) if s is not None)
    top = max(v for s in drawn for v in s.y)
    says = (
        f"{name}: {count} eigenvalues up to {stat.series[SPECTRUM][0]:.3g}; "
        f"the tail of {c['tail']:.0f} from {c['xmin']:.3g} on has alpha {_value(c)}, KS distance {c['ks']:.3f}."
    )
    note = f"α {c['alpha']:.2f} ± {c['stderr']:.2f}" + " ✕ unstable" * bool(c["unstable"])
    return Chart(
        f"block {stat.block}", says, "λ", "", drawn, (Rule("x", start, "", 2),), True, True, small=True, note=note,
        x_range=(reach[0] * 0.98, reach[1] * 1.05), y_range=(floor * 0.8, top * 3),
    )  # fmt: skip


def _histogram(stat: LayerStat, low: float, high: float, width: float, place: int) -> Series:
    """Share of the eigenvalues per unit of ln λ, in bins of about a width between two values."""
    values = np.array(stat.series[SPECTRUM])
    good = values > 0
    logs, above = np.log(values[good])[::-1], (np.array(ranks(min(stat.shape)))[: len(values)][good] + 0.5)[::-1]
    bins = max(1, round(math.log(high / low) / width))
    edges = np.linspace(math.log(low), math.log(high), bins + 1)
    counts = np.interp(edges, logs, above)  # of eigenvalues above each edge
    counts[-1] = 0 if edges[-1] >= logs[-1] - 1e-9 else counts[-1]
    heights = [
        (a - b) / (e - d) / min(stat.shape) for (a, b), (d, e) in zip(pairwise(counts), pairwise(edges), strict=True)
    ]
    x, y = steps(list(np.exp(edges)), [max(float(h), 1e-12) for h in heights])
    return Series("", tuple(map(float, x)), y, place, "area")
