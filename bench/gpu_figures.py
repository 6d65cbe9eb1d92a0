"""What README.md and docs show of GPUs, from the committed rows; RESULTS/ stands for their folder."""

from collections.abc import Callable, Sequence

from figures import rows, table
from rows import kept

FRONT = (28672, 4096)  # the layer that README.md shows: gate and up of LLaMA 3 side by side
KEPT = ((0.5, "unstructured"), (0.6, "unstructured"), (0.7, "unstructured"), (0.8, "unstructured"),
        (0.9, "unstructured"), (0.5, "2:4"))  # fmt: skip
OURS = "alphaprune"
MOST_MMA = 16  # tokens for which sbt_mma is taken where there is sbt_wgmma, whose rows are in wide.jsonl


def found(name: str = "gpu.jsonl") -> list[dict]:
    """Rows without an error, of every GPU."""
    return [row for row in rows(name) if "error" not in row and "skipped" not in row]


def fastest(shape: tuple[int, int], of: list[dict]) -> list[list[str]]:
    """A line per number of tokens: dense microseconds, and of each sparsity our fastest kernel and its speed-up."""
    lines = []
    here = [row for row in of if tuple(row["shape"]) == shape]
    for tokens in sorted({row["tokens"] for row in here}):
        ours = [row for row in here if row["tokens"] == tokens and row["kind"] == "kernel" and row["values"] == "float"]
        ours = [row for row in ours if row["name"] != "sbt_mma" or tokens <= MOST_MMA or row["capability"] != "9.0"]
        if not ours:
            continue
        dense = ours[0]["dense_seconds"]
        here_too = {(row["name"], row["sparsity"]) for row in ours}
        others = elsewhere(ours[0]["gpu"], shape, tokens, dense)
        ours += [row for row in others if (row["name"], row["sparsity"]) not in here_too]
        cells = [f"{tokens}", f"{1e6 * dense:.1f}"]
        for sparsity, pattern in KEPT:
            best = [r for r in ours if (r["sparsity"], r["pattern"]) == (sparsity, pattern)]
            row = min(best, key=lambda r: r["seconds"], default=None)
            cells.append("" if row is None else f"{row['ratio']:.2f}× {row['name']}")
        lines.append(cells)
    return lines


def elsewhere(gpu: str, shape: tuple[int, int], tokens: int, dense: float) -> list[dict]:
    """The same of kernels that have rows in files of their own, over the faster dense product of both."""
    taken = {"sbt_wgmma": ("wide.jsonl", lambda row: row["seconds"][row["best"]])}
    taken["pair_mma"] = "pairs.jsonl", lambda row: row["seconds"]["pair_mma"]
    return [
        {
            "name": name,
            "pattern": "unstructured",
            "sparsity": row["sparsity"],
            "seconds": (seconds := seconds_of(row)),
            "ratio": min(dense, row["seconds"]["dense"]) / seconds,
        }
        for name, (file, seconds_of) in taken.items()
        for row in rows(file)
        if (row["gpu"], tuple(row["shape"]), row["tokens"]) == (gpu, shape, tokens)
    ]


def gpu() -> str:
    """One layer on the GPUs that have rows, and whole models in a line."""
    return " ".join([layers([FRONT]), *whole_models()])


def whole_models() -> list[str]:
    """A sentence for each GPU: steps of one sequence of each model and sparsity over those with dense weights."""
    steps = [
        row
        for row in found("decode_gpu.jsonl")
        if (row["load"], row["sequences"], row["decoder"]) == ("decode", 1, OURS)
    ]
    by_machine: dict[str, list[str]] = {}
    for machine, model in dict.fromkeys((row["machine"], row["model"]) for row in steps):
        here = sorted(
            (row for row in steps if (row["machine"], row["model"]) == (machine, model) and row["sparsity"]),
            key=lambda row: (":" in row["pattern"], row["sparsity"]),
        )
        names = [kept(row) for row in here]
        ratios = [f"{row['ratio']:.2f}" for row in here]
        by_machine.setdefault(machine, []).append(f"{model} at {' / '.join(names)} {' / '.join(ratios)} times")
    return [
        f"Whole models decode tokens, over our own decoder with dense weights: {', '.join(models)} as fast "
        "([rows](RESULTS/decode_gpu.jsonl))."
        for models in by_machine.values()
    ]


def gpus() -> str:
    """Every layer on every GPU that has rows."""
    return layers(list(dict.fromkeys(tuple(row["shape"]) for row in found())))


def layers(shapes: list[tuple[int, int]]) -> str:
    parts = []
    of, columns = found(), ["tokens", "dense, µs", *(f"{s:.0%}" if p == "unstructured" else p for s, p in KEPT)]
    for name in dict.fromkeys(row["gpu"] for row in of):
        here = [row for row in of if row["gpu"] == name]
        for shape in shapes:
            if lines := fastest(shape, here):
                parts.append(f"{name}, a layer of {shape[0]}×{shape[1]}:\n\n{table(columns, lines)}")
        first = here[0]
        parts.append(
            f"`python bench/gpu.py`, bfloat16, torch {first['torch']}, driver {first['driver']}, copies "
            f"{first['bandwidth'] / 1e9:.0f} GB/s: the fastest kernel of this package beside the fastest dense product "
            "of torch and of every algorithm that cuBLASLt proposes, weights from memory, medians of replayed graphs "
            "([all rows](RESULTS/gpu.jsonl)); `sbt_wgmma` and part of `pair_mma` in runs of their own "
            "([1](RESULTS/wide.jsonl), [2](RESULTS/pairs.jsonl)), over the faster dense product of both."
        )
    return "\n\n".join(parts)


def order(row: dict) -> tuple:
    """By tokens, sparsity and size."""
    return row["tokens"], row.get("sparsity", 0), [-size for size in row["shape"]]


def tables(file: str, columns: list[str], cells: Callable[[dict], list[str]], below: Callable[[str, dict], str]) -> str:
    """For each GPU the rows of layers in a file, after tokens and layer, and a text below: of its name and a row."""
    of, parts = rows(file), []
    for name in dict.fromkeys(row["gpu"] for row in of):
        here = sorted((row for row in of if row["gpu"] == name), key=order)
        lines = [[f"{row['tokens']}", "×".join(map(str, row["shape"])), *cells(row)] for row in here]
        parts.append(f"{table(['tokens', 'layer', *columns], lines)}\n\n{below(name, here[0])}")
    return "\n\n".join(parts)


def micro(row: dict, names: Sequence[str], digits: int = 1) -> list[str]:
    """Microseconds by each of these names, nothing where a row has none."""
    return [f"{1e6 * taken:.{digits}f}" if (taken := row["seconds"].get(name)) else "" for name in names]


def wide() -> str:
    """sbt_wgmma by the fastest way to share its work, beside torch and sbt_mma."""
    return tables(
        "wide.jsonl",
        ["sparsity", "torch", "sbt_mma", "sbt_wgmma", "its way", "over torch"],
        lambda row: [
            f"{row['sparsity']:.0%}",
            *micro(row, ("dense", "sbt_mma", row["best"])),
            row["best"],
            f"{row['over_dense']:.2f}×",
        ],
        lambda name, row: (
            f"Microseconds, bfloat16, weights from memory: `python bench/wide.py`, {name}, torch {row['torch']}. A "
            "way: warpgroups of a block with different rows, with the same ones, blocks that share the columns ([all "
            "of them](RESULTS/wide.jsonl))."
        ),
    )


def pairs() -> str:
    """pair_mma beside the kernels of the packed weight itself, and torch."""
    return tables(
        "pairs.jsonl",
        ["sparsity", "torch", "sbt_mma", "sbt_wgmma", "pair_mma", "over torch"],
        lambda row: [
            f"{row['sparsity']:.0%}",
            *micro(row, ("dense", "sbt_mma", "sbt_wgmma", "pair_mma")),
            f"{row['seconds']['dense'] / row['seconds']['pair_mma']:.2f}×",
        ],
        lambda name, _: (
            f"Microseconds, bfloat16, weights from memory, by what `bench/wide.py` measures with, {name}: from 32 "
            "tokens on `pair_mma` in a run some minutes after the others ([rows](RESULTS/pairs.jsonl))."
        ),
    )


def prompts() -> str:
    """2:4 weights with many tokens: nm_wgmma beside torch and the expansion."""
    return tables(
        "prompts.jsonl",
        ["torch", "sbt_expand", "nm_mma_sp", "best way", "over torch", "over expanded"],
        lambda row: [
            *micro(row, ("dense", "sbt_expand", "nm_mma_sp"), 0),
            row["best"],
            f"{row['over_dense']:.2f}×",
            f"{row['seconds']['sbt_expand'] / row['seconds']['nm_mma_sp']:.2f}×",
        ],
        lambda name, row: (
            f"Microseconds, bfloat16, 2:4: `python bench/prompts.py`, {name}, torch {row['torch']}. A way: tokens of a "
            "unit of work, warpgroups of a block ([all of them](RESULTS/prompts.jsonl))."
        ),
    )


def gpu_decode() -> str:
    """Whole models on GPUs."""
    parts = []
    for name in dict.fromkeys(row["machine"] for row in found("decode_gpu.jsonl")):
        here = [row for row in found("decode_gpu.jsonl") if row["machine"] == name]
        lines = [
            [
                row["model"],
                kept(row),
                f"{row['load']} {row['sequences']}",
                f"{row['decoder']}, {row['how']}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['step_over_kernels']:.2f}" if row.get("step_over_kernels") else "",
                f"{row['ratio']:.2f}×" if row.get("ratio") else "",
                f"{row['weight_bytes'] / 1e9:.2f}",
            ]
            for row in here
        ]
        columns = ["model", "weights", "load", "decoder", "tokens/s", "step / kernels", "over dense", "weights, GB"]
        parts.append(
            f"{table(columns, lines)}\n\n{name}: `python bench/decode.py --device cuda`, random weights, bfloat16; "
            "over our own decoder with dense weights ([rows](RESULTS/decode_gpu.jsonl))."
        )
    return "\n\n".join(parts)
