"""What docs/compressions.md shows, from the committed rows; RESULTS/ stands for their folder."""

from typing import Any

from figures import rows, table

ALLOCATIONS = {  # (allocator, asked epsilon, other direction) → how a column is called
    ("uniform", 0.0, False): "uniform",
    ("alpha", "auto", False): "alpha, ε auto",
    ("alpha", 0.2, False): "alpha, ε 0.2",
    ("alpha", 0.2, True): "reversed, ε 0.2",
}
METHODS = {"bits": "{:g} bits", "rank": "rank ratio {:g}", "structured": "{:.0%} removed"}


def _key(row: dict) -> tuple[Any, ...]:
    return row["allocator"], row["epsilon"], row["reverse"]


def _models() -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows("compressions.jsonl"):
        found.setdefault(row["on"], []).append(row)
    return found


def _goal(row: dict) -> str:
    return METHODS[row["method"]].format(row["budget"])


def _usual(found: list[dict]) -> dict[str, str]:
    """The first way of each method, which all allocations were carried out in."""
    return {row["method"]: row["way"] for row in reversed(found) if row["method"] != "dense"}


def compressions() -> str:
    """Allocations by budget on every model and text."""
    return "\n\n".join(_allocations(name, found) for name, found in _models().items())


def _allocations(name: str, found: list[dict]) -> str:
    dense, usual = next(r for r in found if r["method"] == "dense"), _usual(found)
    found = [r for method in METHODS for r in found if r["method"] == method]
    cells, wins, losses = [], [], []
    for goal in dict.fromkeys(map(_goal, found)):
        line = {_key(r): r for r in found if _goal(r) == goal and r["way"] == usual[r["method"]]}
        best = min(r["perplexity"] for r in line.values())
        shown = [f"{line[key]['perplexity']:.4g}" for key in ALLOCATIONS]
        shown = [f"**{s}**" if line[k]["perplexity"] == best else s for s, k in zip(shown, ALLOCATIONS, strict=True)]
        uniform = line["uniform", 0.0, False]
        cells.append([goal, *shown, f"{uniform['linears_bytes'] / 1e6:.1f}"])
        alpha = line["alpha", "auto", False]["perplexity"]
        if alpha != uniform["perplexity"]:
            (wins if alpha < uniform["perplexity"] else losses).append(goal)
    verdict = " and ".join(
        f"{word} than uniform at {', '.join(goals)}" for word, goals in (("better", wins), ("worse", losses)) if goals
    )
    spread = next(r["spread"] for r in found if r["epsilon"] == "auto")
    note = (
        f"{name}: perplexity (dense: {dense['perplexity']:.4g}, its loss ± {dense['stderr']:.3f} nats; "
        f"{dense['linears_bytes'] / 1e6:.1f} MB of linears), {dense['windows']} windows of {dense['length']} tokens. "
        f"The automatic ε is that of the blocks' alphas, {spread:.3f} here; there alpha is {verdict or 'uniform'}, and "
        f"elsewhere both make one plan. `python bench/compressions.py` ([rows](RESULTS/compressions.jsonl))."
    )
    columns = ["budget", *ALLOCATIONS.values(), "MB of linears, uniform"]
    return f"{table(columns, cells)}\n\n{note}"


def compression_ways() -> str:
    """What text and refits are worth on uniform plans, on every model and text."""
    return "\n\n".join(_ways(name, found) for name, found in _models().items())


def _ways(name: str, found: list[dict]) -> str:
    found, cells = [r for method in METHODS for r in found if r["method"] == method], []
    for method, way in dict.fromkeys((r["method"], r["way"]) for r in found):
        line = [r for r in found if (r["method"], r["way"], r["allocator"]) == (method, way, "uniform")]
        shown = " / ".join(f"{r['perplexity']:.4g}" for r in line)
        cells.append([f"{method}: {way}", " / ".join(_goal(r).replace(" removed", "") for r in line), shown])
    note = f"{name}, uniform plans: `python bench/compressions.py` ([rows](RESULTS/compressions.jsonl))."
    return f"{table(['carried out', 'budgets', 'perplexity'], cells)}\n\n{note}"
