"""`alphaprune demo`: analyze → plan → prune → pack → run on the embedded model, measured at every step."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from alphaprune import analysis, checkpoint, data, evaluate, generate, hf, layer, planning, pruning, timing
from alphaprune.demo import block, corpus, picture
from alphaprune.files import atomic_write_text
from alphaprune.model import open_source

MODEL = Path(__file__).parent / "model"
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
ALLOCATORS = ("uniform", "alpha")
METHOD = "sparsegpt"  # with a refit: nearly as good as alps here, in a fifth of its time
LENGTH = 512  # tokens per window, the context of the model
EVALUATED, CALIBRATED = 32, 8  # windows
SHOWN_PLAN = 0.7  # the sparsity whose plan is drawn


def run(output: Path, bar: Callable) -> dict[str, Any]:
    """All measurements as one JSON-able dict; writes demo.json and demo.png into `output`."""
    started = perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = data.load_tokenizer(MODEL)
    held_out = spread(encode(tokenizer, "held-out"), EVALUATED)
    tokens = data.sample_windows(encode(tokenizer, "calibration"), CALIBRATED, LENGTH, seed=0)
    source = open_source(MODEL)
    stats = analysis.analyze(source)
    plans = {(a, s): planning.plan(stats, s, allocator=a) for s in SPARSITIES for a in ALLOCATORS}
    timer = block.BlockTimer()
    rows: list[dict[str, Any]] = []
    models = []  # of the rows that are no copies
    with bar(1 + len(distinct(plans)), "demo", "model") as tick:
        models.append(hf.load(MODEL))
        rows.append(measure_dense(models[0], held_out, timer))
        tick("dense")
        for (allocator, sparsity), plan in plans.items():
            same = twin(plans, allocator, sparsity)
            if same is not None:  # epsilon auto is 0 up to 50 %: the same plan, so the same model
                found = next(r for r in rows if (r["allocator"], r["sparsity"]) == same)
                rows.append({**found, "allocator": allocator, "same_as": same[0]})
                continue
            model, row = measure(plan, tokens, held_out, timer)
            models.append(model)
            rows.append(row)
            tick(f"{allocator} {sparsity:.0%}")
    rates = iter(generate.decode_rates(models))
    for row in rows:
        own = "same_as" not in row
        row["tokens_per_second"] = next(rates) if own else rate_of(rows, row["same_as"], row["sparsity"])
    result = {
        "machine": timing.machine(),
        "method": METHOD,
        "python": corpus.load("held-out").python,
        "corpus_sha256": held_out.sha256,
        "bytes": rows[0]["bytes_scored"],
        "tokens": rows[0]["tokens_scored"],
        "rows": rows,
        "alpha": alpha_of_blocks(stats),
        "plan": {a: plan_of_blocks(plans[a, SHOWN_PLAN]) for a in ALLOCATORS},
        "plan_sparsity": SHOWN_PLAN,
    }
    result["picture"] = picture.draw(result, output / "demo.png")
    result["seconds"] = perf_counter() - started
    atomic_write_text(output / "demo.json", json.dumps(result, indent=2) + "\n")
    return result


def encode(tokenizer: Any, split: str) -> data.Text:
    return data.encode(tokenizer, corpus.load(split).text, f"standard library, {split}")


def spread(text: data.Text, windows: int) -> data.Text:
    """Windows evenly spread over a text, as a shorter text: a sample of all its documents."""
    count = text.tokens.numel() // LENGTH
    picks = torch.linspace(0, count - 1, min(windows, count)).long()
    tokens = text.tokens[: count * LENGTH].reshape(count, LENGTH)[picks]
    ends = text.ends[: count * LENGTH].reshape(count, LENGTH)[picks]
    return data.Text(text.name, text.sha256, text.bytes, tokens.flatten(), ends.flatten())


def distinct(plans: dict[tuple[str, float], planning.Plan]) -> list[tuple[str, float]]:
    return [key for key in plans if twin(plans, *key) is None]


def twin(plans: dict[tuple[str, float], planning.Plan], allocator: str, sparsity: float) -> tuple[str, float] | None:
    """The earlier allocator whose plan removes the same weights, if there is one."""
    zeros = {n: p.zeros for n, p in plans[allocator, sparsity].layers.items()}
    for other in ALLOCATORS[: ALLOCATORS.index(allocator)]:
        if {n: p.zeros for n, p in plans[other, sparsity].layers.items()} == zeros:
            return other, sparsity
    return None


def rate_of(rows: list[dict[str, Any]], allocator: str, sparsity: float) -> float:
    """Tokens per second in the row of a plan."""
    return next(r["tokens_per_second"] for r in rows if (r["allocator"], r["sparsity"]) == (allocator, sparsity))


def measure_dense(model: Any, held_out: data.Text, timer: block.BlockTimer) -> dict[str, Any]:
    source = open_source(MODEL)
    linears = sum(n * k * 2 for n, k in source.description().shapes.values())
    quality = evaluate.evaluate(model, held_out, LENGTH)
    return {
        "allocator": "dense",
        "sparsity": 0.0,
        **figures(quality),
        "disk_bytes": disk_bytes(MODEL),
        "linears_bytes": linears,
        "block_seconds": timer.dense_seconds,
        "block_speedup": 1.0,
        "block_bytes": timer.dense_bytes,
    }


def measure(
    plan: planning.Plan, tokens: torch.Tensor, held_out: data.Text, timer: block.BlockTimer
) -> tuple[Any, dict[str, Any]]:
    """Prunes, packs, writes, loads and judges one model; its weights stay mapped from files that have no name then."""
    with tempfile.TemporaryDirectory() as folder:
        model = hf.load(MODEL)
        masks = pruning.prune(model, plan, METHOD, tokens, refit=True)
        written = checkpoint.save(layer.sparsify(model, masks), Path(folder, "packed"))
        packed = hf.load(written.folder)
        quality = evaluate.evaluate(packed, held_out, LENGTH)
        size = disk_bytes(written.folder)
    return packed, {
        "allocator": plan.allocator,
        "sparsity": plan.sparsity,
        **figures(quality),
        "disk_bytes": size,
        "linears_bytes": written.stored_bytes,
        **timer.time(plan_of_blocks(plan)),
    }


def figures(quality: evaluate.Evaluation) -> dict[str, Any]:
    return {
        "bits_per_byte": quality.bits_per_byte,
        "perplexity": quality.perplexity,
        "bytes_scored": quality.bytes,
        "tokens_scored": quality.tokens,
    }


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def alpha_of_blocks(stats: analysis.Analysis) -> list[dict[str, float]]:
    """Per block: the mean alpha of its layers, and the lowest and highest."""
    blocks: dict[int, list[float]] = {}
    for stat in stats.layers.values():
        blocks.setdefault(stat.block, []).append(stat.columns["alpha"])
    return [{"mean": sum(a) / len(a), "lowest": min(a), "highest": max(a)} for _, a in sorted(blocks.items())]


def plan_of_blocks(plan: planning.Plan) -> list[float]:
    """Sparsity of each block."""
    zeros: dict[str, int] = {}
    weights: dict[str, int] = {}
    for name, entry in plan.layers.items():
        key = ".".join(name.split(".")[:3])  # model.layers.3
        zeros[key] = zeros.get(key, 0) + entry.zeros
        weights[key] = weights.get(key, 0) + entry.shape[0] * entry.shape[1]
    return [zeros[key] / weights[key] for key in zeros]


def show(result: dict[str, Any], table: Callable) -> None:
    """Prints the table and what it stands on."""
    rows = []
    for row in result["rows"]:
        name = "dense" if row["allocator"] == "dense" else f"{row['sparsity']:.0%} {row['allocator']}"
        rows.append(
            [
                name + (f" (= {row['same_as']})" if "same_as" in row else ""),
                f"{row['bits_per_byte']:.4f}",
                f"{row['disk_bytes'] / 1e6:.2f}",
                f"{row['linears_bytes'] / 1e6:.2f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['block_seconds'] * 1e3:.2f}e-3",
                f"{row['block_speedup']:.2f}×",
            ]
        )
    columns = ["model", "bits per byte", "MB on disk", "MB linears", "tokens/s", "7B block, s", "speed-up"]
    table(columns, rows)
    print(
        f"Quality: held-out standard library of Python {result['python']}, corpus sha256 "
        f"{result['corpus_sha256'][:16]}, {result['bytes']:,} bytes in {result['tokens']:,} tokens."
    )
    print(
        "tokens/s: this model, greedy decoding by the package; with 11 M parameters much of its time goes into\n"
        "Python, not weights. 7B block: the seven linears of one LLaMA-2-7B block with random weights, one token,\n"
        "weights read from memory, each matrix pruned in parts with the ratios of the plan's blocks."
    )
    print(result["picture"] or "No picture: matplotlib is missing (pip install 'alphaprune[demo]').")
    print(f"{result['seconds']:.0f} s in all.")
