"""Rows of what Nsight Compute counted of each launch of bench/pipes.py: bytes, pipes, wavefronts, stalls.

ncu -o p --profile-from-start off --clock-control none --set full python bench/pipes.py --case sbt_mma:1:0.5
ncu -i p.ncu-rep --csv --page raw > raw.csv
python bench/counters.py raw.csv --case sbt_mma:1:0.5 --changed "persistent blocks" --out bench/results/pipes.jsonl

A row has seconds, bytes and counts; everything else is a share, from 0 to 1. pipes and issue_slots: of the cycles in
which a multiprocessor works; busy: of the launch's cycles, those. stalls: of a warp's time, what it waits for, the
largest first. conflicts: of the shared memory's wavefronts, those more than needed. changed: what was done because of
the row, in words.
"""

import argparse
import csv
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import gpu_cases
from rows import append

SCALES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNIT = re.compile(r"([numKMGT]?)(s|second|byte|hz)\b")
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
LEAST_STALL = 0.02
SHARED = "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum"
COUNTED = {
    "seconds": "gpu__time_duration.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_written_bytes": "dram__bytes_write.sum",
    "dram_bytes_per_second": "dram__bytes.sum.per_second",
    "instructions": "smsp__inst_executed.sum",
    "shared_wavefronts": SHARED,
    "cycles": "sm__cycles_elapsed.max",
    "registers": "launch__registers_per_thread",
    "waves": "launch__waves_per_multiprocessor",
}
SHARES = {
    "of_dram": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hits": "lts__t_sector_hit_rate.pct",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue_slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "wavefront_slots": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
}
PIPES = {
    "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "fma": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
    "lsu": "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "uniform": "sm__inst_executed_pipe_uniform.avg.pct_of_peak_sustained_active",
    "xu": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
}


def launches(lines: list[str]) -> Iterator[dict[str, float | str]]:
    """What each launch's line says, by column, in seconds, bytes and counts; ValueError if it is no raw page."""
    found = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(found) < 2 or "Kernel Name" not in found[0] or len(found[0]) != len(found[1]):
        raise ValueError("this is no page of launches; make it by: ncu -i FILE.ncu-rep --csv --page raw")
    names, units, *every = found
    for values in every:
        if len(values) != len(names):
            raise ValueError(
                f"a launch has {len(values)} cells, and there are {len(names)} columns: the page is cut off"
            )
        cells = zip(names, values, units, strict=True)
        yield {name: number(value, unit) for name, value, unit in cells}


def number(text: str, unit: str) -> float | str:
    """A cell in seconds, bytes or what it counts; the text itself if it is none."""
    try:
        found = float(text.replace(",", ""))
    except ValueError:
        return text
    scale = UNIT.match(unit)
    return float(f"{found * SCALES[scale[1]]:.9g}") if scale else found


def row(launch: dict[str, float | str]) -> dict[str, object]:
    """The figures that are kept of a launch; None where this Nsight Compute or this device has no such counter."""
    found: dict[str, object] = {
        "gpu": launch.get("device__attribute_display_name"),
        "capability": str(launch.get("CC")),
        "launched": str(launch["Kernel Name"]),
        "grid": _sizes(launch.get("Grid Size", "")),
        "block": _sizes(launch.get("Block Size", "")),
    }
    found |= {name: _counted(launch.get(column)) for name, column in COUNTED.items()}
    found |= {name: _share(launch.get(column)) for name, column in SHARES.items()}
    found["busy"] = _ratio(launch.get("sm__cycles_active.avg"), launch.get(COUNTED["cycles"]))
    conflicts = launch.get("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum")
    found["conflicts"] = _ratio(conflicts, launch.get(SHARED))
    found["pipes"] = {name: _share(launch.get(column)) for name, column in PIPES.items()}
    found["stalls"] = stalls(launch)
    return found


def stalls(launch: dict[str, float | str]) -> dict[str, float]:
    """What warps wait for, as shares of their time, from LEAST_STALL on, the largest first."""
    named = {match[1]: value for name, value in launch.items() if (match := STALL.fullmatch(name))}
    every = {name: value for name, value in named.items() if isinstance(value, float)}
    total = sum(every.values())
    shares = {name: value / total for name, value in every.items() if value >= LEAST_STALL * total > 0}
    return {name: round(share, 4) for name, share in sorted(shares.items(), key=lambda item: -item[1])}


def _counted(value: "float | str | None") -> float | None:
    return value if isinstance(value, float) else None


def _ratio(part: "float | str | None", whole: "float | str | None") -> float | None:
    return part / whole if isinstance(part, float) and isinstance(whole, float) and whole else None


def _share(percent: "float | str | None") -> float | None:
    return percent / 100 if isinstance(percent, float) else None


def _sizes(text: "float | str") -> list[int]:
    return [int(part) for part in re.findall(r"\d+", str(text))]


def line(row: dict) -> str:
    """A row of the table."""
    pipes = ", ".join(f"{name} {100 * share:.0f}" for name, share in row["pipes"].items() if share and share >= 0.1)
    waits = ", ".join(f"{name} {100 * share:.0f}" for name, share in list(row["stalls"].items())[:4])
    what = row.get("case") or row["launched"]
    took = "?" if row["seconds"] is None else f"{1e6 * row['seconds']:.2f}"
    busy = "?" if row["busy"] is None else f"{100 * row['busy']:.0f}"
    return f"{what:28}  {took:>8} us  busy {busy:>3} %  pipes {pipes}  stalls {waits}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="ncu --csv --page raw; - for standard input")
    cases = {"type": gpu_cases.launches_from, "default": ()}
    parser.add_argument("--case", **cases, help="kernel:tokens:sparsity of each launch, with commas, as in pipes.py")
    parser.add_argument("--shape", type=gpu_cases.shapes_from, default=((28672, 4096),))
    parser.add_argument("--changed", help="what is done because of these rows")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", help="append the rows to this file, one JSON object each")
    options = parser.parse_args(arguments)
    try:
        text = sys.stdin.read() if options.file == "-" else Path(options.file).read_text()
        found = [row(launch) for launch in launches(text.splitlines())]
        cases = list(itertools.product(options.shape, options.case))
        if cases and len(cases) != len(found):
            raise ValueError(f"--case names {len(cases)} launches, and {options.file} has {len(found)}")
    except (OSError, ValueError) as fault:
        print(f"counters.py: {fault}", file=sys.stderr)
        return 2
    for place, made in enumerate(found):
        if cases:
            shape, (kernel, tokens, kept) = cases[place]
            case = f"{kernel}:{tokens}:{kept}"
            made |= {"case": case, "shape": list(shape), "kernel": kernel, "tokens": tokens, "sparsity": kept}
        if options.changed:
            made["changed"] = options.changed
        print(json.dumps(made, allow_nan=False) if options.json else line(made), flush=True)
        if options.out:
            append(options.out, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
