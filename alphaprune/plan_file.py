"""The record of a plan: an exact number of zeros per layer, their pattern, and its JSON file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alphaprune.analysis import is_count, is_number, need, read_json, read_shape
from alphaprune.files import atomic_write_text
from alphaprune.model import Description
from alphaprune.pattern import NM, Pattern, parse

VERSION = 1


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


def patterned(shape: tuple[int, int], pattern: NM) -> LayerPlan:
    """A layer with the N:M pattern everywhere."""
    return LayerPlan(shape, shape[0] * shape[1] // pattern.of * (pattern.of - pattern.keep), pattern)


def check_divisible(name: str, shape: Sequence[int], of: int) -> None:
    need(shape[1] % of == 0, f"{name}: N:{of} needs K to be a multiple of {of}, got shape {tuple(shape)}")


def _layer_plan(where: str, entry: dict[str, Any]) -> LayerPlan:
    need(is_count(entry.get("zeros")), f"{where}: zeros: wanted a count, got {entry.get('zeros')!r}")
    shape, zeros = read_shape(where, entry), entry["zeros"]
    need(zeros <= shape[0] * shape[1], f"{where}: zeros: {zeros} is more than the shape {shape} has weights")
    need(isinstance(entry.get("pattern"), str), f"{where}: pattern: wanted a text, got {entry.get('pattern')!r}")
    try:
        pattern = parse(entry["pattern"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if isinstance(pattern, NM):
        check_divisible(where, shape, pattern.of)
        implied = patterned(shape, pattern).zeros
        need(zeros == implied, f"{where}: zeros: {pattern} on shape {shape} makes {implied}, not {zeros}")
    return LayerPlan(shape, zeros, pattern)
