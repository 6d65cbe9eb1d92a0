"""LayerStats and a sparsity → Plan: an exact number of zeros per layer, inside bounds."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from alphaprune import allocators, curves, nm_planning, speed_planning
from alphaprune.allocators import Granularity, measured
from alphaprune.analysis import Analysis, is_number, need, option_for
from alphaprune.counts import SLACK, share_counts, water_fill
from alphaprune.pattern import NM, Pattern, Unstructured
from alphaprune.plan_file import LayerPlan as LayerPlan
from alphaprune.plan_file import Plan as Plan
from alphaprune.plan_file import check_divisible, patterned

ORDERED = 0.3  # an ε for allocations of which only the order counts: any above 0 gives the same

Bounds = tuple[float | None, float | None]


def plan(
    analysis: Analysis,
    sparsity: float | None = None,
    allocator: str = "alpha",
    epsilon: "float | Literal['auto']" = "auto",
    pattern: "str | Pattern" = "unstructured",
    granularity: Granularity = "block",
    bounds: Bounds | None = None,
    break_even: Mapping[str, float] | None = None,
    latency: float | None = None,
    max_loss: float | None = None,
    times: Mapping[str, Sequence[float]] | None = None,
) -> Plan:
    """How much to prune in every layer of the analysed model; the zeros sum to round(sparsity · weights).

    epsilon: spread of the ratios, 0 ≤ ε < 1, or "auto" (`auto_epsilon`).   bounds: least and most sparsity of a layer.
    pattern: "unstructured"; one such as "2:4", which with a sparsity below its own leaves layers dense (`nm_planning`
    says which, and how near it comes), and without one stands in all; or "N:8" with a literal N, which chooses N of 1…8
    per layer and meets the sparsity to within one step (1/8) of the smallest layer.
    break_even: of each layer the sparsity from which on it is faster than dense (see kernels/table.py). One that would
    stay below gets no zeros at all, the others get its share: first the one that is farthest below, and so on.
    latency, max_loss: instead of a sparsity, with the allocator measured: `speed_planning`, which reads the `times`.

    Raises ValueError for a sparsity outside [0, 1) or unreachable inside the bounds, a column that the analysis lacks,
    a layer whose K is no multiple of M, or a budget that the layers which gain cannot take.
    """
    text, (fixed, family) = str(pattern), nm_planning.kind(pattern)
    if latency is not None or max_loss is not None:
        _check_speed(analysis, sparsity, allocator, times)
        bounds = limits(None, bounds)
        return speed_planning.fastest(analysis, times or {}, latency, max_loss, pattern, *bounds)
    if fixed is not None and (sparsity is None or (is_number(sparsity) and abs(sparsity - fixed.sparsity) < 1e-9)):
        return _fixed(analysis, fixed, bounds, break_even or {})
    if sparsity is None:
        raise ValueError(f"pattern {text} implies no sparsity: give one, such as 0.7")
    need(is_number(sparsity) and 0 <= sparsity < 1, f"sparsity {sparsity}: wanted 0 ≤ sparsity < 1")
    low, high = limits(sparsity, bounds)
    spread = _epsilon(epsilon, sparsity, high, analysis, allocator, granularity)
    if fixed is not None:
        spread = ORDERED if epsilon == "auto" and spread == 0 else spread
        ranks = _ranks(analysis, sparsity, fixed, allocator, spread, granularity, (low, high))
        layers = _mixed(analysis, sparsity, fixed, ranks, (low, high), break_even or {})
    else:
        found = ratios(analysis, sparsity, allocator, spread, granularity, (low, high))
        shapes = {name: stat.shape for name, stat in analysis.layers.items()}
        fill = partial(_counts, family=family, sparsity=sparsity, low=low, high=high)
        layers = _gaining(shapes, found, sparsity, low, high, break_even, fill) if break_even else fill(shapes, found)
    return Plan(analysis.model, analysis.fingerprint, float(sparsity), allocator, spread, text, layers)


def _check_speed(analysis: Analysis, sparsity: float | None, allocator: str, times: Any) -> None:
    """ValueError unless a plan can be made for a latency or a loss."""
    need(sparsity is None, "give one of a sparsity, a latency and a loss: each of them determines the others")
    need(
        allocator == measured.ALLOCATOR.name,
        f"allocator {allocator}: for a latency or a loss only measured can plan, from error curves and times",
    )
    need(times is not None, "a latency or a loss needs the times of the layers: --times FILE, or auto")
    check_series(analysis, measured.ALLOCATOR)


def real_sparsities(
    analysis: Analysis,
    sparsity: float,
    allocator: str = "alpha",
    epsilon: float = 0.0,
    granularity: Granularity = "block",
    bounds: tuple[float, float] = (0.0, math.inf),
) -> dict[str, float]:
    """Sparsities before they are rounded to counts: s_k = clip(η·r_k, bounds), with the one η that meets the budget.

    Without bounds this is the published formula s_k = η·r_k, η = S·ΣN_k / ΣN_k·r_k, which may exceed 1.
    """
    found = ratios(analysis, sparsity, allocator, epsilon, granularity, bounds)
    sizes = [stat.shape[0] * stat.shape[1] for stat in analysis.layers.values()]
    return dict(zip(found, water_fill(sizes, list(found.values()), sparsity, *bounds), strict=True))


def ratios(
    analysis: Analysis,
    sparsity: float,
    allocator: str,
    epsilon: float,
    granularity: Granularity,
    bounds: tuple[float, float],
) -> dict[str, float]:
    """r_k > 0 of every layer by the allocator, whose columns the analysis must have."""
    chosen = allocators.get(allocator)
    need(granularity in ("block", "matrix"), f"granularity {granularity!r}: wanted 'block' or 'matrix'")
    check_series(analysis, chosen)
    return chosen.ratios(analysis.layers, sparsity, epsilon, granularity, *([bounds] if chosen.bounded else []))


def check_series(analysis: Analysis, chosen: allocators.Allocator) -> None:
    """ValueError if the analysis lacks a column or a series that the allocator reads."""
    for name, stat in analysis.layers.items():
        for entry in (*chosen.columns, *chosen.series):
            how = f"run `alphaprune analyze` with {option_for(entry)}"
            if entry in curves.SERIES:
                how = "give `alphaprune plan` the error curves that `alphaprune compare` makes, --curves FILE"
            need(
                entry in stat.columns or entry in stat.series,
                f"{name}: allocator {chosen.name} reads {entry}, which this analysis lacks; {how}, or choose "
                f"--allocator uniform",
            )


def _counts(
    shapes: dict[str, tuple[int, int]],
    ratios: dict[str, float],
    budget: int | None = None,
    *,
    family: int | None,
    sparsity: float,
    low: float,
    high: float,
) -> dict[str, LayerPlan]:
    """Zeros of the layers in `shapes`, which share the budget; where none is given, it is that of the sparsity."""
    sizes = [n * k for n, k in shapes.values()]
    share = sparsity if budget is None else min(max(budget / sum(sizes), low), high)
    budget = round(sparsity * sum(sizes)) if budget is None else budget
    wanted = water_fill(sizes, [ratios[name] for name in shapes], share, low, high)
    if family is not None:
        return nm_planning.family(shapes, dict(zip(shapes, wanted, strict=True)), family, budget, low, high)
    zeros = share_counts(sizes, wanted, budget, low, high)
    return {n: LayerPlan(shape, z, Unstructured()) for (n, shape), z in zip(shapes.items(), zeros, strict=True)}


def _gaining(
    shapes: dict[str, tuple[int, int]],
    ratios: dict[str, float],
    sparsity: float,
    low: float,
    high: float,
    break_even: Mapping[str, float],
    fill: Callable[..., dict[str, LayerPlan]],
) -> dict[str, LayerPlan]:
    """The layers' zeros, none in layers that would be slower than dense for them."""
    budget, active = round(sparsity * sum(n * k for n, k in shapes.values())), dict(shapes)
    while True:
        need(
            budget <= sum(math.floor(high * n * k + SLACK) for n, k in active.values()),
            f"sparsity {sparsity} cannot be reached: {len(shapes) - len(active)} of {len(shapes)} layers stay dense, "
            f"since their share of it would make them slower, and {high} of the others' weights is too little; raise "
            f"the most sparsity of a layer, or leave out the time table",
        )
        found = fill(active, ratios, budget if len(active) < len(shapes) else None)
        below = {name: break_even[name] - p.sparsity for name, p in found.items() if _loses(p, break_even[name])}
        if not below:
            return {name: found.get(name) or _untouched(p, found) for name, p in shapes.items()}
        loser = max(below, key=below.__getitem__)
        need(
            low == 0,
            f"{loser}: it would be faster dense, but every layer is to have a sparsity of {low} at least; leave out "
            f"the least sparsity or the time table",
        )
        del active[loser]


def _loses(planned: LayerPlan, break_even: float) -> bool:
    """Whether a layer has zeros, and more than one too few to gain from them."""
    return planned.zeros > 0 and planned.zeros + 1 <= break_even * planned.shape[0] * planned.shape[1]


def _untouched(shape: tuple[int, int], others: dict[str, LayerPlan]) -> LayerPlan:
    """A layer without zeros, its pattern of the same kind as the others'."""
    kind = next(iter(others.values())).pattern
    return LayerPlan(shape, 0, NM(kind.of, kind.of) if isinstance(kind, NM) else kind)


def limits(sparsity: float | None, bounds: Bounds | None = None) -> tuple[float, float]:
    """Least and most sparsity of a layer: 0 and 0.95, or half-way from `sparsity` to 1 above 0.9, unless given."""
    low, high = bounds or (None, None)
    low = 0.0 if low is None else low
    high = (0.95 if sparsity is None or sparsity <= 0.9 else 1 - (1 - sparsity) / 2) if high is None else high
    for value in (low, high):
        need(is_number(value) and 0 <= value <= 1, f"bounds: wanted sparsities from 0 to 1, got {value}")
    need(low <= high, f"bounds: the least sparsity of a layer, {low}, is above the most, {high}")
    reachable = sparsity is None or low <= sparsity <= high
    need(reachable, f"sparsity {sparsity} cannot be reached with layers between {low} and {high}")
    return low, high


def auto_epsilon(sparsity: float, high: float) -> float:
    """0 up to a sparsity of 0.5, where no allocation beats uniform; rising to its cap at 0.6.

    The cap is 0.3, or less where 1 + ε would push the most pruned layers over `high`: min(0.3, high/sparsity − 1).
    Allocators may have an epsilon of their own, or a cap that depends on the model (`Allocator.auto_cap`).
    """
    if sparsity <= 0.5:
        return 0.0
    return max(0.0, min(0.3, high / sparsity - 1)) * min(1.0, round((sparsity - 0.5) / 0.1, 9))


def _epsilon(
    epsilon: "float | str", sparsity: float, high: float, analysis: Analysis, allocator: str, granularity: Granularity
) -> float:
    if epsilon == "auto":
        chosen = allocators.get(allocator)
        check_series(analysis, chosen)
        found = (chosen.auto_epsilon or auto_epsilon)(sparsity, high)
        return min(found, chosen.auto_cap(analysis.layers, granularity)) if chosen.auto_cap else found
    if not is_number(epsilon) or not 0 <= float(epsilon) < 1:
        raise ValueError(f"epsilon {epsilon!r}: wanted a number from 0 to below 1, or 'auto'")
    return float(epsilon)


def _fixed(analysis: Analysis, pattern: NM, bounds: Bounds | None, break_even: Mapping[str, float]) -> Plan:
    """The same N:M everywhere; there is nothing to allocate."""
    limits(pattern.sparsity, bounds)
    for name, stat in analysis.layers.items():
        check_divisible(name, stat.shape, pattern.of)
    layers = {name: patterned(stat.shape, pattern) for name, stat in analysis.layers.items()}
    for name, planned in layers.items():
        need(
            not _loses(planned, break_even.get(name, 0)),
            f"{name}: {pattern} would be slower than dense, which needs a sparsity of {break_even.get(name, 0):g}, and "
            f"no other layer can take its zeros; choose another pattern, or leave out the time table",
        )
    return Plan(analysis.model, analysis.fingerprint, pattern.sparsity, "uniform", 0.0, str(pattern), layers)


def _ranks(
    analysis: Analysis,
    sparsity: float,
    pattern: NM,
    allocator: str,
    epsilon: float,
    granularity: Granularity,
    bounds: tuple[float, float],
) -> dict[str, float]:
    """Numbers that are larger where a pattern should rather be: ratios, or what error curves say of the pattern."""
    if allocator == measured.ALLOCATOR.name:
        check_series(analysis, measured.ALLOCATOR)
        return measured.order(analysis.layers, pattern.sparsity)
    return ratios(analysis, sparsity, allocator, epsilon, granularity, bounds)


def _mixed(
    analysis: Analysis,
    sparsity: float,
    pattern: NM,
    ranks: dict[str, float],
    bounds: tuple[float, float],
    break_even: Mapping[str, float],
) -> dict[str, LayerPlan]:
    """The pattern in some layers, among them none that it makes slower, and the others dense."""
    need(
        sparsity < pattern.sparsity,
        f"pattern {pattern} has sparsity {pattern.sparsity:g}, not {sparsity}: give no more than that, or leave the "
        f"sparsity out",
    )
    need(
        bounds[0] == 0 and bounds[1] >= pattern.sparsity - SLACK,
        f"pattern {pattern} with sparsity {sparsity}: layers have a sparsity of 0 or {pattern.sparsity:g}, which is "
        f"not between {bounds[0]} and {bounds[1]}",
    )
    shapes = {name: stat.shape for name, stat in analysis.layers.items()}
    planned = {name: patterned(shape, pattern) for name, shape in shapes.items()}
    able = {name: shapes[name] for name, p in planned.items() if not _loses(p, break_even.get(name, 0))}
    budget = round(sparsity * sum(n * k for n, k in shapes.values()))
    need(
        budget <= sum(planned[name].zeros for name in able),
        f"sparsity {sparsity} cannot be reached: {pattern} would be slower than dense in {len(shapes) - len(able)} of "
        f"{len(shapes)} layers, and the others have too few zeros; choose another pattern, or leave out the time table",
    )
    blocks = {name: analysis.layers[name].block for name in able}
    found = nm_planning.mixed(able, ranks, blocks, pattern, budget) if able else {}
    return {name: found.get(name) or patterned(shape, NM(pattern.of, pattern.of)) for name, shape in shapes.items()}
