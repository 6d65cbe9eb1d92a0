"""One layer, or the channels of one block, made smaller: the arithmetic of each method."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphaprune import formats, shapes
from alphaprune.calibrate import InputStat
from alphaprune.formats import Packed, quantize
from alphaprune.gram import DAMPING, Gram, factorize, full_float32
from alphaprune.model import Block
from alphaprune.shapes import DOWN, GATE, KEY, OUT, QUERY, UP, VALUE, LowRankLinear

Score = Literal["magnitude", "wanda"]


def round_layer(
    layer: nn.Linear, bits: int, group: int | None, inputs: InputStat | None = None
) -> tuple[Packed, quantize.Error]:
    """A layer with weights of so many bits, packed, and what that lost; its own weight becomes the rounded one.

    The integers lie in int8, and those that are 0 are not stored: the fewer the bits, the more of them there are.
    inputs: of the layer; then the scales are chosen by the error of its outputs, inputs taken as independent.
    """
    importance = None if inputs is None else inputs.norms.square()
    integers, scale, error = quantize.quantize(layer.weight.detach(), None, group, bits, importance)
    layer.weight.data = quantize.dequantize(integers, scale, layer.weight.dtype)
    return formats.get("sbt").pack(integers, integers != 0, scale), error


def factor_layer(layer: nn.Linear, rank: int, gram: Gram | None = None) -> LowRankLinear:
    """The layer of that rank with the least ‖(W − BA)X‖, or ‖W − BA‖ where nothing is known of its inputs X.

    With G + δI = R Rᵀ the best BA is the truncated SVD of W R times R⁻¹ (Wang et al. 2024, "SVD-LLM"; Eckart and
    Young). Singular values are shared between A and B by their roots, which keeps both in the range of half precision.
    """
    weight = layer.weight.detach().float()  # [N, K]
    with full_float32():
        root = None if gram is None else gram.factor().matrix  # R [K, K] upper triangular
        left, sizes, right = torch.linalg.svd(weight if root is None else weight @ root, full_matrices=False)
        left, sizes, right = left[:, :rank], sizes[:rank].sqrt(), right[:rank]
        if root is not None:
            right = torch.linalg.solve_triangular(root, right, upper=True, left=False)
    made = LowRankLinear.like(layer, rank)
    made.first.weight = nn.Parameter((sizes[:, None] * right).to(layer.weight.dtype), requires_grad=False)
    made.second.weight = nn.Parameter((left * sizes).to(layer.weight.dtype), requires_grad=False)
    if layer.bias is not None:
        made.second.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return made


def remove(
    block: Block,
    config: Any,
    heads: int,
    channels: int,
    inputs: Mapping[str, InputStat],
    score: Score,
    refit: bool,
    narrow: bool,
) -> None:
    """Leaves a block so many KV heads, each with its queries, and so many channels of the MLP, in place.

    score: of a channel of o_proj and down_proj, ‖W_j‖ or ‖W_j‖·‖x_j‖ (Wanda's, over a column), a head's the root of the
    summed squares; the lowest go.   refit: what is kept of o_proj and down_proj is solved for anew.
    narrow: removed rows and columns are gone; otherwise they are 0, which computes the same.
    """
    width, queries = shapes.head_dim(config), shapes.queries_per_key(config)
    columns = _scores(block, OUT, inputs, score)
    groups = columns.view(-1, queries * width).square().sum(1)
    kept = _best(groups, heads)
    if heads < len(groups):
        own = _spread(kept, width)
        _cut(block, OUT, _spread(kept, queries * width), inputs, refit, narrow)
        for name, rows in ((QUERY, _spread(kept, queries * width)), (KEY, own), (VALUE, own)):
            _keep_rows(block.module.get_submodule(name), rows, narrow)
    columns = _scores(block, DOWN, inputs, score)
    if channels < len(columns):
        kept = _best(columns, channels)
        _cut(block, DOWN, kept, inputs, refit, narrow)
        for name in (GATE, UP):
            _keep_rows(block.module.get_submodule(name), kept, narrow)


def _scores(block: Block, name: str, inputs: Mapping[str, InputStat], score: Score) -> Tensor:
    """[K] float32, of the columns of a layer."""
    norms = block.module.get_submodule(name).weight.detach().float().norm(dim=0)
    return norms if score == "magnitude" else norms * inputs[f"{block.name}.{name}"].norms.to(norms.device)


def _best(scores: Tensor, count: int) -> Tensor:
    """The places of the highest scores, in order; of equal ones the later stay."""
    return scores.flip(0).sort(descending=True, stable=True).indices[:count].neg().add(len(scores) - 1).sort().values


def _spread(kept: Tensor, width: int) -> Tensor:
    """The places of all channels of the heads `kept`."""
    return (kept[:, None] * width + torch.arange(width, device=kept.device)).flatten()


def _cut(block: Block, name: str, kept: Tensor, inputs: Mapping[str, InputStat], refit: bool, narrow: bool) -> None:
    """Keeps some columns of a layer, solved for anew or as they are."""
    layer = block.module.get_submodule(name)
    weight = layer.weight.detach()
    new = refit_columns(weight, kept, inputs[f"{block.name}.{name}"].gram) if refit else weight[:, kept]
    if not narrow:
        new = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device).index_copy_(1, kept, new.float())
    _put(layer, new.to(weight.dtype).contiguous())


def refit_columns(weight: Tensor, kept: Tensor, gram: Gram) -> Tensor:
    """[N, k] float32: argmin ‖(W[:, kept]' − W)X‖² over the kept columns, W G[:, S] (G[S, S] + δI)⁻¹.

    δ is 1 % of the mean diagonal (gram.py) and pulls towards the weights as they are, not towards 0: it is the change
    that is solved for. Column sets as in OSSCAR (Meng et al. 2024).
    """
    gram.check()
    matrix = gram.matrix
    gone = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
    gone[kept] = False
    inner = matrix[kept][:, kept].contiguous()
    diagonal = gram.living_diagonal()[kept]
    old = weight.float().to(matrix.device)
    with full_float32():
        missing = old[:, gone] @ matrix[gone][:, kept]  # what the removed columns did that the kept can do, [N, k]
        change = factorize(inner, diagonal, DAMPING * float(diagonal.mean())).solve_(missing)
    return (old[:, kept] + change).to(weight.device)


def _keep_rows(layer: nn.Linear, kept: Tensor, narrow: bool) -> None:
    if narrow:
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[kept].clone(), requires_grad=False)
        _put(layer, layer.weight.detach()[kept].contiguous())
        return
    gone = torch.ones(layer.out_features, dtype=torch.bool, device=layer.weight.device)
    gone[kept] = False
    for tensor in (layer.weight, layer.bias):
        if tensor is not None:
            tensor.data = tensor.detach().masked_fill(gone[:, None] if tensor.ndim == 2 else gone, 0)


def _put(layer: nn.Linear, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape
