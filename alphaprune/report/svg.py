"""Chart → SVG text that takes its colours from the page."""

import html
import itertools
import math

from alphaprune.report.chart import Chart, Rule, Series, extent, ticks

WIDE, SMALL = (420, 250), (210, 132)  # width and height in units of the drawing; text is readable from 0.9 px each
LETTER = 6.6  # width of one in a wide font, of 11 units' text, on average
COLOURS, DASHES = 8, ("", "6 3", "1.5 3", "8 3 1.5 3", "4 4", "10 4", "2 2", "6 2 2 2 2 2")
ROW = 19  # height of a row of a chart that is `across`
LEGEND = 16  # height of a line of it
SIZE = 3.6  # of a mark


class _Frame:
    """Where the numbers of a chart are in its drawing."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.x, self.y = extent(chart, "x"), extent(chart, "y")
        self.x_ticks = chart.x_ticks or ticks(*self.x, chart.x_log, 4 if chart.small else 6)
        self.y_ticks = chart.y_ticks or ticks(*self.y, chart.y_log, 5)
        self.legend = [] if chart.small else _lines_of_legend(chart)
        width, height = SMALL if chart.small else WIDE
        self.left = (
            6
            if chart.small
            else (10 if chart.across else 24) + LETTER * max(len(text) for _, text in self.y_ticks or ((0, ""),))
        )
        self.top = 6 if chart.small else 8 + LEGEND * len(self.legend)
        bottom = 18 if chart.small else 36
        if chart.across:
            height = self.top + bottom + ROW * chart.rows
        elif not chart.small:
            height += LEGEND * max(0, len(self.legend) - 1)
        self.width, self.height = width, round(height)
        self.right, self.bottom = width - (6 if chart.small else 10), self.height - bottom

    def at_x(self, value: float) -> float:
        value = math.log10(value) if self.chart.x_log else value
        share = (value - self.x[0]) / (self.x[1] - self.x[0])
        return self.left + min(max(share, 0), 1) * (self.right - self.left)

    def at_y(self, value: float) -> float:
        value = math.log10(value) if self.chart.y_log else value
        share = (value - self.y[0]) / (self.y[1] - self.y[0])
        share = share if self.chart.across else 1 - share
        return self.top + min(max(share, 0), 1) * (self.bottom - self.top)


def draw(chart: Chart, name: str) -> str:
    """The element; name: makes the ids of its title and description the only ones of a page."""
    frame = _Frame(chart)
    kind = "small" if chart.small else "chart"
    parts = [
        f'<svg class="{kind}" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-labelledby="{name}t {name}d"><title id="{name}t">{escape(chart.title)}</title>'
        f'<desc id="{name}d">{escape(chart.says)}</desc>',
        *_axes(frame),
        *(_rule(frame, rule) for rule in chart.rules),
        *(_series(frame, series) for series in chart.series),
        *_legend(frame),
    ]
    if chart.note:
        parts.append(_text(frame.right - 2, frame.top + 11, chart.note, "note e"))
    return "".join([*parts, "</svg>"])


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def _n(value: float) -> str:
    text = f"{value:.1f}"
    return text.removesuffix(".0")


def _text(x: float, y: float, text: str, kind: str, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turned else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" class="{kind}"{turn}>{escape(text)}</text>'


def _axes(frame: _Frame) -> list[str]:
    chart, found = frame.chart, []
    lines = []
    for value, text in frame.x_ticks:
        x = frame.left + (value - frame.x[0]) / (frame.x[1] - frame.x[0]) * (frame.right - frame.left)
        if frame.left - 0.5 <= x <= frame.right + 0.5:
            lines.append(f"M{_n(x)} {_n(frame.bottom)}v{3 if not chart.across else _n(frame.top - frame.bottom)}")
            edge = "s" if x < frame.left + 12 and chart.small else "e" if x > frame.right - 12 and chart.small else "m"
            found.append(_text(x, frame.bottom + 13, text, f"t {edge}"))
    for value, text in () if chart.small else frame.y_ticks:
        share = (value - frame.y[0]) / (frame.y[1] - frame.y[0])
        y = frame.top + (share if chart.across else 1 - share) * (frame.bottom - frame.top)
        if frame.top - 0.5 <= y <= frame.bottom + 0.5:
            lines.append(f"M{_n(frame.left)} {_n(y)}h{_n(frame.right - frame.left)}")
            found.append(_text(frame.left - 5, y + 3.5, text, "t e"))
    base = f'<path class="axis" d="M{_n(frame.left)} {_n(frame.bottom)}H{_n(frame.right)}"/>'
    found = [f'<path class="grid" d="{"".join(lines)}"/>', base, *found]
    if not chart.small:
        found.append(_text((frame.left + frame.right) / 2, frame.height - 6, chart.x_name, "n m"))
        if not chart.across:
            found.append(_text(11, (frame.top + frame.bottom) / 2, chart.y_name, "n m", turned=True))
    return found


def _rule(frame: _Frame, rule: Rule) -> str:
    if rule.axis == "x":
        place = f"M{_n(frame.at_x(rule.value))} {_n(frame.top)}V{_n(frame.bottom)}"
    else:
        place = f"M{_n(frame.left)} {_n(frame.at_y(rule.value))}H{_n(frame.right)}"
    return f'<path class="rule" stroke-dasharray="{DASHES[rule.dash % len(DASHES)]}" d="{place}"/>'


def _series(frame: _Frame, series: Series) -> str:
    points = [(frame.at_x(x), frame.at_y(y)) for x, y in zip(series.x, series.y, strict=True)]
    if not points:
        return ""
    path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
    if series.kind == "area":
        ends = f"L{_n(points[-1][0])} {_n(frame.bottom)}L{_n(points[0][0])} {_n(frame.bottom)}Z"
        return f'<path class="area a{series.place % COLOURS}" d="{path}{ends}"/>'
    parts, colour = [], f"c{series.place % COLOURS}"
    if series.kind == "stem":
        parts.append(f'<path class="line" d="{"".join(f"M{_n(frame.left)} {_n(y)}H{_n(x)}" for x, y in points)}"/>')
    elif series.kind != "points":
        dash = DASHES[series.place % len(DASHES)]
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path class="line"{dashed} d="{path}"/>')
    if series.error:
        parts.append(_errors(frame, series, points))
    if series.kind != "law":
        parts.append(_marks(series, points))
    return f'<g class="{colour}">{"".join(parts)}</g>'


def _errors(frame: _Frame, series: Series, points: list[tuple[float, float]]) -> str:
    bars = []
    for (x, y), a, b, error in zip(points, series.x, series.y, series.error, strict=True):
        if not error > 0:
            continue
        if frame.chart.across:
            low, high = (
                frame.at_x(max(a - error, 10 ** frame.x[0] if frame.chart.x_log else -math.inf)),
                frame.at_x(a + error),
            )
            bars.append(f"M{_n(low)} {_n(y)}H{_n(high)}M{_n(low)} {_n(y - 2.5)}v5M{_n(high)} {_n(y - 2.5)}v5")
        else:
            low, high = (
                frame.at_y(max(b - error, 10 ** frame.y[0] if frame.chart.y_log else -math.inf)),
                frame.at_y(b + error),
            )
            bars.append(f"M{_n(x)} {_n(low)}V{_n(high)}M{_n(x - 2)} {_n(low)}h4M{_n(x - 2)} {_n(high)}h4")
    return f'<path class="bar" d="{"".join(bars)}"/>'


def _marks(series: Series, points: list[tuple[float, float]]) -> str:
    """All marks of a series in one path, unless each has something to say."""
    flagged = series.flagged or (False,) * len(points)
    plain = [p for p, bad in zip(points, flagged, strict=True) if not bad]
    odd = [p for p, bad in zip(points, flagged, strict=True) if bad]
    kind = "hollow" if series.hollow else "mark"
    if series.says:
        return "".join(
            f'<path class="{"hollow" if bad else kind}" d="{mark(x, y, series.place)}{cross(x, y) if bad else ""}">'
            f"<title>{escape(said)}</title></path>"
            for (x, y), said, bad in zip(points, series.says, flagged, strict=True)
        )
    found = f'<path class="{kind}" d="{"".join(mark(x, y, series.place) for x, y in plain)}"/>' if plain else ""
    if odd:
        shapes = "".join(mark(x, y, series.place) + cross(x, y) for x, y in odd)
        found += f'<path class="hollow" d="{shapes}"/>'
    return found


def mark(x: float, y: float, place: int, s: float = SIZE) -> str:
    """The outline of a mark: circle, square, two triangles, diamond, pentagon, bow tie, hourglass."""
    corners: tuple[tuple[float, float], ...]
    match place % COLOURS:
        case 0:
            return f"M{_n(x - s)} {_n(y)}a{s} {s} 0 1 0 {_n(2 * s)} 0a{s} {s} 0 1 0 {_n(-2 * s)} 0"
        case 1:
            corners = ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
        case 2:
            corners = ((0, -1.2), (1.1, 0.9), (-1.1, 0.9))
        case 3:
            corners = ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0))
        case 4:
            corners = ((0, 1.2), (1.1, -0.9), (-1.1, -0.9))
        case 5:
            corners = ((0, -1.2), (1.15, -0.35), (0.7, 1), (-0.7, 1), (-1.15, -0.35))
        case 6:
            corners = ((-1.1, -1.1), (1.1, 1.1), (1.1, -1.1), (-1.1, 1.1))
        case _:
            corners = ((-1.1, -1.1), (1.1, -1.1), (-1.1, 1.1), (1.1, 1.1))
    return "M" + "L".join(f"{_n(x + s * a)} {_n(y + s * b)}" for a, b in corners) + "Z"


def cross(x: float, y: float, s: float = 2 * SIZE) -> str:
    """What goes through a mark that is not to be trusted."""
    return f"M{_n(x - s)} {_n(y - s)}L{_n(x + s)} {_n(y + s)}M{_n(x - s)} {_n(y + s)}L{_n(x + s)} {_n(y - s)}"


def _named(chart: Chart) -> list[tuple[str, Series | Rule]]:
    found: list[tuple[str, Series | Rule]] = [(s.name, s) for s in chart.series if s.name and s.kind != "area"]
    return found + [(rule.name, rule) for rule in chart.rules if rule.name]


def _lines_of_legend(chart: Chart) -> list[list[tuple[float, str, Series | Rule]]]:
    """The legend in lines that are no wider than the drawing: place, name, and what it names."""
    named = _named(chart)
    if not named:
        return []
    lines: list[list[tuple[float, str, Series | Rule]]] = [[]]
    x = 8.0
    for name, what in named:
        width = 26 + LETTER * len(name) + 10
        if lines[-1] and x + width > WIDE[0]:
            lines.append([])
            x = 8.0
        lines[-1].append((x, name, what))
        x += width
    return lines


def _legend(frame: _Frame) -> list[str]:
    found = []
    for line, entries in enumerate(frame.legend):
        y = 10 + LEGEND * line
        for x, name, what in entries:
            if isinstance(what, Rule):
                dash = DASHES[what.dash % len(DASHES)]
                found.append(f'<path class="rule" stroke-dasharray="{dash}" d="M{_n(x)} {_n(y)}h20"/>')
            else:
                found.append(_sample(what, x, y))
            found.append(_text(x + 25, y + 3.5, name, "n"))
    return found


def _sample(series: Series, x: float, y: float) -> str:
    dash = DASHES[series.place % len(DASHES)]
    line = f'<path class="line" stroke-dasharray="{dash}" d="M{_n(x)} {_n(y)}h20"/>' if series.kind != "points" else ""
    kind = "hollow" if series.hollow else "mark"
    shape = f'<path class="{kind}" d="{mark(x + 10, y, series.place)}"/>' if series.kind != "law" else ""
    return f'<g class="c{series.place % COLOURS}">{line}{shape}</g>'


def steps(edges: "list[float]", heights: "list[float]") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The outline of a histogram: x and y of its corners."""
    x = [edge for edge in edges for _ in range(2)][1:-1]
    y = list(itertools.chain.from_iterable((h, h) for h in heights))
    return tuple(x), tuple(y)
