"""Our packed layers beside other engines' layers: same shapes, same numbers, same machine, by turns in one run.

python bench/peers.py --setup DIR                each engine in an environment of its own, pinned; downloads, builds
python bench/peers.py --envs DIR --out FILE      all rows; nothing is downloaded
python bench/peers.py --envs DIR --tokens 1 --shapes 11008x4096 --out FILE      a part, replacing its rows

One chunk is one shape and one number of tokens. In it all engines at all sparsities are loaded at once; every round
runs each of them over its copies of the weights once, so that between two reads of a weight all others have passed
through the caches. A figure is the median over the rounds. DeepSparse compiles a layer for up to half a minute above
16 tokens: there it is measured at the sparsity nearest to 70 % only, unless --all.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "engines"))

import rounds
import setups

PEERS = ("torch", "openvino", "deepsparse", "llamacpp", "alphaprune")
OURS = "alphaprune"
IDENTITY = ("machine", "threads", "engine", "variant", "shape", "sparsity", "tokens")
WIDTHS = (-10, -19, 11, 8, 6, 8, 17, 10, 24, 24, 8)
NAMES = (
    "engine",
    "variant",
    "shape",
    "sparsity",
    "tokens",
    "ms",
    "quartiles",
    "Gweights/s",
    "/ ours",
    "/ ours int8",
    "error",
)


def rows(found: list[rounds.Measured], common: dict) -> list[dict]:
    """What is written of one chunk: a row per engine, variant and sparsity.

    sparsity: None for an engine that gains nothing from zeros. ratio: {sparsity: seconds over those of our bfloat16
    values at that sparsity}; ratio_int8: the same over our int8 values, ratio_bytes: with activations of 8 bits, too.
    """
    ours = {(m.variant, m.sparsity): m.seconds for m in found if m.engine == OURS}
    made = []
    for m in found:
        row = common | m.row()
        for name, values in (("ratio", "bfloat16"), ("ratio_int8", "int8"), ("ratio_bytes", "int8, x in int8")):
            row[name] = {
                str(sparsity): m.seconds / seconds
                for (variant, sparsity), seconds in ours.items()
                if variant == values and m.sparsity in (None, sparsity)
            }
        made.append(row)
    return made


def line(row: dict) -> str:
    """A row of the table; ratios are listed by rising sparsity."""

    def listed(ratio: dict) -> str:
        return "/".join(f"{value:.2f}" for value in ratio.values())

    return table_line(
        row["engine"],
        row["variant"],
        "x".join(map(str, row["shape"])),
        "dense" if row["sparsity"] is None else row["sparsity"],
        row["tokens"],
        f"{1e3 * row['seconds']:.2f}",
        "–".join(f"{1e3 * seconds:.2f}" for seconds in row["quartiles"]),
        f"{row['weights_per_second'] / 1e9:.2f}",
        listed(row["ratio"]),
        listed(row["ratio_int8"]),
        f"{row['error']:.1e}",
    )


def table_line(*cells) -> str:
    return " ".join(
        f"{cell!s:<{-width}}" if width < 0 else f"{cell!s:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)
    )


def write(path: Path, new: list[dict]) -> None:
    """Appends the rows; those already there of the same thing are replaced."""

    def identity(row: dict) -> str:
        return json.dumps([row[name] for name in IDENTITY])

    old = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    fresh = {identity(row) for row in new}
    kept = [row for row in old if identity(row) not in fresh] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def shapes(text: str) -> list[tuple[int, int]]:
    return [tuple(map(int, one.split("x"))) for one in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", metavar="DIR", type=Path, help="make the environments there, and nothing else")
    parser.add_argument("--envs", metavar="DIR", type=Path, help="where --setup made them")
    parser.add_argument("--shapes", type=shapes, default=shapes("11008x4096,4096x11008"), help="NxK[,NxK...]")
    parser.add_argument(
        "--sparsity", type=lambda text: [float(s) for s in text.split(",")], default=[0.5, 0.7, 0.8, 0.9]
    )
    parser.add_argument("--tokens", type=lambda text: [int(t) for t in text.split(",")], default=[1, 16, 64, 256])
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS))
    parser.add_argument("--threads", type=int, help="default: the cores that this process may use")
    parser.add_argument("--rounds", type=int, default=5, help="at least")
    parser.add_argument("--seconds", type=float, default=12, help="of measuring per chunk, if that gives more rounds")
    parser.add_argument(
        "--all", action="store_true", help=f"DeepSparse above {rounds.FEW_TOKENS} tokens at every sparsity"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown:
        parser.error(f"--peers {unknown[0]}: there are {', '.join(PEERS)}")
    return options


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(options: argparse.Namespace, drawn: Path) -> int:
    """All chunks; rows go out after each; 1 if a chunk has none. drawn: a folder for the runners' weights."""
    threads = options.threads or rounds.cores()
    workers = rounds.start(options.peers, options.envs, threads, drawn, tell)
    common = {"machine": rounds.machine(), "threads": threads}
    if not options.json:
        print(table_line(*NAMES))
    failed = not workers
    try:
        for shape, tokens in itertools.product(options.shapes, options.tokens):
            begun = time.perf_counter()
            chunk = rounds.Chunk(workers, shape, tokens, options.sparsity, options.all, tell)
            try:
                found = rows(chunk.measure(options.rounds, options.seconds), common)
            except rounds.Fault as fault:
                tell(f"{shape[0]}x{shape[1]}, {tokens} tokens: no rows, {fault}")
                failed = True
                continue
            for row in found:
                print(json.dumps(row) if options.json else line(row), flush=True)
            if options.out:
                write(options.out, found)
            loading = ", ".join(f"{name} {seconds:.0f}" for name, seconds in chunk.loading.items())
            tell(f"{shape[0]}x{shape[1]}, {tokens} tokens: {time.perf_counter() - begun:.0f} s (loading: {loading})")
    finally:
        for worker in workers.values():
            worker.stop()
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.setup:
        return setups.make(options.setup, [name for name in options.peers if name in setups.NEEDS], tell)
    with tempfile.TemporaryDirectory() as drawn:
        return measure(options, Path(drawn))


if __name__ == "__main__":
    sys.exit(main())
