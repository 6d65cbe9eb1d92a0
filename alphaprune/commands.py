"""What each command does, with plain arguments: check everything first, then load, work, write, print.

Raises ValueError in one sentence for bad input; `cli` turns that into an exit status.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alphaprune import model as models

LONGEST = 2048  # tokens per window, unless the model's context is shorter


def analyze(model: str, output: str, fit: str, device: str, solver: str, json: bool) -> None:
    from alphaprune import analysis

    _check_file(output)
    source = models.open_source(model)
    with bar(source.block_count(), "analyze", "block") as tick:
        found = analysis.analyze(source, fit=fit, device=device, solver=solver, progress=tick)
    found.save(output)
    if json:
        print(found.to_json())
        return
    rows = [[name, f"{s.shape[0]}×{s.shape[1]}", *_alpha_cells(s.columns)] for name, s in found.layers.items()]
    table(["layer", "shape", "alpha", "± stderr", "KS", "tail", ""], rows)
    print(f"{output}: {len(found.layers)} layers, fit {fit}, solver {found.solver}")


def _alpha_cells(columns: dict[str, float]) -> list[str]:
    return [
        f"{columns['alpha']:.3f}",
        f"{columns['stderr']:.3f}",
        f"{columns['ks']:.3f}",
        f"{columns['tail']:.0f}",
        "unstable" if columns["unstable"] else "",
    ]


def plan(analysis: str, output: str, json: bool, **options: Any) -> None:
    from alphaprune.analysis import Analysis

    _check_file(output)
    made = _make_plan(Analysis.load(analysis), **options)
    made.save(output)
    if json:
        print(made.to_json())
        return
    rows = [[name, str(p.pattern), f"{p.sparsity:.4f}", f"{p.zeros:,}"] for name, p in made.layers.items()]
    table(["layer", "pattern", "sparsity", "zeros"], rows)
    print(f"{output}: sparsity {made.sparsity:.6g}, allocator {made.allocator}, epsilon {made.epsilon:.4g}")


def _make_plan(analysis, sparsity, allocator, epsilon, pattern, per, min_sparsity, max_sparsity):
    from alphaprune import planning

    if epsilon != "auto":
        try:
            epsilon = float(epsilon)
        except ValueError:
            raise ValueError(f"--epsilon {epsilon}: wanted a number or auto") from None
    return planning.plan(
        analysis,
        sparsity,
        allocator=allocator,
        epsilon=epsilon,
        pattern=pattern,
        granularity=per,
        bounds=(min_sparsity, max_sparsity),
    )


def prune(
    model: str,
    output: str,
    plan: str | None,
    analysis: str | None,
    method: str | None,
    select: str | None,
    calibration: str | None,
    samples: int,
    length: int | None,
    seed: int,
    format: str,  # noqa: A002
    json: bool,
    **options: Any,
) -> None:
    from alphaprune import __version__, checkpoint, pruning

    pruner = _pruner(method, calibration)
    _check_plan_options(plan, options)
    checkpoint.check_free(Path(output))
    source = models.open_source(model)
    tokens, identity = None, {"method": pruner.name, "selection": select or pruner.selection, "format": format}
    if pruner.needs_calibration:
        tokens, read = _calibration(source, calibration, samples, _window(length, source.config), seed)
        identity |= read
    chosen = _chosen_plan(source, plan, analysis, options)
    identity["model"] = source.description().fingerprint
    identity["plan"] = hashlib.sha256(chosen.to_json().encode()).hexdigest()
    recipe = {"alphaprune": __version__, "source": source.name, **identity, "plan": chosen.to_dict()}
    with bar(source.block_count(), f"prune ({pruner.name})", "block") as tick:

        def run(restore: Any) -> Iterator[Any]:
            return pruning.prune_blocks(source, chosen, pruner.name, tokens, select, restore, tick)

        written = checkpoint.write_pruned(source, output, identity, recipe, run, packed=format == "sbt")
    if json:
        print(_dump({**vars(written), "folder": str(written.folder), "sparsity": chosen.realized}))
        return
    print(
        f"{written.folder}: sparsity {chosen.realized:.4f}, linears {size(written.dense_bytes)} → "
        f"{size(written.stored_bytes)}, {written.packed_layers} of {written.layers} layers packed"
    )


def _pruner(method: str | None, calibration: str | None) -> Any:
    from alphaprune import pruners

    if method is None and calibration is None:
        raise ValueError(
            "give --calibration FILE, the text that the model should stay good at (method wanda), "
            "or --method magnitude, which needs none"
        )
    pruner = pruners.get(method or "wanda")
    if pruner.needs_calibration and calibration is None:
        raise ValueError(
            f"--method {pruner.name} needs --calibration FILE, the text that the model should stay good at"
        )
    return pruner


def _check_plan_options(plan: str | None, options: dict[str, Any]) -> None:
    if plan is None and options["sparsity"] is None and options["pattern"] == "unstructured":
        raise ValueError("give --sparsity, such as 0.7, or --plan FILE")
    if plan is not None and (options["sparsity"] is not None or options["pattern"] != "unstructured"):
        raise ValueError("a plan holds sparsity and pattern already: give --plan or --sparsity/--pattern, not both")


def _chosen_plan(source: models.Source, plan: str | None, analysis: str | None, options: dict[str, Any]) -> Any:
    from alphaprune import allocators, planning
    from alphaprune.analysis import Analysis
    from alphaprune.analysis import analyze as run_analysis

    if plan is not None:
        chosen = planning.Plan.load(plan)
        chosen.check(source.description())
        return chosen
    if analysis is not None:
        stats = Analysis.load(analysis)
    else:
        needed = bool(allocators.get(options["allocator"]).columns)
        with bar(source.block_count(), "analyze", "block") as tick:
            stats = run_analysis(source, fit="robust" if needed else None, progress=tick)
    chosen = _make_plan(stats, **options)
    chosen.check(source.description())
    return chosen


def _calibration(source: models.Source, file: str, samples: int, length: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """Calibration windows, and what identifies them."""
    from alphaprune import data

    folder = getattr(source, "folder", source.name)
    text = data.encode(data.load_tokenizer(folder), data.read_text(file), file)
    identity = {"calibration": text.sha256, "samples": samples, "length": length, "seed": seed}
    return data.sample_windows(text, samples, length, seed), identity


def evaluate(
    model: str,
    text: str | None,
    wikitext: str | None,
    length: int | None,
    windows: int | None,
    dtype: str,
    json: bool,
) -> None:
    from alphaprune import data, hf
    from alphaprune import evaluate as evaluation

    file = text or wikitext
    folder = models.resolve(model)
    length = _window(length, models.read_config(folder))
    found = data.encode(data.load_tokenizer(folder), data.read_text(file, wikitext is not None), file)
    evaluation.window_count(found, length)
    loaded = hf.load(folder, dtype=dtype)
    with bar(evaluation.window_count(found, length, windows), "eval", "window") as tick:
        result = evaluation.evaluate(loaded, found, length, windows, tick)
    if json:
        print(_dump(result.as_dict()))
        return
    byte = f", {result.bits_per_byte:.4f} bits per byte" if result.bits_per_byte else ""
    print(f"perplexity {result.perplexity:.4f} (loss ± {result.stderr:.4f} nats){byte}")
    print(
        f"{result.tokens} tokens in {result.windows} windows of {result.length}, {result.dtype}, "
        f"text sha256 {result.data_sha256[:16]}, {result.seconds:.1f} s"
    )


def generate(
    model: str,
    prompt: str,
    max_new: int,
    temperature: float,
    seed: int,
    json: bool,
) -> None:
    from alphaprune import data, hf
    from alphaprune import generate as generation

    if max_new < 1:
        raise ValueError(f"--max-new {max_new}: wanted at least one token")
    if temperature < 0:
        raise ValueError(f"--temperature {temperature}: wanted 0 or more")
    folder = models.resolve(model)
    tokenizer = data.load_tokenizer(folder)
    loaded = hf.load(folder)

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    made = generation.generate(loaded, tokenizer, prompt, max_new, temperature, seed, None if json else show)
    if json:
        print(_dump(vars(made)))
    else:
        rate = made.new_tokens / made.seconds
        print(f"{made.new_tokens} tokens in {made.seconds:.2f} s, {rate:.1f} tokens/s", file=sys.stderr)


def info(model: str | None, json: bool) -> None:
    from alphaprune import inspection

    found = inspection.describe_model(model) if model else inspection.describe_machine()
    if json:
        print(_dump(found))
    elif model:
        table(["layer", "shape", "stored as", "sparsity", "bytes", "kernel", "why"], inspection.model_rows(found))
        print(inspection.model_summary(found))
    else:
        table(["", ""], inspection.machine_rows(found), header=False)


def bench(model: str | None, shape: str | None, json: bool, **options: Any) -> None:
    from alphaprune import benchmark

    if (model is None) == (shape is None):
        raise ValueError("give either MODEL or --shape, such as --shape llama2-7b or --shape 11008x4096")
    result = (
        benchmark.bench_model(model, bar=bar, **options) if model else benchmark.bench_shapes(shape, bar=bar, **options)
    )
    if json:
        print(_dump(result))
    else:
        for heading, columns, rows in benchmark.tables(result):
            print(heading)
            table(columns, rows)


def demo(output: str, json: bool) -> None:
    from alphaprune.demo import run

    result = run.run(Path(output), bar)
    if json:
        print(_dump(result))
    else:
        run.show(result, table)


def table(columns: list[str], rows: list[list[str]], header: bool = True) -> None:
    """Prints rows; in a terminal with rules and colours, in a pipe as plain aligned text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    made = Table(box=box.SIMPLE_HEAD, show_header=header, pad_edge=False)
    for place, name in enumerate(columns):
        made.add_column(name, justify="left" if place == 0 or not header else "right", no_wrap=place == 0)
    for row in rows:
        made.add_row(*row)
    console.print(made)


@contextmanager
def bar(total: int, description: str, unit: str) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; yields what to call after each step."""
    from tqdm import tqdm

    with tqdm(total=total, desc=description, unit=unit, leave=False, disable=not sys.stderr.isatty()) as progress:

        def tick(step: str) -> None:
            progress.set_postfix_str(step)
            progress.update()

        yield tick


def size(count: float) -> str:
    """Bytes for a person: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _window(length: int | None, config: Any) -> int:
    context = getattr(config, "max_position_embeddings", LONGEST)
    if length is None:
        return min(LONGEST, context)
    if not 2 <= length <= context:
        raise ValueError(f"--length {length}: this model takes windows of 2 to {context} tokens")
    return length


def _check_file(output: str) -> None:
    folder = Path(output).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{output}: there is no folder {folder} to write it to")
    if Path(output).is_dir():
        raise ValueError(f"{output}: is a folder; name a file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{output}: the folder {folder} is not writable")


def _dump(found: Any) -> str:
    return json.dumps(found, indent=2)
