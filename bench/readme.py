"""Writes the figures of README.md and docs from the committed rows: `python bench/readme.py [--check]`.

Between `<!-- NAME -->` and `<!-- /NAME -->` stands what this script makes of bench/results; --check: fails if stale.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def table(columns: list[str], cells: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


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


SHOWN = {1: (0.5, 0.7, 0.8), 16: (0.7, 0.8), 64: (0.8,), 256: (0.8,)}  # sparsities of a layer by tokens


def linear() -> str:
    """On the newest machine that has rows."""
    return linear_tables()[-1]


def linears() -> str:
    """On every machine, the newest last."""
    return "\n\n".join(linear_tables())


def linear_tables() -> list[str]:
    """Of one layer, and not of every sparsity: a table for every machine that has rows."""
    shown = [
        row
        for row in rows("linear.jsonl")
        if row["shape"] == [11008, 4096] and row["sparsity"] in SHOWN.get(row["tokens"], ())
    ]
    machines = dict.fromkeys(row["machine"] for row in shown)
    return [linear_of([r for r in shown if r["machine"] == name]) for name in machines]


def linear_of(found: list[dict]) -> str:
    cells = [
        [
            str(r["tokens"]),
            f"{r['sparsity']:.0%}",
            r.get("values", r["dtype"]),
            r["kernel"],
            f"{r['seconds']:.2e}",
            f"{r['dense_seconds']:.2e}",
            f"{r['of_bandwidth']:.0%}",
            f"{r['ratio']:.2f}×",
        ]
        for r in found
    ]
    columns = [
        *("tokens", "sparsity", "values", "kernel", "seconds"),
        *("dense, seconds", "of read bandwidth", "speed-up"),
    ]
    first = found[0]
    dense = dict.fromkeys(r.get("dense_dtype", r["dtype"]) for r in found)
    note = (
        f"A layer of 11008×4096 ([more rows](RESULTS/linear.jsonl)): `python bench/linear.py`, "
        f"{first['machine']}, {first['threads']} threads, which read "
        f"{first['bandwidth'] / 1e9:.1f} GB/s; medians of interleaved calls, weights from memory; dense is torch in "
        f"{' or '.join(dense)}."
    )
    return f"{table(columns, cells)}\n\n{note}"


def peers() -> str:
    """Every other engine beside ours at one token, on the newest machine that has rows."""
    found = [row for row in rows("peers.jsonl") if row["tokens"] == 1]
    found = [row for row in found if row["machine"] == found[-1]["machine"]]
    ours = {
        (tuple(r["shape"]), r["variant"], r["sparsity"]): r["seconds"] for r in found if r["engine"] == "alphaprune"
    }
    shapes, sparsities = (list(dict.fromkeys(key[place] for key in ours)) for place in (0, 2))
    cells = []
    for engine, variant in dict.fromkeys((r["engine"], r["variant"]) for r in found if r["engine"] != "alphaprune"):
        values = "int8" if variant.startswith(("int8", "Q")) else "bfloat16"
        line = [f"{engine} {variant}", values]
        for shape in shapes:
            theirs = {
                r["sparsity"]: r["seconds"]
                for r in found
                if (r["engine"], r["variant"]) == (engine, variant) and tuple(r["shape"]) == shape
            }
            ratios = [theirs.get(s, theirs.get(None, math.nan)) / ours[shape, values, s] for s in sparsities]
            line.append(" / ".join(f"{ratio:.2f}" for ratio in ratios))
        cells.append(line)
    cells.sort(key=lambda line: (line[1], line[0]))
    at = " / ".join(f"{s:.0%}" for s in sparsities)
    note = (
        f"Seconds of other engines over ours at a sparsity of {at} (above 1: ours is faster), one token, weights "
        f"from memory, all by turns in one run: `python bench/peers.py`, {found[0]['machine']}, "
        f"{found[0]['threads']} threads ([rows](RESULTS/peers.jsonl), other machines and 16 tokens among them)."
    )
    return f"{table(['engine', 'our values', *(f'{n}×{k}' for n, k in shapes)], cells)}\n\n{note}"


def decode() -> str:
    """Whole models: the summary of every packed one."""
    found = rows("decode.jsonl")
    cells = [
        [
            r["model"],
            f"{r['sparsity']:.0%}",
            r["values"],
            *(f"{r[name]:.2f}×" for name in ("ratio", "ratio_of_weights")),
            " / ".join(f"{ratio:.2f}" for ratio in r["ratios"]),
        ]
        for r in found
        if "ratio" in r
    ]
    first = found[0]
    columns = ["model", "sparsity", "values", "over transformers, dense", "over our decoder, dense", "pairs"]
    note = (
        f"Tokens per second of a whole model with random weights, over those of the dense one in bfloat16, processes "
        f"by turns: `python bench/decode.py`, {first['machine']}, {first['threads']} threads "
        f"([rows](RESULTS/decode.jsonl))."
    )
    return f"{table(columns, cells)}\n\n{note}"


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


def cubins() -> str:
    shown = [row for row in rows("cubins.jsonl") if row["m"] == (1 if row["kernel"].startswith("delta") else 8)]
    found = [row for row in shown if row["arch"] == "sm_80" or not row["kernel"].startswith("nm")]
    cells = [
        [
            row["kernel"].partition("<")[0],
            row["arch"],
            str(row["m"]),
            *(f"{row[column]:.4g}" for column in ("instr", "alu", "popc", "lsu", "hmma")),
            str(row["registers"]),
            f"{row['occupancy']:.0%}",
        ]
        for row in found
    ]
    note = (
        "`python bench/cubins.py`, nvcc: issued by a warp in the main loop per 1024 weights (delta_spmv: non-zeros) at "
        "50 % sparsity, bfloat16; no kernel spills ([more tokens](bench/results/cubins.jsonl)). Counts, not times."
    )
    columns = [
        "kernel",
        "architecture",
        "tokens",
        "instructions",
        "ALU",
        "POPC",
        "LSU",
        "HMMA",
        "registers",
        "occupancy",
    ]
    return f"{table(columns, cells)}\n\n{note}"


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


def serve() -> str:
    found = rows("serve.jsonl")
    cells = [
        [
            str(r["clients"]),
            r["weights"],
            f"{r['tokens_per_second']:.0f}",
            f"{r['over_one_client']:.2f}×",
            *(f"{r[name]:.4f}" for name in ("first_token_seconds", "token_seconds")),
        ]
        for r in found
    ]
    packed = next(r for r in found if r["sparsity"])
    note = (
        f"The embedded model, packed at {packed['sparsity']:.0%} and dense, with clients that stream {packed['new']} "
        f"tokens each: `python bench/serve.py`, {packed['machine']}, {packed['threads']} threads, clients on the same "
        f"cores, medians ([rows](RESULTS/serve.jsonl))."
    )
    columns = ["clients", "weights", "tokens/s", "of one client", "first token, seconds", "each token, seconds"]
    return f"{table(columns, cells)}\n\n{note}"


def load() -> str:
    cells = [
        [
            r["cache"],
            *(f"{r[name]:.2f}" for name in ("read_seconds", "load_seconds", "first_seconds", "next_seconds")),
            f"{r['resident_loaded'] / 1e6:.0f}",
        ]
        for r in rows("load.jsonl")
    ]
    first = rows("load.jsonl")[0]
    note = (
        f"A packed directory of {first['bytes'] / 1e9:.1f} GB, out of the file cache and in it; MB added: resident "
        f"memory after loading, before the first token. `python bench/load.py`, {first['machine']}, "
        f"{first['threads']} threads ([rows](RESULTS/load.jsonl))."
    )
    columns = [
        "file cache",
        "reading the files, s",
        "from_pretrained, s",
        "first token, s",
        "next token, s",
        "MB added",
    ]
    return f"{table(columns, cells)}\n\n{note}"


PAGES = {
    "README.md": (demo, quality, linear, cubins, model),
    "docs/speed.md": (linears, peers, decode),
    "docs/quality.md": (quality_stories, compared, analyze),
    "docs/serving.md": (load, serve),
}


def filled(page: str) -> str:
    """A page with its figures; SystemExit if it has no place for one of them."""
    text = (ROOT / page).read_text()
    for part in PAGES[page]:
        name = part.__name__
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no place for {name}")
        made = part().replace("RESULTS/", "../" * page.count("/") + "bench/results/")
        text = pattern.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    options = parser.parse_args()
    pages = {page: filled(page) for page in PAGES}
    if options.check:
        return int(any(text != (ROOT / page).read_text() for page, text in pages.items()))
    for page, text in pages.items():
        (ROOT / page).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
