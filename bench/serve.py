"""The server under load: the embedded model packed at 70 % beside the dense one, for 1, 8 and 32 clients.

python bench/serve.py --clients 1,8,32 --out bench/results/serve.jsonl
python bench/serve.py --shape tinyllama-1.1b --clients 1,4,8 --out bench/results/serve.jsonl
python bench/serve.py --device cuda --model PACKED --dense DENSE --out bench/results/serve-a100.jsonl

Without --model and --dense it is the embedded model, packed here, or random weights in the shapes of a larger one:
packed, packed as int8 (on a CPU with activations of 8 bits), and dense. All servers run; in each of `--rounds` rounds
each of them in turn gets the load of each number of clients. A client streams completions of `--new` tokens after
prompts of some 40 letters, greedily, one after the other. The clients are one process on the same cores as the server.
Rows, one JSON object each, seconds and bytes throughout:

machine, threads, torch      where it ran
device, engine               of the server; whose batching
model, weights               the embedded one, its shape or its folder; packed, dense or int8
sparsity, weight_bytes       of the prunable layers; of the whole model
clients, new                 at the same time; tokens per completion
tokens_per_second            of all clients together, median of the rounds
first_token_seconds          from a request to its first token, median of all requests
first_token_seconds_p95      95 % of the requests were faster
token_seconds                from one token of a stream to its next one, median of all requests
over_one_client              tokens per second over those of one client, median of the rounds
packed_bytes, kv_bytes, scratch_bytes, memory_allocated_bytes, memory_peak_bytes, memory_limit_bytes
                             what /metrics says at the end: of the GPU, or of the server's process
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from rows import append
from served import Reply, Served, complete, pack_demo, random_folder, serve

GAUGES = [f"{name}_bytes" for name in ("packed", "kv", "scratch")]
GAUGES += [f"memory_{name}_bytes" for name in ("allocated", "peak", "limit")]
COLUMNS = ("weights", "engine", "clients", "tokens/s", "over one", "first s", "first p95", "token s")
PROMPTS = [f"def {verb}_{noun}(self, {noun}, count):\n    " for verb in ("read", "write", "find", "copy", "sort")
           for noun in ("file", "line", "name", "table", "node", "entry", "value", "token")]  # fmt: skip


async def load(server: Served, clients: int, requests: int, new: int) -> tuple[float, list[Reply]]:
    """Tokens per second of all clients together, and their replies."""

    async def client(number: int) -> list[Reply]:
        prompts = [PROMPTS[(number + 7 * i) % len(PROMPTS)] for i in range(requests)]
        return [await complete(server.host, server.port, prompt, new) for prompt in prompts]

    started = perf_counter()
    replies = [r for each in await asyncio.gather(*(client(n) for n in range(clients))) for r in each]
    return sum(reply.tokens for reply in replies) / (perf_counter() - started), replies


def measure(servers: dict[tuple[str, str], Served], clients: list[int], rounds: int, new: int) -> list[dict[str, Any]]:
    """A row per server, by weights and engine, and number of clients, measured by turns."""
    rates: dict[tuple[tuple[str, str], int], list[float]] = {}
    replies: dict[tuple[tuple[str, str], int], list[Reply]] = {}
    for turn in range(rounds + 1):
        for count in clients:
            for name, server in servers.items():
                rate, made = asyncio.run(load(server, count, 2 if count > 1 else 4, new))
                if turn:  # the first round warms up
                    rates.setdefault((name, count), []).append(rate)
                    replies.setdefault((name, count), []).extend(made)
    rows = []
    for (name, count), found in rates.items():
        first = sorted(reply.first for reply in replies[name, count])
        alone = rates.get((name, 1))
        rows.append(
            {
                "weights": name[0],
                "engine": name[1],
                "clients": count,
                "new": new,
                "tokens_per_second": statistics.median(found),
                "first_token_seconds": statistics.median(first),
                "first_token_seconds_p95": first[int(0.95 * (len(first) - 1))],
                "token_seconds": statistics.median(reply.per_token for reply in replies[name, count]),
                "over_one_client": alone and statistics.median(a / b for a, b in zip(found, alone, strict=True)),
                **{key: servers[name].gauge(key) for key in GAUGES},
            }
        )
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--device", default="cpu", help="of the servers: cpu, cuda or cuda:N")
    parser.add_argument("--engine", default="auto", help="auto, alphaprune or transformers; by a comma for several")
    parser.add_argument("--model", help="a packed folder in the place of the embedded model")
    parser.add_argument("--dense", help="the folder of its dense twin, with --model")
    parser.add_argument("--shape", help="random weights in the shapes of this model, such as tinyllama-1.1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64, help="tokens per completion")
    parser.add_argument("--threads", type=int, help="of the server's kernels (default: its own)")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", help="append the rows to this file, one JSON object each")
    return parser.parse_args(arguments)


def folders_of(options: argparse.Namespace, place: Path) -> dict[str, Path]:
    """What is served, by weights; made in `place` where no folder is given. ValueError if it does not fit."""
    if options.model:
        return {"packed": Path(options.model), "dense": Path(options.dense)}
    if options.shape:
        return {
            "packed": random_folder(place / "packed", options.shape, options.sparsity),
            "int8": random_folder(place / "int8", options.shape, options.sparsity, "int8"),
            "dense": random_folder(place / "dense", options.shape, None),
        }
    from alphaprune.demo.run import MODEL

    return {"packed": pack_demo(place / "packed", options.sparsity), "dense": MODEL}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    from alphaprune import timing

    extra = ("--threads", options.threads) if options.threads else ()
    if bool(options.model) != bool(options.dense):
        print("serve.py: give both of --model and --dense, or none", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        try:
            folders = folders_of(options, Path(place))
        except ValueError as error:
            print(f"serve.py: {error}", file=sys.stderr)
            return 2
        servers = {}
        for engine in options.engine.split(","):
            for weights, folder in folders.items():
                log = Path(place) / f"{weights}-{engine}.log"
                own = (*extra, "--activations", "int8") if weights == "int8" and options.device == "cpu" else extra
                made = serve(folder, log, "--device", options.device, "--engine", engine, *own)
                servers[weights, engine] = stack.enter_context(made)
        rows = measure(servers, [int(c) for c in options.clients.split(",")], options.rounds, options.new)
        sizes = {name: sum(f.stat().st_size for f in at.glob("*.safetensors")) for name, at in folders.items()}
    common = {"machine": timing.machine(), "threads": options.threads or torch.get_num_threads()}
    if options.device != "cpu":
        common["machine"] = torch.cuda.get_device_name(options.device)
    common |= {"device": options.device, "model": options.shape or options.model or "embedded"}
    if not options.json:
        print("  ".join(f"{name:>10}" for name in COLUMNS))
    for row in rows:
        made = {**common, "torch": torch.__version__, **row, "weight_bytes": sizes[row["weights"]]}
        made["sparsity"] = 0.0 if row["weights"] == "dense" else options.sparsity
        print(json.dumps(made) if options.json else line(made), flush=True)
        if options.out:
            append(options.out, made)
    return 0


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    over = row["over_one_client"]
    cells = [
        row["weights"],
        row["engine"],
        str(row["clients"]),
        f"{row['tokens_per_second']:.0f}",
        f"{over:.2f}" if over else "",
    ]
    cells += [f"{row[name]:.4f}" for name in ("first_token_seconds", "first_token_seconds_p95", "token_seconds")]
    return "  ".join(f"{cell:>10}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
