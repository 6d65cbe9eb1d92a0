"""`alphaprune bench --tune`: the time table of this machine, every kernel and dense torch measured by turns."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune import __version__, timing
from alphaprune.formats import native
from alphaprune.kernels import base, spmm, table
from alphaprune.kernels.table import Curve, Machine, Table

Bar = Callable[[int, str, str], AbstractContextManager[Callable[[str], None]]]
Call = Callable[[Tensor], Tensor]
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# (values, activations). The dense layer beside them computes in the dtype of the activations.
QUICK_DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.int8, torch.bfloat16))
ALL_DTYPES = (*QUICK_DTYPES, (torch.float32, torch.float32), (torch.float16, torch.float16))
# A kernel that takes so many times as long as the fastest is not asked about more tokens, unless it is made for many.
LOST = 3.0
SHOWN = (0.5, 0.7, 0.9)
MOST_ROUNDS = 50


@dataclass(frozen=True)
class Grid:
    """What is measured: shapes [N, K], sparsities, dtypes, tokens; weights of `rotated` bytes, so none is in a cache.

    seconds: spent on each kernel at one point at most, unless three calls take longer.
    """

    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...] = ALL_DTYPES
    sparsities: tuple[float, ...] = SPARSITIES
    tokens: tuple[int, ...] = TOKENS
    rotated: int = 1 << 30
    seconds: float = 0.3


QUICK = Grid(((512, 512), (4096, 4096)), QUICK_DTYPES, rotated=1 << 28, seconds=0.05)
FULL = Grid(((512, 512), (2048, 2048), (4096, 4096), (11008, 4096), (4096, 11008)))


def tune(grid: Grid, bar: Bar) -> Table:
    """Seconds of every kernel that runs here, and of the dense layer, at each point of the grid; medians.

    bar: (total, description, unit) → context that yields what to call after each step.
    """
    threads, curves = torch.get_num_threads(), []
    dense: dict[tuple[tuple[int, int], torch.dtype, int], list[float]] = {}
    problems = [
        (shape, values, x, sparsity)
        for shape in grid.shapes
        for values, x in grid.dtypes
        for sparsity in grid.sparsities
    ]
    with bar(len(problems), "tune", "weight") as tick, torch.inference_mode():
        for shape, values, x, sparsity in problems:
            found = _measure(grid, shape, values, x, sparsity)
            for tokens, seconds in found.pop(table.DENSE, {}).items():
                dense.setdefault((shape, x, tokens), []).extend(seconds)
            curves += [_curve(name, values, x, shape, sparsity, times) for name, times in found.items()]
            tick(f"{shape[0]}×{shape[1]} {sparsity:.0%}")
    for shape, x in dict.fromkeys((shape, x) for shape, x, _ in dense):
        times = {tokens: dense[shape, x, tokens] for tokens in grid.tokens}
        curves.append(_curve(table.DENSE, x, x, shape, 0.0, times))
    versions = {"alphaprune": __version__, "torch": torch.__version__}
    return Table(Machine.here(), threads, tuple(curves), timing.read_bandwidth(), versions)


def _measure(
    grid: Grid, shape: tuple[int, int], values: torch.dtype, x_dtype: torch.dtype, sparsity: float
) -> dict[str, dict[int, list[float]]]:
    """{kernel or DENSE: {tokens: seconds of each call}} for one random weight, in copies that the calls go round."""
    weight, packed = timing.random_packed(shape, sparsity, x_dtype, values)
    sparse = list(timing.copies(packed, grid.rotated))
    dense = [weight.clone() for _ in range(timing.copy_count(weight.nbytes, grid.rotated))]
    calls: dict[str, list[Call]] = {table.DENSE: [lambda x, w=w: functional.linear(x, w) for w in dense]}
    for name in contenders(shape, values, x_dtype):
        calls[name] = [spmm.prepare(copy, "tune", name) for copy in sparse]
    found: dict[str, dict[int, list[float]]] = {name: {} for name in calls}
    turn = itertools.count()
    for tokens in grid.tokens:
        x = torch.randn(tokens, shape[1]).to(x_dtype)
        times = _rounds(calls, x, turn, grid.seconds)
        for name, seconds in times.items():
            found[name][tokens] = seconds
        medians = {name: statistics.median(seconds) for name, seconds in times.items() if name != table.DENSE}
        for name, median in medians.items():
            if median > LOST * min(medians.values()) and base.kernels()[name].most_tokens is not None:
                del calls[name]
    return found


def contenders(shape: tuple[int, int], values: torch.dtype, x_dtype: torch.dtype) -> list[str]:
    """The kernels that run here and take the dtypes. The reference is the truth, not a contender.

    ValueError if there is none.
    """
    if native.load() is None:
        raise ValueError(f"there are no kernels to tune: {native.status()}")
    return [
        name
        for name, kernel in base.kernels().items()
        if name != "reference" and not (kernel.available() or kernel.supports(shape, 1, values, x_dtype))
    ]


def _rounds(calls: dict[str, list[Call]], x: Tensor, turn: Iterator[int], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call after a first round that does not count: three rounds at least, MOST_ROUNDS at most."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(MOST_ROUNDS + 1):
        if done > 3 and time.perf_counter() - started > seconds * len(calls):
            break
        place = next(turn)
        for name, copies in calls.items():
            times[name].append(timing.seconds_of(copies[place % len(copies)], x))
    return {name: taken[1:] for name, taken in times.items()}


def _curve(
    kernel: str,
    values: torch.dtype,
    x_dtype: torch.dtype,
    shape: tuple[int, int],
    sparsity: float,
    times: dict[int, list[float]],
) -> Curve:
    names = (str(dtype).removeprefix("torch.") for dtype in (values, x_dtype))
    medians = (float(f"{statistics.median(seconds):.4g}") for seconds in times.values())
    return Curve(kernel, *names, shape, sparsity, tuple(times), tuple(medians))


def write(made: Table, output: "str | Path | None") -> Path:
    """Writes a table to a file, or where this user's programs find it from now on; returns where."""
    path = Path(output) if output else table.cache_folder() / table.file_name(made.machine, made.threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path.parent}: cannot be made: {error.strerror or error}") from error
    made.save(path)
    table.forget()
    return path


def break_evens(shapes: dict[str, tuple[int, int]], dtype: str, times: str, tokens: int) -> dict[str, float]:
    """The sparsity of each layer W [N, K] from which on it is faster than dense, NEVER where it is at none.

    dtype: of the weights, "bfloat16"…   times: a table's file, or "auto" for this machine's. tokens: rows of x.
    ValueError if there is no such table, or it has no times for the dtype.
    """
    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: wanted a whole number from 1")
    found = table.current() if times == "auto" else Table.load(times)
    if found is None:
        raise ValueError("--times auto: there is no time table for this machine; run `alphaprune bench --tune` first")
    kind = getattr(torch, dtype)
    known = {shape: found.break_even(shape, tokens, kind, kind) for shape in set(shapes.values())}
    if None in known.values():
        raise ValueError(
            f"{found.path}: has no times of {dtype} weights and their dense layers; run `alphaprune bench --tune`"
        )
    return {name: known[shape] for name, shape in shapes.items()}


def rows(made: Table) -> list[dict[str, Any]]:
    """What a table says, shape by shape and tokens by tokens: break-even, dense seconds, and the kernel at SHOWN."""
    found = []
    dense = [c for c in made.curves if c.kernel == table.DENSE]
    packed = dict.fromkeys((c.shape, c.weight, c.x) for c in made.curves if c.kernel != table.DENSE)
    for shape, weight, x in packed:
        kinds = getattr(torch, weight), getattr(torch, x)
        for tokens in next(c.tokens for c in dense if (c.shape, c.x) == (shape, x)):
            row = {"shape": shape, "values": weight, "x": x, "tokens": tokens}
            row["break_even"] = made.break_even(shape, tokens, *kinds)
            row["dense_seconds"] = seconds = made.dense(shape, tokens, *kinds)
            for sparsity in SHOWN:
                best = made.best(shape, 1 - sparsity, tokens, *kinds)
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
                row["values"],
                str(row["tokens"]),
                percent(row["break_even"]),
                f"{row['dense_seconds']:.1e}",
                *(f"{b['kernel']} {b['ratio']:.2f}×" if b else "?" for b in best),
            ]
        )
    return columns, lines


def percent(break_even: float | None) -> str:
    """A break-even for a person."""
    return "?" if break_even is None else "never" if break_even == table.NEVER else f"{break_even:.0%}"
