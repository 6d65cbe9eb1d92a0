"""What pruning one block alone does to the whole model: every block in turn, at a few sparsities, on real text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import calibrate, evaluate
from alphaprune.calibrate import Activations
from alphaprune.curves import BlockCurve, Curves
from alphaprune.model import Block, Description, LiveSource
from alphaprune.pattern import Unstructured
from alphaprune.plan_file import LayerPlan, Plan
from alphaprune.pruning import Recipe, Statistics, prune_blocks


class _Only(LiveSource):
    """A live model of which only one block is seen."""

    def __init__(self, model: nn.Module, block: Block) -> None:
        super().__init__(model)
        self.block = block

    def blocks(self) -> Iterator[Block]:
        yield self.block


def levels(sparsities: Sequence[float]) -> list[float]:
    """The sparsities to measure at for plans of `sparsities`: these, what their blocks may well get, and 0.9."""
    around = {round(s + d, 6) for s in sparsities for d in (-0.2, 0, 0.1)} | {0.9}
    return sorted(s for s in around if 0.05 <= s <= 0.95)


def measure(
    source: LiveSource,
    recipe: Recipe,
    statistics: Statistics,
    tokens: Tensor,
    sparsities: Sequence[float],
    part: "str | Path",
    data: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Curves:
    """For every block and sparsity the mean KL(dense ‖ model) in nats per token with only this block pruned.

    All layers of the block get the same unstructured sparsity by `recipe`; the model is dense again afterwards.
    statistics: what is known of the inputs of a block's layers.   tokens: [windows, length] int64.
    part: file of finished blocks; an interrupted measurement of the same goes on there.
    progress: called after each sparsity of each block.   Raises ValueError naming the block if a figure is not finite.
    """
    blocks, known, data = list(source.blocks()), source.description(), data or {}
    done = Curves.load(part).blocks if Path(part).is_file() else {}
    dense = evaluate.reference(source.skeleton, tokens).states
    at = _Place(source, blocks, known, calibrate.first_inputs(source, tokens), tokens, dense)
    for block in blocks:
        if block.index not in done:
            losses = [0.0]
            for sparsity in sparsities:
                losses.append(at.divergence(block, sparsity, recipe, statistics))
                if progress:
                    progress(f"{block.name} {sparsity:g}")
            try:
                done[block.index] = BlockCurve((0.0, *sparsities), losses)
            except ValueError as error:
                raise ValueError(f"{block.name}: {error}") from error
            Curves(known.name, known.fingerprint, recipe.method, "kl", done, data).save(part)
        elif progress:
            for sparsity in sparsities:
                progress(f"{block.name} {sparsity:g}")
        calibrate.run(block, at.activations)
    return Curves(known.name, known.fingerprint, recipe.method, "kl", done, data)


@dataclass(frozen=True)
class _Place:
    """A block's place in the forward pass: `activations` are its inputs behind dense blocks, for `tokens`; `dense` the
    inputs of the dense model's head."""

    source: LiveSource
    blocks: list[Block]
    known: Description
    activations: Activations
    tokens: Tensor
    dense: Tensor

    def divergence(self, block: Block, sparsity: float, recipe: Recipe, statistics: Statistics) -> float:
        """Mean KL with all layers of one block at `sparsity`; the forward pass starts at that block."""
        model, kept = self.source.skeleton, {name: layer.weight.data for name, layer in block.linears.items()}
        states = Activations(list(self.activations.hidden), self.activations.keywords)
        try:
            for _ in prune_blocks(_Only(model, block), self._plan(block, sparsity), recipe, statistics=statistics):
                pass
            for later in self.blocks[block.index :]:
                calibrate.run(later, states)
        finally:
            for name, layer in block.linears.items():
                layer.weight.data = kept[name]
        norm = model.get_submodule(self.source.prefix.rpartition(".")[0]).norm  # the last step before the head
        sizes = [hidden.shape[0] for hidden in states.hidden]
        with torch.no_grad():
            found = [
                evaluate.judge(model, tokens, norm(hidden), dense).divergences
                for tokens, hidden, dense in zip(
                    self.tokens.split(sizes), states.hidden, self.dense.split(sizes), strict=True
                )
            ]
        return torch.cat(found).mean().item()

    def _plan(self, block: Block, sparsity: float) -> Plan:
        """The same sparsity in every layer of one block, no zeros in the others."""
        layers = {
            name: LayerPlan((n, k), round(sparsity * n * k) if name in block.linears else 0, Unstructured())
            for name, (n, k) in self.known.shapes.items()
        }
        name, fingerprint = self.known.name, self.known.fingerprint
        return Plan(name, fingerprint, sparsity, "uniform", 0.0, "unstructured", layers)
