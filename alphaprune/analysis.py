"""Model → Analysis: one LayerStat per prunable layer, from its weights alone, and its JSON file."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import alphaprune
from alphaprune import alpha, spectrum
from alphaprune.files import atomic_write_text
from alphaprune.model import Block, Source, open_source

VERSION = 1


@dataclass(frozen=True)
class LayerStat:
    """What is known of one layer W [N, K]: its block, its shape, and named numbers such as `alpha` and `ks`."""

    block: int
    shape: tuple[int, int]
    columns: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """What is known of every prunable layer of one model, and how it was found out.

    fit: the method of `alpha.fit`, None if only shapes were read. solver: route and precision of the eigenvalues.
    """

    model: str
    fingerprint: str
    dtype: str
    fit: str | None
    solver: str | None
    layers: dict[str, LayerStat]
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        found = {"kind": "analysis", "version": VERSION, **asdict(self)}
        return json.dumps(found, indent=2, allow_nan=False) + "\n"

    def save(self, path: "str | Path") -> None:
        """Writes a JSON file; it appears whole or not at all."""
        atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: "str | Path") -> "Analysis":
        """What `save` wrote. ValueError, naming the layer where there is one, if anything is missing or no number."""
        found = read_json(path, "analysis", VERSION, cls)
        need(isinstance(found["versions"], dict), f"{path}: versions: wanted an object")
        layers = {name: _layer_stat(f"{path}: {name}", entry) for name, entry in found["layers"].items()}
        columns = sorted({c for stat in layers.values() for c in stat.columns})
        for name, stat in layers.items():
            for column in columns:
                need(column in stat.columns, f"{path}: {name}: no {column}, which other layers have; analyze again")
        return cls(**{**found, "layers": layers})


def analyze(
    source: "Source | nn.Module | str | Path",
    fit: "alpha.Method | None" = "robust",
    device: str = "auto",
    solver: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> Analysis:
    """Spectrum and power law of every prunable layer of a live model, a directory or a hub id.

    fit: "robust", "reference", "mid" (see `alpha.fit`), or None for shapes only, which reads no weights.
    device: "auto" (CUDA if there is one), "cpu", "cuda"…   solver: "auto", or "float64" for exact eigenvalues.
    progress: called with the name of each finished block. One block is in memory at a time.

    Raises ValueError naming the layer if its weights hold NaN or infinity or have no spectrum to fit.
    """
    if fit is not None and fit not in alpha.METHODS:
        raise ValueError(f"fit {fit!r}: wanted one of {', '.join(alpha.METHODS)}, or None")
    spectrum.check(solver, device)
    source = open_source(source)
    known = source.description()
    layers = {name: LayerStat(known.block_of[name], tuple(shape)) for name, shape in known.shapes.items()}
    used: dict[str, int] = {}
    for block in source.blocks() if fit is not None else ():
        for name, (law, solved_by) in _fit_block(block, fit, device, solver).items():
            layers[name].columns.update(law.columns())
            used[solved_by] = used.get(solved_by, 0) + 1
        if progress:
            progress(block.name)
    versions = {"alphaprune": alphaprune.__version__, "torch": torch.__version__}
    solvers = ", ".join(sorted(used)) or None
    return Analysis(known.name, known.fingerprint, known.dtype, fit, solvers, layers, versions)


def _fit_block(block: Block, fit: "alpha.Method", device: str, solver: str) -> dict[str, tuple["alpha.PowerLaw", str]]:
    """Power law and solver of every layer of a block; layers of one shape go to the solver together."""
    shapes: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for name, layer in block.linears.items():
        weight = layer.weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{name}: the weights hold NaN or infinity, so they have no spectrum; repair the checkpoint"
            )
        shapes.setdefault(tuple(weight.shape), {})[name] = weight
    found = {}
    for group in shapes.values():
        spectra = spectrum.solve(list(group.values()), alpha.NEED[fit], device, solver)
        for name, (eigenvalues, used) in zip(group, spectra, strict=True):
            try:
                found[name] = alpha.fit(eigenvalues, fit, noise=used.noise), str(used)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return {name: found[name] for name in block.linears}


def read_json(path: "str | Path", kind: str, version: int, record: type) -> dict[str, Any]:
    """The fields of the dataclass `record` from a file that says it is of this kind and version."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(f"{path}: is no {kind} file: {error}") from error
    need(isinstance(found, dict) and found.get("kind") == kind, f"{path}: is no {kind} file of alphaprune")
    need(
        found.get("version") == version,
        f"{path}: {kind} version {found.get('version')!r}; this release reads {version}",
    )
    fields = tuple(record.__dataclass_fields__)
    for name in fields:
        need(name in found, f"{path}: this {kind} has no {name}")
    for name in ("model", "fingerprint"):
        need(isinstance(found[name], str), f"{path}: {name}: wanted a text, got {found[name]!r}")
    layers = found["layers"]
    need(isinstance(layers, dict) and bool(layers), f"{path}: layers: wanted an object with a layer at least")
    for name, entry in layers.items():
        need(isinstance(entry, dict), f"{path}: {name}: wanted an object, got {entry!r}")
    return {name: found[name] for name in fields}


def need(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_shape(where: str, entry: dict[str, Any]) -> tuple[int, int]:
    shape = entry.get("shape")
    good = isinstance(shape, list) and len(shape) == 2 and all(is_count(n) and n > 0 for n in shape)
    need(good, f"{where}: shape: wanted two positive integers, got {shape!r}")
    return tuple(shape)


def _layer_stat(where: str, entry: dict[str, Any]) -> LayerStat:
    need(is_count(entry.get("block")), f"{where}: block: wanted the number of its block, got {entry.get('block')!r}")
    columns = entry.get("columns")
    need(isinstance(columns, dict), f"{where}: columns: wanted an object, got {columns!r}")
    for column, value in columns.items():
        need(is_number(value), f"{where}: {column}: wanted a finite number, got {value!r}; analyze the model again")
    return LayerStat(entry["block"], read_shape(where, entry), {c: float(v) for c, v in columns.items()})


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands there twice")
    return found
