"""Tensor parallelism of transformers with packed layers: each rank gets its slice of SBT, cut from the mapped file.

transformers' own plan says which layers are cut by rows and which by columns, and its own hooks add the ranks' results;
dense layers go the way that they always go. Tried with transformers 5.24; the hooks that it needs, for layers whose
tensors are plain ones, are there from 5.16 on.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from alphaprune.formats import PACKED_SUFFIXES, Packed, quantize, slices
from alphaprune.layer import SparseLinear

OLDEST = "5.16"
ROWS = ("colwise", "colwise_rep", "colwise_gather_output")
COLUMNS = ("rowwise", "rowwise_rep", "rowwise_split_input")


@dataclass(frozen=True)
class Ranks:
    """Which of how many ranks this process is, and what transformers' plan says of layers, by names with wildcards."""

    count: int
    own: int
    plan: dict[str, str]

    def style(self, name: str) -> str | None:
        """What the plan says of a layer; None where every rank holds it whole."""
        return self.plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


class SlicedLinear(SparseLinear):
    """A rank's rows or columns of a packed layer; in_features and out_features are those of the whole layer.

    Its forward gives the rank's part or summand of y, transformers' hooks around it the whole.
    """

    _hf_quantized_needs_local_tp = True  # its tensors are plain ones, not views of distributed tensors

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__(packed, bias)
        self.held = packed.shape  # [N, K] of the slice

    @property
    def packed(self) -> Packed:
        values, mask, offsets, scale = (self._buffers[suffix] for suffix in PACKED_SUFFIXES)
        return Packed(values, mask, offsets, self.held, scale, self.activations)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        raise ValueError(f"{self.name}: one rank holds {self.held} of it; load the model on one rank to expand it")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, held={self.held}"


class CutSlice(ConversionOps):
    """What transformers calls with the mapped tensors of one packed layer: gives this rank's slice of them."""

    supports_many_to_many = True

    def __init__(self, ranks: Ranks, refused: list[str]) -> None:
        self.ranks, self.refused = ranks, refused
        self.hf_quantizer = True  # transformers casts to the dtype of the first target unless it finds this attribute

    def __deepcopy__(self, _: dict) -> "CutSlice":
        return self  # transformers copies it for each layer; `refused` must stay the quantizer's

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """The tensors of the slice by their names in the model; nothing, and a sentence in `refused`, if it cannot."""
        name = full_layer_name.removesuffix(".weight")
        found = {}
        for pattern, tensors in input_dict.items():
            found[_suffix(pattern)] = tensors[0] if isinstance(tensors, list) else tensors
        layer = model.get_submodule(name)
        whole = Packed(*(found.get(suffix) for suffix in PACKED_SUFFIXES[:3]), _shape(layer), found.get("weight_scale"))
        try:
            part = cut(whole, layer, self.ranks)
        except ValueError as problem:
            self.refused.append(f"{name}: {problem}")
            missing_keys.difference_update(f"{name}.{suffix}" for suffix in found)
            return {}
        values = part.weight.to(layer.weight.dtype) if part.scale is None else part.weight
        return {f"{name}.{suffix}": t for suffix, t in (part.tensors | {"weight": values}).items()}


def cut(whole: Packed, layer: SlicedLinear, ranks: Ranks) -> Packed:
    """The slice of a packed weight that a rank holds."""
    n, k = whole.shape
    if layer.held[0] < n:
        return slices.rows(whole, *slices.share(n, ranks.count, ranks.own))
    return slices.columns(whole, *slices.share(k, ranks.count, ranks.own, "columns"))


def ranks_of(model: nn.Module) -> Ranks | None:
    """The ranks that share a model which is being loaded; None if there is one only.

    ValueError if the version of transformers cannot do it, or ranks would have to share an attention head.
    """
    config = getattr(model.config, "distributed_config", None)
    config = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    count, override = config.get("tp_size"), config.get("tp_plan")
    if count in (None, 1) or override == {}:  # an empty plan cuts nothing
        return None
    if Version(transformers.__version__) < Version(OLDEST):
        raise ValueError(
            f"transformers {transformers.__version__} cannot share packed layers among ranks: "
            f"install transformers {OLDEST} or newer"
        )
    plan = {**(model.tp_plan or {}), **(override if isinstance(override, dict) else {})}
    ranks = Ranks(count, torch.distributed.get_rank() % count, plan)  # the last dimension of transformers' mesh
    text = model.config.get_text_config()
    if any(name.endswith(("q_proj", "k_proj")) and style == "colwise" for name, style in plan.items()):
        for what in ("num_attention_heads", "num_key_value_heads"):
            if heads := getattr(text, what, None):
                slices.share(heads, count, ranks.own, what.removeprefix("num_").replace("_", " "))
    return ranks


def empty_slice(name: str, whole: SparseLinear, ranks: Ranks) -> SparseLinear:
    """The layer that this rank holds of a packed one on the meta device, or the layer itself if it holds all.

    ValueError naming the layer if it cannot be shared by so many ranks, with the counts that can.
    """
    style = ranks.style(name)
    if style is None or style == "replicate":
        return whole
    if style not in (*ROWS, *COLUMNS):
        raise ValueError(f"{name}: packed layers cannot be shared in the style {style}; leave it out of the tp_plan")
    n, k = _shape(whole)
    grouped = whole.weight_scale is not None and whole.weight_scale.dim() == 2
    try:
        if style in ROWS:
            first, last = slices.share(n, ranks.count, ranks.own)
            held = last - first, k
        else:
            first, last = slices.share(k, ranks.count, ranks.own, "columns")
            held = n, last - first
            if grouped and held[1] % quantize.GROUP:
                raise ValueError(slices.cut_group(first or last))
    except ValueError as problem:
        raise ValueError(f"{name}: {problem}") from problem
    scale = None
    if whole.weight_scale is not None:
        scale = (held[0], quantize.groups(held[1], quantize.GROUP)) if grouped else (held[0],)
    part = SlicedLinear.empty(held, 0, False, whole.weight.dtype, whole.weight.dtype, scale)
    part.name, (part.out_features, part.in_features) = name, (n, k)
    part.bias = whole.bias  # transformers cuts or copies it by itself
    return part


def _shape(layer: SparseLinear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def converters(parts: dict[str, SlicedLinear], ranks: Ranks, refused: list[str]) -> list[WeightConverter]:
    """What transformers loads the tensors of each sliced layer with; `refused` gets sentences of what failed.

    parts: by what follows the prefix that names in a file have or lack, as it is with or without a head.
    """
    found = []
    for name, part in parts.items():
        names = [f"{name}.{suffix}" for suffix in part.packed.tensors]
        patterns = [f"{re.escape(tensor)}$" for tensor in names]
        found.append(WeightConverter(patterns, names, [CutSlice(ranks, refused)], force_cpu=True))
    return found


def _suffix(pattern: str) -> str:
    return pattern.removesuffix("$").rpartition(".")[2]
