"""Sections → one HTML page that loads nothing: drawings inline, a light and a dark set of colours, tables behind."""

import re
from collections.abc import Sequence
from importlib import resources

from alphaprune.report import svg
from alphaprune.report.chart import Chart, Section, Table

OPEN = 64  # drawings of spectra up to which all groups are open from the start
NOTHING_LOADS = "default-src 'none'; style-src 'unsafe-inline'"

escape = svg.escape


def html(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], maker: str) -> str:
    """The whole page. facts: name and value of what stands at the top."""
    style = resources.files("alphaprune.report").joinpath("style.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#s{n}">{escape(s.title)}</a></li>' for n, s in enumerate(sections))
    known = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    body = "\n".join(_section(number, section) for number, section in enumerate(sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{NOTHING_LOADS}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="{escape(maker)}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<dl class="facts">{known}</dl>
<nav aria-label="Sections"><ol>{links}</ol></nav>
</header>
<main>
{body}
</main>
<footer>{escape(maker)}. This page loads nothing from elsewhere.</footer>
</body>
</html>
"""


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="s{number}"><h2>{escape(section.title)}</h2>']
    if section.words:
        parts.append(f"<p>{_prose(section.words)}</p>")
    if section.charts:
        drawn = (_figure(chart, f"s{number}c{place}") for place, chart in enumerate(section.charts))
        parts.append(f'<div class="charts">{"".join(drawn)}</div>')
    total = sum(len(charts) for _, charts in section.groups)
    for place, (name, charts) in enumerate(section.groups):
        drawn = (_figure(chart, f"s{number}g{place}c{c}") for c, chart in enumerate(charts))
        is_open = " open" if total <= OPEN or place == 0 else ""
        parts.append(
            f'<details class="group"{is_open}><summary>{escape(name)} <span>{len(charts)}</span></summary>'
            f'<div class="smalls">{"".join(drawn)}</div></details>'
        )
    parts += [_table(table) for table in section.tables]
    return "".join([*parts, "</section>"])


def _prose(words: str) -> str:
    """Text in which what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(words))


def _figure(chart: Chart, name: str) -> str:
    caption = f"<figcaption>{escape(chart.title)}</figcaption>"
    return f"<figure>{caption}{svg.draw(chart, name)}</figure>"


def _table(table: Table) -> str:
    numbers = [any(map(_is_number, cells)) for cells in zip(*table.rows, strict=True)] or [True] * len(table.columns)
    head = "".join(
        f'<th scope="col"{"" if right else " class=w"}>{escape(column)}</th>'
        for column, right in zip(table.columns, numbers, strict=True)
    )
    rows = "".join(f'<tr><th scope="row">{escape(row[0])}</th>{_cells(row[1:])}</tr>' for row in table.rows)
    found = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.name)}"><table><thead>'
        f"<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    if table.closed:
        return f'<details class="table"><summary>{escape(table.name)}</summary>{found}</details>'
    return f"<h3>{escape(table.name)}</h3>{found}"


def _cells(cells: Sequence[str]) -> str:
    """Numbers to the right, words to the left."""
    return "".join(f"<td{'' if _is_number(cell) else ' class=w'}>{escape(cell)}</td>" for cell in cells)


def _is_number(cell: str) -> bool:
    return cell.strip("+-−%×, ").replace(",", "")[:1].isdigit()
