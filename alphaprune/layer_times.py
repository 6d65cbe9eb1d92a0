"""A time table → what plans ask of it: from which sparsity on a layer gains, and its seconds at every sparsity."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from alphaprune import formats, nm_planning, tuning
from alphaprune.formats import sbt
from alphaprune.kernels import base, table
from alphaprune.kernels.table import Table
from alphaprune.pattern import Pattern
from alphaprune.speed_planning import TIMED

Shape = tuple[int, int]


@dataclass(frozen=True)
class Wanted:
    """How layers are to be stored and called.

    dtype: of the checkpoint, "bfloat16"…   times: a table's file, or "auto" for this CPU's. tokens: rows of x. pattern:
    of the zeros; some kernels take only such as 2:4. values, activations: "int8" where they are to be rounded so.
    """

    dtype: str
    times: str = "auto"
    tokens: int = 1
    pattern: str | Pattern = "unstructured"
    values: str | None = None
    activations: str | None = None

    @property
    def kinds(self) -> tuple[torch.dtype, torch.dtype]:
        """What a table has the weight and x under."""
        plain = getattr(torch, self.dtype)
        return torch.int8 if self.values else plain, torch.int8 if self.activations else plain

    @functools.cached_property
    def table(self) -> Table:
        """Read once. ValueError if there is none, and for what cannot be asked."""
        if self.tokens < 1:
            raise ValueError(f"--tokens {self.tokens}: wanted a whole number from 1")
        if self.activations and not self.values:
            raise ValueError("--activations int8 rounds beside int8 values; give --values int8, too")
        found = table.current() if self.times == "auto" else Table.load(self.times)
        if found is None:
            raise ValueError("--times auto: there is no time table for this machine; run `alphaprune bench --tune`")
        return found

    @functools.cached_property
    def kernels(self) -> list[str]:
        """Those of the table that take the pattern."""
        return taking(self.table.kernels, self.pattern)


def break_evens(shapes: dict[str, Shape], wanted: Wanted) -> dict[str, float]:
    """The sparsity of each layer W [N, K] from which on it is faster than dense, NEVER where it is at none.

    0 with int8 values: such layers are stored as integers whatever their sparsity.
    ValueError if there is no such table, or it has no times for what is wanted.
    """
    asked = wanted.tokens, *wanted.kinds, wanted.kernels
    known = {shape: wanted.table.break_even(shape, *asked) for shape in set(shapes.values())}
    if None in known.values():
        raise ValueError(_lacks(wanted))
    return {name: 0.0 if wanted.values else known[shape] for name, shape in shapes.items()}


def time_curves(shapes: dict[str, Shape], wanted: Wanted) -> dict[str, list[float]]:
    """Seconds of each layer W [N, K] at the sparsities of `speed_planning.TIMED`, the first without zeros.

    That of the fastest kernel which takes such a pattern, or of the dense layer where that is faster, or where the
    packed weight is no smaller and so is stored dense; int8 values are always packed. Errors: as of `break_evens`.
    """
    known = {shape: _time_curve(shape, wanted) for shape in set(shapes.values())}
    return {name: known[shape] for name, shape in shapes.items()}


def dense_seconds(shapes: dict[str, Shape], wanted: Wanted) -> float:
    """Of all layers as torch has them: in what x comes in, as `Table.dense` says."""
    found = [wanted.table.dense(shape, wanted.tokens, *wanted.kinds) for shape in shapes.values()]
    if None in found:
        raise ValueError(_lacks(wanted))
    return sum(found)


def _time_curve(shape: Shape, wanted: Wanted) -> list[float]:
    times, kinds, size = wanted.table, wanted.kinds, shape[0] * shape[1]
    dense, seconds = times.dense(shape, wanted.tokens, *kinds), []
    for sparsity in TIMED:
        best = times.best(shape, 1 - sparsity, wanted.tokens, *kinds, wanted.kernels)
        if dense is None or best is None:
            raise ValueError(_lacks(wanted))
        kept = size - round(sparsity * size)
        packed = sparsity > 0 and formats.get("sbt").nbytes(shape, kept, kinds[0]) < size * kinds[0].itemsize
        seconds.append(best[1] if wanted.values else min(best[1], dense) if packed else dense)
    return seconds


def taking(names: Iterable[str], pattern: str | Pattern) -> list[str]:
    """Those that take every weight with zeros so: `general` ones, and of N:M what its most crowded groups fit."""
    fixed, _ = nm_planning.kind(pattern)
    found = tuning.general(names)
    if fixed is None:
        return found
    mask = torch.zeros(2, 4, fixed.of, dtype=torch.bool)  # at either end of each group, which fours may cut anywhere
    mask[0, :, : fixed.keep] = mask[1, :, fixed.of - fixed.keep :] = True
    crowded, known = sbt.pack(mask.flatten(1).bfloat16(), mask.flatten(1)), base.kernels()
    special = (name for name in names if name in known and known[name].fits is not None)
    return found + [name for name in special if known[name].fits(crowded) is None]


def _lacks(wanted: Wanted) -> str:
    values, x = (str(kind).removeprefix("torch.") for kind in wanted.kinds)
    kinds = values if values == x else f"{values} beside {x}"
    return f"{wanted.table.path}: has no times of {kinds} weights and their dense layers; run `alphaprune bench --tune`"
