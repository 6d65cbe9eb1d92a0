"""Blocks whose sizes config.json cannot say: fewer heads or channels in each, and layers that are two factors.

transformers has one number of heads and one of channels for all blocks. Where blocks differ, `quantization_config`
holds a list of each by block, and the ranks of factored layers by name. The forward pass of the families that are
`resizable` takes the number of heads from the tensors, so that only the layers need another shape.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import families

# The layers of a block of resizable families.
QUERY, KEY, VALUE, OUT = (f"self_attn.{part}_proj" for part in "qkvo")
GATE, UP, DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))


@dataclass(frozen=True)
class Shapes:
    """What is not as config.json says. kv_heads, channels: by block, None where all are.   ranks: by layer name."""

    kv_heads: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    ranks: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.kv_heads or self.channels or self.ranks)

    def settings(self) -> dict[str, Any]:
        """The entries of `quantization_config`."""
        found = {"kv_heads": self.kv_heads, "channels": self.channels, "ranks": self.ranks}
        return {name: dict(v) if name == "ranks" else list(v) for name, v in found.items() if v}


class LowRankLinear(nn.Module):
    """y = (x Aᵀ) Bᵀ + b: a linear layer of rank r as two, `first` A [r, K] and `second` B [N, r] with the bias."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.in_features, self.out_features, self.rank = first.in_features, second.out_features, first.out_features

    @classmethod
    def like(cls, layer: nn.Linear, rank: int) -> "LowRankLinear":
        """One of that rank in the place of `layer`, its values not set."""
        where = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        first = nn.Linear(layer.in_features, rank, bias=False, **where)
        return cls(first, nn.Linear(rank, layer.out_features, bias=layer.bias is not None, **where))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        return self.second(self.first(x))

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The layer as one matrix, B A, multiplied in float32 and rounded to `dtype`, by default its own."""
        weight = self.second.weight.detach().float() @ self.first.weight.detach().float()
        dtype = dtype or self.first.weight.dtype
        linear = nn.Linear(self.in_features, self.out_features, self.second.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if self.second.bias is not None:
            linear.bias = nn.Parameter(self.second.bias.detach().to(dtype), requires_grad=False)
        return linear


def of(config: Any) -> Shapes:
    """What the `quantization_config` of a transformers config says; ValueError if it cannot be meant."""
    return read(getattr(config, "quantization_config", None))


def read(settings: Any) -> Shapes:
    """What a `quantization_config` says, a dict or transformers' object of it."""
    settings = settings if isinstance(settings, dict) else vars(settings) if settings is not None else {}
    if settings.get("quant_method") != "alphaprune":
        return Shapes()
    lists = {}
    for name in ("kv_heads", "channels"):
        found = settings.get(name)
        if found is not None and not (isinstance(found, list | tuple) and all(map(_is_size, found))):
            raise ValueError(f"quantization_config: {name} {found!r}: wanted a size from 1 for each block, in a list")
        lists[name] = None if found is None else tuple(found)
    ranks = settings.get("ranks") or {}
    if not (isinstance(ranks, dict) and all(_is_size(rank) for rank in ranks.values())):
        raise ValueError(f"quantization_config: ranks {ranks!r}: wanted a rank from 1 for each layer name")
    return Shapes(**lists, ranks=ranks)


def reshape(decoder: nn.Module, prefix: str, config: Any, shapes: Shapes) -> None:
    """Gives the blocks of a new model their shapes, in place; values of the layers that change are not set.

    prefix: of the layer names in `shapes.ranks`.   Raises ValueError naming what does not fit the model.
    """
    blocks = len(list(decoder.children()))
    for name, sizes in (("kv_heads", shapes.kv_heads), ("channels", shapes.channels)):
        if sizes is not None and len(sizes) != blocks:
            raise ValueError(f"quantization_config: {len(sizes)} {name} for {blocks} blocks: wanted one for each")
    if shapes.kv_heads or shapes.channels:
        check_layout(config)
    for index, (child, block) in enumerate(decoder.named_children()):
        where = f"{prefix}.{child}"
        if shapes.kv_heads:
            _resize_attention(where, block, config, shapes.kv_heads[index])
        if shapes.channels:
            _resize_mlp(where, block, shapes.channels[index])
    for name, rank in shapes.ranks.items():
        inner = name.removeprefix(f"{prefix}.")
        layer = dict(decoder.named_modules()).get(inner)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"quantization_config: ranks: {name} is no linear layer of this model")
        if rank > min(layer.weight.shape):
            raise ValueError(f"{name}: rank {rank} is more than a layer of {tuple(layer.weight.shape)} can have")
        decoder.set_submodule(inner, LowRankLinear.like(layer, rank))


def observe(decoder: nn.Module, prefix: str, config: Any) -> Shapes:
    """What of a model's blocks is not as its config says."""
    ranks = {f"{prefix}.{n}": m.rank for n, m in decoder.named_modules() if isinstance(m, LowRankLinear)}
    if not _resizable(config):
        return Shapes(ranks=ranks)
    blocks = list(decoder.children())
    heads = tuple(kv_heads(block, config) for block in blocks)
    return unlike(config, heads, tuple(block.get_submodule(DOWN).in_features for block in blocks), ranks)


def unlike(config: Any, heads: tuple[int, ...], channels: tuple[int, ...], ranks: dict[str, int]) -> Shapes:
    """What of these sizes of all blocks is not as a config says."""
    config = families.text_config(config)
    return Shapes(
        None if all(count == config.num_key_value_heads for count in heads) else heads,
        None if all(count == config.intermediate_size for count in channels) else channels,
        ranks,
    )


def kv_heads(block: nn.Module, config: Any) -> int:
    """How many heads of keys a block has."""
    return block.get_submodule(KEY).out_features // head_dim(config)


def head_dim(config: Any) -> int:
    config = families.text_config(config)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def queries_per_key(config: Any) -> int:
    config = families.text_config(config)
    return config.num_attention_heads // config.num_key_value_heads


def check_layout(config: Any) -> None:
    """ValueError unless heads and channels of this kind of model are known."""
    if not _resizable(config):
        known = ", ".join(name for name, family in families.FAMILIES.items() if family.resizable)
        raise ValueError(
            f"model type {families.kind(config)}: heads and channels can be removed from {known} (resizable in "
            f"families.py); use --bits or --rank-ratio for this one"
        )


def _resizable(config: Any) -> bool:
    family = families.of(config)
    return family is not None and family.resizable


def _resize_attention(where: str, block: nn.Module, config: Any, count: int) -> None:
    width, queries = head_dim(config), queries_per_key(config)
    if count > (most := families.text_config(config).num_key_value_heads):
        raise ValueError(f"{where}: {count} kv_heads, config.json has {most}; one of them is another model's")
    for name, rows in ((QUERY, queries * count * width), (KEY, count * width), (VALUE, count * width)):
        _resize(block.get_submodule(name), rows=rows)
    _resize(block.get_submodule(OUT), columns=queries * count * width)


def _resize_mlp(where: str, block: nn.Module, count: int) -> None:
    most = block.get_submodule(DOWN).in_features
    if count > most:
        raise ValueError(f"{where}: {count} channels, config.json has {most}; one of them is another model's")
    for name in (GATE, UP):
        _resize(block.get_submodule(name), rows=count)
    _resize(block.get_submodule(DOWN), columns=count)


def _resize(layer: nn.Linear, rows: int | None = None, columns: int | None = None) -> None:
    rows, columns = rows or layer.out_features, columns or layer.in_features
    weight, bias = layer.weight, layer.bias
    layer.weight = nn.Parameter(weight.new_empty(rows, columns), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.new_empty(rows), requires_grad=bias.requires_grad)
    layer.out_features, layer.in_features = rows, columns


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
