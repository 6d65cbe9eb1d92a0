"""Weights → columns and series of their layers: what is found out of weights alone, of many layers side by side."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alphaprune import alpha, farms, metrics, sketches, spectrum

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

    def entries(self, units: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Any]]:
        """The entry of every unit, which is some layers of one shape.

        On a CPU large layers are worked on side by side, each with its part of the threads, the most costly first, so
        that none is left alone at the end.
        """
        if self.device != "cpu":
            return {unit: self.entry(layers) for unit, layers in units.items()}
        parts = [(unit, part) for unit, layers in units.items() for part in _parts(layers)]
        parts.sort(key=lambda part: sum(cost(tuple(weight.shape)) for weight in part[1].values()), reverse=True)
        working = [spectrum.working_bytes(tuple(w.shape)) for layers in units.values() for w in layers.values()]
        with spectrum.threads(max(1, min(len(parts), AT_ONCE_BYTES // max(working)))) as pool:
            made = list(zip(parts, pool.map(lambda part: self.entry(part[1]), parts), strict=True))
        found = {}
        for unit, layers in units.items():
            own = [entry for (of, _), entry in made if of == unit]
            known = {name: layer for entry in own for name, layer in entry["layers"].items()}
            solvers = {solver for entry in own for solver in entry["solvers"]}
            found[unit] = {"layers": {name: known[name] for name in layers}, "solvers": sorted(solvers)}
        return found

    def entry(self, layers: dict[str, Tensor]) -> dict[str, Any]:
        """Columns, series and solvers of layers of one shape."""
        found: dict[str, dict[str, Any]] = {name: {"columns": {}, "series": {}} for name in layers}
        solvers = set()
        if self.fit is not None:
            for name, (entry, used) in _spectral(layers, self.fit, self.device, self.solver).items():
                found[name] = entry
                solvers.add(used)
        for name, weight in layers.items():
            if self.windows is not None:
                found[name]["columns"].update(_farms_columns(name, weight, self.windows, self.device))
            if self.magnitudes:
                found[name]["series"].update(sketches.series(weight))
        return {"layers": found, "solvers": sorted(solvers)}


def _parts(layers: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Layers of one shape as they go to the solver: small ones together, large ones alone."""
    together = spectrum.together(tuple(next(iter(layers.values())).shape), len(layers), None)
    return [layers] if together == len(layers) else [{name: weight} for name, weight in layers.items()]


def cost(shape: tuple[int, int]) -> float:
    """Operations of a spectrum, but for a factor: a Gram matrix of the smaller side, and its eigenvalues."""
    small, large = sorted(shape)
    return float(small**2 * (large + 4 * small))


def _spectral(
    layers: dict[str, Tensor], fit: "alpha.Method", device: str, solver: str
) -> dict[str, tuple[dict[str, Any], str]]:
    """Columns, the spectrum's series and solver of layers of one shape, which go to the solver together."""
    found, spectra = {}, spectrum.solve(list(layers.values()), alpha.NEED[fit], device, solver)
    for (name, weight), (eigenvalues, used) in zip(layers.items(), spectra, strict=True):
        try:
            law = alpha.fit(eigenvalues, fit, noise=used.noise)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        columns = {**law.columns(), **metrics.columns(eigenvalues, law, tuple(weight.shape), used.noise)}
        series = {sketches.SPECTRUM: sketches.eigenvalues(eigenvalues)}
        found[name] = {"columns": columns, "series": series}, str(used)
    return found


def _farms_columns(name: str, weight: Tensor, windows: "farms.Windows", device: str) -> dict[str, float]:
    try:
        return farms.columns(weight, windows, device)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
