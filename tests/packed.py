"""Small models with zeros, as directories: dense, packed, with int8 values."""

from pathlib import Path

import torch
from conftest import make_model, write_tokenizer
from torch import nn

import alphaprune
from alphaprune import SparseLinear

DENSE = "model.layers.2.self_attn.k_proj"  # is left without zeros, so that it stays dense
TOKENS = torch.arange(30)[None]


def zeros_model(seed: int = 1, sparsity: float = 0.7, **changes) -> nn.Module:
    """A LLaMA of three blocks, its linear layers without the smallest weights, DENSE excepted."""
    model = make_model(seed, **changes)
    for name, layer in linears(model).items():
        if name != DENSE:
            size = layer.weight.detach().abs()
            layer.weight.data[size <= size.flatten().kthvalue(int(sparsity * size.numel())).values] = 0
    return model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}


def write_zeros(folder: Path, **changes) -> Path:
    """A dense directory that holds zeros, in several files, with a tokenizer."""
    zeros_model(**changes).save_pretrained(folder, max_shard_size="300KB")
    write_tokenizer(folder)
    return folder


def write_packed(
    folder: Path, values: str | None = None, group: int | None = None, head: bool = False, **changes
) -> Path:
    """The same packed; head: with an output layer of int8 values."""
    model = alphaprune.sparsify(zeros_model(**changes), values=values, group=group)
    alphaprune.save(alphaprune.round_head(model) if head else model, folder)
    write_tokenizer(folder)
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits
