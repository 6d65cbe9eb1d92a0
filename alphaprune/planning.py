"""LayerStats and a sparsity → Plan: an exact number of zeros per layer, inside bounds, and its JSON file."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from alphaprune import allocators
from alphaprune.allocators import Granularity
from alphaprune.analysis import Analysis, is_count, is_number, need, option_for, read_json, read_shape
from alphaprune.counts import SLACK, share_counts, share_steps, water_fill
from alphaprune.files import atomic_write_text
from alphaprune.model import Description
from alphaprune.pattern import NM, Pattern, Unstructured, parse

VERSION = 1

Bounds = tuple[float | None, float | None]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer W [N, K]: the exact count of its zeros, and where they may be."""

    shape: tuple[int, int]
    zeros: int
    pattern: Pattern

    @property
    def sparsity(self) -> float:
        return self.zeros / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Plan:
    """How much to prune in every prunable layer of one model.

    sparsity: what was asked for (`realized` is what the counts make). epsilon: the spread used, as a number.
    pattern: as asked for: "unstructured", "2:4", or a family such as "N:8", of which each layer has its own.
    """

    model: str
    fingerprint: str
    sparsity: float
    allocator: str
    epsilon: float
    pattern: str
    layers: dict[str, LayerPlan]

    @property
    def realized(self) -> float:
        """Zeros / weights over all layers."""
        return sum(p.zeros for p in self.layers.values()) / sum(p.shape[0] * p.shape[1] for p in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        layers = {name: {**asdict(p), "pattern": str(p.pattern)} for name, p in self.layers.items()}
        return {"kind": "plan", "version": VERSION, **asdict(self), "layers": layers}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, path: "str | Path") -> None:
        """Writes a JSON file; it appears whole or not at all."""
        atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: "str | Path") -> "Plan":
        """What `save` wrote. ValueError, naming the layer where there is one, if anything is missing or impossible."""
        found = read_json(path, "plan", VERSION, cls)
        for name in ("sparsity", "epsilon"):
            need(is_number(found[name]) and 0 <= found[name] < 1, f"{path}: {name}: wanted 0 to 1, got {found[name]!r}")
        for name in ("allocator", "pattern"):
            need(isinstance(found[name], str), f"{path}: {name}: wanted a text, got {found[name]!r}")
        layers = {name: _layer_plan(f"{path}: {name}", entry) for name, entry in found["layers"].items()}
        return cls(**{**found, "layers": layers})

    def check(self, description: Description) -> None:
        """ValueError if this plan is for another model, or lacks a layer, or has one too many."""
        for name, shape in description.shapes.items():
            need(name in self.layers, f"{name}: the plan for {self.model} has no such layer; plan again for this model")
            wanted = self.layers[name].shape
            need(wanted == tuple(shape), f"{name}: the plan is for shape {wanted}, the layer has {tuple(shape)}")
        for name in self.layers:
            need(name in description.shapes, f"{name}: in the plan, but {description.name} has no such prunable layer")
        need(
            self.fingerprint == description.fingerprint,
            f"the plan was made for another model: {self.model} with fingerprint {self.fingerprint[:12]}…, while "
            f"{description.name} has {description.fingerprint[:12]}…; analyze and plan this one",
        )


def plan(
    analysis: Analysis,
    sparsity: float | None = None,
    allocator: str = "alpha",
    epsilon: "float | Literal['auto']" = "auto",
    pattern: "str | Pattern" = "unstructured",
    granularity: Granularity = "block",
    bounds: Bounds | None = None,
    break_even: Mapping[str, float] | None = None,
) -> Plan:
    """How much to prune in every layer of the analysed model; the zeros sum to round(sparsity · weights).

    epsilon: spread of the ratios, 0 ≤ ε < 1, or "auto" (`auto_epsilon`).   bounds: least and most sparsity of a layer.
    pattern: "unstructured"; a fixed one such as "2:4", which implies the sparsity; or "N:8" with a literal N, which
    chooses N of 1…8 per layer and meets the sparsity to within one step (1/8) of the smallest layer.
    break_even: of each layer the sparsity from which on it is faster than dense (see kernels/table.py). One that would
    stay below gets no zeros at all, the others get its share: first the one that is farthest below, and so on.

    Raises ValueError for a sparsity outside [0, 1) or unreachable inside the bounds, a column that the analysis lacks,
    a layer whose K is no multiple of M, or a budget that the layers which gain cannot take.
    """
    text = str(pattern)
    family = int(found[1]) if (found := re.fullmatch(r"N:(\d+)", text)) else None
    fixed = None if family is not None else parse(pattern)
    need(family is None or family >= 2, f"pattern {text}: N:M needs M of 2 at least")
    if isinstance(fixed, NM):
        return _fixed(analysis, sparsity, fixed, bounds, break_even or {})
    need(sparsity is not None, f"pattern {text} implies no sparsity: give one, such as 0.7")
    need(is_number(sparsity) and 0 <= sparsity < 1, f"sparsity {sparsity}: wanted 0 ≤ sparsity < 1")
    low, high = limits(sparsity, bounds)
    spread = _epsilon(epsilon, sparsity, high, allocator)
    ratios = _ratios(analysis, sparsity, allocator, spread, granularity)
    shapes = {name: stat.shape for name, stat in analysis.layers.items()}
    fill = partial(_counts, family=family, sparsity=sparsity, low=low, high=high)
    layers = _gaining(shapes, ratios, sparsity, low, high, break_even, fill) if break_even else fill(shapes, ratios)
    return Plan(analysis.model, analysis.fingerprint, float(sparsity), allocator, spread, text, layers)


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
    ratios = _ratios(analysis, sparsity, allocator, epsilon, granularity)
    sizes = [stat.shape[0] * stat.shape[1] for stat in analysis.layers.values()]
    return dict(zip(ratios, water_fill(sizes, list(ratios.values()), sparsity, *bounds), strict=True))


def _ratios(
    analysis: Analysis, sparsity: float, allocator: str, epsilon: float, granularity: Granularity
) -> dict[str, float]:
    """r_k of every layer by the allocator, whose columns the analysis must have."""
    chosen = allocators.get(allocator)
    need(granularity in ("block", "matrix"), f"granularity {granularity!r}: wanted 'block' or 'matrix'")
    for name, stat in analysis.layers.items():
        for entry in (*chosen.columns, *chosen.series):
            need(
                entry in stat.columns or entry in stat.series,
                f"{name}: allocator {allocator} reads {entry}, which this analysis lacks; run `alphaprune analyze` "
                f"with {option_for(entry)}, or choose --allocator uniform",
            )
    return chosen.ratios(analysis.layers, sparsity, epsilon, granularity)


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
        return _family_layers(shapes, dict(zip(shapes, wanted, strict=True)), family, budget, low, high)
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


def limits(sparsity: float, bounds: Bounds | None = None) -> tuple[float, float]:
    """Least and most sparsity of a layer: 0 and 0.95, or half-way from `sparsity` to 1 above 0.9, unless given."""
    low, high = bounds or (None, None)
    low = 0.0 if low is None else low
    high = (0.95 if sparsity <= 0.9 else 1 - (1 - sparsity) / 2) if high is None else high
    for value in (low, high):
        need(is_number(value) and 0 <= value <= 1, f"bounds: wanted sparsities from 0 to 1, got {value}")
    need(low <= high, f"bounds: the least sparsity of a layer, {low}, is above the most, {high}")
    need(low <= sparsity <= high, f"sparsity {sparsity} cannot be reached with layers between {low} and {high}")
    return low, high


def auto_epsilon(sparsity: float, high: float) -> float:
    """0 up to a sparsity of 0.5, where no allocation beats uniform; rising to its cap at 0.6.

    The cap is 0.3, or less where 1 + ε would push the most pruned layers over `high`: min(0.3, high/sparsity − 1).
    """
    if sparsity <= 0.5:
        return 0.0
    return max(0.0, min(0.3, high / sparsity - 1)) * min(1.0, round((sparsity - 0.5) / 0.1, 9))


def _epsilon(epsilon: "float | str", sparsity: float, high: float, allocator: str) -> float:
    if epsilon == "auto":
        return (allocators.get(allocator).auto_epsilon or auto_epsilon)(sparsity, high)
    need(is_number(epsilon) and 0 <= epsilon < 1, f"epsilon {epsilon!r}: wanted a number from 0 to below 1, or 'auto'")
    return float(epsilon)


def _fixed(
    analysis: Analysis, sparsity: float | None, pattern: NM, bounds: Bounds | None, break_even: Mapping[str, float]
) -> Plan:
    """The same N:M everywhere; there is nothing to allocate."""
    agrees = sparsity is None or (is_number(sparsity) and abs(sparsity - pattern.sparsity) < 1e-9)
    need(agrees, f"pattern {pattern} has sparsity {pattern.sparsity:g}, not {sparsity}; leave the sparsity out")
    limits(pattern.sparsity, bounds)
    layers = {}
    for name, stat in analysis.layers.items():
        _check_divisible(name, stat.shape, pattern.of)
        layers[name] = LayerPlan(stat.shape, _zeros(stat.shape, pattern), pattern)
        need(
            not _loses(layers[name], break_even.get(name, 0)),
            f"{name}: {pattern} would be slower than dense, which needs a sparsity of {break_even.get(name, 0):g}, and "
            f"no other layer can take its zeros; choose another pattern, or leave out the time table",
        )
    return Plan(analysis.model, analysis.fingerprint, pattern.sparsity, "uniform", 0.0, str(pattern), layers)


def _family_layers(
    shapes: dict[str, tuple[int, int]], wanted: dict[str, float], of: int, budget: int, low: float, high: float
) -> dict[str, LayerPlan]:
    """Each layer its own N:`of`, N from 1 to `of` (dense), near the wanted sparsities and on the budget."""
    for name, shape in shapes.items():
        _check_divisible(name, shape, of)
    most = min(math.floor(high * of + SLACK), of - 1) / of
    units = [n * k // of for n, k in shapes.values()]  # zeros per step of N
    share = budget / (sum(units) * of)
    need(share <= most, f"sparsity {share:g} cannot be reached: N:{of} has {most:g} at most inside the bounds")
    drops = share_steps(units, [wanted[name] * of for name in shapes], budget, low * of, min(high * of, of - 1))
    patterns = [NM(of - drop, of) for drop in drops]
    return {n: LayerPlan(s, _zeros(s, p), p) for (n, s), p in zip(shapes.items(), patterns, strict=True)}


def _check_divisible(name: str, shape: Sequence[int], of: int) -> None:
    need(shape[1] % of == 0, f"{name}: N:{of} needs K to be a multiple of {of}, got shape {tuple(shape)}")


def _zeros(shape: tuple[int, int], pattern: NM) -> int:
    return shape[0] * shape[1] // pattern.of * (pattern.of - pattern.keep)


def _layer_plan(where: str, entry: dict[str, Any]) -> LayerPlan:
    shape, zeros = read_shape(where, entry), entry.get("zeros")
    need(is_count(zeros), f"{where}: zeros: wanted a count, got {zeros!r}")
    need(zeros <= shape[0] * shape[1], f"{where}: zeros: {zeros} is more than the shape {shape} has weights")
    need(isinstance(entry.get("pattern"), str), f"{where}: pattern: wanted a text, got {entry.get('pattern')!r}")
    try:
        pattern = parse(entry["pattern"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if isinstance(pattern, NM):
        _check_divisible(where, shape, pattern.of)
        implied = _zeros(shape, pattern)
        need(zeros == implied, f"{where}: zeros: {pattern} on shape {shape} makes {implied}, not {zeros}")
    return LayerPlan(shape, zeros, pattern)
