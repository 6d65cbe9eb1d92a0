"""`alphaprune bench --tune`: the time table of a CPU or a GPU, every kernel and the dense layer measured by turns."""

import functools
import itertools
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaprune import __version__, timing
from alphaprune.formats import native
from alphaprune.kernels import base, spmm, table
from alphaprune.kernels.dense import linear as dense_linear
from alphaprune.kernels.table import Curve, Table
from alphaprune.pattern import NM
from alphaprune.timing import Call, Clock

log = logging.getLogger("alphaprune")
Bar = Callable[[int, str, str], AbstractContextManager[Callable[[str], None]]]
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# (values, activations), int8 where kernels round these. The dense layer beside them computes in what they come in.
HALVES = ((torch.bfloat16, torch.bfloat16), (torch.int8, torch.bfloat16))
QUICK_DTYPES = (*HALVES, (torch.int8, torch.int8))
ALL_DTYPES = (*QUICK_DTYPES, (torch.float32, torch.float32), (torch.float16, torch.float16))
GPU_DTYPES = (*HALVES, (torch.float16, torch.float16))
REGULAR = NM(2, 4)  # what is kept of the weights that kernels are timed on which do not take every weight
# A kernel that takes so many times as long as the fastest is not asked about more tokens, unless it is made for many.
LOST = 3.0
SHOWN = (0.5, 0.7, 0.9)
MOST_ROUNDS = 50


@dataclass(frozen=True)
class Grid:
    """What is measured: shapes [N, K], sparsities, dtypes, tokens; weights of `rotated` bytes, so none is in a cache.

    rotated: None for what the device's caches ask for. seconds: spent on each kernel at one point at most, unless three
    rounds take longer.
    """

    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...] = ALL_DTYPES
    sparsities: tuple[float, ...] = SPARSITIES
    tokens: tuple[int, ...] = TOKENS
    rotated: int | None = None
    seconds: float = 0.3


QUICK = Grid(((512, 512), (4096, 4096)), QUICK_DTYPES, rotated=1 << 28, seconds=0.05)
FULL = Grid(((512, 512), (2048, 2048), (4096, 4096), (11008, 4096), (4096, 11008)))
# On a GPU a round is of calls on all copies: a few of them are as many calls as dozens on a CPU.
GPU_QUICK = Grid(((1024, 1024), (4096, 4096), (28672, 4096)), ((torch.bfloat16, torch.bfloat16),), seconds=0.01)
GPU_FULL = Grid(
    ((1024, 1024), (4096, 1024), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096), (8192, 28672)), GPU_DTYPES,
    seconds=0.05,
)  # fmt: skip
# Which sparsities tell the most of the others, which lie between them or past them.
TELLING = (0.5, 0.0, 0.9, 0.7, 0.3)


@dataclass(frozen=True)
class Problem:
    """A weight [N, K] = shape with `values` for x in its dtype. regular: kept REGULAR, for the kernels that need it.

    x: int8 for the kernels that round it so, which then comes `given`.
    """

    shape: tuple[int, int]
    values: torch.dtype
    x: torch.dtype
    sparsity: float
    regular: bool = False

    @property
    def given(self) -> torch.dtype:
        return table.unrounded(self.x)


def grid_for(device: torch.device, quick: bool) -> Grid:
    """What `bench --tune` measures on a device."""
    return {"cpu": (FULL, QUICK), "cuda": (GPU_FULL, GPU_QUICK)}[device.type][quick]


def tune(grid: Grid, bar: Bar, clock: Clock, seconds: float | None = None) -> Table:
    """Median seconds of every kernel that runs on the clock's device, and of the dense layer, all over the grid.

    bar: (total, description, unit) → context that yields what to call after each step. seconds: that are given; one
    weight at least, the most telling first, as many as are likely to fit. ValueError without a kernel.
    """
    curves: list[Curve] = []
    dense: dict[tuple[tuple[int, int], torch.dtype, int], list[float]] = {}
    problems = _problems(grid, clock.device.type)
    if seconds is not None:
        problems.sort(key=_worth)
    with bar(len(problems), "tune", "weight") as tick, torch.inference_mode():
        for problem in _in_time(problems, seconds):
            found = _measure(grid, problem, clock)
            for tokens, seconds in found.pop(table.DENSE).items():
                dense.setdefault((problem.shape, problem.given, tokens), []).extend(seconds)
            curves += [_curve(name, problem, times) for name, times in found.items()]
            tick(f"{problem.shape[0]}×{problem.shape[1]} {problem.sparsity:.0%}")
    for shape, x in dict.fromkeys((shape, x) for shape, x, _ in dense):
        times = {tokens: dense[shape, x, tokens] for tokens in grid.tokens}
        curves.append(_curve(table.DENSE, Problem(shape, x, x, 0.0), times))
    versions = {"alphaprune": __version__, "torch": torch.__version__}
    return Table(clock.machine, clock.threads, tuple(curves), clock.bandwidth(), versions)


def _problems(grid: Grid, device: str) -> list[Problem]:
    """All weights that some kernel is timed on."""
    found = []
    for shape, (values, x) in itertools.product(grid.shapes, grid.dtypes):
        names = contenders(shape, values, x, device)
        if general(names):
            found += [Problem(shape, values, x, sparsity) for sparsity in grid.sparsities]
        if len(general(names)) < len(names):
            found.append(Problem(shape, values, x, REGULAR.sparsity, True))
    return found


def _worth(problem: Problem) -> tuple[int, int]:
    """What to measure first, ascending: the sparsities that the others lie between, of the larger shapes before."""
    place = TELLING.index(problem.sparsity) if problem.sparsity in TELLING else len(TELLING)
    return place, -math.prod(problem.shape)


def _in_time(problems: list[Problem], seconds: float | None) -> Iterator[Problem]:
    """Problems until the next one, if it took as long as the longest, would end after `seconds`; the first anyway."""
    begin, longest = time.perf_counter(), 0.0
    for done, problem in enumerate(problems):
        started = time.perf_counter()
        if seconds is not None and longest and started + longest - begin > seconds:
            log.warning("%d of %d weights were measured in %.0f s", done, len(problems), seconds)
            return
        yield problem
        longest = max(longest, time.perf_counter() - started)


def _measure(grid: Grid, problem: Problem, clock: Clock) -> dict[str, dict[int, list[float]]]:
    """{kernel or DENSE: {tokens: seconds of each call}} for one random weight, in copies that the calls go round."""
    rotated, where, known = grid.rotated or clock.rotated, clock.device, base.kernels()
    pattern = REGULAR if problem.regular else timing.UNSTRUCTURED
    weight, packed = timing.random_packed(
        problem.shape, problem.sparsity, problem.given, problem.values, pattern, where
    )
    packed = replace(packed, activations=torch.int8 if problem.x == torch.int8 else None)
    sparse = list(timing.copies(packed, rotated))
    copies = timing.dense_copies(weight, rotated)
    ways: dict[str, list[Callable[[Tensor], Tensor]]] = {table.DENSE: [dense_linear(copy, None) for copy in copies]}
    names = contenders(problem.shape, problem.values, problem.x, where.type)
    for turn, name in enumerate(names):
        fits, first = known[name].fits, turn * len(sparse) // len(names)
        if (fits is not None) == problem.regular and not (fits and fits(packed)):
            # Each begins elsewhere, so that none finds in a cache what another has just read.
            ways[name] = [spmm.prepare(copy, "tune", name) for copy in sparse[first:] + sparse[:first]]
    found: dict[str, dict[int, list[float]]] = {name: {} for name in ways}
    for tokens in grid.tokens:
        x = torch.randn(tokens, problem.shape[1], device=where).to(problem.given)
        calls = {
            name: [functools.partial(way, x) for way in copied]
            for name, copied in ways.items()
            if name == table.DENSE or not known[name].supports(problem.shape, tokens, problem.values, problem.x)
        }
        times = _rounds(clock, calls, grid.seconds)
        for name, seconds in times.items():
            found[name][tokens] = seconds
        medians = {name: statistics.median(seconds) for name, seconds in times.items() if name != table.DENSE}
        for name, median in medians.items():
            if median > LOST * min(medians.values()) and not known[name].many:
                del ways[name]
    return {name: times for name, times in found.items() if times}


def contenders(shape: tuple[int, int], values: torch.dtype, x_dtype: torch.dtype, device: str = "cpu") -> list[str]:
    """The kernels of a kind of device that run here and take the dtypes. The reference is the truth, not a contender.

    ValueError if none runs here.
    """
    there = {name: kernel for name, kernel in base.kernels().items() if kernel.device == device}
    reasons = {name: kernel.available() for name, kernel in there.items()}
    if all(reasons.values()):
        why = native.status() if device == "cpu" else "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise ValueError(f"there are no kernels to tune: {why}")
    return [name for name, kernel in there.items() if not (reasons[name] or kernel.supports(shape, 1, values, x_dtype))]


def general(names: Iterable[str]) -> list[str]:
    """Those of the kernels that take weights with zeros anywhere, as far as this release knows them."""
    known = base.kernels()
    return [name for name in names if name in known and known[name].fits is None]


def _rounds(clock: Clock, calls: dict[str, list[Call]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call after a first round that does not count: three rounds at least, MOST_ROUNDS at most."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done, found in enumerate(itertools.islice(clock.rounds(calls), MOST_ROUNDS + 1)):
        for name, taken in found.items():
            times[name].append(taken)
        if done >= 3 and time.perf_counter() - started > seconds * len(calls):
            break
    return {name: taken[1:] for name, taken in times.items()}


def _curve(kernel: str, problem: Problem, times: dict[int, list[float]]) -> Curve:
    names = (str(dtype).removeprefix("torch.") for dtype in (problem.values, problem.x))
    medians = (float(f"{statistics.median(seconds):.4g}") for seconds in times.values())
    return Curve(kernel, *names, problem.shape, problem.sparsity, tuple(times), tuple(medians))


def user_folder() -> Path:
    """Where this user's programs find tables, made if it is not there; ValueError if nothing can be written to it."""
    folder = table.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made: {error.strerror or error}; give -o FILE") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: is not writable; give -o FILE")
    return folder


def write(made: Table, output: "str | Path | None") -> Path:
    """Writes a table to a file, or where this user's programs find it from now on; returns where.

    ValueError if the disk is full or the place not writable; a table that was there stays as it was.
    """
    path = Path(output) if output else user_folder() / table.file_name(made.machine, made.threads)
    made.save(path)
    table.forget()
    return path


def rows(made: Table) -> list[dict[str, Any]]:
    """What a table says, shape by shape and tokens by tokens: break-even, dense seconds, and the kernel at SHOWN."""
    found, names = [], general(made.kernels)
    dense = [c for c in made.curves if c.kernel == table.DENSE]
    packed = dict.fromkeys((c.shape, c.weight, c.x) for c in made.curves if c.kernel != table.DENSE)
    for shape, weight, x in packed:
        kinds = getattr(torch, weight), getattr(torch, x)
        given = shape, table.unrounded(kinds[1])
        for tokens in next(c.tokens for c in dense if (c.shape, getattr(torch, c.x)) == given):
            row = {"shape": shape, "values": weight, "x": x, "tokens": tokens}
            row["break_even"] = made.break_even(shape, tokens, *kinds, names)
            row["dense_seconds"] = seconds = made.dense(shape, tokens, *kinds)
            for sparsity in SHOWN:
                best = made.best(shape, 1 - sparsity, tokens, *kinds, names)
                row[f"{sparsity:.0%}"] = best and {"kernel": best[0], "seconds": best[1], "ratio": seconds / best[1]}
            found.append(row)
    return found


def cells(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the printed table."""
    columns = ["shape", "values", "tokens", "break-even", "dense seconds", *(f"{s:.0%}" for s in SHOWN)]
    lines = []
    for row in found:
        best = [row[f"{s:.0%}"] for s in SHOWN]
        lines.append(
            [
                f"{row['shape'][0]}×{row['shape'][1]}",
                kinds_cell(row["values"], row["x"]),
                str(row["tokens"]),
                percent(row["break_even"]),
                f"{row['dense_seconds']:.1e}",
                *(f"{b['kernel']} {b['ratio']:.2f}×" if b else "?" for b in best),
            ]
        )
    return columns, lines


def kinds_cell(values: str, x: str) -> str:
    """For a person, the dtype of the values and, where kernels round it, of x."""
    return f"{values}, x in {x}" if x == "int8" else values


def percent(break_even: float | None) -> str:
    """A break-even for a person."""
    return "?" if break_even is None else "never" if break_even == table.NEVER else f"{break_even:.0%}"
