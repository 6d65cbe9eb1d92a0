"""How fast this machine reads memory: every load width, prefetch, kind of page and number of streams, best first.

python bench/bandwidth.py --out bench/results/bandwidth.jsonl
"""

import argparse
import json
import sys

import torch
from rows import append

from alphaprune import bandwidth, timing


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1, help="that each loop reads")
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all loops; the best counts")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", help="append the rows to this file, one JSON object each")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    nbytes = int(args.gigabytes * (1 << 30))
    where = {"machine": timing.machine(), "threads": torch.get_num_threads(), "repeats": args.repeats}
    rows = sorted(bandwidth.read_loops(nbytes, args.repeats), key=lambda row: -row["bytes_per_second"])
    if not args.json:
        print(f"{where['machine']}; {where['threads']} threads; {nbytes / 1e9:.1f} GB; best of {args.repeats}")
        print(f"{'loop':<34}{'pages':>8}{'streams':>9}{'GB/s':>8}")
    for row in rows:
        text = json.dumps(where | row)
        line = f"{row['loop']:<34}{row['pages']:>8}{row['streams']:>9}{row['bytes_per_second'] / 1e9:>8.1f}"
        print(text if args.json else line)
        if args.out:
            append(args.out, where | row)


if __name__ == "__main__":
    sys.exit(main())
