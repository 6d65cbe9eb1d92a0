"""Error curves and times → the best model within a latency, or the fastest within a loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from alphaprune import nm_planning
from alphaprune.allocators import measured
from alphaprune.analysis import Analysis, is_number, need
from alphaprune.counts import SLACK
from alphaprune.pattern import NM, Pattern, Unstructured
from alphaprune.plan_file import LayerPlan, Plan, check_divisible, patterned

TIMED = tuple(percent / 100 for percent in range(101))  # the sparsities that layers have times for

Seconds = Mapping[str, Sequence[float]]


def fastest(
    analysis: Analysis,
    times: Seconds,
    latency: float | None,
    max_loss: float | None,
    pattern: "str | Pattern",
    low: float,
    high: float,
) -> Plan:
    """The model with the least predicted loss whose layers take `latency` seconds at most; or, of that None, the
    fastest one that loses `max_loss` at most. The sparsity of the plan is what comes out.

    times: seconds of each layer at the sparsities TIMED, at the first of them dense. A layer that would be no faster
    than dense stays dense, or as near to it as `low` lets it. Layers of a block share a sparsity: a multiple of 0.01,
    what N:M allows, or a bound.   Raises ValueError where there is no such model, and says the least.
    """
    fixed, family = nm_planning.kind(pattern)
    of = fixed.of if fixed else family
    need(latency is None or max_loss is None, "give a latency or a loss, not both: either determines the other")
    for name, value in (("latency", latency), ("loss", max_loss)):
        need(value is None or (is_number(value) and value >= 0), f"{name} {value}: wanted a number from 0")
    levels = _levels(fixed, family, low, high)
    need(bool(levels), f"pattern {pattern} has no sparsity between {low} and {high}")
    for name, stat in analysis.layers.items():
        need(len(times.get(name, ())) == len(TIMED), f"{name}: wanted its seconds at {len(TIMED)} sparsities")
        if of is not None:
            check_divisible(name, stat.shape, of)
    taken = {name: np.interp(levels, TIMED, times[name]) for name in analysis.layers}
    found = measured.timed(analysis.layers, taken, levels, latency, max_loss)
    layers = {}
    for name, stat in analysis.layers.items():
        gains = np.interp(found[name], TIMED, times[name]) < times[name][0]
        layers[name] = _at(stat.shape, found[name] if gains else levels[0], of, low, high)
    made = Plan(analysis.model, analysis.fingerprint, 0.0, measured.ALLOCATOR.name, 0.0, str(pattern), layers)
    return replace(made, sparsity=made.realized)


def _levels(fixed: NM | None, family: int | None, low: float, high: float) -> list[float]:
    """The sparsities inside the bounds that the pattern lets blocks have, rising."""
    if fixed is not None:
        known = sorted({0.0, fixed.sparsity})
    else:
        known = TIMED if family is None else [drop / family for drop in range(family)]
    inside = [s for s in known if low - SLACK <= s <= high + SLACK]
    return inside if fixed or family else sorted({low, *inside, high})


def _at(shape: tuple[int, int], share: float, of: int | None, low: float, high: float) -> LayerPlan:
    if of is not None:
        return patterned(shape, NM(of - round(share * of), of))
    size = shape[0] * shape[1]
    least, most = math.ceil(low * size - SLACK), math.floor(high * size + SLACK)
    return LayerPlan(shape, min(max(round(share * size), least), most), Unstructured())


def predicted_seconds(plan: Plan, times: Seconds) -> float:
    """Seconds of all layers as planned. times: as `fastest` takes them."""
    return math.fsum(np.interp(p.sparsity, TIMED, times[name]) for name, p in plan.layers.items())


def predicted_loss(plan: Plan, analysis: Analysis) -> float:
    """What the error curves in the analysis say of a plan (`measured.predicted`)."""
    return measured.predicted(analysis.layers, {name: p.zeros for name, p in plan.layers.items()})
