"""Activation statistics, streamed block by block: hidden states in, statistics of a block and new hidden states out.

The inputs of a block are the outputs of the *pruned* blocks before it; all layers of a block see the block while it
is still dense (Wanda's protocol: Sun et al. 2023, section 3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune.model import Block, DirectorySource, Source

TOKENS_AT_ONCE = 4096  # so many tokens go through a block together


class _Captured(Exception):
    """Ends a forward pass at the first block, whose inputs are then known."""


@dataclass
class Activations:
    """Inputs of the next block: `hidden`, a list of [batch, length, D]; `keywords`, what the blocks are called with."""

    hidden: list[Tensor]
    keywords: dict[str, Any] = field(default_factory=dict)

    def samples(self) -> int:
        return sum(h.shape[0] for h in self.hidden)


def first_inputs(source: Source, tokens: Tensor) -> Activations:
    """What the first block sees for `tokens` [samples, length] int64: embeddings and the blocks' keyword arguments."""
    if tokens.ndim != 2 or tokens.shape[0] == 0:
        raise ValueError(
            f"calibration tokens: wanted [samples, length] with a sample at least, got {tuple(tokens.shape)}"
        )
    batch = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    first = next(iter(source.skeleton.get_submodule(source.prefix).children()))
    found = Activations([])

    def stop(module: nn.Module, arguments: tuple, keywords: dict) -> None:
        found.hidden.append(arguments[0] if arguments else keywords["hidden_states"])
        found.keywords = {k: v for k, v in keywords.items() if k != "hidden_states"}
        raise _Captured

    lazy = isinstance(source, DirectorySource)
    if lazy:
        source.load_outside()
    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), _evaluating(source.skeleton):
            # One sample to learn the keywords (their batch dimension is 1, so they serve every batch size),
            # then the embeddings of all.
            for part in (tokens[:1], *(tokens.split(batch))):
                keywords = found.keywords
                try:
                    source.skeleton(input_ids=part.to(_device(source.skeleton)), use_cache=False)
                except _Captured:
                    found.keywords = keywords or found.keywords
    finally:
        hook.remove()
        if lazy:
            source.unload_outside()
    found.hidden = found.hidden[1:]
    return found


def run(block: Block, activations: Activations) -> None:
    """Replaces the hidden states by what the block makes of them."""
    with torch.no_grad(), _evaluating(block.module):
        for place, hidden in enumerate(activations.hidden):
            out = block.module(hidden, **activations.keywords)
            activations.hidden[place] = out[0] if isinstance(out, tuple) else out


def input_norms(block: Block, activations: Activations) -> dict[str, Tensor]:
    """For every prunable layer of the block, ‖X_j‖₂ of its inputs: [K] float32, root of the mean over samples.

    ‖X_j‖₂² = Σ over tokens of x_j², averaged over samples; float64 sums, so the order of samples does not matter.
    """
    sums = {name: torch.zeros(layer.weight.shape[1], dtype=torch.float64) for name, layer in block.linears.items()}

    def observe(name: str):
        def hook(module: nn.Module, arguments: tuple) -> None:
            x = arguments[0].detach().flatten(0, -2).float()  # [tokens, K]
            sums[name] += x.square().sum(0, dtype=torch.float64).cpu()

        return hook

    hooks = [layer.register_forward_pre_hook(observe(name)) for name, layer in block.linears.items()]
    try:
        with torch.no_grad(), _evaluating(block.module):
            for hidden in activations.hidden:
                block.module(hidden, **activations.keywords)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / activations.samples()).sqrt().float() for name, total in sums.items()}


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off for the time of a pass, and the mode as it was after it."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device
