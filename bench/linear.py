"""Packed linear layers beside torch's dense ones, from memory: a table, JSON, or rows appended to a file.

python bench/linear.py --shape 11008x4096 --sparsity 0.5,0.8 --tokens 1,4,16
"""

import argparse
import json
import sys
from dataclasses import asdict

import held
import torch
from rows import append

from alphaprune import timing
from alphaprune.bandwidth import Reader

COLUMNS = (
    "shape",
    "sparsity",
    "tokens",
    "values",
    "kernel",
    "seconds",
    "dense seconds",
    "Gweights/s",
    "GB/s",
    "bandwidth %",
    "ratio",
)


def row_dict(row: timing.Row) -> dict:
    """A row with its derived figures, ready for JSON; seconds and bytes."""
    derived = ("ratio", "weights_per_second", "bytes_per_second", "of_bandwidth")
    return asdict(row) | {name: getattr(row, name) for name in derived}


def line(row: timing.Row) -> str:
    """A row of the table."""
    cells = [
        "x".join(map(str, row.shape)),
        f"{row.sparsity:.2f}",
        str(row.tokens),
        row.values + (f", x in {row.activations}" if row.activations else ""),
        row.kernel,
        f"{row.seconds:.6f}",
        f"{row.dense_seconds:.6f}",
        f"{row.weights_per_second / 1e9:.1f}",
        f"{row.bytes_per_second / 1e9:.1f}",
        f"{100 * row.of_bandwidth:.0f}",
        f"{row.ratio:.2f}",
    ]
    return "  ".join(f"{cell:>13}" for cell in cells)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="11008x4096", help="NxK[,NxK...]")
    parser.add_argument("--sparsity", default="0.5,0.6,0.7,0.8,0.9")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--values", choices=("int8",), help="how the packed weight is stored, if not in --dtype")
    parser.add_argument("--activations", choices=("int8",), help="of x beside int8 values, where kernels can")
    parser.add_argument("--kernel", help="one kernel instead of the automatic choice")
    parser.add_argument("--held", choices=held.ISAS, help=held.HELP)
    parser.add_argument("--gigabytes", type=float, default=1, help="of weights that the calls go round")
    parser.add_argument("--repeats", type=int, default=3, help="times round them")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", help="append the rows to this file, one JSON object each")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    held.hold(args.held)
    timing.check_activations(args.values and torch.int8, args.activations and torch.int8)
    reader = Reader()
    if not args.json:
        reads = f"reads {reader.bandwidth / 1e9:.1f} GB/s"
        print(f"{timing.machine()}; {torch.get_num_threads()} threads; {reads}; {args.dtype}")
        print("  ".join(f"{name:>13}" for name in COLUMNS))
    for shape in args.shape.split(","):
        n, k = map(int, shape.split("x"))
        for tokens in map(int, args.tokens.split(",")):
            for sparsity in map(float, args.sparsity.split(",")):
                row = timing.time_linear(
                    (n, k),
                    sparsity,
                    tokens,
                    getattr(torch, args.dtype),
                    args.kernel,
                    int(args.gigabytes * (1 << 30)),
                    args.repeats,
                    reader=reader,
                    values=args.values and getattr(torch, args.values),
                    activations=args.activations and getattr(torch, args.activations),
                )
                found = row_dict(row)
                found["machine"] = held.named(found["machine"], args.held)
                print(json.dumps(found) if args.json else line(row), flush=True)
                if args.out:
                    append(args.out, found)


if __name__ == "__main__":
    sys.exit(main())
