"""Weights → columns and series of their layers: what is found out of weights alone, of many layers side by side."""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from alphaprune import alpha, farms, metrics, sketches, spectrum, tridiagonal

Layers = dict[str, Tensor]
Units = dict[str, Layers]
Entries = dict[str, dict[str, Any]]
Spectra = dict[str, tuple[Tensor, spectrum.Solver]]
Submitted = list[tuple[str, "Future[dict[str, Any]]"]]

AT_ONCE_BYTES = 4 << 30  # that layers side by side may take on a CPU


@dataclass(frozen=True)
class WeightStats:
    """What is found out of weights alone."""

    fit: "alpha.Method | None"
    device: str
    solver: str
    magnitudes: bool
    windows: "farms.Windows | None"

    @property
    def reads(self) -> bool:
        return self.fit is not None or self.magnitudes or self.windows is not None

    def of_blocks(self, blocks: Iterable[Units], shapes: Iterable[tuple[int, int]]) -> Iterator[Entries]:
        """For every block, in order, the entry of each of its units, which are some layers of one shape.

        shapes: of all that come. On a CPU large layers are worked on side by side, each with its part of the threads,
        the most costly of a block first; and the next block is read, and begun with where threads are free, before a
        block is done. On a GPU a block's eigenvalues are found together, and fitted while those of the next one are.
        """
        if self.device != "cpu":
            yield from self._of_blocks_on_gpu(blocks)
            return
        blocks = iter(blocks)
        first = next(blocks, None)
        if first is None:
            return
        room = AT_ONCE_BYTES // max(spectrum.working_bytes(shape) for shape in shapes)
        before: tuple[Units, Submitted] | None = None
        with spectrum.threads(max(1, min(2 * len(_parts(first)), room))) as pool:
            for units in itertools.chain([first], blocks):
                parts = [(unit, pool.submit(self.entry, part)) for unit, part in _parts(units)]
                if before is not None:
                    yield _joined(*before)
                before = units, parts
            if before is not None:
                yield _joined(*before)

    def _of_blocks_on_gpu(self, blocks: Iterable[Units]) -> Iterator[Entries]:
        """Windows are not worked on aside: their spectra need the GPU, too."""
        aside, before = replace(self, windows=None), None
        with spectrum.threads() as pool, tridiagonal.recording():
            for units in blocks:
                spectra = self.spectra({name: weight for layers in units.values() for name, weight in layers.items()})
                parts = [
                    (unit, pool.submit(aside.entry, {name: weight}, spectra))
                    for unit, layers in units.items()
                    for name, weight in layers.items()
                ]
                if before is not None:
                    yield self._with_windows(*before)
                before = units, parts
            if before is not None:
                yield self._with_windows(*before)

    def _with_windows(self, units: Units, parts: Submitted) -> Entries:
        found = _joined(units, parts)
        for unit, layers in units.items():
            for name, weight in layers.items() if self.windows is not None else ():
                found[unit]["layers"][name]["columns"].update(_farms_columns(name, weight, self.windows, self.device))
        return found

    def spectra(self, layers: Layers) -> Spectra:
        """The eigenvalues of layers of any shapes and what solved them, by name; nothing if nothing fits them."""
        if self.fit is None:
            return {}
        found = spectrum.solve_all(list(layers.values()), alpha.NEED[self.fit], self.device, self.solver)
        return dict(zip(layers, found, strict=True))

    def entry(self, layers: Layers, spectra: Spectra | None = None) -> dict[str, Any]:
        """Columns, series and solvers of layers of one shape. spectra: those of the layers, if they are known."""
        found: dict[str, dict[str, Any]] = {name: {"columns": {}, "series": {}} for name in layers}
        solvers = set()
        if self.fit is not None:
            known = self.spectra(layers) if spectra is None else spectra
            for name, weight in layers.items():
                found[name] = _spectral(name, weight, *known[name], self.fit)
                solvers.add(str(known[name][1]))
        for name, weight in layers.items():
            if self.windows is not None:
                found[name]["columns"].update(_farms_columns(name, weight, self.windows, self.device))
            if self.magnitudes:
                found[name]["series"].update(sketches.series(weight))
        return {"layers": found, "solvers": sorted(solvers)}


def _parts(units: Units) -> list[tuple[str, Layers]]:
    """Each unit's layers as they go to the solver, small ones together and large ones alone; the most costly first, so
    that none is left alone at the end."""
    parts = []
    for unit, layers in units.items():
        alone = spectrum.together(tuple(next(iter(layers.values())).shape), len(layers), None) < len(layers)
        parts += [(unit, {name: weight}) for name, weight in layers.items()] if alone else [(unit, layers)]
    return sorted(parts, key=lambda part: sum(cost(tuple(weight.shape)) for weight in part[1].values()), reverse=True)


def _joined(units: Units, parts: Submitted) -> Entries:
    """The entries of units whose parts were submitted."""
    found = {}
    for unit, layers in units.items():
        own = [part.result() for of, part in parts if of == unit]
        known = {name: layer for entry in own for name, layer in entry["layers"].items()}
        solvers = {solver for entry in own for solver in entry["solvers"]}
        found[unit] = {"layers": {name: known[name] for name in layers}, "solvers": sorted(solvers)}
    return found


def cost(shape: tuple[int, int]) -> float:
    """Operations of a spectrum, but for a factor: a Gram matrix of the smaller side, and its eigenvalues."""
    small, large = sorted(shape)
    return float(small**2 * (large + 4 * small))


def _spectral(
    name: str, weight: Tensor, eigenvalues: Tensor, used: spectrum.Solver, fit: "alpha.Method"
) -> dict[str, Any]:
    """Columns and the spectrum's series of a layer."""
    try:
        law = alpha.fit(eigenvalues, fit, noise=used.noise)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    columns = {**law.columns(), **metrics.columns(eigenvalues, law, tuple(weight.shape), used.noise)}
    return {"columns": columns, "series": {sketches.SPECTRUM: sketches.eigenvalues(eigenvalues)}}


def _farms_columns(name: str, weight: Tensor, windows: "farms.Windows", device: str) -> dict[str, float]:
    try:
        return farms.columns(weight, windows, device)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
