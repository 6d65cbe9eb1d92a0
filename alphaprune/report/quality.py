"""Comparisons, error curves, evaluations and demos → sections: what pruning costs, and against which size and speed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaprune.compare import SERIES, paired
from alphaprune.report.chart import Chart, Rule, Section, Series, Table, block_ticks
from alphaprune.report.inputs import Input, Inputs

BASELINES = ("uniform", "ramp")
CURVES = 8  # in one picture


@dataclass(frozen=True)
class Point:
    """One model. quality: bits per byte or perplexity, lower is better; None where a file does not say."""

    name: str
    group: str
    sparsity: float | None
    quality: float | None
    megabytes: float | None = None
    rate: float | None = None


def sections(inputs: Inputs) -> list[Section]:
    found = [section for one in inputs.of("comparison") for section in _comparison(one)]
    found += [_error_curves(one) for one in inputs.of("curves")]
    for one in inputs.of("demo"):
        points, measure = _demo_points(one.content)
        found += _curves(f"Quality, size and speed: {one.file}", points, measure)
    texts = _by_text(inputs.of("eval"))
    for (text, length), judged in texts.items():
        on = f", text {text[:12]}… in windows of {length}" if len(texts) > 1 else ""
        found += _curves(f"Quality, size and speed of the models{on}", _measured_points(inputs, judged), "perplexity")
    return found + [_tasks(inputs)] * bool(inputs.of("tasks"))


def _comparison(one: Input) -> list[Section]:
    results = one.content
    part = results["test"] if "test" in results else results["validation"]
    rows = {name: {**row, "id": name, "over": _over(row, part["dense"])} for name, row in part["rows"].items()}
    rows = {name: row for name, row in rows.items() if row["over"][0] is not None}
    charts = [_dots(chosen, rows) for chosen in results["recommended"]]
    if len(results["recommended"]) > 1:
        charts.insert(0, _loss_curves(rows))
    which = "the test text, read after the choice" if "test" in results else "the text that candidates are chosen by"
    words = (
        f"What every candidate loses on {which}, in nats per token over the dense model's {part['dense']['loss']:.4f} "
        f"(perplexity {part['dense']['perplexity']:.4g}); bars: standard error over windows. Hollow: the baselines "
        f"uniform and ramp. The upright line: the recommended one."
    )
    return [Section("Every allocator with every method", words, tuple(charts), (_comparison_table(results, rows),))]


def _over(row: dict[str, Any], dense: dict[str, Any]) -> tuple[float | None, float]:
    """Loss over the dense model's, and its error: of paired windows where the file has them."""
    if all(SERIES[0] in entry for entry in (row, dense)):
        found = paired(row, dense)
        return found["difference"], found["stderr"] or 0.0
    if row["loss"] is None or dense["loss"] is None:
        return None, 0.0
    return row["loss"] - dense["loss"], 0.0


def _label(row: dict[str, Any]) -> str:
    """The plan: uniform, or alpha-0.1 where several epsilons were tried."""
    return row["id"].partition("-")[2].removesuffix(f"-{row['method']}")


def _dots(chosen: dict[str, Any], rows: dict[str, dict[str, Any]]) -> Chart:
    """A row for every plan, a mark for every method."""
    found = [row for row in rows.values() if row["sparsity"] == chosen["sparsity"]]
    labels = list(dict.fromkeys(map(_label, found)))
    methods = list(dict.fromkeys(row["method"] for row in rows.values()))
    series = []
    for place, method in enumerate(methods):
        shift = 0.5 * ((place + 0.5) / len(methods) - 0.5)
        for hollow in (False, True):
            mine = [r for r in found if r["method"] == method and (r["allocator"] in BASELINES) == hollow]
            if mine:
                says = tuple(f"{r['id']}: {_nats(r)}" for r in mine)
                x, y = tuple(r["over"][0] for r in mine), tuple(labels.index(_label(r)) + shift for r in mine)
                error = tuple(r["over"][1] for r in mine)
                name = method if not any(s.name == method for s in series) else ""
                series.append(Series(name, x, y, place, "points", error, says=says, hollow=hollow))
    best = rows.get(chosen["id"])
    rules = (Rule("x", best["over"][0], "recommended", 0),) if best else ()
    log = all(row["over"][0] > 0 for row in found)
    title = f"Loss at sparsity {chosen['sparsity']:g}"
    says = f"{len(found)} candidates; recommended: {chosen['id']}" + (f", {_nats(best)}." if best else ".")
    ticks = tuple((float(place), label) for place, label in enumerate(labels))
    return Chart(
        title, says, "nats per token over dense", "", tuple(series), rules, x_log=log, y_ticks=ticks,
        across=True, y_range=(-0.7, len(labels) - 0.3), rows=len(labels),
    )  # fmt: skip


def _nats(row: dict[str, Any]) -> str:
    return f"{row['over'][0]:+.4f} ± {row['over'][1]:.4f} nats per token"


def _loss_curves(rows: dict[str, dict[str, Any]]) -> Chart:
    """Loss by sparsity of every plan with the method that suits it best, the baselines last and hollow."""
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows.values():
        key = (row["allocator"], row["sparsity"])
        if key not in best or row["over"][0] < best[key]["over"][0]:
            best[key] = row
    names = list(dict.fromkeys(allocator for allocator, _ in best))
    total = {n: sum(row["over"][0] for (a, _), row in best.items() if a == n) for n in names}
    others = sorted((n for n in names if n not in BASELINES), key=total.__getitem__)[: CURVES - len(BASELINES)]
    series = []
    for place, name in enumerate([*others, *(b for b in BASELINES if b in names)]):
        mine = sorted((row for (a, _), row in best.items() if a == name), key=lambda row: row["sparsity"])
        says = tuple(f"{row['id']}: {_nats(row)}" for row in mine)
        x, y = (tuple(row["sparsity"] for row in mine), tuple(row["over"][0] for row in mine))
        error = tuple(row["over"][1] for row in mine)
        series.append(Series(name, x, y, place, "line", error, says=says, hollow=name in BASELINES))
    log = all(value > 0 for s in series for value in s.y)
    ticks = tuple((s, f"{s:.0%}") for s in sorted({row["sparsity"] for row in rows.values()}))
    title = "Loss by sparsity, each plan with its best method"
    says = f"{len(series)} allocators at {len(ticks)} sparsities."
    return Chart(title, says, "sparsity", "nats over dense", tuple(series), y_log=log, x_ticks=ticks)


def _comparison_table(results: dict[str, Any], rows: dict[str, dict[str, Any]]) -> Table:
    chosen = {entry["id"] for entry in results["recommended"]}
    cells = tuple(
        (
            name, f"{row['sparsity']:g}", row["allocator"], row["method"], _cell(row["perplexity"]),
            f"{row['over'][0]:+.4f}", f"{row['over'][1]:.4f}", _cell(row.get("kl")),
            "recommended" if name in chosen else "",
        )
        for name, row in rows.items()
    )  # fmt: skip
    columns = ("candidate", "sparsity", "allocator", "method", "perplexity", "nats over dense", "± error", "KL", "")
    return Table(f"All {len(cells)} candidates", columns, cells)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _error_curves(one: Input) -> Section:
    curves = one.content
    steps = sorted({s for curve in curves.blocks.values() for s in curve.sparsities if s > 0})
    series = []
    for place, step in enumerate(steps[-CURVES:]):
        points = [
            (b, c.losses[c.sparsities.index(step)]) for b, c in sorted(curves.blocks.items()) if step in c.sparsities
        ]
        x, y = tuple(float(b) for b, _ in points), tuple(loss for _, loss in points)
        says = tuple(f"block {b:g} alone at {step:.0%}: {loss:.4g}" for b, loss in points)
        series.append(Series(f"{step:.0%}", x, y, place, "line", says=says))
    log = all(value > 0 for s in series for value in s.y)
    title = "What one block alone costs"
    says = f"{curves.measure} by block, at {len(series)} sparsities."
    name = {"kl": "KL, nats per token", "loss": "loss, nats per token"}.get(curves.measure, curves.measure)
    ticks = block_ticks(sorted(curves.blocks))
    chart = Chart(title, says, "block", name, tuple(series), y_log=log, x_ticks=ticks)
    rows = tuple((str(b), *(f"{loss:.4g}" for loss in c.losses)) for b, c in sorted(curves.blocks.items()))
    widest = max(curves.blocks.values(), key=lambda c: len(c.sparsities)).sparsities
    rows = tuple((*row, *[""] * (1 + len(widest) - len(row))) for row in rows)
    table = Table("Losses of every block", ("block", *(f"{s:.0%}" for s in widest)), rows)
    words = (
        f"The loss of the whole model with one block pruned ({curves.method}) and all others dense, from {one.file}."
    )
    return Section("Error curves of the blocks", words, (chart,), (table,))


def _demo_points(found: dict[str, Any]) -> tuple[list[Point], str]:
    points = []
    for row in found["rows"]:
        name = "dense" if row["allocator"] == "dense" else f"{row['allocator']} {row['sparsity']:.0%}"
        sizes = row["linears_bytes"] / 1e6, row["tokens_per_second"]
        points.append(Point(name, row["allocator"], row["sparsity"], row["bits_per_byte"], *sizes))
    return points, "bits per byte"


def _by_text(judged: list[Input]) -> dict[tuple[str, int | None], list[Input]]:
    """Evaluations that may be compared: on the same text, in windows of the same length."""
    found: dict[tuple[str, int | None], list[Input]] = {}
    for one in judged:
        found.setdefault((one.content["data_sha256"], one.content.get("length")), []).append(one)
    return found


def _measured_points(inputs: Inputs, judged: list[Input]) -> list[Point]:
    """Models that were judged, with what `info` and `bench` say of the same folder."""
    infos = {_folder(one.model): one.content for one in inputs.of("info")}
    rates = {}
    for one in inputs.of("bench"):
        timed = [row for row in one.content.get("generation", ()) if "skipped" not in row]
        if one.model and timed:
            rates[_folder(one.model)] = max(
                row["decode_tokens_per_second"] for row in timed if row["weights"] == timed[0]["weights"]
            )
    points = []
    for one in judged:
        key = _folder(one.model)
        info = infos.get(key)
        name = Path(one.model).name if one.model else Path(one.file).stem
        size = info and info["linears_bytes"] / 1e6
        points.append(Point(name, "models", info and info["sparsity"], one.content["perplexity"], size, rates.get(key)))
    return points


def _folder(model: str | None) -> str | None:
    return model and str(Path(model).resolve() if Path(model).exists() else model)


AXES = (("sparsity", "sparsity"), ("megabytes", "MB of linear layers"), ("rate", "tokens per second"))


def _curves(title: str, points: list[Point], measure: str) -> list[Section]:
    charts = []
    for field, name in AXES:
        known = [p for p in points if getattr(p, field) is not None and p.quality is not None]
        if len(known) < 2:
            continue
        series = []
        for place, group in enumerate(dict.fromkeys(p.group for p in known)):
            mine = sorted((p for p in known if p.group == group), key=lambda p: (p.sparsity or 0, getattr(p, field)))
            says = tuple(f"{p.name}: {measure} {p.quality:.4g}, {name} {getattr(p, field):.4g}" for p in mine)
            x, y = tuple(float(getattr(p, field)) for p in mine), tuple(p.quality for p in mine)
            series.append(Series(group, x, y, place, "line", says=says))
        log = max(p.quality for p in known) > 10 * min(p.quality for p in known)
        charts.append(Chart(f"{measure} by {name}", "Lower is better.", name, measure, tuple(series), y_log=log))
    rows = tuple(
        (p.name, *("" if v is None else f"{v:.4g}" for v in (p.sparsity, p.quality, p.megabytes, p.rate)))
        for p in points
    )
    columns = ("model", "sparsity", measure, "MB of linear layers", "tokens/s")
    words = "What is lost against what is gained: quality by sparsity, by size and by speed. Lower is better."
    return [Section(title, words, tuple(charts), (Table("The same as numbers", columns, rows, closed=bool(charts)),))]


def _tasks(inputs: Inputs) -> Section:
    rows = []
    for one in inputs.of("tasks"):
        for name, task in one.content["tasks"].items():
            for metric, value in task.get("metrics", {}).items():
                error = value.get("stderr")
                shown = "" if not isinstance(error, float) or math.isnan(error) else f"{error:.4f}"
                rows.append((Path(one.model or one.file).name, str(name), str(metric), str(value.get("value")), shown))
    table = Table("Tasks", ("model", "task", "metric", "value", "± stderr"), tuple(rows), closed=False)
    return Section("Tasks", "What lm-eval says.", tables=(table,))
