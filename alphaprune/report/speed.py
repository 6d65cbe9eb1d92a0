"""`info` and `bench` → sections: sparsity and kernel of every layer, and how fast layers and models are."""

from pathlib import Path
from typing import Any

from alphaprune.benchmark import tables as bench_tables
from alphaprune.inspection import COLUMNS, model_rows, model_summary
from alphaprune.report.chart import Chart, Rule, Section, Series, Table, block_ticks
from alphaprune.report.inputs import Input, Inputs, kind_of, number_in

MOST = 8  # series in one picture
DENSE = Rule("x", 1.0, "dense", 1)


def sections(inputs: Inputs) -> list[Section]:
    found = [_layers(one) for one in inputs.of("info")]
    return found + [_bench(one) for one in inputs.of("bench")]


def _layers(one: Input) -> Section:
    found = one.content
    rows = found["layers"]
    kinds = list(dict.fromkeys(kind_of(row["name"]) for row in rows))
    blocks = [number_in(row["name"]) for row in rows]
    series = []
    for place, kernel in enumerate(dict.fromkeys(row["kernel"] for row in rows)):
        mine = [(b, row) for b, row in zip(blocks, rows, strict=True) if row["kernel"] == kernel]
        shift = 0.6 / len(kinds)
        x = tuple(b + shift * (kinds.index(kind_of(row["name"])) - (len(kinds) - 1) / 2) for b, row in mine)
        y = tuple(row["zeros"] / row["weights"] for _, row in mine)
        says = tuple(
            f"{row['name']}: {row['zeros'] / row['weights']:.2%} zeros, {row['stored']}, {kernel}: {row['why']}"
            for _, row in mine
        )
        series.append(Series(f"{kernel} ({len(mine)})", x, y, place, "points", says=says))
    title, ticks = "Sparsity and kernel of every layer", block_ticks(sorted(set(blocks)))
    says = f"{len(rows)} layers; kernels: {', '.join(s.name for s in series)}."
    charts = [Chart(title, says, "block", "sparsity", tuple(series[:MOST]), x_ticks=ticks)]
    charts.append(_bytes(rows, kinds))
    name = Path(found["model"]).name
    if found["sparsity"] == 0:
        charts = []  # a dense model has nothing to draw
    table = Table(f"{name}: every layer", tuple(COLUMNS), tuple(map(tuple, model_rows(found))))
    return Section(f"Sparsity and kernel per layer: {name}", model_summary(found), tuple(charts), (table,))


def _bytes(rows: list[dict[str, Any]], kinds: list[str]) -> Chart:
    """By kind of layer, what of its dense bytes is left."""
    share = []
    for kind in kinds:
        mine = [row for row in rows if kind_of(row["name"]) == kind]
        share.append(sum(row["bytes"] for row in mine) / sum(row["dense_bytes"] for row in mine))
    says = [f"{kind}: {value:.1%} of the dense bytes" for kind, value in zip(kinds, share, strict=True)]
    return _bars("Bytes over the dense layer's", "bytes / dense bytes", kinds, share, says, DENSE)


def _bars(title: str, x_name: str, names: list[str], values: list[float], says: list[str], *rules: Rule) -> Chart:
    """A row with a line from 0 for every name."""
    places = tuple(map(float, range(len(names))))
    series, rules = Series("", tuple(values), places, 0, "stem", says=tuple(says)), (*rules, Rule("x", 0.0, "", 0))
    ticks, reach = tuple(zip(places, names, strict=True)), (-0.7, len(names) - 0.3)
    return Chart(
        title, "; ".join(says), x_name, "", (series,), rules, y_ticks=ticks, across=True, y_range=reach, rows=len(names)
    )


def _bench(one: Input) -> Section:
    found = one.content
    charts = []
    if "generation" in found:
        charts.append(_generation(found["generation"]))
    if "layers" in found:
        charts.append(_timed_layers(found["layers"]))
    else:
        for tokens in dict.fromkeys(row["tokens"] for row in found["rows"]):
            charts.append(_ratios([row for row in found["rows"] if row["tokens"] == tokens], tokens))
    tables = []
    for heading, columns, rows in bench_tables(found):
        tables.append(Table(heading, tuple(columns), tuple(tuple(map(str, row)) for row in rows)))
    does = f", {found['threads']} threads" if found.get("threads") else ""
    words = (
        f"Measured on {found['machine']}{does}, against dense layers of torch by turns; above 1 is faster than dense."
    )
    title = f"Speed: {Path(found['model']).name if found.get('model') else 'layers'}"
    return Section(title, words, tuple(c for c in charts if c is not None), tuple(tables))


def _ratios(rows: list[dict[str, Any]], tokens: int) -> Chart:
    """Speed-up by sparsity, a line for every shape; by shape, where there is one sparsity."""
    noun = "token" if tokens == 1 else "tokens"
    title, sparsities = f"Speed-up over dense, {tokens} {noun}", {row["sparsity"] for row in rows}
    groups = list(dict.fromkeys((*row["shape"], row["values"]) for row in rows))
    labels = [f"{n}×{k}" + (f" {values}" if len({g[2] for g in groups}) > 1 else "") for n, k, values in groups]
    if len(sparsities) == 1:
        of_group = {(*row["shape"], row["values"]): row for row in rows}
        shown = [of_group[group] for group in groups]
        says = [f"{label}: {r['ratio']:.2f}× with {r['kernel']}" for label, r in zip(labels, shown, strict=True)]
        return _bars(title, "× dense", labels, [row["ratio"] for row in shown], says, DENSE)
    series = []
    for place, (group, label) in enumerate(zip(groups[:MOST], labels, strict=False)):
        mine = sorted((r for r in rows if (*r["shape"], r["values"]) == group), key=lambda row: row["sparsity"])
        says = tuple(f"{label} at {r['sparsity']:.0%}: {r['ratio']:.2f}× with {r['kernel']}" for r in mine)
        x, y = tuple(r["sparsity"] for r in mine), tuple(r["ratio"] for r in mine)
        series.append(Series(label, x, y, place, "line", says=says))
    ticks = tuple((s, f"{s:.0%}") for s in sorted(sparsities))
    says = f"{len(series)} shapes at {len(ticks)} sparsities, from {min(r['ratio'] for r in rows):.2f}× on."
    rule = (Rule("y", 1.0, "dense", 1),)
    return Chart(title, says, "sparsity", "× dense", tuple(series), rule, x_ticks=ticks)


def _generation(rows: list[dict[str, Any]]) -> Chart | None:
    known = [row for row in rows if "skipped" not in row]
    if not known:
        return None
    names = [f"{row['weights']}, {row['decoder']}" for row in known]
    rates = [row["decode_tokens_per_second"] for row in known]
    says = [f"{name}: {rate:.1f} tokens per second" for name, rate in zip(names, rates, strict=True)]
    return _bars("Decoding", "tokens per second", names, rates, says)


def _timed_layers(rows: list[dict[str, Any]]) -> Chart | None:
    known = [row for row in rows if row.get("ratio") is not None and kind_of(row["name"]) != row["name"]]
    if not known:
        return None
    series = []
    for place, kernel in enumerate(dict.fromkeys(row["kernel"] for row in known)):
        mine = [row for row in known if row["kernel"] == kernel]
        says = tuple(f"{row['name']}: {row['ratio']:.2f}× with {kernel}" for row in mine)
        x, y = tuple(float(number_in(row["name"])) for row in mine), tuple(row["ratio"] for row in mine)
        series.append(Series(kernel, x, y, place, "points", says=says))
    blocks = sorted({number_in(row["name"]) for row in known})
    title = "Speed-up of every layer in a step"
    return Chart(
        title,
        f"{len(known)} layers.",
        "block",
        "× dense",
        tuple(series),
        (Rule("y", 1.0, "dense"),),
        x_ticks=block_ticks(blocks),
    )
