"""What of a model gets one amount each, by method: layers for bits and ranks, heads and channels of blocks."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from alphaprune import shapes
from alphaprune.allocators import Granularity
from alphaprune.analysis import Analysis, is_number, need
from alphaprune.compressions.plans import CompressionPlan, Kept, Method, Part, fill
from alphaprune.counts import SLACK
from alphaprune.formats.quantize import BITS
from alphaprune.model import Description, Source

PARTS = ("both", "heads", "channels")
WHOLE = 16  # bits of a layer that is left as it is
REVERSED = {"bits": False, "rank": True, "structured": False}

Which = Literal["both", "heads", "channels"]


def plan(
    source: Source,
    analysis: Analysis,
    method: Method,
    budget: float,
    allocator: str = "alpha",
    epsilon: "float | Literal['auto']" = "auto",
    granularity: Granularity = "block",
    choices: Sequence[int] = BITS,
    which: Which = "channels",
    multiple: int = 8,
    reverse: bool | None = None,
) -> CompressionPlan:
    """How much every part of a model keeps.

    method, budget: "bits", the mean of the bits of all prunable weights, scales not counted; "rank", the weights of the
    factors over those of the dense layers; "structured", the share of the prunable weights that goes with heads and
    channels. It is never exceeded, and what is left of it is less than the smallest step: with bits per block that of
    one block, with granularity "matrix" that of one layer; one rank of the smallest layer; `multiple` channels.
    choices: the bits that there are, of 2…8, and 16 for a layer that is left alone.   which: what "structured" removes;
    multiple: channels are kept by so many.   reverse: the other direction than the method's, see plans.py.
    Raises ValueError for a budget out of range, an analysis of another model, or a family without known heads.
    """
    description = source.description()
    need(
        analysis.fingerprint == description.fingerprint,
        f"the analysis is of another model ({analysis.model}) than {description.name}; analyze this one",
    )
    need(granularity in ("block", "matrix"), f"granularity {granularity!r}: wanted 'block' or 'matrix'")
    check_budget(method, budget, choices)
    parts = parts_of(source, description, method, choices, which, multiple)
    grouped = _by_block(parts, description) if method == "bits" and granularity == "block" else parts
    total = sum(part.costs[-1] for part in parts.values())
    share = {"bits": budget / max(choices), "rank": budget, "structured": 1 - budget}[method]
    most = math.floor(share * total * (1 + 1e-12) + SLACK)
    reverse = REVERSED[method] if reverse is None else reverse
    amounts, spread = fill(analysis, method, grouped, most, allocator, epsilon, granularity, reverse)
    if grouped is not parts:
        amounts = {layer: amounts[name] for name, part in grouped.items() for layer in part.layers}
    kept = {name: Kept(amounts[name], part.amounts[-1], part.weights) for name, part in parts.items()}
    spent = sum(part.costs[list(part.amounts).index(amounts[name])] for name, part in parts.items())
    realized = {"bits": spent / total * max(choices), "rank": spent / total, "structured": 1 - spent / total}[method]
    return CompressionPlan(
        description.name, description.fingerprint, method, float(budget), realized, allocator, spread, kept
    )


def parts_of(
    source: Source,
    description: Description,
    method: Method,
    choices: Sequence[int] = BITS,
    which: Which = "both",
    multiple: int = 1,
) -> dict[str, Part]:
    """The parts of a model by name, as `plan` takes its arguments."""
    if method == "structured":
        return _structured(source, description, which, multiple)
    found = {}
    for name, (n, k) in description.shapes.items():
        if method == "bits":
            amounts, costs = tuple(sorted(choices)), tuple(n * k * bits for bits in sorted(choices))
        else:
            need(not name.endswith((".first", ".second")), f"{name}: is a factor of a layer of low rank already")
            gaining = range(1, -(-n * k // (n + k)))  # r·(N + K) < N·K
            amounts, costs = (*gaining, min(n, k)), (*(rank * (n + k) for rank in gaining), n * k)
        found[name] = Part((name,), n * k, amounts, costs)
    return found


def shapes_of(source: Source, plan: CompressionPlan | None) -> shapes.Shapes:
    """What of a model's blocks is not as its config says, when a plan is carried out; None: as they are."""
    own = shapes.observe(source.skeleton.get_submodule(source.prefix), source.prefix, source.config)
    if plan is not None and plan.method == "rank":
        lower = {name: kept.amount for name, kept in plan.parts.items() if kept.amount < kept.of}
        return replace(own, ranks=own.ranks | lower)
    if plan is not None and plan.method == "structured":
        blocks = [source.block_name(index) for index in range(source.block_count())]
        heads, channels = (
            tuple(plan.parts[f"{block}.{part}"].amount for block in blocks) for part in ("self_attn", "mlp")
        )
        return shapes.unlike(source.config, heads, channels, own.ranks)
    return own


def check(plan: CompressionPlan, source: Source) -> None:
    """ValueError unless the plan is for this model, part by part."""
    description = source.description()
    choices = BITS
    if plan.method == "bits":
        for name, kept in plan.parts.items():
            good = {kept.amount, kept.of} <= {*BITS, WHOLE}
            need(good, f"{name}: {kept.amount} of {kept.of} bits: there are {BITS[0]} to {BITS[-1]}, and {WHOLE}")
        choices = (BITS[0], max(kept.of for kept in plan.parts.values()))
    plan.check(description, parts_of(source, description, plan.method, choices))


def check_budget(method: Method, budget: float, choices: Sequence[int] = BITS) -> None:
    """ValueError for a budget, or bits to choose from, that there cannot be."""
    if method == "bits":
        good = bool(choices) and all(choice in (*BITS, WHOLE) for choice in choices)
        need(good, f"choices {list(choices)}: wanted some of the bits 2 to 8, and 16 for layers that are left alone")
        low, high = min(choices), max(choices)
        need(is_number(budget) and low <= budget <= high, f"bits {budget}: wanted a mean from {low} to {high}")
    else:
        need(is_number(budget) and 0 < budget < 1, f"{method} {budget}: wanted a share between 0 and 1")


def _by_block(parts: dict[str, Part], description: Description) -> dict[str, Part]:
    """Parts of one amount for all layers of a block, by its number."""
    members: dict[int, list[Part]] = {}
    for name, part in parts.items():
        members.setdefault(description.block_of[name], []).append(part)
    return {
        str(block): Part(
            tuple(layer for part in group for layer in part.layers),
            sum(part.weights for part in group),
            group[0].amounts,
            tuple(sum(costs) for costs in zip(*(part.costs for part in group), strict=True)),
        )
        for block, group in members.items()
    }


def _structured(source: Source, description: Description, which: Which, multiple: int) -> dict[str, Part]:
    """Heads with their queries, and channels of the MLP; one of a kind that stays is a part with one amount."""
    shapes.check_layout(source.config)
    need(which in PARTS, f"parts {which!r}: wanted one of {', '.join(PARTS)}")
    need(isinstance(multiple, int) and multiple >= 1, f"multiple {multiple!r}: wanted a whole number from 1")
    found = {}
    for child, block in source.skeleton.get_submodule(source.prefix).named_children():
        name = f"{source.prefix}.{child}"
        groups = {"self_attn": [shapes.QUERY, shapes.KEY, shapes.VALUE, shapes.OUT]}
        groups["mlp"] = [shapes.GATE, shapes.UP, shapes.DOWN]
        for part, inner in groups.items():
            layers = tuple(f"{name}.{layer}" for layer in inner)
            for layer in layers:
                need(layer in description.shapes, f"{layer}: is no single matrix, so its channels cannot be removed")
            weights = sum(math.prod(description.shapes[layer]) for layer in layers)
            if part == "mlp":
                units = description.shapes[layers[2]][1]
                amounts = [*range(multiple, units, multiple), units] if which != "heads" else [units]
            else:
                units = shapes.kv_heads(block, source.config)
                amounts = list(range(1, units + 1)) if which != "channels" else [units]
            found[f"{name}.{part}"] = Part(layers, weights, amounts, [weights // units * a for a in amounts])
    return found
