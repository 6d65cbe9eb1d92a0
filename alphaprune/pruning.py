"""The driver over blocks: weights and plan in, one finished block after another out.

Who calls it decides what becomes of a finished block: `prune` keeps the masks of a live model, `checkpoint` packs,
writes and remembers it, and hands blocks that were finished by an earlier run back through `restore`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphaprune import calibrate, permute, pruners, ranks, trees
from alphaprune.calibrate import Activations, InputStat, Need
from alphaprune.model import Block, Source, check_finite
from alphaprune.planning import Plan
from alphaprune.pruners import Cut, Pruner, Selection
from alphaprune.refit import refit
from alphaprune.states import Room


@dataclass(frozen=True)
class Recipe:
    """How layers are pruned, apart from how much.

    method: a name in pruners.MEMBERS.   selection: "row" or "matrix", by default what the method was published with.
    refit: the kept weights of every layer are solved for anew, see refit.py.
    prefix: what the inputs of a block come from, the "pruned" blocks before it, or the "dense" ones.
    device: where a block is calibrated and pruned; by default where it is.
    channel_permute: for N:M masks, put channels in a better order first, see permute.py.
    """

    method: str = "wanda"
    selection: Selection | None = None
    refit: bool = False
    prefix: Literal["pruned", "dense"] = "pruned"
    device: str | None = None
    channel_permute: bool = False

    def check(self) -> Pruner:
        """The pruner; ValueError for anything that is not there."""
        pruner = pruners.get(self.method)
        if self.selection not in (None, "row", "matrix"):
            raise ValueError(f"selection {self.selection!r}: wanted 'row' or 'matrix'")
        if self.prefix not in ("pruned", "dense"):
            raise ValueError(f"prefix {self.prefix!r}: wanted 'pruned' or 'dense'")
        return pruner

    @property
    def need(self) -> Need:
        """What must be known of the layers' inputs."""
        return "gram" if self.refit else pruners.get(self.method).need


@dataclass(frozen=True)
class PrunedBlock:
    """A block whose weights are final; `masks` (True = keep, [N, K] bool) of its prunable layers by full name."""

    block: Block
    masks: dict[str, Tensor]
    restored: bool = False  # by an earlier run


Restore = Callable[[Block], "dict[str, Tensor] | None"]
Finish = Callable[[Block, "dict[str, Tensor]"], None]
Statistics = Callable[[Block], "dict[str, InputStat]"]


def prune(
    model: nn.Module,
    plan: Plan,
    method: str = "wanda",
    tokens: Tensor | None = None,
    selection: Selection | None = None,
    progress: Callable[[str], None] | None = None,
    inputs: Any = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Prunes a live model in place as `plan` says and returns the masks, {layer: [N, K] bool, True = keep}.

    model: of transformers, or any tree of modules (trees.py); the mask of a convolution is that of its matrix.
    tokens: [samples, length] int64 calibration text, for methods that need it.   inputs: for a tree the same: a tensor
    [samples, …], or batches.
    selection: "row" or "matrix"; by default what the method was published with.   options: those of `Recipe`.
    """
    recipe, source = Recipe(method, selection, **options), trees.open_source(model)
    recipe.check()
    statistics = None if inputs is None else trees.statistics(source, inputs, recipe.need, recipe.prefix)
    return {
        name: mask
        for pruned in prune_blocks(source, plan, recipe, tokens, progress=progress, statistics=statistics)
        for name, mask in pruned.masks.items()
    }


def prune_blocks(
    source: "Source | nn.Module | str",
    plan: Plan,
    recipe: Recipe,
    tokens: Tensor | None = None,
    restore: Restore | None = None,
    progress: Callable[[str], None] | None = None,
    finish: Finish | None = None,
    statistics: Statistics | None = None,
    room: Room | None = None,
) -> Iterator[PrunedBlock]:
    """Finished blocks in order; each block's weights hold its zeros when it is yielded.

    restore: given a block, puts the weights of an earlier run into it and returns its masks, or returns None.
    finish: given a block and its masks, may change the kept weights before the next block is calibrated behind them.
    statistics: what is known already of the inputs of a block's layers; then no text is needed and none is run.
    room: where hidden states may lie between blocks, see states.py.
    Raises ValueError before any work if the plan is for another model or the method lacks its calibration text.
    """
    source, pruner = trees.open_source(source), recipe.check()
    trees.check(source, tokens=tokens, device=recipe.device, channel_permute=recipe.channel_permute)
    plan.check(source.description())
    if recipe.channel_permute:
        permute.check(source.config, source.name, plan.layers)
    if recipe.need != "nothing" and tokens is None and statistics is None:
        what = f"method {recipe.method}" if pruner.needs_calibration else "a refit"
        other = ", or choose --method magnitude" if pruner.needs_calibration and not recipe.refit else ""
        text = "calibration text: give --calibration FILE (tokens=…)"
        text = "inputs to calibrate with (inputs=…)" if isinstance(source, trees.Tree) else text
        raise ValueError(f"{what} needs {text}{other}")
    run = _Run(source, plan, recipe, pruner, tokens if statistics is None else None, statistics, room)
    return run.blocks(restore, progress, finish)


@dataclass
class _Run:
    """One pass over the blocks of a model."""

    source: Source
    plan: Plan
    recipe: Recipe
    pruner: Pruner
    tokens: Tensor | None
    statistics: Statistics | None
    room: Room | None

    def blocks(
        self, restore: Restore | None, progress: Callable[[str], None] | None, finish: Finish | None
    ) -> Iterator[PrunedBlock]:
        activations = None
        if self.recipe.need != "nothing" and self.statistics is None and self.tokens is not None:
            activations = calibrate.first_inputs(self.source, self.tokens, self.room)
        for block in self.source.blocks():
            pruned = self._block(block, activations, restore, finish)
            self.source.check_unchanged()  # before anybody keeps it
            if progress:
                progress(block.name)
            yield pruned

    def _block(
        self, block: Block, activations: Activations | None, restore: Restore | None, finish: Finish | None
    ) -> PrunedBlock:
        dense_prefix = activations is not None and self.recipe.prefix == "dense"
        more = activations is not None and block.index + 1 < self.source.block_count()
        inputs = None
        if activations is not None and dense_prefix:  # before restoring, which overwrites the dense weights
            with calibrate.on(block, self.recipe.device):
                inputs = calibrate.statistics(block, activations, self.recipe.need)
                if more:
                    calibrate.run(block, activations)
        masks = restore(block) if restore else None
        restored = masks is not None
        if masks is None:
            check_finite(block, "no score of them means anything")
            with calibrate.on(block, self.recipe.device):
                inputs = self._inputs(block, activations) if inputs is None else inputs
                if self.recipe.channel_permute:
                    inputs = permute.block(block, inputs, self.plan.layers, self.source.config)
                masks = self._layers(block, inputs)
            masks = {name: mask.to(block.linears[name].weight.device) for name, mask in masks.items()}
            if finish:
                finish(block, masks)
        if activations is not None and more and not dense_prefix:
            with calibrate.on(block, self.recipe.device):
                calibrate.run(block, activations)
        return PrunedBlock(block, masks, restored)

    def _inputs(self, block: Block, activations: Activations | None) -> dict[str, InputStat]:
        if self.statistics is not None and self.recipe.need != "nothing":
            return self.statistics(block)
        return calibrate.statistics(block, activations, self.recipe.need) if activations else {}

    def _layers(self, block: Block, inputs: dict[str, InputStat]) -> dict[str, Tensor]:
        """Gives the layers of a block their new weights and returns the masks; of several processes each does some."""
        masks, owners = {}, ranks.mine({name: float(layer.weight.numel()) for name, layer in block.linears.items()})
        for name, layer in block.linears.items():
            if owners[name] == ranks.world().rank:
                masks[name] = self._layer(name, layer, inputs.get(name))
        for name, layer in block.linears.items() if ranks.world().size > 1 else ():
            weight = layer.weight.data
            layer.weight.data = ranks.share_tensor(weight, owners[name])
            mask = masks.get(name, torch.zeros_like(weight, dtype=torch.bool))
            masks[name] = ranks.share_tensor(mask, owners[name])
        return {name: masks[name] for name in block.linears}

    def _layer(self, name: str, layer: nn.Linear, inputs: InputStat | None) -> Tensor:
        """Gives a layer its new weight and returns the mask."""
        dense, wanted = layer.weight.data, self.plan.layers[name]  # dense: [N, K]
        if wanted.zeros == 0:
            return torch.ones_like(dense, dtype=torch.bool)  # left as it is, by every method
        try:
            cut = Cut(wanted.zeros, wanted.pattern, self.recipe.selection or self.pruner.selection)
            weight, mask = self.pruner.prune(dense, inputs, cut)
            if self.recipe.refit:
                assert inputs is not None and inputs.gram is not None, "recipe.need asks for it"
                weight = refit(weight, dense, mask, inputs.gram)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        # Rounding to the layer's dtype keeps zeros zero.
        layer.weight.data = weight.to(dense.dtype)
        return mask
