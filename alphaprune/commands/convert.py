"""`alphaprune convert`: a checkpoint of others → packed, packed → dense, a plan → a recipe of other tools."""

from pathlib import Path
from typing import Any

from alphaprune.commands.shared import (
    check_file,
    check_values,
    dump,
    is_compression,
    rounding_loss,
    written_as_dict,
)
from alphaprune.console import bar, size


def run(
    old: str,
    new: str,
    format: str | None,  # noqa: A002
    values: str | None,
    group: int | None,
    head: str | None,
    negative_zeros: str | None,
    modifier: str | None,
    json: bool,
) -> None:
    if Path(old).is_file():
        if format or values or group or head or negative_zeros:
            raise ValueError(f"{old}: is a file, so a plan: it becomes a recipe, which has no --format or --values")
        _recipe(old, new, modifier, json)
        return
    if modifier is not None:
        raise ValueError("--modifier belongs to a plan that becomes a recipe of llm-compressor")
    check_values(values, group, format, head)
    if format == "dense" and negative_zeros is not None:
        raise ValueError("--negative-zeros is about packing: leave out --format dense")
    from alphaprune import convert, unfinished

    unfinished.check_free(Path(new))
    with bar(None, "check", "layer") as tick:
        source = convert.open_stored(old, tick)
    with bar(source.block_count(), "convert", "block") as tick:
        how = format != "dense", values, group, negative_zeros != "drop", tick, head is not None
        done = convert.convert(source, new, *how)
    _report(done, json)


def _recipe(old: str, new: str, modifier: str | None, json: bool) -> None:
    from alphaprune import llm_compressor
    from alphaprune.plan_file import Plan

    check_file(new)
    if Path(new).exists() and Path(new).samefile(old):
        raise ValueError(f"{new}: is the plan itself; name another file for the recipe")
    if is_compression(old):
        _settings(old, new, modifier, json)
        return
    made = llm_compressor.write(Plan.load(old), new, modifier or "wanda")
    if json:
        print(dump(made))
        return
    for modifiers in made["pruning_stage"].values():
        for name, settings in modifiers.items():
            print(f"{new}: {name}, {settings['mask_structure']}, {len(settings['targets'])} targets")


def _settings(old: str, new: str, modifier: str | None, json: bool) -> None:
    """A plan of bits for the tools that have kernels for them."""
    from alphaprune.compressions import CompressionPlan, export

    if modifier is not None:
        raise ValueError(f"--modifier {modifier}: is about pruning, and {old} is a plan of `alphaprune compress`")
    plan = CompressionPlan.load(old)
    made = export.write(plan, new)
    if json:
        print(dump(made))
        return
    tool = "GPTQModel" if "dynamic" in made else "llm-compressor"
    bits = sorted({kept.amount for kept in plan.parts.values()})
    print(f"{new}: for {tool}, {', '.join(map(str, bits))} bits, {plan.realized:.4f} on average")


def _report(done: Any, json: bool) -> None:
    written = done.written
    if json:
        print(dump(written_as_dict(written) | {"layouts": done.layouts, "negative_zeros": done.negative_zeros}))
        return
    layouts = ", ".join(f"{count} {layout}" for layout, count in done.layouts.items())
    print(
        f"{written.folder}: {layouts} → {written.packed_layers} of {written.layers} layers packed, linears "
        f"{size(written.dense_bytes)} dense, now {size(written.stored_bytes)}"
    )
    if done.negative_zeros:
        print(f"{done.negative_zeros:,} weights are -0 and were kept; --negative-zeros drop makes zeros of them")
    if written.errors:
        print(rounding_loss(written.errors))
