"""What README.md and docs show of quality and analyses, from the committed rows; RESULTS/ stands for their folder."""

import json

from figures import RESULTS, rows, table


def demo() -> str:
    found = json.loads((RESULTS / "demo.json").read_text())
    cells = []
    twins = [row["sparsity"] for row in found["rows"] if "same_as" in row]
    for row in (row for row in found["rows"] if "same_as" not in row):
        name = "dense" if row["allocator"] == "dense" else f"{row['sparsity']:.0%}, {row['allocator']}"
        cells.append(
            [
                name + (" and alpha" if row["sparsity"] in twins else ""),
                f"{row['bits_per_byte']:.3f}",
                f"{row['linears_bytes'] / 1e6:.2f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['block_bytes'] / row['block_seconds'] / 1e9:.1f}",
                f"{row['block_speedup']:.2f}×",
            ]
        )
    columns = ["model", "bits per byte", "MB of linears", "tokens/s", "7B block, GB/s", "7B block, speed-up"]
    note = (
        f"`alphaprune demo`, {found['machine']}: the embedded 11 M-parameter LLaMA, method {found['method']} with a "
        f"refit, judged on the held-out standard library of Python {found['python']} (corpus sha256 "
        f"{found['corpus_sha256'][:12]}, "
        f"{found['bytes']:,} bytes in {found['tokens']:,} tokens). 7B block: the seven linears of one LLaMA-2-7B-"
        f"shaped block, random bf16 weights read from memory, one token, against torch's dense bf16."
    )
    return f"{table(columns, cells)}\n\n{note} {verdict(found)}"


def verdict(found: dict) -> str:
    """Which allocation is better where, in words; and how far apart the blocks are."""
    bits = {(r["allocator"], r["sparsity"]): r["bits_per_byte"] for r in found["rows"] if "same_as" not in r}
    pairs = {s: (bits["alpha", s], bits["uniform", s]) for a, s in bits if a == "alpha"}
    better = [f"{s:.0%}" for s, (alpha, uniform) in pairs.items() if alpha < uniform]
    worse = [f"{s:.0%}" for s, (alpha, uniform) in pairs.items() if alpha > uniform]
    means = [a["mean"] for a in found["alpha"]]
    parts = [f"better at {', '.join(better)}"] * bool(better) + [f"worse at {', '.join(worse)}"] * bool(worse)
    return (
        f"On this model the alpha allocation is {' and '.join(parts)}: the mean alphas of its blocks lie between "
        f"{min(means):.2f} and {max(means):.2f}. No allocator wins everywhere; judge them on your own model and text."
    )


def model() -> str:
    found = json.loads((RESULTS / "demo_model.json").read_text())
    return (
        f"Held-out bits per byte {found['bits_per_byte']:.3f}; `xz -9` on the same {found['bytes']:,} bytes "
        f"{found['xz_bits_per_byte']:.3f}, and {found['xz_after_train_bits_per_byte']:.3f} after it has seen the "
        f"training text (Python {found['python']}, {found['tokens']:,} tokens, held-out sha256 "
        f"{found['held_out_sha256'][:12]}; `python bench/demo_model.py`)."
    )


def analyze() -> str:
    found = [row for row in rows("analyze.jsonl") if row["contender"] != "mid"]
    cells = [
        [f"{r['shape'][0]}×{r['shape'][1]}", r["contender"], r["solver"], f"{r['seconds']:.2f}", f"{r['ratio']:.2f}×"]
        for r in found
    ]
    note = (
        f"`python bench/analyze.py`, {found[0]['threads']} threads, float32 weights; medians of "
        f"{found[0]['rounds']} rounds by turns."
    )
    return f"{table(['matrix', 'fit', 'solver', 'seconds', 'of svdvals'], cells)}\n\n{note}"


def quality() -> str:
    """Methods by sparsity on the embedded model as they were published; the rest stands in the file."""
    return methods_of("demo", "the embedded model", everything=False)


def quality_stories() -> str:
    return methods_of("stories260K_hf", "stories260K")


OTHER_SELECTION = {"magnitude": "row", "wanda": "matrix"}  # than the published one; see bench/quality.py


def _called(row: dict) -> str:
    other = row["selection"] == OTHER_SELECTION.get(row["method"]) and row["pattern"] == "unstructured"
    name = row["method"] + f" by {row['selection']}" * other
    return name + " + refit" * row["refit"] + " + channel permutation" * row["channel_permute"]


def _extra(row: dict) -> bool:
    return row["channel_permute"] or row["selection"] == OTHER_SELECTION.get(row["method"])


def methods_of(model: str, called: str, everything: bool = True) -> str:
    found = [row for row in rows("quality.jsonl") if row["model"] == model]
    dense = next(row for row in found if row["method"] == "dense")
    pruned = [row for row in found if row["method"] != "dense" and (everything or not _extra(row))]
    shapes = list(dict.fromkeys((row["pattern"], row["sparsity"]) for row in pruned))
    cells = []
    for name in dict.fromkeys(map(_called, pruned)):
        line = {(r["pattern"], r["sparsity"]): r for r in pruned if _called(r) == name}
        figures = [f"{line[s]['perplexity']:.4g} ({line[s]['layer_error']:.1%})" if s in line else "" for s in shapes]
        cells.append((-line[next(s for s in reversed(shapes) if s in line)]["layer_error"], [name, *figures]))
    names = [f"{sparsity:.0%}" if pattern == "unstructured" else pattern for pattern, sparsity in shapes]
    note = (
        f"Perplexity (dense: {dense['perplexity']:.4g}, its loss ± {dense['stderr']:.3f}) and layer error "
        f"Σ‖(Ŵ − W)X‖² / Σ‖WX‖² of {called} at uniform ratios: `python bench/quality.py`, {dense['windows']} windows "
        f"of {dense['length']} tokens ([rows](RESULTS/quality.jsonl))."
    )
    return f"{table(['method', *names], [line for _, line in sorted(cells)])}\n\n{note}"


def compared() -> str:
    """Allocators by sparsity on every model that was compared."""
    found = rows("compare.jsonl")
    return "\n\n".join(compared_on(m, [r for r in found if r["model"] == m]) for m in {r["model"]: 0 for r in found})


def compared_on(model: str, found: list[dict]) -> str:
    dense, candidates = found[0], found[1:]
    sparsities, methods = (list(dict.fromkeys(r[k] for r in candidates)) for k in ("sparsity", "method"))
    cells = []
    for allocator in dict.fromkeys(r["allocator"] for r in candidates):
        line = [allocator]
        for sparsity in sparsities:
            mine = {r["method"]: r for r in candidates if (r["allocator"], r["sparsity"]) == (allocator, sparsity)}
            shown = [f"{mine[m]['test']['perplexity']:.4g}" for m in methods]
            line.append(
                " / ".join(f"**{s}**" if mine[m]["recommended"] else s for s, m in zip(shown, methods, strict=True))
            )
        cells.append(line)
    judged = []
    for row in (r for r in candidates if r["recommended"]):
        versus = row["test_versus_best"]
        margin = f"{versus['difference']:+.3f} ± {versus['stderr']:.3f} nats" if versus["difference"] else "itself"
        judged.append(f"{row['sparsity']:.0%} {row['allocator']} with {row['method']} ({margin})")
    note = (
        f"{model}: test perplexity with {' / '.join(methods)} (dense: {dense['test']['perplexity']:.4g}), bold: chosen "
        f"by `alphaprune compare` on the validation text. Against the best on the test text: {'; '.join(judged)}. "
        f"`python bench/compare.py`, {dense['windows']} windows of {dense['length']} tokens each "
        f"([rows](RESULTS/compare.jsonl))."
    )
    return f"{table(['allocator', *(f'{s:.0%}' for s in sparsities)], cells)}\n\n{note}"


def recovered() -> str:
    """What LoRA recovery wins back on the embedded model, by sparsity."""
    found = sorted(rows("recover.jsonl"), key=lambda row: row["sparsity"])
    cells = [
        [
            f"{r['sparsity']:.0%}",
            *(f"{r[name]:.3f}" for name in ("dense", "pruned", "recovered")),
            f"{r['won_back']:.0%}",
            f"{r['seconds'] / 60:.1f}",
        ]
        for r in found
    ]
    first = found[0]
    tokens = first["steps"] * first["batch"] * first["length"]
    note = (
        f"Held-out loss of the embedded model in nats per token, pruned by {first['method']} with a refit and the "
        f"{first['allocator']} allocation, then {first['steps']} steps of {first['batch']} windows of "
        f"{first['length']} tokens ({tokens:,} in all), rank {first['rank']}, "
        f"{'taught by the dense model' if first['distil'] else 'on the text alone'}; "
        f"`python bench/recover.py`, {first['machine']}, {first['threads']} thread{'s' * (first['threads'] > 1)}, "
        f"beside other work ([rows](RESULTS/recover.jsonl))."
    )
    columns = ["sparsity", "dense", "pruned", "recovered", "won back", "minutes"]
    return f"{table(columns, cells)}\n\n{note}"
