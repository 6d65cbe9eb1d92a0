"""What benchmarks of calls on a CPU share that go round copies in distinct memory: options, facts, medians by turns."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rows import replace

from alphaprune import timing


def options(parser: argparse.ArgumentParser, what: str, gigabytes: float) -> None:
    """--gigabytes of `what`, --rounds and --out."""
    parser.add_argument("--gigabytes", type=float, default=gigabytes, help=f"of {what} that the calls go round")
    parser.add_argument("--rounds", type=int, default=5, help="times round them")
    out(parser)


def out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="put the rows into this file, in the place of this machine's")


def tell(rows: Iterable[dict[str, Any]], file: Path | None) -> None:
    """Prints rows as they come, and puts them into the file, if there is one, in the place of their machine's."""
    made = []
    for row in rows:
        made.append(row)
        print(json.dumps(row), flush=True)
    if file:
        replace(file, made, "machine")


def here() -> dict[str, Any]:
    """Machine, threads, torch, and the bandwidth of the moment in bytes per second."""
    found = {"machine": timing.machine(), "threads": torch.get_num_threads()}
    return found | {"torch": torch.__version__, "bandwidth": timing.read_bandwidth()}


def medians(calls: dict[str, list[timing.Call]], rounds: int) -> dict[str, float]:
    """Seconds of each kind, whose calls are one for every copy, so many times round them."""
    copies = max(map(len, calls.values()))
    return timing.medians(timing.CpuClock(), calls, max(rounds * copies, timing.LEAST_CALLS))
