"""Committed rows, and tables of them in Markdown."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def table(columns: list[str], cells: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])
