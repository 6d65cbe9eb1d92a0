"""Bits, ranks, heads and channels from the heavy tails of the layers: plan, and carry the plan out block by block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import calibrate, devices
from alphaprune.calibrate import InputStat, Need
from alphaprune.checkpoint import block_tensors, copy_companions, output_config
from alphaprune.compressions import layers, parts
from alphaprune.compressions.layers import Score
from alphaprune.compressions.parts import plan
from alphaprune.compressions.plans import CompressionPlan
from alphaprune.formats import Packed, quantize
from alphaprune.layer import SparseLinear
from alphaprune.model import Block, Description, Source, check_finite, open_source
from alphaprune.unfinished import Writer, Written, identified

__all__ = ["CompressionPlan", "Recipe", "compress", "plan", "write"]

SCORES = ("magnitude", "wanda")


@dataclass(frozen=True)
class Recipe:
    """How a plan is carried out.

    packed: as this package stores it, rounded weights packed, factors as two layers, channels gone; otherwise as dense
    layers of the old shapes, which everything loads: rounded values, the product of factors, zeros.
    calibrated: with what is known of the layers' inputs: scales of bits by what they do to outputs, factors of whitened
    weights.   group: columns that share a scale, 128 or None for the row.
    score, refit: of channels, see layers.remove.   device: where a block is worked on; by default where it is.
    """

    packed: bool = True
    calibrated: bool = False
    group: int | None = quantize.GROUP
    score: Score | None = None
    refit: bool = False
    device: str | None = None

    def need(self, plan: CompressionPlan) -> Need:
        """What must be known of the layers' inputs; ValueError for what does not go together."""
        quantize.check("int8", self.group)
        structured = plan.method == "structured"
        if (self.refit or self.score is not None) and not structured:
            raise ValueError(f"score and refit are about removed channels, and this plan is one of {plan.method}")
        if self.score is not None and self.score not in SCORES:
            raise ValueError(f"score {self.score!r}: wanted one of {', '.join(SCORES)}")
        if (self.refit or self.score == "wanda") and not self.calibrated:
            what = "a refit" if self.refit else "score wanda"
            raise ValueError(f"{what} needs calibration text: give --calibration FILE (tokens=…)")
        if not self.calibrated:
            return "nothing"
        if structured:
            return "gram" if self.refit else "norms" if self.chosen == "wanda" else "nothing"
        return "gram" if plan.method == "rank" else "norms"

    @property
    def chosen(self) -> Score:
        return self.score or ("wanda" if self.calibrated else "magnitude")


@dataclass(frozen=True)
class Done:
    """A finished block; packed: its rounded layers, and errors: what rounding them lost, by full name."""

    block: Block
    packed: dict[str, Packed]
    errors: dict[str, quantize.Error]
    skipped: bool = False


def compress(
    model: nn.Module,
    plan: CompressionPlan,
    tokens: Tensor | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> nn.Module:
    """Carries a plan out on a live model, in place, and returns it; `save` writes it so that it loads again.

    tokens: [samples, length] int64 calibration text.   options: those of `Recipe`.
    Raises ValueError before any work if the plan is for another model.
    """
    recipe = Recipe(**{"calibrated": tokens is not None, **options})
    for done in blocks(open_source(model), plan, recipe, tokens, progress):
        for name, packed in done.packed.items():
            layer = done.block.linears[name]
            sparse = SparseLinear(packed, None if layer.bias is None else layer.bias.detach())
            sparse.name, sparse.quantization_error = name, done.errors[name]
            model.set_submodule(name, sparse)
    return model


def write(
    source: Source,
    out: "str | Path",
    plan: CompressionPlan,
    recipe: Recipe,
    identity: dict[str, Any],
    made: dict[str, Any],
    tokens: Tensor | None = None,
    progress: Callable[[str], None] | None = None,
) -> Written:
    """Writes the directory OUT, whole or not at all; an interrupted run of the same identity goes on.

    identity: what makes this run this run.   made: what the directory says of how it was made.
    """
    identity = identified(identity, source.stamps())
    writer = Writer(out, identity, source.block_count(), source.family.stored_name)
    description = source.description()
    left = blocks(source, plan, recipe, tokens, progress, writer.has) if writer.stage == "blocks" else ()
    own = parts.shapes_of(source, plan if recipe.packed else None)  # before blocks get theirs, or are skipped
    for done in left:
        if not done.skipped and not writer.has(done.block.index):
            source.check_unchanged()
            writer.write(done.block.index, block_tensors(done.block, done.packed), done.errors)
    if not writer.has(source.block_count()):
        writer.write(source.block_count(), dict(source.outside_tensors()))
    source.check_unchanged()
    rounded = plan.method == "bits" and recipe.packed
    config = output_config(source, rounded, "int8" if rounded else None, own)
    written = _summary(writer, description)
    if writer.stage != "finished":
        writer.finish(config, made | writer.losses(), lambda folder: copy_companions(source, folder))
    return written


def blocks(
    source: Source,
    plan: CompressionPlan,
    recipe: Recipe,
    tokens: Tensor | None = None,
    progress: Callable[[str], None] | None = None,
    has: Callable[[int], bool] | None = None,
) -> Iterator[Done]:
    """Finished blocks in order. has: which are written already; without text to run behind them they are skipped.

    Raises ValueError before any work if the plan is for another model or text is missing.
    """
    needs = recipe.need(plan)
    if recipe.device is not None:
        devices.named(recipe.device)
    parts.check(plan, source)
    if needs != "nothing" and tokens is None:
        raise ValueError("a calibrated compression needs calibration text: give --calibration FILE (tokens=…)")
    return _blocks(source, plan, recipe, needs, tokens, progress, has)


def _blocks(
    source: Source,
    plan: CompressionPlan,
    recipe: Recipe,
    needs: Need,
    tokens: Tensor | None,
    progress: Callable[[str], None] | None,
    has: Callable[[int], bool] | None,
) -> Iterator[Done]:
    activations = None if tokens is None or needs == "nothing" else calibrate.first_inputs(source, tokens)
    for block in source.blocks():
        if activations is None and has is not None and has(block.index):
            done = Done(block, {}, {}, skipped=True)
        else:
            check_finite(block, "they cannot be rounded, factored or compared")
            with calibrate.on(block, recipe.device):
                inputs = calibrate.statistics(block, activations, needs) if activations else {}
                done = _block(block, source.config, plan, recipe, inputs)
                if activations and block.index + 1 < source.block_count():
                    calibrate.run(block, activations)
        if progress:
            progress(block.name)
        yield done


def _block(block: Block, config: Any, plan: CompressionPlan, recipe: Recipe, inputs: dict[str, InputStat]) -> Done:
    packed: dict[str, Packed] = {}
    errors: dict[str, quantize.Error] = {}
    if plan.method == "structured":
        heads, channels = (plan.parts[f"{block.name}.{part}"].amount for part in ("self_attn", "mlp"))
        layers.remove(block, config, heads, channels, inputs, recipe.chosen, recipe.refit, recipe.packed)
        return Done(block, packed, errors)
    for name, layer in block.linears.items():
        kept = plan.parts[name]
        try:
            if plan.method == "bits" and kept.amount != parts.WHOLE:
                made, errors[name] = layers.round_layer(layer, kept.amount, recipe.group, inputs.get(name))
                if recipe.packed:
                    packed[name] = made
            elif plan.method == "rank" and kept.amount < kept.of:
                factored = layers.factor_layer(layer, kept.amount, inputs[name].gram if inputs else None)
                new = factored if recipe.packed else factored.to_linear()
                block.module.set_submodule(name.removeprefix(f"{block.name}."), new)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return Done(block, packed, errors)


def _summary(writer: Writer, before: Description) -> Written:
    """Bytes of the prunable layers before and after; layers that are packed or factored."""
    sizes = {name: size for tensors in writer.done.values() for name, size in tensors.items()}
    dense = sum(n * k for n, k in before.shapes.values()) * getattr(torch, before.dtype).itemsize
    layers = {writer.stored_name(name) for name in before.shapes}
    inside = [n for n in sizes if n.rpartition(".")[0].removesuffix(".first").removesuffix(".second") in layers]
    stored = sum(sizes[name] for name in inside if not name.endswith(".bias"))
    changed = sum(name.endswith((".weight_mask", ".first.weight")) for name in inside)
    return Written(writer.out, dense, stored, changed, len(before.shapes), writer.errors)
