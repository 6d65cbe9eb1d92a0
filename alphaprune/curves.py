"""What pruning one block alone costs the whole model, at a few sparsities: a record, its JSON file, its place in an
analysis. `alphaprune compare` measures it, the allocator `measured` reads it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from alphaprune.analysis import Analysis, is_number, need, read_json
from alphaprune.files import atomic_write_text

VERSION = 1
SERIES = ("curve_sparsity", "curve_loss")


@dataclass(frozen=True)
class BlockCurve:
    """losses[i]: what the model lost with the layers of one block at sparsities[i] and all others dense.

    sparsities: rising from 0, below 1. losses: 0 at 0; as measured, so they may be noisy, fall, or lie below 0.
    ValueError if they are anything else.
    """

    sparsities: tuple[float, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("sparsities", "losses"):
            values = getattr(self, name)
            good = isinstance(values, Sequence) and all(is_number(v) for v in values)
            need(good, f"{name}: wanted finite numbers, got {values!r}")
            object.__setattr__(self, name, tuple(float(v) for v in values))
        count = len(self.sparsities), len(self.losses)
        need(
            count[0] == count[1] >= 2, f"wanted a loss for every sparsity, two at least; got {count[1]} for {count[0]}"
        )
        rising = all(a < b for a, b in pairwise(self.sparsities))
        need(
            rising and self.sparsities[0] == 0 and self.sparsities[-1] < 1,
            f"sparsities: wanted numbers that rise from 0 and stay below 1, got {list(self.sparsities)}",
        )
        need(self.losses[0] == 0, f"losses: wanted 0 at sparsity 0, got {self.losses[0]:g}")


@dataclass(frozen=True)
class Curves:
    """The curves of every block of one model, by the block's number.

    method: how weights were chosen, such as "wanda". measure: what a loss is, such as "kl" (nats per token between the
    dense and the pruned model) or "loss" (nats per token of cross entropy more than the dense model's).
    data: what identifies the text and whatever else the losses depend on.
    """

    model: str
    fingerprint: str
    method: str
    measure: str
    blocks: dict[int, BlockCurve]
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        blocks = {str(block): asdict(curve) for block, curve in sorted(self.blocks.items())}
        found = {"kind": "curves", "version": VERSION, **asdict(self), "blocks": blocks}
        return json.dumps(found, indent=2, allow_nan=False) + "\n"

    def save(self, path: "str | Path") -> None:
        """Writes a JSON file; it appears whole or not at all."""
        atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: "str | Path") -> "Curves":
        """What `save` wrote. ValueError, naming the block where there is one, if anything is missing or impossible."""
        found = read_json(path, "curves", VERSION, cls, "block")
        for name in ("method", "measure"):
            need(isinstance(found[name], str), f"{path}: {name}: wanted a text, got {found[name]!r}")
        need(isinstance(found.get("data", {}), dict), f"{path}: data: wanted an object")
        blocks = {_number(path, name): _curve(f"{path}: block {name}", e) for name, e in found["blocks"].items()}
        return cls(**{**found, "blocks": blocks})


def attach(analysis: Analysis, curves: Curves) -> Analysis:
    """The analysis with the curve of its block in every layer, as the series `SERIES`.

    ValueError if the curves are of another model or lack a block.
    """
    need(
        curves.fingerprint == analysis.fingerprint,
        f"the curves were measured on another model: {curves.model} with fingerprint {curves.fingerprint[:12]}…, while "
        f"the analysis is of {analysis.model} with {analysis.fingerprint[:12]}…; run `alphaprune compare` on this one",
    )
    layers = {}
    for name, stat in analysis.layers.items():
        need(
            stat.block in curves.blocks,
            f"{name}: the curves of {curves.model} lack its block, number {stat.block}; run `alphaprune compare` again",
        )
        curve = curves.blocks[stat.block]
        series = dict(zip(SERIES, (list(curve.sparsities), list(curve.losses)), strict=True))
        layers[name] = replace(stat, series={**stat.series, **series})
    return replace(analysis, layers=layers)


def _number(path: "str | Path", name: str) -> int:
    need(name.isdecimal(), f"{path}: block {name}: wanted the number of a block")
    return int(name)


def _curve(where: str, entry: dict[str, Any]) -> BlockCurve:
    for name in ("sparsities", "losses"):
        need(isinstance(entry.get(name), list), f"{where}: {name}: wanted a list of numbers, got {entry.get(name)!r}")
    try:
        return BlockCurve(entry["sparsities"], entry["losses"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
