"""Model → Analysis: one LayerStat per prunable layer, from its weights alone, and its JSON file."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import alphaprune
from alphaprune import activity, alpha, calibrate, farms, ranks, sketches, spectrum, trees
from alphaprune.files import atomic_write_text
from alphaprune.journal import Journal
from alphaprune.model import Block, Description, Source, check_finite
from alphaprune.states import Room
from alphaprune.weight_stats import Units, WeightStats, cost

VERSION = 1
NO_SPECTRUM = "they have no spectrum"
T = TypeVar("T")


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
    journal: "str | Path | None" = None,
    keep_journal: bool = False,
    room: Room | None = None,
    inputs: Any = None,
) -> Analysis:
    """What allocators read, for every prunable layer of a live model, a module tree, a directory or a hub id.

    fit: "robust", "reference", "mid" (see `alpha.fit`), or None for no spectrum.
    device: "auto" (CUDA if there is one), "cpu", "cuda"…   solver: "auto", or "float64" for exact eigenvalues.
    tokens: [samples, length] int64 text; adds the columns of activity.py. calibration: what identifies it.
    magnitudes: adds the series of sketches.py.   windows: adds the column of farms.py, from windows of such a size.
    inputs: in place of text what a module tree is fed with, such as images (see trees.py).
    statistics: what is known already of the inputs of a block's layers, Gram matrices included, in place of tokens.
    progress: called `steps` times, with the name of a finished block. One block is in memory at a time, and the next.
    journal: the file that the result will be saved as; beside it lies what is finished, and an interrupted analysis
    goes on there. It is deleted at the end, unless it is to be kept.   room: of hidden states, see states.py.

    Several processes share the work (ranks.py), and each gets the whole result, the same as one process finds.
    Raises ValueError naming the layer if its weights hold NaN or infinity or have no spectrum to fit.
    """
    if fit is not None and fit not in alpha.METHODS:
        raise ValueError(f"fit {fit!r}: wanted one of {', '.join(alpha.METHODS)}, or None")
    target, source = spectrum.check(solver, ranks.device(device) or device), trees.open_source(source)
    trees.check(source, tokens=tokens)
    statistics = statistics if inputs is None else trees.statistics(source, inputs, "gram")
    known, work = source.description(), WeightStats(fit, str(target), solver, magnitudes, windows)
    active = tokens is not None or statistics is not None
    versions = {"alphaprune": alphaprune.__version__, "torch": torch.__version__}
    identity = {"fingerprint": known.fingerprint, "dtype": known.dtype, **versions, "threads": torch.get_num_threads()}
    identity |= {"work": repr(work), "calibration": calibration, "active": active}
    identity |= {"tokens": _hashed(tokens), "files": source.stamps()}
    done = Journal(journal, identity)
    try:
        if work.reads:
            _by_weights(source, known, work, done, progress)
        if active:
            _by_activity(source, tokens, statistics, room, str(target), done, progress)
        parts = done.all()
        layers = {name: LayerStat(known.block_of[name], shape) for name, shape in known.shapes.items()}
        for key in sorted(parts, key=lambda key: (key.startswith(ACTIVITY), key)):
            for name, found in parts[key]["layers"].items():
                layers[name].columns.update(found.get("columns", {}))
                layers[name].series.update(found.get("series", {}))
        solvers = ", ".join(sorted({s for part in parts.values() for s in part.get("solvers", ())})) or None
    except BaseException as error:
        done.stop(error)
        raise
    done.close() if keep_journal else done.delete()
    return Analysis(known.name, known.fingerprint, known.dtype, fit, solvers, layers, versions, calibration)


def steps(blocks: int, fit: str | None, magnitudes: bool, windows: Any, active: bool) -> int:
    """How often `analyze` calls `progress`: once per block for what weights tell, and once for what their inputs do."""
    return blocks * (int(fit is not None or magnitudes or windows is not None) + int(active))


def _hashed(tokens: Tensor | None) -> str | None:
    """By which the same text is known again."""
    return None if tokens is None else hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()


ACTIVITY = "activity "  # what entries of a block's inputs are called by, followed by its number


def _by_weights(
    source: Source, known: Description, work: WeightStats, done: Journal, progress: Callable[[str], None] | None
) -> None:
    """Entries of all layers, those of one block and shape together: this process makes its share."""
    units: dict[str, list[str]] = {}
    for name, (n, k) in known.shapes.items():
        units.setdefault(f"{known.block_of[name]} {n}x{k}", []).append(name)
    costs = {unit: cost(known.shapes[names[0]]) * len(names) for unit, names in units.items() if unit not in done.known}
    owners = ranks.mine(costs)
    own: dict[int, list[str]] = {}
    for unit in units:
        if owners.get(unit) == ranks.world().rank:
            own.setdefault(known.block_of[units[unit][0]], []).append(unit)

    def weights() -> Iterator[Units]:
        for block in source.blocks(own):
            names = {name for unit in own[block.index] for name in units[unit]}
            check_finite(replace(block, linears={n: m for n, m in block.linears.items() if n in names}), NO_SPECTRUM)
            yield {u: {n: block.linears[n].weight.detach() for n in units[u]} for u in own[block.index]}

    shapes = [known.shapes[units[unit][0]] for of_block in own.values() for unit in of_block]
    for entries in _passed(source, zip(sorted(own), work.of_blocks(weights(), shapes), strict=True), progress):
        source.check_unchanged()  # their files were read until now, while those of the next block were
        for unit, entry in entries.items():
            done.add(unit, entry)


def _by_activity(
    source: Source,
    tokens: Tensor | None,
    statistics: Callable[[Block], dict[str, calibrate.InputStat]] | None,
    room: Room | None,
    device: str,
    done: Journal,
    progress: Callable[[str], None] | None,
) -> None:
    """Entries of what the inputs of a block's layers tell; blocks follow each other behind the same text."""
    left = [index for index in range(source.block_count()) if f"{ACTIVITY}{index}" not in done.known]
    activations = None
    if left and statistics is None and tokens is not None:
        activations = calibrate.first_inputs(source, tokens, room)
    end = max(left, default=-1) + 1
    wanted = range(end) if activations else left
    for block in _passed(source, ((block.index, block) for block in source.blocks(wanted)), progress):
        check_finite(block, NO_SPECTRUM)
        where = None if device == "cpu" or statistics else device
        with calibrate.on(block, where):
            if block.index in left:
                if activations is not None:
                    inputs = calibrate.statistics(block, activations, "gram")
                elif statistics is not None:
                    inputs = statistics(block)
                if block.index % ranks.world().size == ranks.world().rank:
                    columns = activity.columns(block, inputs)
                    entry = {name: {"columns": found} for name, found in columns.items()}
                    done.add(f"{ACTIVITY}{block.index}", {"layers": entry})
                del inputs
            if activations is not None and block.index + 1 < end:
                calibrate.run(block, activations)


def _passed(source: Source, found: Iterable[tuple[int, T]], progress: Callable[[str], None] | None) -> Iterator[T]:
    """What is found of each block of these numbers; `progress` hears of every block that is done with, of those in
    between, too."""
    heard = 0

    def hear(end: int) -> None:
        nonlocal heard
        while heard < end:
            if progress:
                progress(source.block_name(heard))
            heard += 1

    for index, of_block in found:
        hear(index)
        yield of_block
        hear(index + 1)
    hear(source.block_count())


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
    known = fields(record)
    for own in known:
        optional = own.default is not MISSING or own.default_factory is not MISSING
        need(own.name in found or optional, f"{path}: this {kind} has no {own.name}")
    for name in ("model", "fingerprint"):
        need(isinstance(found[name], str), f"{path}: {name}: wanted a text, got {found[name]!r}")
    parts = found[f"{part}s"]
    need(isinstance(parts, dict) and bool(parts), f"{path}: {part}s: wanted an object with a {part} at least")
    for name, entry in parts.items():
        where = name if part == "layer" else f"{part} {name}"
        need(isinstance(entry, dict), f"{path}: {where}: wanted an object, got {entry!r}")
    return {own.name: found[own.name] for own in known if own.name in found}


def need(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_shape(where: str, entry: dict[str, Any]) -> tuple[int, int]:
    shape: Any = entry.get("shape")
    good = isinstance(shape, list) and len(shape) == 2 and all(is_count(n) and n > 0 for n in shape)
    need(good, f"{where}: shape: wanted two positive integers, got {shape!r}")
    return tuple(shape)


def _layer_stat(where: str, entry: dict[str, Any]) -> LayerStat:
    need(is_count(entry.get("block")), f"{where}: block: wanted the number of its block, got {entry.get('block')!r}")
    columns: Any = entry.get("columns")
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
