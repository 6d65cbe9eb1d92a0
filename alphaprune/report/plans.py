"""Plans → sections: each beside uniform and the depth ramp at the same sparsity."""

from alphaprune import planning
from alphaprune.analysis import Analysis, LayerStat
from alphaprune.plan_file import Plan
from alphaprune.report.chart import Chart, Kind, Section, Series, Table, block_ticks
from alphaprune.report.inputs import Inputs, kind_of
from alphaprune.report.spectra import mean_alphas

BASELINES = ("uniform", "ramp")
LEAST = 2e-3  # difference between two layers of a block from which on they have sparsities of their own
CURVED = 7  # plans in one picture


def sections(inputs: Inputs) -> list[Section]:
    plans = _plans(inputs)
    if not plans:
        return []
    analyses = [
        one.content for one in inputs.of("analysis") if all("alpha" in s.columns for s in one.content.layers.values())
    ]
    charts, tables = [], []
    for key in dict.fromkeys((plan.sparsity, plan.pattern) for _, plan in plans):
        alike = [(file, plan) for file, plan in plans if (plan.sparsity, plan.pattern) == key]
        for start in range(0, len(alike), CURVED):
            charts.append(_by_block(alike[start : start + CURVED], inputs.layers))
        if analyses:
            charts.append(_by_alpha(alike[:CURVED], analyses[0], inputs.layers))
        charts += [c for file, plan in alike for c in _within_blocks(file, plan, inputs.layers)]
        tables += [_table(file, plan, inputs.layers) for file, plan in alike]
    words = (
        "How much of every block goes. Uniform and the depth ramp at the same sparsity are drawn beside each plan: a "
        "plan is worth its trouble only where the model that it makes is better than theirs."
    )
    return [Section("The plan, against uniform and ramp", words, tuple(charts), tuple(tables))]


def _plans(inputs: Inputs) -> list[tuple[str, Plan]]:
    """Every plan once, by what it removes, with the name of its first file."""
    found: dict[tuple, tuple[str, Plan]] = {}
    for one in inputs.of("plan"):
        zeros = tuple((name, entry.zeros, str(entry.pattern)) for name, entry in one.content.layers.items())
        found.setdefault((one.content.allocator, zeros), (one.file, one.content))
    return list(found.values())


def blockwise(plan: Plan, blocks: dict[str, int]) -> dict[int, float]:
    """Sparsity of every block."""
    zeros: dict[int, int] = {}
    weights: dict[int, int] = {}
    for name, entry in plan.layers.items():
        block = blocks[name]
        zeros[block] = zeros.get(block, 0) + entry.zeros
        weights[block] = weights.get(block, 0) + entry.shape[0] * entry.shape[1]
    return {block: zeros[block] / weights[block] for block in sorted(zeros)}


def _baseline(plan: Plan, name: str, blocks: dict[str, int]) -> Plan | None:
    """What an allocator that reads shapes only makes of the same sparsity; None where the pattern cannot."""
    layers = {layer: LayerStat(blocks[layer], entry.shape) for layer, entry in plan.layers.items()}
    bare = Analysis(plan.model, plan.fingerprint, "float32", None, None, layers)
    try:
        return planning.plan(bare, plan.sparsity, name, plan.epsilon or "auto", plan.pattern)
    except ValueError:
        return None


def _by_block(plans: list[tuple[str, Plan]], blocks: dict[str, int]) -> Chart:
    series, first = [], plans[0][1]
    named = {plan.allocator for _, plan in plans}
    for place, (_, plan) in enumerate(plans):
        series.append(_curve(_name(plan, [p for _, p in plans]), blockwise(plan, blocks), place))
    for place, name in enumerate(BASELINES, 6):
        beside = None if name in named else _baseline(first, name, blocks)
        if beside is not None:
            series.append(_curve(name, blockwise(beside, blocks), place, "law"))
    pattern = "" if first.pattern == "unstructured" else f", {first.pattern}"
    title = f"Sparsity by block, {first.sparsity:.0%} in all{pattern}"
    found = blockwise(first, blocks)
    says = f"{first.allocator}: from {min(found.values()):.1%} to {max(found.values()):.1%} over {len(found)} blocks."
    return Chart(title, says, "block", "sparsity", tuple(series), x_ticks=block_ticks(sorted(set(blocks.values()))))


def _name(plan: Plan, all_of_them: list[Plan]) -> str:
    alike = sum(other.allocator == plan.allocator for other in all_of_them)
    return plan.allocator + (f", epsilon {plan.epsilon:.3g}" if alike > 1 else "")


def _curve(name: str, values: dict[int, float], place: int, kind: Kind = "line") -> Series:
    says = tuple(f"{name}, block {block}: {value:.2%}" for block, value in values.items())
    return Series(name, tuple(map(float, values)), tuple(values.values()), place, kind, says=says)


def _by_alpha(plans: list[tuple[str, Plan]], stats: Analysis, blocks: dict[str, int]) -> Chart:
    alphas, series = mean_alphas(stats), []
    for place, (_, plan) in enumerate(plans):
        found = blockwise(plan, blocks)
        says = tuple(f"block {b}: alpha {alphas[b]:.3f}, sparsity {value:.2%}" for b, value in found.items())
        at = tuple(alphas[b] for b in found)
        name = _name(plan, [p for _, p in plans])
        series.append(Series(name, at, tuple(found.values()), place, "points", says=says))
    title = f"Sparsity by mean alpha, {plans[0][1].sparsity:.0%} in all"
    return Chart(title, "One mark for every block.", "mean alpha of the block", "sparsity", tuple(series))


def _within_blocks(file: str, plan: Plan, blocks: dict[str, int]) -> list[Chart]:
    """By kind of layer, where the layers of a block have sparsities of their own."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, entry in plan.layers.items():
        found.setdefault(kind_of(name), {}).setdefault(blocks[name], []).append(entry.sparsity)
    of_block = blockwise(plan, blocks)
    apart = (abs(v - of_block[b]) for kind in found.values() for b, values in kind.items() for v in values)
    if max(apart) < LEAST:
        return []
    series = [
        _curve(kind, {b: sum(v) / len(v) for b, v in values.items()}, place)
        for place, (kind, values) in enumerate(found.items())
    ]
    title = f"{plan.allocator} at {plan.sparsity:.0%}, by kind of layer"
    says = f"Sparsities of the layers of every block, {file}."
    return [Chart(title, says, "block", "sparsity", tuple(series), x_ticks=block_ticks(sorted(set(blocks.values()))))]


def _table(file: str, plan: Plan, blocks: dict[str, int]) -> Table:
    """Blocks downwards; the plan, what is drawn beside it and kinds of layers across; experts of one kind together."""
    kinds = list(dict.fromkeys(map(kind_of, plan.layers)))
    cells: dict[int, dict[str, list[float]]] = {}
    for name, entry in plan.layers.items():
        cells.setdefault(blocks[name], {}).setdefault(kind_of(name), []).append(entry.sparsity)
    beside = {name: _baseline(plan, name, blocks) for name in BASELINES if name != plan.allocator}
    whole = {"all": plan} | {name: made for name, made in beside.items() if made is not None}
    of_block = [blockwise(made, blocks) for made in whole.values()]
    rows = []
    for block, found in sorted(cells.items()):
        line = (f"{sum(found[k]) / len(found[k]):.4f}" if k in found else "" for k in kinds)
        rows.append((str(block), *(f"{made[block]:.4f}" for made in of_block), *line))
    return Table(f"{file}: sparsity of every layer", ("block", *whole, *kinds), tuple(rows))
