"""`alphaprune bench`: times of layers and models on this machine."""

from typing import Any

from alphaprune.commands.shared import check_file, dump
from alphaprune.console import bar, table


def run(
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
        print(dump(result))
    else:
        for heading, columns, rows in benchmark.tables(result):
            print(heading)
            table(columns, rows)


def _tune(problem: str | None, quick: bool, output: str | None, device: str, json: bool) -> None:
    from alphaprune import timing, tuning

    if problem:
        raise ValueError(f"{problem}: --tune measures a table for all models; name neither MODEL nor --shape")
    if output:
        check_file(output)
    clock = timing.clock(device)
    made = tuning.tune(tuning.grid_for(clock.device, quick), bar, clock)
    path, rows = tuning.write(made, output), tuning.rows(made)
    if json:
        print(dump({"path": str(path), "machine": str(made.machine), "threads": made.threads, "rows": rows}))
        return
    does = "reads" if made.threads else "copies"
    print(f"{made.place}, {does} {made.bandwidth / 1e9:.1f} GB/s; dense torch = 1.00×")
    table(*tuning.cells(rows))
    where = f"where torch has {made.threads} threads" if made.threads else "for every GPU of this name"
    print(path if output else f"{path}: used from now on {where}")
