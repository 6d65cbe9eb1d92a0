"""Channels inside a block in an order that lets an N:M mask keep more, without changing what the block computes.

Two kinds of channels can change places for free, since nothing outside their block sees the order: the intermediate
channels of the MLP (rows of gate_proj and up_proj, columns of down_proj), and the channels of each KV head (rows of
v_proj, columns of o_proj for all query heads that share it). So down_proj and o_proj gain. The layers q, k, v, gate and
up keep the order of their inputs: that is the residual stream, which only the whole model could permute at once; and
rotary embeddings tie the rows of q and k to their places.

The heuristic deals the strongest channels over different groups (channel allocation of RIA: Zhang et al., ICLR 2024),
then swaps channels between random pairs of groups for as long as that helps.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import families, scores
from alphaprune.calibrate import InputStat
from alphaprune.families import FAMILIES, GATED, Family
from alphaprune.gram import Gram
from alphaprune.model import Block
from alphaprune.pattern import NM
from alphaprune.planning import LayerPlan


def _is_known(family: Family | None) -> bool:
    """Whether nothing but the layers below tells one channel of v or the MLP from another in the blocks."""
    return family is not None and family.prunable == GATED and family.experts is None


LAYOUTS = tuple(name for name, family in FAMILIES.items() if _is_known(family))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

NEEDS_PATTERN = "--channel-permute needs an N:M pattern, such as --pattern 2:4; an unstructured mask gains nothing"
ROUNDS = 32  # of swaps; three times as many keep 0.1 % more
ROWS = 1024  # that swaps are judged by
LEAST = 1e-6  # gain of a swap relative to what the two groups keep: above the rounding of float32 sums


def check(config: Any, name: str, plan_layers: Mapping[str, LayerPlan]) -> None:
    """ValueError in one sentence if channels of this model cannot be permuted, or for nothing."""
    if not _is_known(families.of(config)):
        raise ValueError(
            f"{name}: --channel-permute knows the blocks of {', '.join(LAYOUTS)}, not of {families.kind(config)}; "
            f"leave it out"
        )
    patterns = {layer: _pattern(wanted) for layer, wanted in plan_layers.items()}
    if not any(patterns.values()):
        raise ValueError(NEEDS_PATTERN)
    width = _heads(config)[2]
    for layer, pattern in patterns.items():
        if layer.endswith(".o_proj") and pattern and width % pattern.of:
            raise ValueError(
                f"{layer}: --channel-permute moves channels inside a head, and heads of {width} channels are no whole "
                f"number of groups of {pattern.of}; choose another pattern, or leave it out"
            )


def block(
    block: Block, inputs: Mapping[str, InputStat], plan_layers: Mapping[str, LayerPlan], config: Any
) -> dict[str, InputStat]:
    """What is known of the layers' inputs after the channels were put, in place, in a better order for the plan.

    inputs: of the prunable layers by full name, or empty; entries of layers whose columns moved come back reordered, as
    new objects. The block computes what it did, up to the order of sums. Layers without an N:M mask move nothing.
    Raises ValueError if the block is not laid out as `LAYOUTS` are.
    """
    attention, mlp = _roles(block, config)
    found = dict(inputs)
    query_heads, heads, width = _heads(config)
    name = f"{block.name}.self_attn.o_proj"
    if pattern := _pattern(plan_layers[name]):
        layer, source = attention["o_proj"], attention["v_proj"]
        judged = _scores(layer, found.get(name))  # [N, query heads · width]
        rows = judged.unflatten(1, (heads, query_heads // heads, width)).permute(1, 0, 2, 3).flatten(1, 2)
        order = best_order(rows, pattern)  # [heads, width]
        _move_rows(source, _inside(order))
        found |= _move_columns(name, layer, _inside(order.repeat_interleave(query_heads // heads, 0)), found)
    name = f"{block.name}.mlp.down_proj"
    if pattern := _pattern(plan_layers[name]):
        layer = mlp["down_proj"]
        order = best_order(_scores(layer, found.get(name))[None], pattern)[0]  # [K]
        for other in ("gate_proj", "up_proj"):
            _move_rows(mlp[other], order)
        found |= _move_columns(name, layer, order, found)
    return found


def best_order(judged: Tensor, pattern: NM) -> Tensor:
    """[B, K] int64: for each of B separate matrices an order of its columns that keeps a large part of its scores.

    judged: [B, R, K] float32 scores, K a multiple of `pattern.of`. Column j of the reordered matrix is column order[j]
    of this one. Never one that keeps less than the order they have. The same on every run.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(judged.shape[1], generator=generator)[:ROWS].to(judged.device)
    sample = judged[:, rows].transpose(1, 2).contiguous()  # [B, K, R]: a channel lies in one piece
    before = torch.arange(judged.shape[2], device=judged.device).expand(len(judged), -1)  # [B, K]
    dealt = _deal(judged, pattern.of)
    better = _kept(sample.transpose(1, 2), dealt, pattern) > _kept(sample.transpose(1, 2), before, pattern)  # [B]
    order = torch.where(better[:, None], dealt, before)
    for _ in range(ROUNDS if order.shape[1] > pattern.of else 0):
        order = _swap(sample, order, pattern, generator)
    gains = _kept(judged, order, pattern) > _kept(judged, before, pattern)
    return torch.where(gains[:, None], order, before)


def _deal(judged: Tensor, of: int) -> Tensor:
    """[B, K]: columns by their total scores, dealt one by one over the groups, and back again, as in choosing teams."""
    ranked = judged.sum(1, dtype=torch.float64).sort(dim=1, descending=True, stable=True).indices
    turns = ranked.unflatten(1, (of, -1))  # [B, M, groups]
    turns = torch.stack([turns[:, i].flip(1) if i % 2 else turns[:, i] for i in range(of)], 1)
    return turns.transpose(1, 2).flatten(1)


def _kept(judged: Tensor, order: Tensor, pattern: NM) -> Tensor:
    """[B] float64: what an N:M mask keeps of the scores [B, R, K] in this order [B, K]."""
    moved = torch.stack([matrix[:, columns] for matrix, columns in zip(judged, order, strict=True)])
    return moved.unflatten(2, (-1, pattern.of)).topk(pattern.keep, dim=3).values.sum((1, 2, 3), dtype=torch.float64)


def _swap(sample: Tensor, order: Tensor, pattern: NM, generator: torch.Generator) -> Tensor:
    """The order [B, K] after the best swap, if it gains, between the two groups of each of many random pairs.

    A row of a group keeps, with value v in place of member a, the N − 1 best of the others and the better of v and the
    next, t_a. Σ max(t_a, v) over rows is (Σt_a + Σv + ‖t_a − v‖₁) / 2, so all M × M swaps of a pair are one distance
    matrix each way.
    """
    (batch, channels, _), of = sample.shape, pattern.of
    groups = channels // of
    pairs = torch.rand(batch, groups, generator=generator).argsort(1)[:, : groups // 2 * 2].unflatten(1, (-1, 2))
    places = (pairs[..., None] * of + torch.arange(of)).to(order.device)  # [B, P, 2, M]
    members = order.gather(1, places.flatten(1)).view_as(places)
    batches = torch.arange(batch, device=order.device)[:, None, None, None]
    values = sample[batches, members]  # [B, P, 2, M, R]
    best = values.topk(pattern.keep + 1, dim=3).values
    last, after = best[:, :, :, -2:-1], best[:, :, :, -1:]  # [B, P, 2, 1, R] the worst that is kept, the best that goes
    kept = best[:, :, :, :-1].sum(3, keepdim=True)
    inside = values >= last
    alone = torch.where(inside, kept - values, kept - last).sum(4)  # [B, P, 2, M] Σ of the N − 1 best of the others
    rest = torch.where(inside, after, last)  # t_a
    with_other = alone.unsqueeze(4) + _sum_of_larger(rest, values.flip(2))  # [B, P, 2, M own, M of the other]
    total = kept.sum((2, 3, 4))  # [B, P]
    gain = with_other[:, :, 0] + with_other[:, :, 1].transpose(2, 3) - total[:, :, None, None]
    most, which = gain.flatten(2).max(2)  # [B, P]
    at = torch.stack([which // of, which % of], 2)[..., None]  # [B, P, 2, 1]
    places, members = places.gather(3, at)[..., 0], members.gather(3, at)[..., 0]  # [B, P, 2]
    members = torch.where((most > LEAST * total)[..., None], members.flip(2), members)
    return order.scatter(1, places.flatten(1), members.flatten(1))


def _sum_of_larger(a: Tensor, b: Tensor) -> Tensor:
    """Σ over the last dimension of max(a_i, b_j), [..., M, M]; a, b: [..., M, R]."""
    apart = torch.cdist(a.flatten(0, -3), b.flatten(0, -3), p=1.0).view(*a.shape[:-1], b.shape[-2])
    return (a.sum(-1).unsqueeze(-1) + b.sum(-1).unsqueeze(-2) + apart) / 2


def _scores(layer: nn.Linear, inputs: InputStat | None) -> Tensor:
    """[N, K] float32: Wanda's where the inputs are known, magnitudes where not, near to what any method ranks by."""
    weight = layer.weight.data
    return scores.magnitude(weight) if inputs is None else scores.wanda(weight, inputs.norms.to(weight.device))


def _inside(order: Tensor) -> Tensor:
    """[H · width] positions of all heads from those inside each head, [H, width]."""
    heads, width = order.shape
    return (order + width * torch.arange(heads, device=order.device)[:, None]).flatten()


def _move_rows(layer: nn.Linear, order: Tensor) -> None:
    layer.weight.data = layer.weight.data[order]
    if layer.bias is not None:
        layer.bias.data = layer.bias.data[order]


def _move_columns(name: str, layer: nn.Linear, order: Tensor, inputs: Mapping[str, InputStat]) -> dict[str, InputStat]:
    """Reorders the columns of a layer, and returns what is known of its inputs in the new order."""
    layer.weight.data = layer.weight.data[:, order].contiguous()
    if name not in inputs:
        return {}
    known = inputs[name]
    there = order.to(known.norms.device)
    gram = known.gram
    if gram is not None:  # a new one, since others may hold this one and what it has cached
        there_too = order.to(gram.matrix.device)
        gram = Gram(gram.matrix[there_too[:, None], there_too], gram.tokens)
    return {name: replace(known, norms=known.norms[there], gram=gram)}


def _pattern(wanted: LayerPlan) -> NM | None:
    """The N:M pattern of a layer that gets zeros by one."""
    return wanted.pattern if isinstance(wanted.pattern, NM) and wanted.zeros else None


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, KV heads and channels of a head."""
    config = families.text_config(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads, config.num_key_value_heads, width


def _roles(block: Block, config: Any) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
    """The layers of attention and MLP by their names inside; ValueError for any other layout."""
    attention = {name: block.linears.get(f"{block.name}.self_attn.{name}") for name in ATTENTION}
    mlp = {name: block.linears.get(f"{block.name}.mlp.{name}") for name in MLP}
    layers = [*attention.values(), *mlp.values()]
    if None in layers or len(layers) != len(block.linears):
        have = ", ".join(name.removeprefix(f"{block.name}.") for name in block.linears)
        raise ValueError(
            f"{block.name}: --channel-permute wants the layers q, k, v and o_proj of self_attn and gate, up and "
            f"down_proj of mlp, and no other; this block has {have}; leave it out"
        )
    query_heads, heads, width = _heads(config)
    inner = mlp["down_proj"].in_features
    shapes = {
        "v_proj": (attention["v_proj"].out_features, heads * width),
        "o_proj": (attention["o_proj"].in_features, query_heads * width),
        "gate_proj": (mlp["gate_proj"].out_features, inner),
        "up_proj": (mlp["up_proj"].out_features, inner),
    }
    for name, (found, wanted) in shapes.items():
        if found != wanted:
            raise ValueError(f"{block.name}: {name} has {found} channels where --channel-permute wants {wanted}")
    return attention, mlp
