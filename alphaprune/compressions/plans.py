"""LayerStats and a budget → how many bits, which rank or how many channels every part of a model keeps; its JSON file.

The rule is that of sparsities (planning.py): a share of each part is removed, in the allocator's ratios, and one factor
meets the budget. Light tails (large alpha) lose more bits and channels. Ranks go the other way: a heavy tail is a
spectrum of which few directions hold the most, so those layers keep the lower rank (Lu et al. 2024, on low rank).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from alphaprune import allocators, planning
from alphaprune.allocators import Granularity
from alphaprune.analysis import Analysis, is_count, is_number, need, read_json
from alphaprune.counts import share_choices, water_fill
from alphaprune.files import atomic_write_text
from alphaprune.model import Description

VERSION = 1
KIND = "compression"  # of the file
METHODS = ("bits", "rank", "structured")
MOST = 0.95  # of a part that is removed
SPREAD = 0.3  # the most that an automatic ε may be, as for sparsities

Method = Literal["bits", "rank", "structured"]


@dataclass(frozen=True)
class Part:
    """What gets one amount: a layer, a block, the heads or the channels of a block.

    layers: whose weights it is made of.   weights: how many they are.   amounts: that it can keep, rising, the last one
    is all that is there.   costs: of each amount, in weights or, of bits, in bits.
    """

    layers: tuple[str, ...]
    weights: int
    amounts: Sequence[int]
    costs: Sequence[int]


@dataclass(frozen=True)
class Kept:
    """How much of a part is kept, of how much, and the weights that it is made of."""

    amount: int
    of: int
    weights: int


@dataclass(frozen=True)
class CompressionPlan:
    """What every part of one model keeps. budget: average bits, or the share of weights kept or removed, as asked for.

    realized: the same as the amounts make it.   epsilon: the spread used.   parts: by name of the layer, or of the
    attention or MLP of a block.
    """

    model: str
    fingerprint: str
    method: Method
    budget: float
    realized: float
    allocator: str
    epsilon: float
    parts: dict[str, Kept]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": KIND, "version": VERSION, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, path: "str | Path") -> None:
        """Writes a JSON file; it appears whole or not at all."""
        atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: "str | Path") -> "CompressionPlan":
        """What `save` wrote. ValueError, naming the part where there is one, if anything is missing or impossible."""
        found = read_json(path, KIND, VERSION, cls, "part")
        need(found["method"] in METHODS, f"{path}: method {found['method']!r}: wanted one of {', '.join(METHODS)}")
        for name in ("budget", "realized", "epsilon"):
            need(is_number(found[name]) and found[name] >= 0, f"{path}: {name}: wanted a number, got {found[name]!r}")
        need(isinstance(found["allocator"], str), f"{path}: allocator: wanted a text, got {found['allocator']!r}")
        parts = {}
        for name, entry in found["parts"].items():
            sizes = [entry.get(field) for field in ("amount", "of", "weights")]
            good = all(is_count(size) and size > 0 for size in sizes) and sizes[0] <= sizes[1]
            need(good, f"{path}: {name}: wanted amount, of and weights from 1, got {entry!r}")
            parts[name] = Kept(*sizes)
        return cls(**{**found, "parts": parts})

    def check(self, description: Description, parts: Mapping[str, Part]) -> None:
        """ValueError if this plan is for another model, or names other parts than the model has."""
        for name, part in parts.items():
            need(name in self.parts, f"{name}: the plan for {self.model} has no such part; plan again for this model")
            kept = self.parts[name]
            same = (kept.of, kept.weights) == (part.amounts[-1], part.weights) and kept.amount >= part.amounts[0]
            need(
                same,
                f"{name}: the plan keeps {kept.amount} of {kept.of} in {kept.weights} weights, and the model has "
                f"{part.amounts[-1]} in {part.weights}; plan again for this model",
            )
        for name in self.parts:
            need(name in parts, f"{name}: in the plan, but {description.name} has no such part")
        need(
            self.fingerprint == description.fingerprint,
            f"the plan was made for another model: {self.model} with fingerprint {self.fingerprint[:12]}…, while "
            f"{description.name} has {description.fingerprint[:12]}…; plan again for this one",
        )


def fill(
    analysis: Analysis,
    method: Method,
    parts: Mapping[str, Part],
    budget: int,
    allocator: str,
    epsilon: "float | Literal['auto']",
    granularity: Granularity,
    reverse: bool,
) -> tuple[dict[str, int], float]:
    """The amount of every part, and the ε used; they cost no more than `budget`, and less by no step that is left.

    epsilon: "auto" follows from the share that goes of the parts which can lose something.   reverse: parts whose
    ratios are small lose more.   Raises ValueError as the allocator does, or if the least amounts are above the budget.
    """
    found = {name: part.amounts[0] for name, part in parts.items() if len(part.amounts) == 1}
    budget -= sum(parts[name].costs[0] for name in found)
    free = {name: part for name, part in parts.items() if name not in found}
    need(bool(free), f"{method}: nothing in this model could keep less")
    sizes = [part.costs[-1] for part in free.values()]
    removed = max(0.0, 1 - budget / sum(sizes))
    high = min(MOST, max(1 - part.costs[0] / part.costs[-1] for part in free.values()))
    need(
        removed <= high,
        f"{method}: of what can keep less a share of {removed:.3f} would have to go, and no more than {high:.3f} can",
    )
    spread = _epsilon(analysis, allocator, epsilon, granularity, removed, high)
    ratios = planning.ratios(analysis, removed, allocator, spread, granularity, (0.0, high))
    if reverse:
        both = max(ratios.values()) + min(ratios.values())
        ratios = {name: both - ratio for name, ratio in ratios.items()}
    means = [math.fsum(ratios[n] for n in part.layers) / len(part.layers) for part in free.values()]
    gone = water_fill(sizes, means, removed, 0.0, high)
    wanted = [size * (1 - share) for size, share in zip(sizes, gone, strict=True)]
    picks = share_choices([part.costs for part in free.values()], wanted, budget)
    found |= {name: part.amounts[pick] for (name, part), pick in zip(free.items(), picks, strict=True)}
    return {name: found[name] for name in parts}, spread


def _epsilon(
    analysis: Analysis, allocator: str, epsilon: "float | str", granularity: Granularity, removed: float, high: float
) -> float:
    if epsilon != "auto":
        need(is_number(epsilon) and 0 <= epsilon < 1, f"epsilon {epsilon!r}: wanted 0 to below 1, or 'auto'")
        return float(epsilon)
    chosen = allocators.get(allocator)
    planning.check_series(analysis, chosen)
    if removed <= 0:
        return 0.0
    if chosen.auto_epsilon:
        return chosen.auto_epsilon(removed, high)
    cap = chosen.auto_cap(analysis.layers, granularity) if chosen.auto_cap else math.inf
    return max(0.0, min(SPREAD, high / removed - 1, cap))
