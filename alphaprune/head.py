"""The output layer of a language model, which gives every token of the vocabulary its score, with int8 values.

No method here prunes it. Beside blocks that are 70 % sparse one of 128 thousand tokens is a sixth of the bytes that a
step of LLaMA-3-8B reads, and two fifths of those of LLaMA-3.2-1B.
"""

from collections.abc import Collection, MutableMapping
from typing import Any, TypeVar

from torch import Tensor, nn

from alphaprune.families import text_config
from alphaprune.formats import PACKED_SUFFIXES
from alphaprune.formats.quantize import Error, check
from alphaprune.layer import SparseLinear, names_of, pack_weight, put
from alphaprune.model import Source

TIED = "tie_word_embeddings"  # of a config: whether the output layer is the matrix of embeddings
Model = TypeVar("Model", bound=nn.Module)


def name_of(model: nn.Module) -> str | None:
    """The full name of the output layer, or None if the model has none that is a linear layer."""
    layer = _find(model)
    return names_of(model)[layer][0] if isinstance(layer, nn.Linear | SparseLinear) else None


def round_head(model: Model, group: int | None = None) -> Model:
    """Gives the output layer int8 values and a scale per row or, with group=128, per 128 columns; returns the model.

    In place; a layer that has them already stays as it is. Where it was the matrix of embeddings, that keeps its dtype,
    and the model is no longer tied: it takes 1.13 bytes a weight more, and a step reads as much less. What was lost
    stands in the layer's `quantization_error`.
    ValueError if there is no output layer, or NaN or infinity in it.
    """
    check("int8", group)
    name = _wanted(model)
    layer = model.get_submodule(name)
    if isinstance(layer, SparseLinear) and layer.weight_scale is not None:
        return model
    dense = layer.to_linear() if isinstance(layer, SparseLinear) else layer
    try:
        sparse = SparseLinear.from_linear(dense, None, "int8", group)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    sparse.name = name
    put(model, names_of(model)[layer], sparse)
    for config in (model.config, text_config(model.config)):
        setattr(config, TIED, False)
    tied = getattr(model, "all_tied_weights_keys", None)
    if isinstance(tied, MutableMapping):
        tied.pop(f"{name}.weight", None)
    return model


def outside_tensors(
    source: Source, packed: bool, rounded: bool = False, group: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Error]]:
    """What a directory holds outside of its blocks, {name: tensor}, and what rounding the output layer lost.

    packed: an output layer that is packed in the source stays so; with `rounded` a dense one is packed, see round_head.
    ValueError as there.
    """
    tensors = dict(source.outside_tensors(packed))
    if not packed and isinstance(layer := _find(source.skeleton), SparseLinear):  # of a model in memory
        parts = [f"{name_of(source.skeleton)}.{suffix}" for suffix in PACKED_SUFFIXES]
        tensors = {n: tensor for n, tensor in tensors.items() if n not in parts}
        tensors[parts[0]] = layer.to_linear(next(source.skeleton.parameters()).dtype).weight.detach()
    if not rounded:
        return tensors, {}
    name = _wanted(source.skeleton)
    if f"{name}.weight_scale" in tensors:
        return tensors, {}
    inputs = names_of(source.skeleton)[source.skeleton.get_input_embeddings()][0]
    weight = tensors.get(f"{name}.weight", tensors.get(f"{inputs}.weight"))  # of a tied model there is one of the two
    if weight is None:
        raise ValueError(
            f"{source.name}: no tensor {name}.weight in its safetensors files, though config.json needs it"
        )
    try:
        made, error = pack_weight(weight, None, "int8", group)
    except ValueError as problem:
        raise ValueError(f"{name}: {problem}") from problem
    tensors.setdefault(f"{inputs}.weight", weight)
    tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in made.tensors.items()}
    return tensors, {} if error is None else {name: error}


def described(config: dict[str, Any], source: Source, written: Collection[str]) -> dict[str, Any]:
    """The config.json of a directory that holds the tensors `written`, as files call them, outside of its blocks.

    An output layer with int8 values is said in our settings, and is never the matrix of embeddings.
    """
    name = name_of(source.skeleton)
    if name is None or source.family.stored_name(f"{name}.weight_scale") not in written:
        return config
    settings = {"quantization_config": {**config["quantization_config"], "head": "int8"}}
    texts = {key: {**config[key], TIED: False} for key in ("text_config",) if config.get(key)}
    return {**config, TIED: False, **texts, **settings}


def _wanted(model: nn.Module) -> str:
    """The name of the output layer that is to be rounded; ValueError if there is none."""
    if (name := name_of(model)) is None:
        raise ValueError(f"{type(model).__name__} has no linear layer as its output, whose weights could become int8")
    return name


def _find(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None
