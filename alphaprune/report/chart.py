"""What a page is made of: sections of charts and tables, drawn by svg.py and png.py alike."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal

# law: a line without marks; stem: one from the axis to each mark; area: filled down to the axis.
Kind = Literal["line", "points", "stem", "area", "law"]
Ticks = tuple[tuple[float, str], ...]
LABELS_PER_AXIS = 12  # of blocks; more would touch each other


def _check(what: str, kind: "type | UnionType", values: Iterable[Any]) -> None:
    """TypeError here rather than where it is drawn, when nobody knows any more which file it came from."""
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"wanted {what}, got {value!r}")


@dataclass(frozen=True)
class Series:
    """Numbers under one name. place: which colour, mark and dash it has, so that none of them is needed alone.

    error: half the length of the bar of each point, along y; along x in a chart that is `across`.   flagged: points
    that are drawn hollow with a cross.   says: what is said of each point where a mouse or a reader stops at it.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    place: int = 0
    kind: Kind = "line"
    error: tuple[float, ...] = ()
    flagged: tuple[bool, ...] = ()
    says: tuple[str, ...] = ()
    hollow: bool = False

    def __post_init__(self) -> None:
        _check("texts", str, (self.name, *self.says))
        _check("numbers", int | float, (*self.x, *self.y, *self.error))


@dataclass(frozen=True)
class Rule:
    """A thin line across the chart at a value of an axis. dash: 0 is none."""

    axis: Literal["x", "y"]
    value: float
    name: str = ""
    dash: int = 1


@dataclass(frozen=True)
class Chart:
    """One picture. says: its content in a sentence, for those who do not see it.   small: one of many.

    low, high: where the y axis must reach at least.   x_ticks, y_ticks: in place of round numbers.
    """

    title: str
    says: str
    x_name: str
    y_name: str
    series: tuple[Series, ...]
    rules: tuple[Rule, ...] = ()
    x_log: bool = False
    y_log: bool = False
    x_ticks: Ticks = ()
    y_ticks: Ticks = ()
    across: bool = False  # rows downwards with numbers to the right
    small: bool = False
    note: str = ""  # drawn into the upper right corner
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    rows: int = 0  # of a chart that is `across`


@dataclass(frozen=True)
class Table:
    """Cells as they are printed; the first column names the row. closed: opened on demand, as one behind a picture."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    closed: bool = True

    def __post_init__(self) -> None:
        for row in (self.columns, *self.rows):
            _check("texts", str, row)


@dataclass(frozen=True)
class Section:
    """One heading. groups: charts that belong together under a name of their own."""

    title: str
    words: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    groups: tuple[tuple[str, tuple[Chart, ...]], ...] = field(default=())


def extent(chart: Chart, axis: Literal["x", "y"]) -> tuple[float, float]:
    """Lowest and highest value of an axis with some room, in its logarithm where it has one."""
    fixed = chart.x_range if axis == "x" else chart.y_range
    log = chart.x_log if axis == "x" else chart.y_log
    if fixed is not None:
        return tuple(math.log10(v) for v in fixed) if log else fixed
    values = [v for s in chart.series for v in _reached(s, axis, chart.across)]
    values += [rule.value for rule in chart.rules if rule.axis == axis]
    values = [math.log10(v) if log else v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not values:
        return (0.0, 1.0)
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * max(abs(high), 1e-3 if log else 1.0)
    named = chart.x_ticks if axis == "x" else chart.y_ticks  # places in a row, which may lie at the edge
    below = low if low >= 0 and low - room < 0 and not log and not named else low - room
    return (below, high + room)


def _reached(series: Series, axis: str, across: bool) -> Iterable[float]:
    """The values of a series along an axis, ends of its error bars included."""
    values = series.x if axis == "x" else series.y
    yield from values
    if series.error and (axis == "x") == across:
        for value, error in zip(values, series.error, strict=True):
            yield from (value - error, value + error)


def ticks(low: float, high: float, log: bool, most: int = 6) -> Ticks:
    """Round numbers between two ends, which are logarithms where the axis is one."""
    return _log_ticks(low, high, most) if log else _linear_ticks(low, high, most)


def _linear_ticks(low: float, high: float, most: int) -> Ticks:
    span = high - low
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * m for m in (1, 2, 5, 10, 20) if span / (step * m) <= most)
    first = math.ceil(low / step - 1e-9)
    values = [step * place for place in range(first, math.floor(high / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return tuple((value, f"{value:.{digits}f}") for value in values)


def _log_ticks(low: float, high: float, most: int) -> Ticks:
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if last - first >= 2:
        step = -(-(last - first + 1) // most)
        return tuple((float(p), _power(p)) for p in range(first, last + 1, step))
    within = [m * 10.0**p for p in range(first - 1, last + 1) for m in (1, 2, 3, 5)]
    within = [v for v in within if low - 1e-9 <= math.log10(v) <= high + 1e-9]
    if len(within) >= 2:
        return tuple((math.log10(v), f"{v:g}") for v in within)
    return tuple((math.log10(v), text) for v, text in _linear_ticks(10**low, 10**high, most) if v > 0)


def _power(exponent: int) -> str:
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def block_ticks(blocks: Sequence[int]) -> Ticks:
    """Numbers of blocks, every so many where there are too many for all."""
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if len(blocks) <= LABELS_PER_AXIS * s)
    return tuple((float(block), str(block)) for block in blocks if block % step == 0)
