"""Model → Analysis: one LayerStat per prunable layer, from its weights alone, and its JSON file."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import alphaprune
from alphaprune import activity, alpha, calibrate, farms, metrics, sketches, spectrum
from alphaprune.files import atomic_write_text
from alphaprune.model import Block, Source, check_finite, open_source

VERSION = 1


@dataclass(frozen=True)
class LayerStat:
    """What is known of one layer W [N, K]: its block, its shape, named numbers such as `alpha` and `ks`, and named
    series of numbers, such as quantiles."""

    block: int
    shape: tuple[int, int]
    columns: dict[str, float] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """What is known of every prunable layer of one model, and how it was found out.

    fit: the method of `alpha.fit`, None if no spectrum was read. solver: route and precision of the eigenvalues.
    calibration: what identifies the text behind the activation columns, None if there are none.
    """

    model: str
    fingerprint: str
    dtype: str
    fit: str | None
    solver: str | None
    layers: dict[str, LayerStat]
    versions: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None

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
        need(isinstance(found.get("versions", {}), dict), f"{path}: versions: wanted an object")
        layers = {name: _layer_stat(f"{path}: {name}", entry) for name, entry in found["layers"].items()}
        for kind in ("columns", "series"):
            known = sorted({c for stat in layers.values() for c in getattr(stat, kind)})
            for name, stat in layers.items():
                for entry in known:
                    have = entry in getattr(stat, kind)
                    need(have, f"{path}: {name}: no {entry}, which other layers have; analyze again")
        return cls(**{**found, "layers": layers})


def analyze(
    source: "Source | nn.Module | str | Path",
    fit: "alpha.Method | None" = "robust",
    device: str = "auto",
    solver: str = "auto",
    progress: Callable[[str], None] | None = None,
    tokens: Tensor | None = None,
    calibration: dict[str, Any] | None = None,
    magnitudes: bool = False,
    windows: "farms.Windows | None" = None,
    statistics: Callable[[Block], dict[str, calibrate.InputStat]] | None = None,
) -> Analysis:
    """What allocators read, for every prunable layer of a live model, a directory or a hub id.

    fit: "robust", "reference", "mid" (see `alpha.fit`), or None for no spectrum.
    device: "auto" (CUDA if there is one), "cpu", "cuda"…   solver: "auto", or "float64" for exact eigenvalues.
    tokens: [samples, length] int64 text; adds the columns of activity.py. calibration: what identifies it.
    magnitudes: adds the series of sketches.py.   windows: adds the column of farms.py, from windows of such a size.
    statistics: what is known already of the inputs of a block's layers, Gram matrices included, in place of tokens.
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
    activations = None if tokens is None or statistics else calibrate.first_inputs(source, tokens)
    active = activations is not None or statistics is not None
    reads = fit is not None or magnitudes or windows is not None or active
    for block in source.blocks() if reads else ():
        check_finite(block, "they have no spectrum")
        if fit is not None:
            for name, (columns, solved_by) in _spectral_columns(block, fit, device, solver).items():
                layers[name].columns.update(columns)
                used[solved_by] = used.get(solved_by, 0) + 1
        if active:
            inputs = statistics(block) if statistics else calibrate.statistics(block, activations, "gram")
            for name, columns in activity.columns(block, inputs).items():
                layers[name].columns.update(columns)
        if activations is not None:
            calibrate.run(block, activations)
        for name, layer in block.linears.items():
            if windows is not None:
                layers[name].columns.update(_farms_columns(name, layer.weight.detach(), windows, device))
            if magnitudes:
                layers[name].series.update(sketches.series(layer.weight.detach()))
        if progress:
            progress(block.name)
    versions = {"alphaprune": alphaprune.__version__, "torch": torch.__version__}
    solvers = ", ".join(sorted(used)) or None
    return Analysis(known.name, known.fingerprint, known.dtype, fit, solvers, layers, versions, calibration)


def option_for(name: str) -> str:
    """The option of `alphaprune analyze` that makes a column or a series."""
    if name in activity.COLUMNS:
        return "--calibration FILE"
    if name in sketches.SERIES:
        return "--magnitudes"
    return "--farms" if name in farms.COLUMNS else "a --fit"


def needs_text(entries: Iterable[str]) -> bool:
    """Whether any of these columns and series is made from calibration text."""
    return any(option_for(entry) == "--calibration FILE" for entry in entries)


def arguments_for(entries: Iterable[str]) -> dict[str, Any]:
    """The arguments of `analyze` that make these columns and series, but for the text or statistics that some need."""
    options = {option_for(entry) for entry in entries}
    return {
        "fit": "robust" if "a --fit" in options else None,
        "magnitudes": "--magnitudes" in options,
        "windows": farms.Windows() if "--farms" in options else None,
    }


def _spectral_columns(
    block: Block, fit: "alpha.Method", device: str, solver: str
) -> dict[str, tuple[dict[str, float], str]]:
    """Columns and solver of every layer of a block; layers of one shape go to the solver together."""
    shapes: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for name, layer in block.linears.items():
        weight = layer.weight.detach()
        shapes.setdefault(tuple(weight.shape), {})[name] = weight
    found = {}
    for shape, group in shapes.items():
        spectra = spectrum.solve(list(group.values()), alpha.NEED[fit], device, solver)
        for name, (eigenvalues, used) in zip(group, spectra, strict=True):
            try:
                law = alpha.fit(eigenvalues, fit, noise=used.noise)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            columns = {**law.columns(), **metrics.columns(eigenvalues, law, shape, used.noise)}
            found[name] = columns, str(used)
    return {name: found[name] for name in block.linears}


def _farms_columns(name: str, weight: Tensor, windows: "farms.Windows", device: str) -> dict[str, float]:
    try:
        return farms.columns(weight, windows, device)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def read_json(path: "str | Path", kind: str, version: int, record: type, part: str = "layer") -> dict[str, Any]:
    """The fields of the dataclass `record` from a file that says it is of this kind and version.

    part: what its objects are about, which stand in the field `layers` or `blocks`.
    """
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
    fields = record.__dataclass_fields__
    for name, known in fields.items():
        optional = known.default is not MISSING or known.default_factory is not MISSING
        need(name in found or optional, f"{path}: this {kind} has no {name}")
    for name in ("model", "fingerprint"):
        need(isinstance(found[name], str), f"{path}: {name}: wanted a text, got {found[name]!r}")
    parts = found[f"{part}s"]
    need(isinstance(parts, dict) and bool(parts), f"{path}: {part}s: wanted an object with a {part} at least")
    for name, entry in parts.items():
        where = name if part == "layer" else f"{part} {name}"
        need(isinstance(entry, dict), f"{path}: {where}: wanted an object, got {entry!r}")
    return {name: found[name] for name in fields if name in found}


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
    series = entry.get("series", {})
    need(isinstance(series, dict), f"{where}: series: wanted an object, got {series!r}")
    for name, values in series.items():
        good = isinstance(values, list) and bool(values) and all(is_number(v) for v in values)
        need(good, f"{where}: {name}: wanted a list of finite numbers; analyze the model again")
    numbers = {c: float(v) for c, v in columns.items()}
    return LayerStat(
        entry["block"], read_shape(where, entry), numbers, {n: [float(v) for v in s] for n, s in series.items()}
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands there twice")
    return found
