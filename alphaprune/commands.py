"""What each command does, with plain arguments: check everything first, then load, work, write, print.

Raises ValueError in one sentence for bad input; `cli` turns that into an exit status.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alphaprune import model as models
from alphaprune.console import bar, size, table

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


def plan(analysis: str, output: str, json: bool, times: str | None, tokens: int, **options: Any) -> None:
    from alphaprune.analysis import Analysis

    _check_file(output)
    stats, break_even = Analysis.load(analysis), None
    if times is not None:
        from alphaprune import tuning

        shapes = {name: stat.shape for name, stat in stats.layers.items()}
        break_even = tuning.break_evens(shapes, stats.dtype, times, tokens)
    made = _make_plan(stats, **options, break_even=break_even)
    made.save(output)
    if json:
        print(made.to_json())
        return
    rows = [[name, str(p.pattern), f"{p.sparsity:.4f}", f"{p.zeros:,}"] for name, p in made.layers.items()]
    table(["layer", "pattern", "sparsity", "zeros"], rows)
    print(f"{output}: sparsity {made.sparsity:.6g}, allocator {made.allocator}, epsilon {made.epsilon:.4g}")


def _make_plan(
    analysis, sparsity, allocator, epsilon, pattern, per, min_sparsity, max_sparsity, break_even=None
) -> Any:
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
        break_even=break_even,
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
    values: str | None,
    group: int | None,
    json: bool,
    **options: Any,
) -> None:
    from alphaprune import __version__, checkpoint, pruning

    pruner = _pruner(method, calibration)
    _check_plan_options(plan, options)
    _check_values(values, group, format)
    checkpoint.check_free(Path(output))
    source = models.open_source(model)
    tokens, identity = None, {"method": pruner.name, "selection": select or pruner.selection, "format": format}
    if values is not None:
        identity |= {"values": values, "group": group}
    if pruner.needs_calibration:
        tokens, read = _calibration(source, calibration, samples, _window(length, source.config), seed)
        identity |= read
    chosen = _chosen_plan(source, plan, analysis, options)
    identity["model"] = source.description().fingerprint
    identity["plan"] = hashlib.sha256(chosen.to_json().encode()).hexdigest()
    recipe = {"alphaprune": __version__, "source": source.name, **identity, "plan": chosen.to_dict()}
    with bar(source.block_count(), f"prune ({pruner.name})", "block") as tick:

        def run(restore: Any, finish: Any) -> Iterator[Any]:
            return pruning.prune_blocks(source, chosen, pruner.name, tokens, select, restore, tick, finish)

        written = checkpoint.write_pruned(source, output, identity, recipe, run, format == "sbt", values, group)
    if json:
        errors = {name: error._asdict() for name, error in written.errors.items()}
        found = {**vars(written), "folder": str(written.folder), "sparsity": chosen.realized}
        found.pop("errors")
        print(_dump(found | ({"quantization_error": errors} if values else {})))
        return
    print(
        f"{written.folder}: sparsity {chosen.realized:.4f}, linears {size(written.dense_bytes)} → "
        f"{size(written.stored_bytes)}, {written.packed_layers} of {written.layers} layers packed"
    )
    if written.errors:
        print(_loss(written.errors))


def _check_values(values: str | None, group: int | None, format: str) -> None:  # noqa: A002
    if group is not None and values is None:
        raise ValueError(f"--group {group} belongs to --values int8")
    if values is not None and format == "dense":
        raise ValueError(f"--values {values} is a way to pack weights: leave out --format dense")


def _loss(errors: dict[str, Any]) -> str:
    """One line about what int8 values lost; per layer it stands in alphaprune.json."""
    relative = {name: error.relative for name, error in errors.items()}
    worst = max(relative, key=relative.__getitem__)
    return (
        f"int8 values: relative error {sum(relative.values()) / len(relative):.2%} on average over {len(relative)} "
        f"layers, at most {relative[worst]:.2%} ({worst})"
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
        print(
            f"{made.new_tokens} tokens in {made.seconds:.2f} s, {rate:.1f} tokens/s, decoder {made.decoder}",
            file=sys.stderr,
        )


def info(model: str | None, tokens: int, device: str, json: bool) -> None:
    from alphaprune import inspection

    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: wanted a whole number from 1")
    found = inspection.describe_model(model, tokens, device) if model else inspection.describe_machine()
    if json:
        print(_dump(found))
    elif model:
        table(inspection.COLUMNS, inspection.model_rows(found))
        print(inspection.model_summary(found))
    else:
        table(["", ""], inspection.machine_rows(found), header=False)


def bench(
    model: str | None,
    shape: str | None,
    json: bool,
    tune: bool,
    quick: bool,
    output: str | None,
    decode: bool,
    device: str,
    **options: Any,
) -> None:
    from alphaprune import benchmark

    if tune:
        return _tune(model or shape, quick, output, device, json)
    if quick or output:
        raise ValueError("--quick and --output belong to --tune")
    if (model is None) == (shape is None):
        raise ValueError("give either MODEL or --shape, such as --shape llama2-7b or --shape 11008x4096")
    if model and decode:
        raise ValueError("--decode belongs to --shape; the decoding of a MODEL is timed without it")
    if model:
        result = benchmark.bench_model(model, bar=bar, device=device, **options)
    else:
        result = benchmark.bench_shapes(shape, bar=bar, decode=decode, device=device, **options)
    if json:
        print(_dump(result))
    else:
        for heading, columns, rows in benchmark.tables(result):
            print(heading)
            table(columns, rows)


def _tune(problem: str | None, quick: bool, output: str | None, device: str, json: bool) -> None:
    from alphaprune import timing, tuning

    if problem:
        raise ValueError(f"{problem}: --tune measures a table for all models; name neither MODEL nor --shape")
    if output:
        _check_file(output)
    clock = timing.clock(device)
    made = tuning.tune(tuning.grid_for(clock.device, quick), bar, clock)
    path, rows = tuning.write(made, output), tuning.rows(made)
    if json:
        print(_dump({"path": str(path), "machine": str(made.machine), "threads": made.threads, "rows": rows}))
        return
    does = "reads" if made.threads else "copies"
    print(f"{made.place}, {does} {made.bandwidth / 1e9:.1f} GB/s; dense torch = 1.00×")
    table(*tuning.cells(rows))
    where = f"where torch has {made.threads} threads" if made.threads else "for every GPU of this name"
    print(path if output else f"{path}: used from now on {where}")


def demo(output: str, json: bool) -> None:
    from alphaprune.demo import run

    result = run.run(Path(output), bar)
    if json:
        print(_dump(result))
    else:
        run.show(result, table)


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
