"""What README.md and docs show of times, from the committed rows; RESULTS/ stands for their folder."""

import math

from figures import rows, table

AT = 0.7  # the sparsity of other engines at more than one token
SHOWN = {1: (0.5, 0.7, 0.8), 16: (0.7, 0.8), 64: (0.8,), 256: (0.8,)}  # sparsities of a layer by tokens
BRIEF = {1: (0.5, 0.7, 0.8), 16: (0.7,), 64: (0.8,), 256: (0.8,)}


def linear() -> str:
    """On the newest machine that has rows, of bfloat16; with activations of 8 bits where they gain most."""
    found = newest([row for row in layer_rows(BRIEF) if row["dtype"] == "bfloat16"])
    return linear_of([row for row in found if not row.get("activations") or row["tokens"] == 16])


def linears() -> str:
    """On every machine, the newest last."""
    return "\n\n".join(linear_tables())


def linear_tables() -> list[str]:
    """A table for every machine that has rows."""
    shown = layer_rows(SHOWN)
    machines = dict.fromkeys(row["machine"] for row in shown)
    return [linear_of([r for r in shown if r["machine"] == name]) for name in machines]


def layer_rows(shown: dict[int, tuple[float, ...]]) -> list[dict]:
    """Of one layer, and not of every sparsity."""
    return [
        row
        for row in rows("linear.jsonl")
        if row["shape"] == [11008, 4096] and row["sparsity"] in shown.get(row["tokens"], ())
    ]


def linear_of(found: list[dict]) -> str:
    cells = [
        [
            str(r["tokens"]),
            f"{r['sparsity']:.0%}",
            values_of(r),
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
    speeds = [row["bandwidth"] / 1e9 for row in found]
    read = " to ".join(dict.fromkeys(f"{speed:.1f}" for speed in (min(speeds), max(speeds))))
    dense = dict.fromkeys(r.get("dense_dtype", r["dtype"]) for r in found)
    note = (
        f"A layer of 11008×4096 ([more rows](RESULTS/linear.jsonl)): `python bench/linear.py`, "
        f"{first['machine']}, {first['threads']} threads, which read {read} "
        f"GB/s; medians of interleaved calls, weights from memory; dense is torch in {' or '.join(dense)}."
    )
    return f"{table(columns, cells)}\n\n{note}"


def values_of(row: dict) -> str:
    """The dtype of the packed values, and of x where kernels might round it or it is none of the others'."""
    beside = row.get("activations") or (row.get("values") == "int8" and row.get("dtype") == "float16" and "float16")
    return (row.get("values") or row["dtype"]) + (f", x in {beside}" if beside else "")


def peers() -> str:
    """Every other engine beside ours on the newest machine that has rows: one token, then more at one sparsity."""
    found = newest(rows("peers.jsonl"))
    ours = [row for row in found if row["engine"] == "alphaprune"]
    shapes, sparsities, tokens = (list(dict.fromkeys(_key(row)[place] for row in ours)) for place in (0, 2, 1))
    many = sorted(count for count in tokens if count > 1)
    one_token = over_ours(found, {f"{n}×{k}": [((n, k), 1, s) for s in sparsities] for n, k in shapes})
    more = over_ours(found, {f"{count} tokens": [(shape, count, AT) for shape in shapes] for count in many})
    at, both = " / ".join(f"{s:.0%}" for s in sparsities), " / ".join(f"{n}×{k}" for n, k in shapes)
    note = (
        f"Seconds of other engines over ours at a sparsity of {at} (above 1: ours is faster), one token, weights "
        f"from memory, all by turns in one run: `python bench/peers.py`, {found[0]['machine']}, "
        f"{found[0]['threads']} threads ([rows](RESULTS/peers.jsonl), other machines among them)."
    )
    if not many:
        return f"{one_token}\n\n{note}"
    return f"{one_token}\n\n{note}\n\nThe same for more tokens at {AT:.0%}, layers of {both}:\n\n{more}"


def _key(row: dict) -> tuple:
    return tuple(row["shape"]), row["tokens"], row["sparsity"]


def over_ours(found: list[dict], columns: dict[str, list[tuple]]) -> str:
    """A row per engine and variant; a column has ratios at several (shape, tokens, sparsity)."""
    ours = {(r["variant"], *_key(r)): r["seconds"] for r in found if r["engine"] == "alphaprune"}
    cells = []
    integers = [name for name in ("int8", "int8, x in int8") if any(key[0] == name for key in ours)]
    for engine, variant in dict.fromkeys((r["engine"], r["variant"]) for r in found if r["engine"] != "alphaprune"):
        theirs = {_key(r): r["seconds"] for r in found if (r["engine"], r["variant"]) == (engine, variant)}
        for values in integers if variant.startswith(("int8", "Q")) else ["bfloat16"]:
            line = [f"{engine} {variant}", values]
            for keys in columns.values():
                seconds = [theirs.get(key, theirs.get((*key[:2], None), math.nan)) for key in keys]
                ratios = [one / ours[(values, *key)] for one, key in zip(seconds, keys, strict=True)]
                line.append(" / ".join("–" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios))
            cells.append(line)
    cells.sort(key=lambda line: (line[1], line[0]))
    return table(["engine", "our values", *columns], cells)


def dense() -> str:
    """Of one layer: torch's seconds over ours by machine, dtype and number of tokens."""
    found = [row for row in rows("dense.jsonl") if row["shape"] == [11008, 4096]]
    ratios = {(r["machine"], r.get("dtype", "bfloat16"), r["tokens"]): r["ratio"] for r in found}
    tokens = sorted({row["tokens"] for row in found})
    cells = [
        [*kind, *(f"{ratios[(*kind, t)]:.2f}×" if (*kind, t) in ratios else "–" for t in tokens)]
        for kind in dict.fromkeys(key[:2] for key in ratios)
    ]
    note = (
        f"Seconds of torch's dense layer over ours by the number of tokens, 11008×4096, from memory, by turns: "
        f"`python bench/dense.py`, {found[-1]['threads']} threads ([more rows](RESULTS/dense.jsonl))."
    )
    return f"{table(['machine', 'dtype', *map(str, tokens)], cells)}\n\n{note}"


def newest(found: list[dict]) -> list[dict]:
    """Those of the machine that the last row is of."""
    return [row for row in found if row["machine"] == found[-1]["machine"]]


def attention() -> str:
    """Of one token, ours and torch's, by the positions of a sequence."""
    found = newest(rows("attention.jsonl"))
    cells = [
        [
            row["model"],
            str(row["sequences"]),
            str(row["context"]),
            *(f"{1e6 * row[name]:.0f}" for name in ("seconds", "paged_seconds", "torch_seconds")),
            f"{row['ratio']:.1f}×",
            f"{row['bytes'] / row['seconds'] / 1e9:.0f}",
        ]
        for row in found
    ]
    columns = ["block of", "sequences", "positions", "ours, µs", "in pages", "torch's", "over it", "GB/s"]
    first = found[0]
    note = (
        f"Keys and values in bfloat16 from memory, which read {first['bandwidth'] / 1e9:.0f} GB/s: "
        f"`python bench/attention.py`, {first['machine']}, {first['threads']} threads "
        f"([rows](RESULTS/attention.jsonl))."
    )
    return f"{table(columns, cells)}\n\n{note}"


def prompt_attention() -> str:
    """torch's time over ours for prompts of some lengths."""
    found = newest(rows("prompt_attention.jsonl"))
    counts = sorted({row["prompt"] for row in found})
    cells = []
    for model in dict.fromkeys(row["model"] for row in found):
        own = {row["prompt"]: row for row in found if row["model"] == model}
        cells.append([model, *(f"{1e3 * own[n]['seconds']:.2f} ({own[n]['ratio']:.1f}×)" for n in counts)])
    note = (
        f"Milliseconds of the attention of a prompt of so many tokens in a block, and torch's over it: "
        f"`python bench/attention.py --prompts {','.join(map(str, counts))}`, {found[0]['machine']}, "
        f"{found[0]['threads']} threads ([rows](RESULTS/prompt_attention.jsonl))."
    )
    return f"{table(['block of', *map(str, counts)], cells)}\n\n{note}"


def decode() -> str:
    """Whole models: the summary of every packed one, on the newest machine."""
    found = newest(rows("decode.jsonl"))
    cells = [
        [
            r["model"],
            f"{r['sparsity']:.0%}",
            values_of(r) + (", head in int8" if r.get("head") else ""),
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


def head() -> str:
    """Steps with an output layer in bfloat16 over those with one of int8 values, on the newest machine."""
    every = newest(rows("head.jsonl"))
    found, judged = ([row for row in every if (name in row)] for name in ("ratio", "loss"))
    losses = ", ".join(f"{r['dense_loss']:.4f} to {r['loss']:.4f} at {r['sparsity']:.0%}" for r in judged)
    sparsities = sorted({row["sparsity"] for row in found})
    cells = []
    for model, values in dict.fromkeys((row["model"], row["values"]) for row in found):
        own = {row["sparsity"]: row for row in found if (row["model"], row["values"]) == (model, values)}
        sizes = [f"{next(iter(own.values()))[name] / 1e9:.2f}" for name in ("dense_head_bytes", "head_bytes")]
        cells.append([model, values, *sizes, *(f"{own[s]['ratio']:.2f}×" for s in sparsities)])
    columns = ["model", "values", "GB in bfloat16", "GB in int8", *(f"{s:.0%}" for s in sparsities)]
    speeds = [row["bandwidth"] / 1e9 for row in found]
    note = (
        f"How many times as fast a step is with an output layer of int8 values as with bfloat16, by the sparsity of "
        f"the blocks; both in one process by turns, medians: `python bench/head.py`, {found[0]['machine']}, "
        f"{found[0]['threads']} threads, which read {min(speeds):.0f} to {max(speeds):.0f} GB/s "
        f"([rows](RESULTS/head.jsonl)). The loss of the embedded model goes from {losses} (nats per token)."
    )
    return f"{table(columns, cells)}\n\n{note}"


def cubins() -> str:
    few = [row for row in rows("cubins.jsonl") if row["m"] == (1 if row["kernel"].startswith("delta") else 8)]
    fifths = "delta_spmv<Bfloat16, 1, true>"  # where deltas have five bits, from some 84 % on
    shown = [row for row in few if "int8" not in row["kernel"] and row["kernel"] != fifths]
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
        "50 % sparsity, bfloat16; no kernel spills ([more tokens](RESULTS/cubins.jsonl)). Counts, not times."
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


def serve() -> str:
    """The embedded model under load, and a larger one."""
    found, parts = newest(rows("serve.jsonl")), []
    for model in dict.fromkeys(r.get("model", "embedded") for r in found):
        of = [r for r in found if r.get("model", "embedded") == model]
        cells = [
            [
                str(r["clients"]),
                "int8, x in int8" if r["weights"] == "int8" else r["weights"],
                f"{r['tokens_per_second']:.{0 if model == 'embedded' else 1}f}",
                f"{r['over_one_client']:.2f}×",
                *(f"{r[name]:.4f}" for name in ("first_token_seconds", "token_seconds")),
            ]
            for r in of
        ]
        packed = next(r for r in of if r["sparsity"])
        what = "The embedded model" if model == "embedded" else f"Random weights in the shapes of {model}"
        option = "" if model == "embedded" else f" --shape {model}"
        note = (
            f"{what}, packed at {packed['sparsity']:.0%} and dense, with clients that stream {packed['new']} tokens "
            f"each: `python bench/serve.py{option}`, {packed['machine']}, {packed['threads']} threads, clients on the "
            "same cores, medians ([rows](RESULTS/serve.jsonl))."
        )
        columns = ["clients", "weights", "tokens/s", "of one client", "first token, seconds", "each token, seconds"]
        parts.append(f"{table(columns, cells)}\n\n{note}")
    return "\n\n".join(parts)


def load() -> str:
    found = newest(rows("load.jsonl"))
    cells = [
        [
            r["cache"],
            {"from_pretrained": "mapped", "load": "on huge pages"}[r["by"]],
            *(f"{r[name]:.2f}" for name in ("read_seconds", "load_seconds", "first_seconds")),
            f"{r['next_seconds']:.3f}",
            f"{r['resident_loaded'] / 1e6:.0f}",
        ]
        for r in found
    ]
    first = found[0]
    note = (
        f"A packed directory of {first['bytes'] / 1e9:.1f} GB, out of the file cache and in it, mapped by "
        f"`from_pretrained` and on huge pages by `load(huge_pages=True)`; tokens by transformers; MB added: resident "
        f"memory after loading, before the first token. `python bench/load.py`, {first['machine']}, {first['threads']} "
        f"threads ([rows](RESULTS/load.jsonl))."
    )
    columns = [
        "file cache",
        "weights",
        "reading the files, s",
        "loading, s",
        "first token, s",
        "next token, s",
        "MB added",
    ]
    return f"{table(columns, cells)}\n\n{note}"
