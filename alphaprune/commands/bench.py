"""`alphaprune bench`: times of layers and models on this machine.

Nothing here imports torch before `run` has bound its threads: OpenMP reads how to bind them once, when torch loads it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from alphaprune import affinity
from alphaprune.console import bar, table

OF_MODELS = ("prompt", "new", "batch", "time", "warmup", "per_layer")


def run(
    model: str | None,
    shape: str | None,
    json: bool,
    tune: bool,
    quick: bool,
    minutes: float | None,
    output: str | None,
    decode: bool,
    device: str,
    threads: int | None,
    pin: str,
    **options: Any,
) -> None:
    load = {name: options.pop(name) for name in OF_MODELS}
    given = {name: value for name, value in load.items() if value is not None and value is not False}
    _check(model, shape, tune, given)
    if not tune and (quick or output or minutes is not None):
        raise ValueError("--quick, --minutes and --output belong to --tune")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise ValueError(f"--minutes {minutes}: wanted minutes, more than 0")
    if tune and options["activations"]:
        raise ValueError("--activations belongs to MODEL or --shape: a time table has times with it and without")
    if model and decode:
        raise ValueError("--decode belongs to --shape; the decoding of a MODEL is timed without it")
    usable = len(affinity.cpus())
    if threads is not None and not 1 <= threads <= usable:
        raise ValueError(f"--threads {threads}: this process may use {usable} CPUs; give 1 to {usable}")
    if pin == "core":
        if tune:
            raise ValueError("--pin core belongs to MODEL or --shape: a time table is of threads that are not bound")
        affinity.pin()

    from alphaprune import benchmark
    from alphaprune.commands.shared import dump, origin

    with _threads(threads) as count:
        places = _places(count) if pin == "core" else None
        if tune:
            return _tune(model or shape, quick, minutes, output, device, json)
        if model:
            given["seconds"] = given.pop("time", 5.0)
            result = benchmark.bench_model(model, bar=bar, device=device, **given, **options)
        else:
            result = benchmark.bench_shapes(shape, bar=bar, decode=decode, device=device, **options)
    if places:
        result["pinned"] = places
    if json:
        print(dump(origin("bench", result.get("model")) | result))
        return
    for heading, columns, rows in benchmark.tables(result):
        print(heading)
        table(columns, rows)


def _check(model: str | None, shape: str | None, tune: bool, given: dict[str, Any]) -> None:
    """What was given of a load, for what, and in which range."""
    if not tune and (model is None) == (shape is None):
        raise ValueError("give either MODEL or --shape, such as --shape llama2-7b or --shape 11008x4096")
    if given and (tune or shape):
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} belongs to MODEL, whose decoding is timed")
    for name in ("prompt", "new", "batch"):
        if given.get(name, 1) < 1:
            raise ValueError(f"--{name} {given[name]}: wanted a whole number from 1")
    for name in ("time", "warmup"):
        if not 0 <= given.get(name, 0) < float("inf"):
            raise ValueError(f"--{name} {given[name]}: wanted seconds, 0 or more")


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """So many threads of torch and the kernels, or as many as there are, until the end."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def _places(threads: int) -> list[list[int]]:
    """The places that threads are bound to once they have run; ValueError if they are not."""
    import torch

    torch.ones(1 << 22).add_(1)
    places = affinity.bound()
    if len(places) < threads and len(affinity.cpus()) > 1:
        raise ValueError(
            f"--pin core: {threads} threads run in {len(places)} places of their own: there are fewer cores than "
            f"threads, or another OpenMP than torch's is loaded; give fewer --threads or leave it out"
        )
    return places


def _tune(problem: str | None, quick: bool, minutes: float | None, output: str | None, device: str, json: bool) -> None:
    from alphaprune import timing, tuning
    from alphaprune.commands.shared import check_file, dump
    from alphaprune.kernels import predicted

    if problem:
        raise ValueError(f"{problem}: --tune measures a table for all models; name neither MODEL nor --shape")
    if output:
        check_file(output)
    else:
        tuning.user_folder()  # what cannot be written is told before minutes of measuring
    clock = timing.clock(device)
    made = tuning.tune(tuning.grid_for(clock.device, quick), bar, clock, minutes and 60 * minutes)
    path, rows, off = tuning.write(made, output), tuning.rows(made), predicted.verdict(made)
    guessed = predicted.like(made)
    beside = [] if guessed is None else tuning.rows(guessed)
    if json:
        found = {"path": str(path), "machine": str(made.machine), "threads": made.threads, "rows": rows}
        print(dump(found | ({"predicted": beside, "verdict": off} if off else {})))
        return
    does = "reads" if made.threads else "copies"
    print(f"{made.place}, {does} {made.bandwidth / 1e9:.1f} GB/s; dense torch = 1.00×")
    table(*tuning.cells(rows))
    if off:
        print(f"beside it what was predicted, not measured: {off}" if beside else off)
    if beside:
        table(*tuning.cells(beside))
    where = f"where torch has {made.threads} threads" if made.threads else "for every GPU of this name"
    print(path if output else f"{path}: used from now on {where}")
