"""N:M per layer: N of a family such as N:8 near the wanted sparsities, or one pattern and which layers stay dense."""

import math
import re
from collections.abc import Mapping
from itertools import accumulate

from alphaprune.analysis import need
from alphaprune.counts import SLACK, share_steps
from alphaprune.pattern import NM, Pattern, parse
from alphaprune.plan_file import LayerPlan, check_divisible, patterned

GOLDEN = (math.sqrt(5) - 1) / 2

Shapes = Mapping[str, tuple[int, int]]


def kind(pattern: "str | Pattern") -> tuple[NM | None, int | None]:
    """A fixed N:M, if the pattern is one, and the M of a family such as "N:8", if it is one."""
    text = str(pattern)
    of = int(found[1]) if (found := re.fullmatch(r"N:(\d+)", text)) else None
    need(of is None or of >= 2, f"pattern {text}: N:M needs M of 2 at least")
    known = None if of is not None else parse(pattern)
    return (known if isinstance(known, NM) else None), of


def family(
    shapes: Shapes, wanted: Mapping[str, float], of: int, budget: int, low: float, high: float
) -> dict[str, LayerPlan]:
    """Each layer its own N:`of`, N from 1 to `of` (dense), near the wanted sparsities.

    Their zeros meet the budget to within one step, 1/`of`, of the smallest layer.
    """
    for name, shape in shapes.items():
        check_divisible(name, shape, of)
    most = min(math.floor(high * of + SLACK), of - 1) / of
    units = [n * k // of for n, k in shapes.values()]  # zeros per step of N
    share = budget / (sum(units) * of)
    need(share <= most, f"sparsity {share:g} cannot be reached: N:{of} has {most:g} at most inside the bounds")
    drops = share_steps(units, [wanted[name] * of for name in shapes], budget, low * of, min(high * of, of - 1))
    return {n: patterned(shape, NM(of - drop, of)) for (n, shape), drop in zip(shapes.items(), drops, strict=True)}


def mixed(
    shapes: Shapes, ratios: Mapping[str, float], blocks: Mapping[str, int], pattern: NM, budget: int
) -> dict[str, LayerPlan]:
    """The pattern in the layers with the largest ratios, as many as the budget asks for, and the others dense.

    Among equal ratios whole blocks come first, in an order whose every beginning is spread evenly over the depth, and
    in a block the largest layers, which gain the most; of equal ones the first. Of layers of one size none is pruned
    before one that comes earlier. The zeros meet the budget to within those of the smallest layer, and within half of
    them unless all or none of the smallest are pruned; where the sizes allow neither, to within half of the zeros of
    the layer at the border.

    Raises ValueError naming a layer whose K is no multiple of M, or a budget above what the layers have.
    """
    for name, shape in shapes.items():
        check_divisible(name, shape, pattern.of)
    ranks = {block: rank for rank, block in enumerate(sorted(set(blocks.values())))}
    ordered = sorted(
        shapes,
        key=lambda name: (-ratios[name], ranks[blocks[name]] * GOLDEN % 1, -shapes[name][0] * shapes[name][1]),
    )
    units = [patterned(shapes[name], pattern).zeros for name in ordered]
    total = sum(units)
    need(budget <= total, f"{budget} zeros cannot be reached: {pattern} makes {total} in the layers that may have it")
    before = [0, *accumulate(units)]
    wanted = [min(max((budget - b) / u, 0.0), 1.0) for b, u in zip(before, units, strict=False)]
    try:
        steps = share_steps(units, wanted, budget, 0, 1)
    except ValueError:  # no choice of layers comes within the smallest
        count = min(range(len(before)), key=lambda i: abs(before[i] - budget))
        steps = [1] * count + [0] * (len(units) - count)
    left: dict[int, int] = {}
    for unit, step in zip(units, steps, strict=True):
        left[unit] = left.get(unit, 0) + step
    found = {}
    for name, unit in zip(ordered, units, strict=True):
        found[name] = patterned(shapes[name], pattern if left[unit] > 0 else NM(pattern.of, pattern.of))
        left[unit] -= 1
    return {name: found[name] for name in shapes}
