"""What README.md and docs show of GPUs, from the committed rows; RESULTS/ stands for their folder."""

from figures import rows, table

FRONT = (28672, 4096)  # the layer that README.md shows: gate and up of LLaMA 3 side by side
KEPT = ((0.5, "unstructured"), (0.6, "unstructured"), (0.7, "unstructured"), (0.8, "unstructured"),
        (0.9, "unstructured"), (0.5, "2:4"))  # fmt: skip


def found(name: str = "gpu.jsonl") -> list[dict]:
    """Rows without an error, of every GPU."""
    return [row for row in rows(name) if "error" not in row and "skipped" not in row]


def fastest(shape: tuple[int, int], of: list[dict]) -> list[list[str]]:
    """A line per number of tokens: dense microseconds, and of each sparsity our fastest kernel and its speed-up."""
    lines = []
    here = [row for row in of if tuple(row["shape"]) == shape]
    for tokens in sorted({row["tokens"] for row in here}):
        ours = [row for row in here if row["tokens"] == tokens and row["kind"] == "kernel" and row["values"] == "float"]
        if not ours:
            continue
        cells = [f"{tokens}", f"{1e6 * ours[0]['dense_seconds']:.1f}"]
        for sparsity, pattern in KEPT:
            best = [r for r in ours if (r["sparsity"], r["pattern"]) == (sparsity, pattern)]
            row = min(best, key=lambda r: r["seconds"], default=None)
            cells.append("" if row is None else f"{row['ratio']:.2f}× {row['name']}")
        lines.append(cells)
    return lines


def gpu() -> str:
    """One layer on the first GPU that has rows."""
    return layers([FRONT])


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
            "([all rows](RESULTS/gpu.jsonl))."
        )
    return "\n\n".join(parts)


def gpu_decode() -> str:
    """Whole models on GPUs."""
    parts = []
    for name in dict.fromkeys(row["machine"] for row in found("decode_gpu.jsonl")):
        here = [row for row in found("decode_gpu.jsonl") if row["machine"] == name]
        lines = [
            [
                row["model"],
                "dense"
                if not row["sparsity"]
                else row["pattern"]
                if ":" in row["pattern"]
                else f"{row['sparsity']:.0%}",
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
