"""What docs show of large checkpoints and of several ranks, from committed rows; RESULTS/ stands for their folder."""

from figures import rows, table

MODELS = {"llama2-7b": "LLaMA-2-7B", "llama2-70b": "LLaMA-2-70B"}
STEPS = {
    "analyze-robust": "analyze",
    "analyze-reference": "analyze --fit reference",
    "prune-magnitude": "prune --method magnitude",
    "prune-wanda": "prune --method wanda",
    "pack": "convert",
    "decode": "generate, 8 tokens",
}
BLOCKS = {"llama2-7b": 32, "llama2-70b": 80}


def scale() -> str:
    """The newest row of every step, and the ratio of two processes to one."""
    newest = {(row["shape"], row["step"]): row for row in rows("scale.jsonl") if row["ok"]}
    cells = [
        [
            f"{MODELS[shape]}, {row['blocks']} of {BLOCKS[shape]} blocks",
            f"`{STEPS[step]}`",
            str(row["threads"]),
            f"{row['seconds'] / 60:.1f}",
            f"{row['rss'] / 2**30:.2f}",
            f"{row['rss_anon'] / 2**30:.2f}",
        ]
        for shape in MODELS
        for step in STEPS
        if (row := newest.get((shape, step)))
    ]
    columns = ["random weights, bfloat16", "command", "threads", "minutes", "GiB at most", "of them not mapped files"]
    last = next(reversed(newest.values()))
    note = f"`python bench/scale.py`, {last['machine']} ([rows](RESULTS/scale.jsonl))"
    if any(row["threads"] == 1 for row in newest.values()):
        note += "; one thread: beside other work"
    both = newest.get(("llama2-7b", "ranks"))
    if both:
        note += f"; two processes analyze {both['ratio']:.2f}× as fast as one, with one thread each"
    return f"{table(columns, cells)}\n\n{note}."


def in_vllm() -> str:
    """Packed beside dense in vLLM, on one rank and on two: the newest row of each."""
    newest = {(row["ranks"], row["compiled"], row["weights"]): row for row in rows("vllm.jsonl")}
    cells = [
        [
            str(ranks),
            "compiled" if compiled else "eager",
            weights if weights == "dense" else f"{weights}, {row['sparsity']:.0%}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['over_dense']:.2f}×",
        ]
        for (ranks, compiled, weights), row in sorted(newest.items())
    ]
    last = next(reversed(newest.values()))
    note = (
        f"{last['clients']} clients at once, {last['new']} tokens each, the embedded model, bfloat16; "
        f"`python bench/in_vllm.py`, {last['machine']}, vLLM {last['vllm']} ([rows](RESULTS/vllm.jsonl))."
    )
    return f"{table(['ranks', 'vLLM', 'weights', 'tokens/s', 'of dense'], cells)}\n\n{note}"
