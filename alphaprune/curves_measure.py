"""What pruning one block alone does to the whole model: every block in turn, at a few sparsities, on real text."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaprune import calibrate, evaluate
from alphaprune.calibrate import Activations
from alphaprune.curves import BlockCurve, Curves
from alphaprune.model import Block, Description, Source
from alphaprune.pattern import Unstructured
from alphaprune.plan_file import LayerPlan, Plan
from alphaprune.pruning import Recipe, Statistics, prune_blocks
from alphaprune.states import Room


def levels(sparsities: Sequence[float]) -> list[float]:
    """The sparsities to measure at for plans of `sparsities`: these, what their blocks may well get, and 0.9."""
    around = {round(s + d, 6) for s in sparsities for d in (-0.2, 0, 0.1)} | {0.9}
    return sorted(s for s in around if 0.05 <= s <= 0.95)


def measure(
    source: Source,
    recipe: Recipe,
    statistics: Statistics,
    tokens: Tensor,
    sparsities: Sequence[float],
    part: "str | Path",
    data: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    room: Room | None = None,
) -> Curves:
    """For every block and sparsity the mean KL(dense ‖ model) in nats per token with only this block pruned.

    All layers of the block get the same unstructured sparsity by `recipe`; the model is dense again afterwards.
    statistics: what is known of the inputs of a block's layers.   tokens: [windows, length] int64.
    part: file of finished blocks; an interrupted measurement of the same goes on there.
    progress: called after each sparsity of each block.   room: where hidden states may lie, see states.py.
    Two blocks are in memory at a time. Raises ValueError naming the block if a figure is not finite.
    """
    known, data = source.description(), data or {}
    done = Curves.load(part).blocks if Path(part).is_file() else {}
    dense = evaluate.reference(source, tokens, room=room)
    at = _Place(source, known, calibrate.first_inputs(source, tokens, room), dense)
    for block in source.blocks():
        if block.index not in done:
            losses = [0.0]
            for sparsity, loss in zip(sparsities, at.divergences(block, sparsities, recipe, statistics), strict=True):
                losses.append(loss)
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
    """A block's place in the forward pass: `activations` are its inputs behind dense blocks, `dense` the model."""

    source: Source
    known: Description
    activations: Activations
    dense: evaluate.Reference

    def divergences(
        self, block: Block, sparsities: Sequence[float], recipe: Recipe, statistics: Statistics
    ) -> Iterator[float]:
        """Mean KL with all layers of one block at each sparsity; the forward passes start at that block."""
        made = [self._behind(block, sparsity, recipe, statistics) for sparsity in sparsities]
        for later in self.source.blocks(range(block.index + 1, self.source.block_count())):
            for states in made:
                calibrate.run(later, states)
        with calibrate.loaded(self.source):
            found = [self._divergence(states) for states in made]
        yield from found

    def _behind(self, block: Block, sparsity: float, recipe: Recipe, statistics: Statistics) -> Activations:
        """What leaves a block that is pruned for the time of it."""
        kept = {name: layer.weight.data for name, layer in block.linears.items()}
        only = copy(self.source)  # of which no other block is seen
        only.blocks, only.description = lambda wanted=None: iter((block,)), lambda: self.known
        states = replace(self.activations, hidden=self.activations.hidden.copy())
        try:
            for _ in prune_blocks(only, self._plan(block, sparsity), recipe, statistics=statistics):
                pass
            calibrate.run(block, states)
        finally:
            for name, layer in block.linears.items():
                layer.weight.data = kept[name]
        return states

    def _divergence(self, states: Activations) -> float:
        found, parts = [], zip(calibrate.batches(self.dense.tokens), states.hidden, self.dense.states, strict=True)
        for tokens, hidden, dense in parts:
            inputs = calibrate.head_inputs(self.source, tokens, hidden)
            found.append(evaluate.judge(self.source.skeleton, tokens, inputs, dense).divergences)
        return torch.cat(found).mean().item()

    def _plan(self, block: Block, sparsity: float) -> Plan:
        """The same sparsity in every layer of one block, no zeros in the others."""
        layers = {
            name: LayerPlan((n, k), round(sparsity * n * k) if name in block.linears else 0, Unstructured())
            for name, (n, k) in self.known.shapes.items()
        }
        name, fingerprint = self.known.name, self.known.fingerprint
        return Plan(name, fingerprint, sparsity, "uniform", 0.0, "unstructured", layers)
