"""The driver over blocks: weights and plan in, one finished block after another out.

Who calls it decides what becomes of a finished block: `prune` keeps the masks of a live model, `checkpoint` packs,
writes and remembers it, and hands blocks that were finished by an earlier run back through `restore`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphaprune import calibrate, pruners
from alphaprune.mask import keep_mask
from alphaprune.model import Block, Source, open_source
from alphaprune.planning import Plan
from alphaprune.pruners import Pruner, Selection


@dataclass(frozen=True)
class PrunedBlock:
    """A block whose weights are final; `masks` (True = keep, [N, K] bool) of its prunable layers by full name."""

    block: Block
    masks: dict[str, Tensor]
    restored: bool = False  # by an earlier run


Restore = Callable[[Block], "dict[str, Tensor] | None"]
Finish = Callable[[Block, "dict[str, Tensor]"], None]


def prune(
    model: nn.Module,
    plan: Plan,
    method: str = "wanda",
    tokens: Tensor | None = None,
    selection: Selection | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Tensor]:
    """Prunes a live model in place as `plan` says and returns the masks, {layer: [N, K] bool, True = keep}.

    tokens: [samples, length] int64 calibration text, for methods that need it.
    selection: "row" or "matrix"; by default what the method was published with.
    """
    return {
        name: mask
        for pruned in prune_blocks(model, plan, method, tokens, selection, progress=progress)
        for name, mask in pruned.masks.items()
    }


def prune_blocks(
    source: "Source | nn.Module | str",
    plan: Plan,
    method: str,
    tokens: Tensor | None = None,
    selection: Selection | None = None,
    restore: Restore | None = None,
    progress: Callable[[str], None] | None = None,
    finish: Finish | None = None,
) -> Iterator[PrunedBlock]:
    """Finished blocks in order; each block's weights hold its zeros when it is yielded.

    restore: given a block, puts the weights of an earlier run into it and returns its masks, or returns None.
    finish: given a block and its masks, may change the kept weights before the next block is calibrated behind them.
    Raises ValueError before any work if the plan is for another model or the method lacks its calibration text.
    """
    source, pruner = open_source(source), pruners.get(method)
    plan.check(source.description())
    if pruner.needs_calibration and tokens is None:
        raise ValueError(
            f"method {method} needs calibration text: give --calibration FILE (tokens=…), or choose --method magnitude"
        )
    if selection not in (None, "row", "matrix"):
        raise ValueError(f"selection {selection!r}: wanted 'row' or 'matrix'")
    return _prune_blocks(source, plan, pruner, tokens, selection or pruner.selection, restore, progress, finish)


def _prune_blocks(
    source: Source,
    plan: Plan,
    pruner: Pruner,
    tokens: Tensor | None,
    selection: Selection,
    restore: Restore | None,
    progress: Callable[[str], None] | None,
    finish: Finish | None,
) -> Iterator[PrunedBlock]:
    activations = calibrate.first_inputs(source, tokens) if pruner.needs_calibration else None
    for block in source.blocks():
        masks = restore(block) if restore else None
        restored = masks is not None
        if masks is None:
            _check_finite(block)
            norms = calibrate.input_norms(block, activations) if activations else {}
            masks = {
                name: _prune_layer(name, layer, plan, pruner, norms, selection) for name, layer in block.linears.items()
            }
            if finish:
                finish(block, masks)
        if activations and block.index + 1 < source.block_count():
            calibrate.run(block, activations)
        if progress:
            progress(block.name)
        yield PrunedBlock(block, masks, restored)


def _prune_layer(
    name: str, layer: nn.Linear, plan: Plan, pruner: Pruner, norms: dict[str, Tensor], selection: Selection
) -> Tensor:
    weight, wanted = layer.weight.data, plan.layers[name]  # weight: [N, K]
    scores = pruner.scores(weight, norms[name].to(weight.device) if norms else None)
    mask = keep_mask(scores, wanted.zeros, wanted.pattern, selection)
    layer.weight.data = weight.masked_fill(~mask, 0)
    return mask


def _check_finite(block: Block) -> None:
    for name, layer in block.linears.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(
                f"{name}: the weights hold NaN or infinity, so no score of them means anything; repair the checkpoint"
            )
