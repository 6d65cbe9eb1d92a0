"""`alphaprune prune`: a model and a plan → a pruned checkpoint."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from alphaprune import journal
from alphaprune import model as models
from alphaprune.commands.plan import make_plan
from alphaprune.commands.shared import (
    calibration_windows,
    check_values,
    dump,
    is_compression,
    room_for,
    rounding_loss,
    window,
    written_as_dict,
)
from alphaprune.console import bar, size

ANALYSIS = "analysis"  # beside it lies what is finished of it, in the folder of an unfinished run


def run(json: bool, **options: Any) -> None:
    from alphaprune import ranks

    with ranks.joined("prune", options) as world:
        written, sparsity = _prune(**options)
    if world.leads:
        _report(written, sparsity, json)


def _prune(
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
    memory: float | None,
    spill: str | None,
    refit: bool,
    channel_permute: bool,
    prefix: str,
    device: str | None,
    format: str,  # noqa: A002
    values: str | None,
    group: int | None,
    head: str | None,
    **options: Any,
) -> tuple[Any, float]:
    """What was written, and the sparsity of it."""
    from alphaprune import permute, pruning, ranks, unfinished
    from alphaprune.checkpoint import Storage

    device = ranks.device(device)
    recipe = pruning.Recipe(_method(method, calibration), select, refit, prefix, device, channel_permute)
    pruner = recipe.check()
    if recipe.need != "nothing" and calibration is None:
        what = f"--method {pruner.name}" if pruner.needs_calibration else "--refit"
        raise ValueError(f"{what} needs --calibration FILE, the text that the model should stay good at")
    _check_plan_options(plan, options)
    check_values(values, group, format, head)
    storage = Storage(format == "sbt", values, group, head is not None)
    if channel_permute and plan is None and options["pattern"] == "unstructured":
        raise ValueError(permute.NEEDS_PATTERN)
    if ranks.world().leads:
        unfinished.check_free(Path(output))
    source = models.open_source(model)
    fingerprint, room = source.description().fingerprint, room_for(memory, spill, output)
    tokens, identity = None, {"method": pruner.name, "selection": select or pruner.selection, "refit": refit}
    identity |= {"channel_permute": channel_permute, "prefix": prefix, **storage.identity()}
    if calibration is not None:
        tokens, read = calibration_windows(source, calibration, samples, window(length, source.config), seed)
        identity |= read
    ranks.agree({"model": fingerprint, **identity})  # files of one name may differ between machines
    with unfinished.nothing_left(output):
        chosen = _chosen_plan(source, plan, analysis, options, tokens, device, Path(output), room)
        if channel_permute:
            permute.check(source.config, source.name, chosen.layers)
        identity |= {"model": fingerprint, "plan": hashlib.sha256(chosen.to_json().encode()).hexdigest()}
        ranks.agree({"plan": identity["plan"]})
        written = _write(source, output, identity, chosen, recipe, tokens, room, storage)
    if not ranks.world().leads:  # on a machine of its own, perhaps, where nobody else tidies up
        journal.delete(unfinished.place(output) / ANALYSIS)
        with suppress(OSError):
            unfinished.place(output).rmdir()
    return written, chosen.realized


def _write(
    source: models.Source,
    output: str,
    identity: dict[str, Any],
    chosen: Any,
    recipe: Any,
    tokens: Any,
    room: Any,
    storage: Any,
) -> Any:
    """Prunes block by block and writes each when it is finished."""
    from alphaprune import __version__, checkpoint, pruning

    made = {"alphaprune": __version__, "source": source.name, **identity, "plan": chosen.to_dict()}
    with bar(source.block_count(), f"prune ({recipe.method})", "block") as tick:

        def run(restore: Any, finish: Any) -> Iterator[Any]:
            return pruning.prune_blocks(source, chosen, recipe, tokens, restore, tick, finish, room=room)

        return checkpoint.write_pruned(source, output, identity, made, run, storage)


def _report(written: Any, sparsity: float, json: bool) -> None:
    if json:
        print(dump(written_as_dict(written) | {"sparsity": sparsity}))
        return
    print(
        f"{written.folder}: sparsity {sparsity:.4f}, linears {size(written.dense_bytes)} → "
        f"{size(written.stored_bytes)}, {written.packed_layers} of {written.layers} layers packed"
    )
    if written.errors:
        print(rounding_loss(written.errors))


def _method(method: str | None, calibration: str | None) -> str:
    if method is None and calibration is None:
        raise ValueError(
            "give --calibration FILE, the text that the model should stay good at (method wanda), "
            "or --method magnitude, which needs none"
        )
    return method or "wanda"


def _check_plan_options(plan: str | None, options: dict[str, Any]) -> None:
    if plan is None and options["sparsity"] is None and options["pattern"] == "unstructured":
        raise ValueError("give --sparsity, such as 0.7, or --plan FILE")
    if plan is not None and (options["sparsity"] is not None or options["pattern"] != "unstructured"):
        raise ValueError("a plan holds sparsity and pattern already: give --plan or --sparsity/--pattern, not both")


def _chosen_plan(
    source: models.Source,
    plan: str | None,
    analysis: str | None,
    options: dict[str, Any],
    tokens: Any,
    device: str | None,
    out: Path,
    room: Any,
) -> Any:
    """The plan of a file, or one made from an analysis, of which what is finished lies where OUT is being made."""
    from alphaprune import planning, ranks, unfinished
    from alphaprune.files import explained

    if plan is not None:
        if is_compression(plan):
            raise ValueError(f"{plan}: is a plan of bits, ranks or channels, not of zeros; give it to compress --plan")
        chosen = planning.Plan.load(plan)
    else:
        kept: dict[str, Any] = {"room": room}
        if not ranks.share(unfinished.journal_beside(out).exists()):  # nothing is missing but its name
            with explained(out):
                unfinished.place(out).mkdir(parents=True, exist_ok=True)
            kept |= {"journal": unfinished.place(out) / ANALYSIS, "keep_journal": True}
        chosen = make_plan(analyzed(source, analysis, options["allocator"], tokens, device, **kept), **options)
    chosen.check(source.description())
    return chosen


def analyzed(
    source: models.Source, file: str | None, allocator: str, tokens: Any, device: str | None, **options: Any
) -> Any:
    """The analysis in a file, or else one made now with what the allocator reads; options: others of `analyze`."""
    from alphaprune import allocators
    from alphaprune.analysis import Analysis, arguments_for, needs_text
    from alphaprune.analysis import analyze as run_analysis
    from alphaprune.curves import SERIES

    if file is not None:
        return Analysis.load(file)
    chosen = allocators.get(allocator)
    if set(chosen.series) & set(SERIES):
        raise ValueError(
            f"--allocator {chosen.name} needs error curves, which `alphaprune compare` makes: give them to "
            f"`alphaprune plan`, and its file as --plan"
        )
    reads = (*chosen.columns, *chosen.series)
    if needs_text(reads) and tokens is None:
        raise ValueError(f"--allocator {chosen.name} needs --calibration FILE, or --analysis made with it")
    with bar(source.block_count(), "analyze", "block") as tick:
        return run_analysis(
            source,
            device=device or "auto",
            progress=tick,
            tokens=tokens if needs_text(reads) else None,
            **arguments_for(reads),
            **options,
        )
